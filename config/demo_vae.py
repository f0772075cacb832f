# `make demo`, first half: autoencoder for 64 px phantoms; two minutes on two CPU cores.
img_size = 64
z_channels = 4
patch_size = 4
base_ch = 64
ch_mults = (1,)
num_res_blocks = 2
linear_path = True
lr = 1e-3
cooldown = 0.5
batch_per_device = 4
max_steps = 3000
disc_start = 1500
disc_base_ch = 32
disc_layers = 2
disc_lr = 2e-4
sample_every = 20
