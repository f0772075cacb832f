#!/usr/bin/env bash
# launch_sweep_swarm.sh SWEEP_ID PARTITION K NODES RUNS_PER_NODE [--gpus N] [--time T]
#                       [--job-name X] [--after JOBID] [--dry-run]
#
# Submit an array of NODES W&B agents, each of which takes RUNS_PER_NODE runs of the sweep. K = 0:
# the full data set; K > 0: --overfit_k=K. Settings that all runs share are in slurm/sweep.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source slurm/common.sh
[ $# -ge 5 ] || die "usage: launch_sweep_swarm.sh SWEEP_ID PARTITION K NODES RUNS_PER_NODE [flags]"
[[ "$3 $4 $5" =~ ^[0-9]+\ [1-9][0-9]*\ [1-9][0-9]*$ ]] ||
    die "K, NODES and RUNS_PER_NODE must be numbers, the last two at least 1: not $3 $4 $5"
parse_launch "${@:6}" --partition="$2"
[ "${#program_args[@]}" = 0 ] ||
    die "unknown flag ${program_args[0]}; the runs' settings are in slurm/sweep.py"
array=1-$4
submit sweep slurm/ldm_sweep_agent.slurm "$1" "$2" "$3" "$5"
