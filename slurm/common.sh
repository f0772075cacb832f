# shellcheck shell=bash disable=SC2034
# What the job scripts and launchers share; they source it from the repository's root.

# --- your cluster: change these here, or set them in the environment ---

# File to source before python (module load, conda activate); empty: .venv
export ENV_ACTIVATE=${ENV_ACTIVATE:-}
# Partition of the launchers where no --partition is given; empty: Slurm's default
export PARTITION=${PARTITION:-}
# More flags for the launchers' sbatch: "--account=lab --exclude=node7,node9"
export SBATCH_FLAGS=${SBATCH_FLAGS:-}
# What the launchers ask for
export CPUS_PER_GPU=${CPUS_PER_GPU:-4}
# --data_root of launchers and sweeps where none is given; empty: the phantom set
export DATA_ROOT=${DATA_ROOT:-}
# --task and --output_root of sweeps
export TASK=${TASK:-TB}
export OUTPUT_ROOT=${OUTPUT_ROOT:-runs}
# Requeues in a row of a run that makes no progress
MAX_RETRIES=3

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
    command -v python >/dev/null ||
        die "no python: type make .venv/runtime, or set ENV_ACTIVATE to a file to source"
}

# check PROGRAM ARGS...: let the program check its flags; it fails, with the program's message,
# where they are bad. Of a trainer, run_folder becomes the folder that it would write to (empty:
# named by the date), and run_step the step of the checkpoint in there (-1: none).
check() {
    local output
    output=$(python "$@" --check) || return
    if [[ $1 == train_*.py ]]; then
        run_folder=$(tail -n 2 <<<"$output" | head -n 1)
        run_step=$(tail -n 1 <<<"$output")
        head -n -2 <<<"$output" >&2 # notes
        [[ $run_step =~ ^-?[0-9]+$ ]] # it is not, after --help
    fi
}

# --- inside a job ---

# Slurm sends USR1 to the script alone (--signal=B:USR1@120) when time runs out or it preempts the
# job.
stopped=
trap 'stopped=1' USR1

# supervise SIGNAL COMMAND...: run COMMAND and pass SIGNAL on to it when Slurm wants the job to
# stop; again every 30 s, since a process that still starts up may miss it. Returns COMMAND's exit
# status.
supervise() {
    local signal=$1 pid repeat='' status=0
    shift
    [ -z "$stopped" ] || return 1
    "$@" &
    pid=$!
    trap 'stopped=1
          kill -s "$signal" "$pid" || true
          { sleep 30; kill -s USR1 $$; } &
          repeat=$!' USR1
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

# torchrun_step PROGRAM ARGS...: one process per GPU on all nodes of the job. --wait: where one node
# has failed, the others would wait for it for hours.
torchrun_step() {
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))
    export MASTER_ADDR MASTER_PORT
    supervise USR1 srun --ntasks="$SLURM_NNODES" --ntasks-per-node=1 \
        --cpus-per-task="$SLURM_CPUS_ON_NODE" --kill-on-bad-exit=0 --wait=600 \
        bash slurm/torchrun_node.sh "$@"
}

# train PROGRAM ARGS...: the whole of a training job. Without --run_name the run is named after the
# job, so that the requeued job goes on in the same folder. Whatever ends the program early, the job
# goes back into the queue.
train() {
    check "$@"
    if [ -z "$run_folder" ]; then
        set -- "$@" --run_name="$SLURM_JOB_NAME-$SLURM_JOB_ID"
    fi
    torchrun_step "$@" || requeue "$@"
}

# requeue PROGRAM ARGS...: put this job back into the queue and end, unless its run has not come a
# step further in the last MAX_RETRIES requeues.
requeue() {
    local file=slurm_logs/retries-$SLURM_JOB_ID job=$SLURM_JOB_ID state progress last='' retries=0
    if [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then
        # The plain id of one task is also that of the whole array.
        job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    fi
    state=$(squeue --noheader --jobs="$job" --format=%T)
    [ "$state" = RUNNING ] || die "not requeued: the job is $state" # cancelled, say
    check "$@"
    progress="step $run_step of ${run_folder:-no run}"
    if [ -f "$file" ]; then
        { read -r retries && read -r last; } <"$file" || true
    fi
    if [ "$progress" = "$last" ]; then
        retries=$((retries + 1))
    else
        retries=0
    fi
    [ "$retries" -lt "$MAX_RETRIES" ] ||
        die "still at $progress after $MAX_RETRIES requeues: giving up"
    printf '%s\n' "$retries" "$progress" >"$file"
    echo "requeued at $progress"
    scontrol requeue "$job" ||
        die "Slurm refuses to requeue: submit again with the --run_name of that folder"
    exit 0
}

# --- launchers ---

# parse_launch ARGS...: the launcher's own flags into variables, all others into the array
# program_args. The array data_root is the --data_root of the settings above.
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
    [[ $nodes =~ ^[1-9][0-9]*$ ]] || die "--nodes=$nodes is not a number of nodes"
    [[ $gpus =~ ^[1-9][0-9]*$ ]] || die "--gpus=$gpus is not a number of GPUs (on each node)"
}

# check_args PROGRAM ARGS...: check, for a launcher: end where the program would not take ARGS.
check_args() {
    activate
    check "$@" || die "nothing was submitted"
}

# submit NAME [SBATCH FLAGS] SCRIPT ARGS...: print the sbatch command and run it; the job's id into
# job_id.
submit() {
    local name=${job_name:-$1} extra command
    shift
    read -ra extra <<<"$SBATCH_FLAGS"
    command=(
        sbatch --parsable --job-name="$name" --nodes="$nodes" --gpus-per-node="$gpus"
        --cpus-per-task="$((gpus * CPUS_PER_GPU))"
        ${partition:+--partition="$partition"}
        ${time:+--time="$time"}
        ${after:+--dependency="afterok:$after" --kill-on-invalid-dep=yes}
        "${extra[@]}" "$@"
    )
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
