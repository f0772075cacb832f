#!/usr/bin/env bash
# launch_sweep_swarm.sh SWEEP_ID PARTITION K NODES RUNS_PER_NODE [--gpus N] [--time T]
#                       [--job-name X] [--after JOBID] [--dry-run]
#
# Submit an array of NODES W&B agents, each of which takes RUNS_PER_NODE runs of the sweep. K = 0:
# the full data set; above: --overfit_k. What the runs share is in slurm/sweep.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source slurm/common.sh
[ $# -ge 5 ] || die "usage: launch_sweep_swarm.sh SWEEP_ID PARTITION K NODES RUNS_PER_NODE [flags]"
for number in "$4" "$5"; do
    [[ $number =~ ^[1-9][0-9]*$ ]] ||
        die "NODES and RUNS_PER_NODE are numbers of at least 1, not $number"
done
[[ $3 =~ ^[0-9]+$ ]] || die "K=$3 is not a number of images (0: all)"
parse_launch "${@:6}" --partition="$2"
[ "${#program_args[@]}" = 0 ] ||
    die "unknown flag ${program_args[0]}; settings of the runs are in slurm/sweep.py"
array=1-$4
submit sweep slurm/ldm_sweep_agent.slurm "$1" "$2" "$3" "$5"
