#!/usr/bin/env bash
# pipeline.sh TASK Z_CHANNELS MODE [flags for all] [--vae flags of train_vae.py]
#             [--ldm flags of train_ldm.py]
#
# Queue autoencoder, latent scale and diffusion model at once; each starts when the one before has
# succeeded. Flags for all: --data_root, --output_root and the like, and the job flags of
# train_vae.sh (--partition, --gpus, --dry-run).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source slurm/common.sh
[ $# -ge 3 ] || die "usage: pipeline.sh TASK Z_CHANNELS MODE [flags]; see the top of the file"
task=$1 z_channels=$2 mode=$3
all=() vae=() ldm=()
declare -n part=all
for flag in "${@:4}"; do
    case $flag in
        --vae) declare -n part=vae ;;
        --ldm) declare -n part=ldm ;;
        *) part+=("$flag") ;;
    esac
done
parse_launch "${all[@]}"
stamp=$(date +%Y%m%d-%H%M%S)
ae_name=ae_${task,,}_z${z_channels}_$stamp
ldm_name=ldm_${task,,}_${mode}_$stamp

shared=(--task="$task" "${data_root[@]}" "${program_args[@]}")
vae=("${shared[@]}" --z_channels="$z_channels" "${vae[@]}" --run_name="$ae_name")
check_args train_vae.py "${vae[@]}"
# The inputs of the other two come from the jobs before them.
scale=("${shared[@]}" --ae_ckpt_path="$run_folder/ckpts/last.pt")
after=earlier check_args find_latent_scale.py "${scale[@]}"
ldm=(--mode="$mode" "${scale[@]}" "${ldm[@]}" --run_name="$ldm_name")
after=earlier check_args train_ldm.py "${ldm[@]}"

submit "$ae_name" slurm/train.slurm train_vae.py "${vae[@]}"
after=$job_id
# The scale is measured by one process, on one GPU of the same type; short jobs start earlier.
nodes=1 gpus=${gpus%"${gpus##*:}"}1 time=${time:-2:00:00} \
    submit "scale_$ae_name" slurm/train.slurm find_latent_scale.py "${scale[@]}"
after=$job_id submit "$ldm_name" slurm/train.slurm train_ldm.py "${ldm[@]}"
