#!/usr/bin/env bash
# torchrun_node.sh PROGRAM ARGS...: what srun starts on each node of a job.
set -euo pipefail
# Slurm sends USR1 to all processes. It would end torchrun, while the training processes have their
# own handler.
trap '' USR1
exec python slurm/launch.py "$@"
