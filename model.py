"""Networks of the latent diffusion model: autoencoder, discriminator, UNet, and averaged weights.

Shapes are [B, C, H, W]; images are 1-channel in [-1, 1]; latents that the UNet sees are normalised
to unit standard deviation by the latent scale factor. Nothing here reads arguments or files.
"""
import copy
import math
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

import diffusion

# --- shared blocks ------------------------------------------------------------------------------


def num_groups(base_ch):
    """Groups of every GroupNorm of a network: the largest power of two up to 32 that fits."""
    return math.gcd(32, base_ch)


def head_dim(base_ch):
    """Channels of each head of attention in a UNet: the largest power of two up to 64 that fits."""
    return math.gcd(64, base_ch)


class GroupNorm(nn.GroupNorm):
    """GroupNorm that an embedding may scale and shift, and that SiLU may follow."""

    def __init__(self, channels, groups):
        super().__init__(groups, channels, eps=1e-6)

    def forward(self, x, scale_shift=None, silu=False):
        """x [B, C, H, W]; scale_shift [B, 2 C]: first what is added to a scale of 1."""
        h = super().forward(x)
        if scale_shift is not None:
            scale, shift = scale_shift[:, :, None, None].chunk(2, dim=1)  # each [B, C, 1, 1]
            h = h * (1 + scale) + shift
        return F.silu(h) if silu else h


def conv3x3(in_ch, out_ch):
    """3x3 convolution that keeps the size."""
    return nn.Conv2d(in_ch, out_ch, 3, padding=1)


def zero_init(layer):
    """Zero a layer's weights, so that the residual branch that it ends starts as zero."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class ResBlock(nn.Module):
    """Two 3x3 convolutions on a residual branch: [B, in_ch, H, W] to [B, out_ch, H, W]. An
    embedding [B, emb_dim] scales and shifts the second norm."""

    def __init__(self, in_ch, out_ch, groups, emb_dim=None):
        super().__init__()
        self.norm1 = GroupNorm(in_ch, groups)
        self.conv1 = conv3x3(in_ch, out_ch)
        self.norm2 = GroupNorm(out_ch, groups)
        self.conv2 = zero_init(conv3x3(out_ch, out_ch))
        self.skip = nn.Conv2d(in_ch, out_ch, 1) if in_ch != out_ch else nn.Identity()
        self.emb = nn.Linear(emb_dim, 2 * out_ch) if emb_dim else None

    def forward(self, x, emb=None):
        h = self.conv1(self.norm1(x, silu=True))  # [B, out_ch, H, W]
        scale_shift = None if self.emb is None else self.emb(F.silu(emb))
        h = self.conv2(self.norm2(h, scale_shift, silu=True))
        return self.skip(x) + h


class Attention(nn.Module):
    """Self-attention over all pixels."""

    def __init__(self, channels, groups, heads):
        super().__init__()
        self.heads = heads
        self.norm = GroupNorm(channels, groups)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = zero_init(nn.Linear(channels, channels))

    def forward(self, x):
        B, C, H, W = x.shape
        h = self.norm(x).permute(0, 2, 3, 1).reshape(B, H * W, C)  # a view in channels_last
        qkv = self.qkv(h).view(B, H * W, 3, self.heads, C // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        h = self.attend(q, k, v)  # [B, heads, HW, C / heads]
        h = self.proj(h.transpose(1, 2).reshape(B, H * W, C))
        return x + h.view(B, H, W, C).permute(0, 3, 1, 2)

    def attend(self, q, k, v):
        """softmax(q k^T / sqrt(d)) v of q, k, v [B, heads, HW, d]."""
        return F.scaled_dot_product_attention(q, k, v)


class Downsample(nn.Module):
    """3x3 convolution of stride 2: [B, C, H, W] to [B, C, H/2, W/2]. padding 1: zeros on all sides,
    as in UNets; 0: right and below only, as in the autoencoders of LDM and diffusers."""

    def __init__(self, channels, padding):
        super().__init__()
        self.padding = padding
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x):
        if self.padding == 0:
            x = F.pad(x, (0, 1, 0, 1))
        return self.conv(x)


class Upsample(nn.Module):
    """Nearest neighbour to twice the size and a 3x3 convolution, as one transposed convolution:
    neighbouring taps often see the same pixel, and with their weights summed 4/9 of the products
    are left."""

    def __init__(self, channels):
        super().__init__()
        self.conv = conv3x3(channels, channels)

    def forward(self, x):
        w = self.conv.weight.flip(2, 3)
        w = F.avg_pool2d(w, 2, stride=1, padding=1, divisor_override=1)  # sums: [out, in, 4, 4]
        return F.conv_transpose2d(x, w.transpose(0, 1), self.conv.bias, stride=2, padding=1)


# --- autoencoder --------------------------------------------------------------------------------


class Posterior(NamedTuple):
    """Diagonal Gaussian q(z|x): mean and log-variance, each [B, z_channels, h, w]."""

    mean: torch.Tensor
    logvar: torch.Tensor

    def sample(self, noise):
        """z = mean + std noise, with standard normal noise of the latent's shape."""
        return self.mean + torch.exp(0.5 * self.logvar) * noise

    def kl(self):
        """KL(q || N(0, I)) in nats per image, [B] (Kingma & Welling 2014, appendix B)."""
        return 0.5 * (self.mean**2 + self.logvar.exp() - 1 - self.logvar).flatten(1).sum(1)


