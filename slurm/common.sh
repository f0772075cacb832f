# shellcheck shell=bash disable=SC2034,SC2153
# Shared by the job scripts and launchers, which source it from the repository's root.

# --- your cluster: change these here, or set them in the environment ---

# File to source before python (module load, conda activate); empty: .venv
export ENV_ACTIVATE=${ENV_ACTIVATE:-}
# Partition of the launchers without --partition; empty: Slurm's default
export PARTITION=${PARTITION:-${SBATCH_PARTITION:-}}
# More flags for the launchers' sbatch: "--account=lab --exclude=node7,node9"
export SBATCH_FLAGS=${SBATCH_FLAGS:-}
# CPUs that the launchers request with each GPU
export CPUS_PER_GPU=${CPUS_PER_GPU:-4}
# --data_root of launchers and sweeps if none is given; empty: the phantom set
export DATA_ROOT=${DATA_ROOT:-}
# --task and --output_root of sweeps
export TASK=${TASK:-TB}
export OUTPUT_ROOT=${OUTPUT_ROOT:-runs}
# How often a job is requeued after a failure without a new step
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

# check FLAG PROGRAM ARGS...: have the program check its flags and, with --check instead of
# --check=flags, that its inputs exist. Fails, after the program's message, if they do not. For a
# trainer, sets run_folder to the folder that it would write to (empty: named by the date) and
# run_step to the step of the checkpoint in it (-1: none).
check() {
    local flag=$1 output
    shift
    output=$(python "$@" "$flag") || return
    if [[ $1 == train_*.py ]]; then
        run_folder=$(tail -n 2 <<<"$output" | head -n 1)
        run_step=$(tail -n 1 <<<"$output")
        head -n -2 <<<"$output" >&2 # notes
        [[ $run_step =~ ^-?[0-9]+$ ]] # it is not, after --help
    fi
}

# declares_gpus PARTITION: can sbatch be asked for GPUs there ('': in the default partition)? Many
# clusters declare none: their sbatch refuses every flag for GPUs, and a job uses those of its node.
# Yes if there is no Slurm to ask, as on a laptop.
declares_gpus() {
    local gres
    gres=$(sinfo --noheader ${1:+--partition="$1"} --format='%P %G' 2>/dev/null) || return 0
    [ -n "$1" ] || gres=$(grep '^[^ ]*[*] ' <<<"$gres")
    [ -z "$gres" ] || [[ $gres =~ [\ ,]gpu ]]
}

# --- inside a job ---

# lacks_gpus: was this job submitted by a plain sbatch that forgot to ask for the partition's GPUs?
lacks_gpus() {
    [ -z "${LAUNCHED:-}${SLURM_GPUS_ON_NODE:-}" ] && declares_gpus "$SLURM_JOB_PARTITION"
}

# For a task of an array, SLURM_JOB_ID may be that of the whole array.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-${SLURM_JOB_ID:-}}
# The programs' exit code if the same command would fail again
FINAL=78

# Slurm sends USR1 to the script alone (--signal=B:USR1@120) before the time limit or a preemption.
stopped=
trap 'stopped=1' USR1

# supervise SIGNAL COMMAND...: run COMMAND, and send it SIGNAL when Slurm wants the job to stop and
# every 30 s after, since a process that is starting up may miss it. Returns COMMAND's exit status.
supervise() {
    local signal=$1 pid status=0
    shift
    [ -z "$stopped" ] || return 1
    "$@" &
    pid=$!
    trap 'stopped=1
          kill -s "$signal" "$pid" || true
          { sleep 30; kill -s USR1 $$; } &' USR1
    trap : TERM # scancel sends it to all processes; the script waits for the others
    while kill -0 "$pid" 2>/dev/null; do
        status=0
        wait "$pid" || status=$?
    done
    trap 'stopped=1' USR1
    return "$status"
}

# torchrun_step PROGRAM ARGS...: one process per GPU on all nodes of the job. Returns FINAL if any
# process did: srun returns the highest exit code of its nodes, and launch.py has no other but 1.
torchrun_step() {
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    # Each restart tries another port, since one may be taken.
    MASTER_PORT=$((10000 + (SLURM_JOB_ID + 7919 * ${SLURM_RESTART_COUNT:-0}) % 20000))
    export MASTER_ADDR MASTER_PORT
    # USR1 goes to all processes: torchrun would die of it, the trainers install a handler.
    # --wait: seconds that a node has to end once another one has ended.
    # shellcheck disable=SC2016
    supervise USR1 srun --ntasks="$SLURM_NNODES" --ntasks-per-node=1 \
        --cpus-per-task="$SLURM_CPUS_ON_NODE" --kill-on-bad-exit=0 --wait=600 \
        bash -c 'trap "" USR1
            exec python slurm/launch.py --nnodes="$SLURM_NNODES" --node_rank="$SLURM_NODEID" \
                --master_addr="$MASTER_ADDR" --master_port="$MASTER_PORT" "$@"' launch "$@"
}

