#!/usr/bin/env bash
# train_vae.sh TASK Z_CHANNELS [flags of train_vae.py] [--partition NAME] [--nodes N] [--gpus N]
#              [--time T] [--job-name X] [--after JOBID] [--dry-run]
#
# Submit the training of an autoencoder: ./slurm/train_vae.sh TB 1. --gpus: number on each node;
# --after: start once that job has succeeded; --dry-run: only print the sbatch command.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source slurm/common.sh
[ $# -ge 2 ] || die "usage: train_vae.sh TASK Z_CHANNELS [flags]; see the top of the file"
task=$1 z_channels=$2
parse_launch "${@:3}"
args=(--task="$task" --z_channels="$z_channels" "${data_root[@]}" "${program_args[@]}")
check_args train_vae.py "${args[@]}"
submit "ae_${task,,}_z$z_channels" slurm/train.slurm train_vae.py "${args[@]}"
