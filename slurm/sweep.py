# Settings shared by all runs of a sweep: sweep.yaml passes this file to train_ldm.py. Environment
# variables come from slurm/common.sh, slurm/ldm_sweep_agent.slurm and `wandb agent`.
import os

data_root = os.environ.get("DATA_ROOT") or None
task = os.environ.get("TASK", "TB")
output_root = os.environ.get("OUTPUT_ROOT", "runs")
# ldm_sweep_agent.slurm finds its runs by this name.
run_name = "-".join(
    ["sweep", os.environ.get("SLURM_JOB_ID", "local"), os.environ.get("WANDB_RUN_ID", "test")])
overfit_k = int(os.environ.get("OVERFIT_K", "0"))
wandb = True
wandb_project = os.environ.get("WANDB_PROJECT", "cxr-ldm")
wandb_entity = os.environ.get("WANDB_ENTITY")
epochs = 100
sample_every = 25
sampler = "dpmpp_2m_sde"
num_sampling_steps = 8