# run_program PROGRAM ARGS...: the whole of a job. A trainer without --run_name has its run named
# after the job, so that the requeued job continues in the same folder. If the program ends early,
# the job is requeued, unless the same command would fail again.
run_program() {
    local status=0 start=python
    if [[ $1 == train_*.py ]]; then
        start=torchrun_step
        check --check=flags "$@"
        if [ -z "$run_folder" ]; then
            set -- "$@" --run_name="$SLURM_JOB_NAME-$SLURM_JOB_ID"
            check --check=flags "$@"
            [[ $run_step == -1 || ${SLURM_RESTART_COUNT:-0} != 0 ]] ||
                die "$run_folder is of another job of this number, on another cluster perhaps"
        fi
    fi
    "$start" "$@" || status=$?
    if [ "$status" = "$FINAL" ]; then
        echo "error: not requeued, since the same command would fail again" >&2
        exit "$FINAL"
    fi
    [ "$status" = 0 ] || requeue "$@"
}

# requeue PROGRAM ARGS...: put this job back into the queue and end, unless its run has made no step
# in the last MAX_RETRIES requeues. Preemption is no failure and does not count.
requeue() {
    local file=slurm_logs/retries-$SLURM_JOB_ID progress="the beginning" why="it failed"
    local state left last='' retries=0
    read -r state left < <(squeue --noheader --jobs="$job" --format='%T %L')
    [ "$state" = RUNNING ] || die "not requeued: Slurm is ending the job ($state)"
    if [[ ${1-} == train_*.py ]]; then
        check --check=flags "$@"
        progress="step $run_step of ${run_folder:-a new run}"
    fi
    if [[ -n $stopped && $left =~ ^[0-3]:[0-9]+$ ]]; then
        why="its --time was over"
    elif [ -n "$stopped" ]; then
        why="it was preempted"
    fi
    [ ! -f "$file" ] || read -r retries last <"$file" || true
    [ "$progress" = "$last" ] || retries=0
    [ "$why" = "it was preempted" ] || retries=$((retries + 1))
    [ "$retries" -le "$MAX_RETRIES" ] ||
        die "still at $progress after $MAX_RETRIES requeues, giving up: $why"
    echo "$retries $progress" >"$file"
    echo "requeued at $progress: $why"
    scontrol requeue "$job" ||
        die "Slurm refuses to requeue: submit again with the --run_name of that folder"
    exit 0
}

# --- launchers ---

# parse_launch ARGS...: set variables from the launcher's own flags and the array program_args to
# all others. The array data_root holds the --data_root of the settings above.
parse_launch() {
    local name value width
    partition=$PARTITION nodes=1 gpus='' time='' job_name='' after='' array='' dry_run=''
    program_args=()
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
            --dry-run) dry_run=1 value=1 width=1 ;;
            *) program_args+=("$1") value=1 width=1 ;;
        esac
        [ -n "$value" ] && [[ $1 == --*=* || $value != -* ]] || die "$name needs a value"
        shift "$width"
    done
    [[ $gpus =~ ^(([^:]+:)?[1-9][0-9]*|0|)$ ]] ||
        die "--gpus=$gpus is not a number of GPUs on each node, such as 2 or a100:2"
    if [ -z "$dry_run" ]; then
        command -v sbatch >/dev/null || die "no sbatch here: log in to a cluster, or add --dry-run"
    fi
    # GPUs are requested here unless elsewhere already, or where sbatch would refuse.
    gpu_flag=''
    if [ "$gpus" != 0 ] && [[ ! " $SBATCH_FLAGS" =~ \ (--gpus|-G|--gres[=\ ][^\ ]*gpu) ]] &&
        [ -z "${SBATCH_GRES:-}${SBATCH_GPUS:-}${SBATCH_GPUS_PER_NODE:-}" ]; then
        if declares_gpus "$partition"; then
            gpu_flag=--gpus-per-node
        elif [ -n "$gpus" ]; then
            echo "note: the partition declares no GPUs: the job uses any that it finds" >&2
        fi
    fi
}

# check_args PROGRAM ARGS...: check, for a launcher: exit if the program would refuse ARGS. With
# --after, its inputs may come from the job before; in a dry run, they may be on another machine.
check_args() {
    local flag=--check
    [ -z "$after$dry_run" ] || flag=--check=flags
    activate
    check "$flag" "$@" || exit 1
}

# submit NAME SCRIPT ARGS...: print the sbatch command and run it; set job_id.
submit() {
    local name=${job_name:-$1} number=${gpus##*:} extra command
    shift
    [[ $name != */* ]] || die "the job's name $name has a slash, and the log is named after it"
    read -ra extra <<<"$SBATCH_FLAGS"
    command=(
        sbatch --parsable --job-name="$name" --nodes="$nodes"
        ${gpu_flag:+"$gpu_flag=${gpus:-1}"}
        --cpus-per-task="$(((number > 0 ? number : 1) * CPUS_PER_GPU))"
        ${partition:+--partition="$partition"}
        ${time:+--time="$time"}
        ${after:+--dependency="afterok:$after" --kill-on-invalid-dep=yes}
        ${array:+--array="$array" --output=slurm_logs/%x-%A_%a.out}
        "${extra[@]}" "$@"
    )
    printf '%q ' "${command[@]}"
    echo
    job_id=JOBID
    if [ -z "$dry_run" ]; then
        export LAUNCHED=1 # for lacks_gpus in the job
        mkdir -p slurm_logs # Slurm drops the log of a job whose log folder is missing
        job_id=$("${command[@]}")
        job_id=${job_id%%;*}
        echo "job $job_id, log slurm_logs/$name-$job_id${array:+_[$array]}.out"
    fi
}