class AutoencoderKL(nn.Module):
    """Convolutional KL autoencoder (Rombach et al. 2022, first stage).

    Down-samples by patch_size * 2 ** (len(ch_mults) - 1); `latent_shape` is (z_channels, h, w).
    attn_res: feature-map sizes that get attention besides the middle block, which always has it.
    patch_size: the networks see squares of this many pixels a side as channels. linear_path: a
    linear map between a latent and its square of pixels runs parallel to each network, which starts
    as zero: principal components are a good autoencoder already, which deep layers with norms take
    thousands of steps to find. `pattern` is subtracted from its squares. quant_conv: 1x1 layers
    around the latent, as in published ones. ValueError if img_size cannot be halved that often.
    """

    def __init__(self, img_size, z_channels, base_ch, ch_mults, num_res_blocks, attn_res=(),
                 patch_size=1, linear_path=False, quant_conv=False):
        super().__init__()
        groups = num_groups(base_ch)
        factor = patch_size * 2 ** (len(ch_mults) - 1)
        if img_size % factor:
            raise ValueError(f"img_size {img_size} must be a multiple of {factor} (see ch_mults)")
        self.latent_shape = (z_channels, img_size // factor, img_size // factor)
        self.patch_size, self.factor = patch_size, factor  # factor: pixels per latent, a side
        widths = [base_ch * m for m in ch_mults]

        def block(in_ch, out_ch, attention):
            layers = [ResBlock(in_ch, out_ch, groups)]
            return layers + [Attention(out_ch, groups, heads=1)] if attention else layers

        ch, res = base_ch, img_size // patch_size
        encoder = [conv3x3(patch_size**2, ch)]
        for level, width in enumerate(widths):
            for _ in range(num_res_blocks):
                encoder += block(ch, width, res in attn_res)
                ch = width
            if level < len(widths) - 1:
                encoder.append(Downsample(ch, padding=0))
                res //= 2
        encoder += block(ch, ch, True) + block(ch, ch, False)
        encoder += [GroupNorm(ch, groups), nn.SiLU(), conv3x3(ch, 2 * z_channels)]
        self.encoder = nn.Sequential(*encoder)

        decoder = [conv3x3(z_channels, ch)]
        decoder += block(ch, ch, True) + block(ch, ch, False)
        for level, width in reversed(list(enumerate(widths))):
            for _ in range(num_res_blocks + 1):
                decoder += block(ch, width, res in attn_res)
                ch = width
            if level > 0:
                decoder.append(Upsample(ch))
                res *= 2
        decoder += [GroupNorm(ch, groups), nn.SiLU(), conv3x3(ch, patch_size**2)]
        self.decoder = nn.Sequential(*decoder)

        self.quant_conv = self.post_quant_conv = nn.Identity()
        if quant_conv:
            self.quant_conv = nn.Conv2d(2 * z_channels, 2 * z_channels, 1)
            self.post_quant_conv = nn.Conv2d(z_channels, z_channels, 1)
        self.linear_encoder = self.linear_decoder = None
        if linear_path:
            self.linear_encoder = nn.Conv2d(1, z_channels, factor, stride=factor)
            self.linear_decoder = nn.ConvTranspose2d(z_channels, 1, factor, stride=factor)
            self.linear_decoder.register_buffer("pattern", torch.zeros(factor, factor))
            self.linear_decoder.register_load_state_dict_pre_hook(  # older weights have none
                lambda _, state, prefix, *rest: state.setdefault(
                    f"{prefix}pattern", torch.zeros(factor, factor)))
            zero_init(self.encoder[-1])
            zero_init(self.decoder[-1])

    def encode(self, x):
        """Images [B, 1, H, W] in [-1, 1] to the Posterior of unscaled latents (float32)."""
        squares = F.pixel_unshuffle(x, self.patch_size)
        mean, logvar = self.quant_conv(self.encoder(squares)).float().chunk(2, dim=1)
        if self.linear_encoder is not None:
            mean = mean + self.linear_encoder(x).float()
        return Posterior(mean, logvar.clamp(-30.0, 20.0))

    def decode(self, z):
        """Unscaled latents [B, z_channels, h, w] to images [B, 1, H, W], not clamped to [-1, 1]."""
        x = F.pixel_shuffle(self.decoder(self.post_quant_conv(z)).float(), self.patch_size)
        if self.linear_decoder is not None:
            x = x + self.linear_decoder(z).float() - self.linear_decoder.pattern.repeat(z.shape[2:])
        return x

    def forward(self, x, noise):
        """(reconstruction, Posterior) of images x; noise: standard normal of the latents' shape."""
        posterior = self.encode(x)
        return self.decode(posterior.sample(noise)), posterior


# --- discriminator ------------------------------------------------------------------------------


class PatchDiscriminator(nn.Module):
    """PatchGAN (Isola et al. 2017): images [B, 1, H, W], at least 3 * 2 ** num_layers px, to one
    logit per patch, [B, 1, h, w] with h = H / 2 ** num_layers - 2. GroupNorm instead of BatchNorm:
    a score then depends neither on the batch nor on the process."""

    def __init__(self, base_ch=64, num_layers=3):
        super().__init__()
        ch = base_ch
        layers = [nn.Conv2d(1, ch, 4, 2, 1), nn.LeakyReLU(0.2)]
        for k in range(1, num_layers + 1):
            width, stride = base_ch * min(2**k, 8), 2 if k < num_layers else 1
            layers += [nn.Conv2d(ch, width, 4, stride, 1, bias=False)]
            layers += [GroupNorm(width, num_groups(base_ch)), nn.LeakyReLU(0.2)]
            ch = width
        self.layers = nn.Sequential(*layers, nn.Conv2d(ch, 1, 4, 1, 1))

    def forward(self, x):
        return self.layers(x).float()


# --- UNet ---------------------------------------------------------------------------------------


def timestep_embedding(t, dim):
    """Sinusoidal features of t in [0, 1], scaled to [0, 1000]: [B] to [B, dim] (Vaswani et al.
    2017, section 3.5)."""
    k = torch.arange(dim // 2, device=t.device, dtype=torch.float32)
    freqs = torch.exp(-math.log(10000) * k / (dim // 2))
    args = 1000.0 * t.float()[:, None] * freqs[None]  # [B, half]
    return torch.cat([args.cos(), args.sin()], dim=1)


class UNet(nn.Module):
    """Class-conditional UNet on latents (Ho et al. 2020; scale and shift: Dhariwal & Nichol 2021).

    Class `num_classes` is the null class of classifier-free guidance. attn_res: latent sizes that
    get attention, in heads of up to 64 channels; the middle block always has it. aug_dim: length of
    the augmentation labels (Karras et al. 2022, appendix F.2). ValueError if the latents cannot be
    halved len(ch_mults) - 1 times.
    """

    def __init__(self, latent_shape, num_classes, base_ch, ch_mults, num_res_blocks, attn_res,
                 aug_dim=0):
        super().__init__()
        in_ch, res, _ = latent_shape
        halvings = len(ch_mults) - 1
        if res % 2**halvings:
            raise ValueError(f"latents of {res}x{res} cannot be halved {halvings} times: use fewer "
                             "ldm_ch_mults, or an autoencoder with latents of another size")
        self.null_class = num_classes
        self.base_ch = base_ch
        groups, emb_dim = num_groups(base_ch), 4 * base_ch
        self.time_mlp = nn.Sequential(
            nn.Linear(base_ch // 2 * 2, emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim))
        self.class_emb = nn.Embedding(num_classes + 1, emb_dim)
        self.aug_emb = None
        if aug_dim:  # without a bias: all zeros, the image as it is, add nothing
            self.aug_emb = nn.Linear(aug_dim, emb_dim, bias=False)
            nn.init.zeros_(self.aug_emb.weight)

        def block(in_ch, out_ch, attention):
            layers, heads = [ResBlock(in_ch, out_ch, groups, emb_dim)], out_ch // head_dim(base_ch)
            return layers + [Attention(out_ch, groups, heads)] if attention else layers

        ch = base_ch
        self.conv_in = conv3x3(in_ch, ch)
        self.down = nn.ModuleList()
        skips = [ch]
        for level, mult in enumerate(ch_mults):
            for _ in range(num_res_blocks):
                self.down.append(nn.ModuleList(block(ch, base_ch * mult, res in attn_res)))
                ch = base_ch * mult
                skips.append(ch)
            if level < len(ch_mults) - 1:
                self.down.append(nn.ModuleList([Downsample(ch, padding=1)]))
                skips.append(ch)
                res //= 2
        self.mid = nn.ModuleList(block(ch, ch, True) + block(ch, ch, False))
        self.up = nn.ModuleList()
        for level, mult in reversed(list(enumerate(ch_mults))):
            for i in range(num_res_blocks + 1):
                layers = block(ch + skips.pop(), base_ch * mult, res in attn_res)
                ch = base_ch * mult
                if i == num_res_blocks and level > 0:
                    layers.append(Upsample(ch))
                    res *= 2
                self.up.append(nn.ModuleList(layers))
        self.norm_out = GroupNorm(ch, groups)
        self.conv_out = zero_init(conv3x3(ch, in_ch))  # first, it predicts zero

    def forward(self, x, t, y, aug=None):
        """x [B, C, h, w], t [B] in [0, 1], y [B] class index or null_class: float32 like x. aug
        [B, aug_dim]: augmentation labels; None, as in sampling: not augmented."""
        emb = self.time_mlp(timestep_embedding(t, self.base_ch)) + self.class_emb(y)  # [B, emb_dim]
        if aug is not None:
            emb = emb + self.aug_emb(aug)

        def run(block, h):
            for layer in block:
                h = layer(h, emb) if isinstance(layer, ResBlock) else layer(h)
            return h

        skips = [self.conv_in(x)]
        for block in self.down:
            skips.append(run(block, skips[-1]))
        h = run(self.mid, skips[-1])
        for block in self.up:
            h = run(block, torch.cat([h, skips.pop()], dim=1))
        return self.conv_out(self.norm_out(h, silu=True)).float()


# --- EMA ----------------------------------------------------------------------------------------


class EMA:
    """Exponential moving average of a module's weights, kept as a copy of it in `module`."""

    def __init__(self, module, decay):
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, module, step):
        """Average `module` in after optimiser step number `step` (from 1). The decay warms up, so
        that a short run forgets its random initial weights."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.module.parameters()), list(module.parameters()), 1 - decay)


# --- from settings ------------------------------------------------------------------------------

# Settings that AutoencoderKL takes, in its order.
VAE_SHAPE = ("img_size", "z_channels", "base_ch", "ch_mults", "num_res_blocks", "attn_res",
             "patch_size", "linear_path", "quant_conv")


def build_vae(settings):
    """AutoencoderKL from a dict of train_vae.py's settings; ValueError if they contradict."""
    return AutoencoderKL(*(settings[name] for name in VAE_SHAPE))


def build_denoiser(settings, latent_shape, num_classes, aug_dim=0):
    """diffusion.Denoiser with its UNet from a dict of train_ldm.py's settings; ValueError if they
    contradict. aug_dim: length of the augmentation labels, if --augment is on."""
    unet = UNet(latent_shape, num_classes, settings["ldm_base_ch"], settings["ldm_ch_mults"],
                settings["ldm_num_res_blocks"], settings["ldm_attn_res"],
                aug_dim if settings["augment"] else 0)
    schedule = diffusion.NoiseSchedule(settings["noise_schedule"], settings["zero_terminal_snr"])
    return diffusion.Denoiser(unet, schedule, settings["prediction"], settings["loss_weighting"])
