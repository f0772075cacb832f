# UNet for the 4 x 16 x 16 latents of config/cpu_vae.py; trains in under an hour on a laptop CPU.
ldm_base_ch = 64
ldm_ch_mults = (1, 2, 2)
ldm_num_res_blocks = 1
ldm_attn_res = (8,)
lr = 3e-4
warmup_steps = 200
sampler = "dpmpp_2m_sde"
num_sampling_steps = 8
sample_every = 20
patience = 3
