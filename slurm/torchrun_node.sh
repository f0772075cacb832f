#!/usr/bin/env bash
# torchrun_node.sh PROGRAM ARGS...: what srun starts on each node of a job: torchrun with one
# process per GPU.
set -euo pipefail
# Slurm sends USR1 to all processes. It would end torchrun, while the training processes have their
# own handler.
trap '' USR1
exec python -m torch.distributed.run --nnodes="$SLURM_NNODES" --node_rank="$SLURM_NODEID" \
    --nproc_per_node="${SLURM_GPUS_ON_NODE:-1}" --master_addr="$MASTER_ADDR" \
    --master_port="$MASTER_PORT" "$@"
