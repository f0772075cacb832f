#!/usr/bin/env bash
# train_ldm.sh MODE [flags of train_ldm.py] [--partition NAME] [--nodes N] [--gpus N] [--time T]
#              [--job-name X] [--after JOBID] [--dry-run]
#
# Submit the training of a diffusion model in a mode: full_train, overfit_one, overfit_16 (any K).
# Flags of the job as in train_vae.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source slurm/common.sh
[ $# -ge 1 ] || die "usage: train_ldm.sh MODE [flags]; see the top of the file"
mode=$1
parse_launch "${@:2}"
args=(--mode="$mode" "${data_root[@]}" "${program_args[@]}")
check_args train_ldm.py "${args[@]}"
submit "ldm_$mode" slurm/train.slurm train_ldm.py "${args[@]}"
