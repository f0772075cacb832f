# An autoencoder that a laptop CPU trains in under an hour: 128 px images to 4 x 16 x 16 latents.
img_size = 128
z_channels = 4
base_ch = 16
ch_mults = (1, 2, 4, 4)
num_res_blocks = 1
lr = 5e-4
batch_per_device = 4
epochs = 16
disc_weight = 0.0
sample_every = 4
