# shellcheck shell=bash disable=SC2034
# What the job scripts and launchers share; they source it from the repository's root.

# --- your cluster: change these here, or set them in the environment ---
export ENV_ACTIVATE=${ENV_ACTIVATE:-}   # file to source before python (module load, conda activate); none: .venv
export PARTITION=${PARTITION:-}         # of the launchers where no --partition is given; none: Slurm's default
export SBATCH_FLAGS=${SBATCH_FLAGS:-}   # more for the launchers' sbatch: "--account=lab --exclude=node7,node9"
export CPUS_PER_GPU=${CPUS_PER_GPU:-4}  # the launchers ask for
export DATA_ROOT=${DATA_ROOT:-}         # --data_root of launchers and sweeps where none is given; none: phantoms
export TASK=${TASK:-TB}                 # --task of sweeps
export OUTPUT_ROOT=${OUTPUT_ROOT:-runs} # --output_root of sweeps
MAX_RETRIES=3                           # requeues in a row of a run that makes no progress

export PYTHONUNBUFFERED=1

die() {
    echo "error: $*" >&2
    exit 1
}

activate() {
    if [ -n "$ENV_ACTIVATE" ] || [ -f .venv/bin/activate ]; then
        set +u # activation scripts read unset variables
        # shellcheck disable=SC1090
        source "${ENV_ACTIVATE:-.venv/bin/activate}"
        set -u
    fi
    command -v python >/dev/null || die "no python: make .venv, or name a file to source in ENV_ACTIVATE"
}

# --- inside a job ---

# Slurm sends USR1 to the script alone (--signal=B:USR1@120) when time runs out or it preempts the job.
stopped=
trap 'stopped=1' USR1

# supervise SIGNAL COMMAND...: run COMMAND and pass SIGNAL on to it when Slurm wants the job to stop; again every
# 30 s, since a process that still starts up may miss it. Returns COMMAND's exit status.
supervise() {
    local signal=$1 pid repeat='' status=0
    shift
    [ -z "$stopped" ] || return 1
    "$@" &
    pid=$!
    trap 'stopped=1; kill -s "$signal" "$pid" || true; { sleep 30; kill -s USR1 $$; } & repeat=$!' USR1
    trap : TERM # at scancel all processes get TERM: stay to see them end
    while kill -0 "$pid" 2>/dev/null; do
        status=0
        wait "$pid" || status=$?
    done
    trap 'stopped=1' USR1
    trap - TERM
    [ -z "$repeat" ] || kill "$repeat" 2>/dev/null || true
    return "$status"
}

# torchrun_step PROGRAM ARGS...: one process a GPU on all nodes of the job. --wait: where one node has failed,
# the others would wait for it for hours.
torchrun_step() {
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))
    export MASTER_ADDR MASTER_PORT
    supervise USR1 srun --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_ON_NODE" \
        --kill-on-bad-exit=0 --wait=600 bash slurm/torchrun_node.sh "$@"
}

# train PROGRAM ARGS...: the whole of a training job. Without --run_name the run is named after the job, so that
# the requeued job goes on in the same folder. Whatever ends the program early, the job goes back into the queue.
train() {
    local info
    info=$(python slurm/run_info.py "$SLURM_JOB_NAME-$SLURM_JOB_ID" "$@")
    mapfile -t info <<<"$info"
    if [ -n "${info[1]}" ]; then
        set -- "$@" "${info[1]}"
    fi
    torchrun_step "$@" || requeue "$@"
}

# requeue PROGRAM ARGS...: put this job back into the queue and end, unless its run has not come a step further in
# the last MAX_RETRIES requeues.
requeue() {
    local file=slurm_logs/retries-$SLURM_JOB_ID job=$SLURM_JOB_ID info progress last='' retries=0 state
    if [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then
        # The plain id of one task is also that of the whole array.
        job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    fi
    state=$(squeue --noheader --jobs="$job" --format=%T)
    [ "$state" = RUNNING ] || die "not requeued: the job is $state" # cancelled, say
    info=$(python slurm/run_info.py - "$@")
    mapfile -t info <<<"$info"
    progress="step ${info[2]} of ${info[0]}"
    if [ -f "$file" ]; then
        { read -r retries && read -r last; } <"$file" || true
    fi
    if [ "$progress" = "$last" ]; then
        retries=$((retries + 1))
    else
        retries=0
    fi
    [ "$retries" -lt "$MAX_RETRIES" ] || die "still at $progress after $MAX_RETRIES requeues: giving up"
    printf '%s\n' "$retries" "$progress" >"$file"
    echo "requeued at $progress"
    scontrol requeue "$job" || die "Slurm does not requeue: submit again with the --run_name of that folder"
    exit 0
}

# --- launchers ---

# parse_launch ARGS...: the launcher's own flags into variables, all others into the array program_args.
# The array data_root is the --data_root of the settings above.
parse_launch() {
    local name value width
    partition=$PARTITION nodes=1 gpus=1 time='' job_name='' after='' dry_run='' program_args=()
    data_root=(${DATA_ROOT:+--data_root="$DATA_ROOT"})
    while [ $# -gt 0 ]; do
        case $1 in
            --*=*) name=${1%%=*} value=${1#*=} width=1 ;;
            *) name=$1 value=${2-} width=2 ;;
        esac
        case $name in
            --partition) partition=$value ;;
            --nodes) nodes=$value ;;
            --gpus) gpus=$value ;;
            --time) time=$value ;;
            --job-name) job_name=$value ;;
            --after) after=$value ;;
            --dry-run) dry_run=1 width=1 ;;
            *) program_args+=("$1") width=1 ;;
        esac
        [ "$width" -le $# ] || die "$name needs a value"
        shift "$width"
    done
    [[ $nodes =~ ^[1-9][0-9]*$ ]] || die "--nodes=$nodes is no number of nodes"
    [[ $gpus =~ ^[1-9][0-9]*$ ]] || die "--gpus=$gpus is no number of GPUs (on each node)"
}

# check_args PROGRAM ARGS...: end with the program's own message where it would not take them; else put its run
# folder into run_folder.
check_args() {
    local info
    activate
    info=$(python slurm/run_info.py JOB "$@") || die "nothing was submitted"
    mapfile -t info <<<"$info"
    run_folder=${info[0]}
}

# submit NAME [SBATCH FLAGS] SCRIPT ARGS...: print the sbatch command and run it; the job's id into job_id.
submit() {
    local name=${job_name:-$1} extra command
    shift
    read -ra extra <<<"$SBATCH_FLAGS"
    command=(sbatch --parsable --job-name="$name" --nodes="$nodes" --gpus-per-node="$gpus"
        --cpus-per-task="$((gpus * CPUS_PER_GPU))" ${partition:+--partition="$partition"} ${time:+--time="$time"}
        ${after:+--dependency="afterok:$after" --kill-on-invalid-dep=yes} "${extra[@]}" "$@")
    printf '%q ' "${command[@]}"
    echo
    job_id=JOBID
    if [ -z "$dry_run" ]; then
        mkdir -p slurm_logs # Slurm drops the log of a job whose log folder is missing
        job_id=$("${command[@]}")
        job_id=${job_id%%;*}
        echo "job $job_id, log slurm_logs/$name-$job_id.out"
    fi
}
