#!/usr/bin/env bash
# train_ldm.sh MODE [flags of train_ldm.py] [--partition NAME] [--nodes N] [--gpus N] [--time T]
#              [--job-name X] [--after JOBID] [--dry-run]
#
# Submit the training of a diffusion model with the preset of a mode: full_train, overfit_one,
# overfit_K. --gpus is the number on each node; --after starts it once another job has succeeded;
# --dry-run only prints the sbatch command.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source slurm/common.sh
[ $# -ge 1 ] || die "usage: train_ldm.sh MODE [flags]; see the top of the file"
mode=$1
parse_launch "${@:2}"
args=(--mode="$mode" "${data_root[@]}" "${program_args[@]}")
check_args train_ldm.py "${args[@]}"
submit "ldm_$mode" slurm/train.slurm train_ldm.py "${args[@]}"
