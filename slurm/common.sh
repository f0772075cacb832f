# shellcheck shell=bash disable=SC2034,SC2153
# What the job scripts and launchers share; they source it from the repository's root.

# --- your cluster: change these here, or set them in the environment ---

# File to source before python (module load, conda activate); empty: .venv
export ENV_ACTIVATE=${ENV_ACTIVATE:-}
# Partition of the launchers where no --partition is given; empty: Slurm's default
export PARTITION=${PARTITION:-${SBATCH_PARTITION:-}}
# More flags for the launchers' sbatch: "--account=lab --exclude=node7,node9"
export SBATCH_FLAGS=${SBATCH_FLAGS:-}
# CPUs that the launchers ask for with each GPU
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

# check FLAG PROGRAM ARGS...: let the program check its flags and, with --check rather than
# --check=flags, whether its inputs are there; it fails, with the program's message, where they are
# not. Of a trainer, run_folder becomes the folder that it would write to (empty: named by the
# date), and run_step the step of the checkpoint in there (-1: none).
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

# declares_gpus PARTITION: are there GPUs to ask for ('': in the default partition)? Many clusters
# declare none: their sbatch refuses every flag for GPUs, and a job takes those of its node. Where
# Slurm cannot be asked, as on a laptop: yes.
declares_gpus() {
    local gres
    gres=$(sinfo --noheader ${1:+--partition="$1"} --format='%P %G' 2>/dev/null) || return 0
    [ -n "$1" ] || gres=$(grep '^[^ ]*[*] ' <<<"$gres")
    [ -z "$gres" ] || [[ $gres =~ [\ ,]gpu ]]
}

# forgot_gpus PARTITION: is this job of a plain sbatch that asked for none of the GPUs there?
forgot_gpus() {
    [ -z "${LAUNCHED:-}${SLURM_GPUS_ON_NODE:-}" ] && declares_gpus "$1"
}

# --- inside a job ---

# The plain id of one task of an array is also that of the whole array.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-${SLURM_JOB_ID:-}}
# What the programs (experiment.py) end with where the same command would fail again
FINAL=78
# Of the run in this job, for a message
run_name=

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
    trap on_term TERM
    while kill -0 "$pid" 2>/dev/null; do
        status=0
        wait "$pid" || status=$?
    done
    trap 'stopped=1' USR1
    trap - TERM
    [ -z "$repeat" ] || kill "$repeat" 2>/dev/null || true
    return "$status"
}

# on_term: all processes got TERM, from scancel or since time ran out. The script stays to see them
# end, and may be killed before it does.
on_term() {
    if [ "$(squeue --noheader --jobs="$job" --format=%r)" = TimeLimit ]; then
        echo "error: time ran out before the program stopped; its run has the last checkpoint:" \
            "submit again${run_name:+ with --run_name=$run_name}" >&2
    fi
}

# torchrun_step PROGRAM ARGS...: one process per GPU on all nodes of the job. --wait: where one node
# has failed, the others would wait for it for hours.
torchrun_step() {
    local status=0
    # srun returns 137 where one node failed for good and the others, left waiting, were killed: the
    # first leaves this mark. A new name for each start, since NFS remembers that there was no file.
    export FINAL_MARK=slurm_logs/final-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))
    export MASTER_ADDR MASTER_PORT
    supervise USR1 srun --ntasks="$SLURM_NNODES" --ntasks-per-node=1 \
        --cpus-per-task="$SLURM_CPUS_ON_NODE" --kill-on-bad-exit=0 --wait=600 \
        bash slurm/torchrun_node.sh "$@" || status=$?
    if [ -e "$FINAL_MARK" ]; then
        rm "$FINAL_MARK"
        status=$FINAL
    fi
    return "$status"
}

# train PROGRAM ARGS...: the whole of a training job. Without --run_name the run is named after the
# job, so that the requeued job goes on in the same folder. Whatever ends the program early, the job
# goes back into the queue, but for errors that would come again.
train() {
    local status=0
    check --check=flags "$@"
    if [ -z "$run_folder" ]; then
        run_folder=$SLURM_JOB_NAME-$SLURM_JOB_ID
        set -- "$@" --run_name="$run_folder"
    fi
    run_name=$(basename "$run_folder")
    torchrun_step "$@" || status=$?
    case $status in
        0) ;;
        "$FINAL")
            echo "error: not requeued, since the same command would fail again" >&2
            exit "$FINAL"
            ;;
        *) requeue "$@" ;;
    esac
}

