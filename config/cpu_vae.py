# Autoencoder from 128 px images to 4 x 16 x 16 latents; trains in under an hour on a laptop CPU.
img_size = 128
z_channels = 4
patch_size = 4
ch_mults = (1, 1)
linear_path = True
lr = 1e-3
cooldown = 0.5
ema_decay = 0.998
batch_per_device = 4
epochs = 100000
max_steps = 12000
disc_start = 6000
disc_base_ch = 32
disc_layers = 2
disc_lr = 2e-4
