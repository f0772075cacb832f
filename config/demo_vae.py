# First half of `make demo`: an autoencoder for 64 px phantoms, two minutes on two CPU cores.
img_size = 64
z_channels = 4
base_ch = 16
ch_mults = (1, 2, 4)
num_res_blocks = 1
lr = 1e-3
batch_per_device = 4
max_steps = 1000
sample_every = 10
disc_weight = 0.0