# requeue PROGRAM ARGS...: put this job back into the queue and end, unless its run has not come a
# step further in the last MAX_RETRIES requeues. One that was told to stop has not failed, unless it
# was for lack of time, which there will be no more of next time.
requeue() {
    local file=slurm_logs/retries-$SLURM_JOB_ID state left progress last='' retries=0
    read -r state left < <(squeue --noheader --jobs="$job" --format='%T %L')
    # After scancel, say.
    [ "$state" = RUNNING ] || die "not requeued: Slurm is ending the job ($state)"
    check --check=flags "$@"
    progress="step $run_step of ${run_folder:-no run}"
    if [ -f "$file" ]; then
        { read -r retries && read -r last; } <"$file" || true
    fi
    if [ "$progress" != "$last" ]; then
        retries=0
    elif [ -z "$stopped" ] || [[ $left =~ ^[0-3]:[0-9]+$ ]]; then
        retries=$((retries + 1))
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
    [[ $nodes =~ ^[1-9][0-9]*$ ]] || die "--nodes=$nodes is not a number of nodes"
    [[ $gpus =~ ^(([^:]+:)?[1-9][0-9]*|0|)$ ]] ||
        die "--gpus=$gpus is not a number of GPUs on each node, such as 2 or a100:2"
    [[ $after =~ ^([0-9_]+(:[0-9_]+)*)?$ ]] ||
        die "--after=$after is not a job's number, such as 7 or 7:8"
    if [ -z "$dry_run" ]; then
        command -v sbatch >/dev/null || die "no sbatch here: log in to a cluster, or add --dry-run"
        check_after
    fi
    ask_for_gpus
}

# check_after: end where the job would start at once, or never, by the jobs that --after names.
check_after() {
    local id states
    for id in ${after//:/ }; do
        states=$(squeue --noheader --states=all --jobs="$id" --format=%T 2>/dev/null) || true
        [ -n "$states" ] ||
            die "--after: Slurm knows no job $id (any more); if it has succeeded, leave --after out"
        ! [[ $states =~ CANCELLED|FAILED|TIMEOUT|NODE_FAIL|OUT_OF_MEMORY|DEADLINE ]] ||
            die "--after: job $id is ${BASH_REMATCH[0]}, and a job after it would never start"
    done
}

# ask_for_gpus: whether sbatch is to hear of --gpus: gpu_flag is --gpus-per-node or empty.
ask_for_gpus() {
    gpu_flag=''
    [ "$gpus" != 0 ] || return 0
    if [[ " $SBATCH_FLAGS" =~ \ (--gpus|-G|--gres[=\ ][^\ ]*gpu) ]] ||
        [ -n "${SBATCH_GRES:-}${SBATCH_GPUS:-}${SBATCH_GPUS_PER_NODE:-}" ]; then
        [ -z "$gpus" ] || echo "note: SBATCH_ variables ask for GPUs, so --gpus does not" >&2
    elif declares_gpus "$partition"; then
        gpu_flag=--gpus-per-node
    elif [ -n "$gpus" ]; then
        echo "note: ${partition:-the default partition} declares no GPUs: the job takes any" \
            "that it finds" >&2
    fi
}

# check_args PROGRAM ARGS...: check, for a launcher: end where the program would not take ARGS. With
# --after, its inputs may come from the job before; in a dry run, they may be on another machine.
check_args() {
    local flag=--check
    [ -z "$after$dry_run" ] || flag=--check=flags
    local -x LAUNCHER_FLAGS="--partition --nodes --gpus --time --job-name --after --dry-run"
    activate
    check "$flag" "$@" || exit 1
}

# submit NAME [SBATCH FLAGS] SCRIPT ARGS...: print the sbatch command and run it; the job's id into
# job_id.
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
        export LAUNCHED=1 # into the job: it asks for what it should
        mkdir -p slurm_logs # Slurm drops the log of a job whose log folder is missing
        job_id=$("${command[@]}")
        job_id=${job_id%%;*}
        echo "job $job_id, log slurm_logs/$name-$job_id${array:+_[$array]}.out"
    fi
}
