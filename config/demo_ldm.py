# `make demo`, second half: small conditional UNet on 4 x 16 x 16 latents; minutes on two CPU cores.
ldm_base_ch = 48
ldm_ch_mults = (1, 2, 2)
ldm_num_res_blocks = 1
ldm_attn_res = (8,)
lr = 5e-4
warmup_steps = 100
max_steps = 1200
sample_every = 100
sampler = "dpmpp_2m_sde"
num_sampling_steps = 8
guidance_scale = 2.0
wandb = False
