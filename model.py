"""Networks of the latent diffusion model: autoencoder, discriminator, UNet, diffusion process, EMA.

Shapes are [B, C, H, W]; images are 1-channel in [-1, 1]; latents that the UNet sees are normalised to unit
standard deviation by the latent scale factor. Nothing here reads arguments, files or environment variables.
"""
import copy
import math
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

# --- shared blocks -----------------------------------------------------------------------------------------


def norm(channels):
    """GroupNorm with the largest power of two up to 32 that divides `channels` as its number of groups."""
    return nn.GroupNorm(math.gcd(32, channels), channels, eps=1e-6)


def zero_init(layer):
    """Zero a layer's weights, so that the residual branch it ends starts as nothing and the block as identity."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class ResBlock(nn.Module):
    """Two 3x3 convolutions on a residual branch; with `emb_dim`, an embedding scales and shifts the second norm."""

    def __init__(self, in_ch, out_ch, emb_dim=None):
        super().__init__()
        self.norm1 = norm(in_ch)
        self.conv1 = nn.Conv2d(in_ch, out_ch, 3, padding=1)
        self.norm2 = norm(out_ch)
        self.conv2 = zero_init(nn.Conv2d(out_ch, out_ch, 3, padding=1))
        self.skip = nn.Conv2d(in_ch, out_ch, 1) if in_ch != out_ch else nn.Identity()
        self.emb = nn.Linear(emb_dim, 2 * out_ch) if emb_dim else None

    def forward(self, x, emb=None):
        h = self.conv1(F.silu(self.norm1(x)))  # [B, out_ch, H, W]
        h = self.norm2(h)
        if self.emb is not None:
            scale, shift = self.emb(F.silu(emb))[:, :, None, None].chunk(2, dim=1)  # each [B, out_ch, 1, 1]
            h = h * (1 + scale) + shift
        h = self.conv2(F.silu(h))
        return self.skip(x) + h


class Attention(nn.Module):
    """Self-attention over all pixels with heads of 64 channels (one head where 64 does not divide)."""

    def __init__(self, channels):
        super().__init__()
        self.heads = channels // 64 if channels % 64 == 0 else 1
        self.norm = norm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = zero_init(nn.Linear(channels, channels))

    def forward(self, x):
        B, C, H, W = x.shape
        h = self.norm(x).permute(0, 2, 3, 1).reshape(B, H * W, C)  # [B, HW, C], a view in channels_last
        qkv = self.qkv(h).view(B, H * W, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(*qkv.unbind(0))  # [B, heads, HW, C / heads]
        h = self.proj(h.transpose(1, 2).reshape(B, H * W, C))
        return x + h.view(B, H, W, C).permute(0, 3, 1, 2)


class Downsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x):
        return self.conv(x)  # [B, C, H/2, W/2]


class Upsample(nn.Module):
    """Nearest neighbour to twice the size, then a 3x3 convolution: in one step, as a transposed convolution.

    Two neighbouring taps often see the same pixel; with their weights added up, 4/9 of the products are left.
    """

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        w = F.avg_pool2d(self.conv.weight.flip(2, 3), 2, stride=1, padding=1, divisor_override=1)  # [out, in, 4, 4]
        return F.conv_transpose2d(x, w.transpose(0, 1), self.conv.bias, stride=2, padding=1)  # [B, C, 2H, 2W]


# --- autoencoder -------------------------------------------------------------------------------------------


class Posterior(NamedTuple):
    """Diagonal Gaussian q(z|x): mean and log-variance, each [B, z_channels, h, w]."""

    mean: torch.Tensor
    logvar: torch.Tensor

    def sample(self, noise):
        """z = mean + std noise, with standard normal noise of the latent's shape."""
        return self.mean + torch.exp(0.5 * self.logvar) * noise

    def kl(self):
        """KL(q || N(0, I)) in nats, summed over an image's latent: [B]. Kingma & Welling 2014, appendix B."""
        return 0.5 * (self.mean**2 + self.logvar.exp() - 1 - self.logvar).flatten(1).sum(1)


class AutoencoderKL(nn.Module):
    """Convolutional KL autoencoder (Rombach et al. 2022, first stage).

    Down-samples by `down_factor` = 2 ** (len(ch_mults) - 1). `attn_res` lists the feature-map sizes that get
    attention beside the one in the middle block, which is always there.
    """

    def __init__(self, img_size, z_channels, base_ch, ch_mults, num_res_blocks, attn_res=()):
        super().__init__()
        self.down_factor = 2 ** (len(ch_mults) - 1)
        if img_size % self.down_factor:
            raise ValueError(
                f"img_size {img_size} is not a multiple of {self.down_factor}, the down-sampling of ch_mults "
                f"{','.join(map(str, ch_mults))}; the nearest that fits is "
                f"{max(1, round(img_size / self.down_factor)) * self.down_factor}")
        self.latent_shape = (z_channels, img_size // self.down_factor, img_size // self.down_factor)
        widths = [base_ch * m for m in ch_mults]

        ch, res = base_ch, img_size
        encoder = [nn.Conv2d(1, ch, 3, padding=1)]
        for level, width in enumerate(widths):
            for _ in range(num_res_blocks):
                encoder.append(ResBlock(ch, width))
                ch = width
                if res in attn_res:
                    encoder.append(Attention(ch))
            if level < len(widths) - 1:
                encoder.append(Downsample(ch))
                res //= 2
        encoder += [ResBlock(ch, ch), Attention(ch), ResBlock(ch, ch)]
        encoder += [norm(ch), nn.SiLU(), nn.Conv2d(ch, 2 * z_channels, 3, padding=1)]
        self.encoder = nn.Sequential(*encoder)

        decoder = [nn.Conv2d(z_channels, ch, 3, padding=1), ResBlock(ch, ch), Attention(ch), ResBlock(ch, ch)]
        for level, width in reversed(list(enumerate(widths))):
            for _ in range(num_res_blocks + 1):
                decoder.append(ResBlock(ch, width))
                ch = width
                if res in attn_res:
                    decoder.append(Attention(ch))
            if level > 0:
                decoder.append(Upsample(ch))
                res *= 2
        decoder += [norm(ch), nn.SiLU(), nn.Conv2d(ch, 1, 3, padding=1)]
        self.decoder = nn.Sequential(*decoder)

    @property
    def last_layer(self):
        """Weight of the decoder's last convolution: where the adaptive GAN weight compares gradients."""
        return self.decoder[-1].weight

    def encode(self, x):
        """Images [B, 1, H, W] in [-1, 1] to the Posterior of unscaled latents (float32)."""
        mean, logvar = self.encoder(x).float().chunk(2, dim=1)
        return Posterior(mean, logvar.clamp(-30.0, 20.0))

    def decode(self, z):
        """Unscaled latents [B, z_channels, h, w] to images [B, 1, H, W], about [-1, 1] and not clamped."""
        return self.decoder(z).float()

    def forward(self, x, noise):
        """One training pass. noise: standard normal of the latent's shape. Returns (reconstruction, Posterior)."""
        posterior = self.encode(x)
        return self.decode(posterior.sample(noise)), posterior


# --- discriminator -----------------------------------------------------------------------------------------


class PatchDiscriminator(nn.Module):
    """PatchGAN (Isola et al. 2017): images [B, 1, H, W], at least 24 px, to a logit a patch [B, 1, H/8 - 2, W/8 - 2].

    GroupNorm instead of BatchNorm: an image's score then depends neither on its batch nor on the process.
    """

    def __init__(self, base_ch=64):
        super().__init__()
        layers = [nn.Conv2d(1, base_ch, 4, 2, 1), nn.LeakyReLU(0.2)]
        for ch, width, stride in ((1, 2, 2), (2, 4, 2), (4, 8, 1)):
            layers += [nn.Conv2d(base_ch * ch, base_ch * width, 4, stride, 1, bias=False), norm(base_ch * width),
                       nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(8 * base_ch, 1, 4, 1, 1))

    def forward(self, x):
        return self.layers(x).float()


# --- UNet --------------------------------------------------------------------------------------------------


def timestep_embedding(t, dim):
    """Sinusoidal features of t in [0, 1], scaled to [0, 1000]: [B] to [B, dim]. Vaswani et al. 2017, sec. 3.5."""
    half = dim // 2
    freqs = torch.exp(-math.log(10000) * torch.arange(half, device=t.device, dtype=torch.float32) / half)
    args = 1000.0 * t.float()[:, None] * freqs[None]  # [B, half]
    return torch.cat([args.cos(), args.sin()], dim=1)


class UNet(nn.Module):
    """Class-conditional UNet on latents (Ho et al. 2020; scale-shift conditioning of Dhariwal & Nichol 2021).

    Class `num_classes` is the null class of classifier-free guidance. `attn_res` lists the latent sizes that
    get attention; the middle block always has it.
    """

    def __init__(self, latent_shape, num_classes, base_ch, ch_mults, num_res_blocks, attn_res):
        super().__init__()
        in_ch, res, _ = latent_shape
        if res % 2 ** (len(ch_mults) - 1):
            raise ValueError(f"latents of {res}x{res} cannot be halved {len(ch_mults) - 1} times: use fewer "
                             f"ldm_ch_mults or an image size whose latent is a multiple of {2 ** (len(ch_mults) - 1)}")
        if base_ch % 2:
            raise ValueError(f"ldm_base_ch {base_ch} is odd, but half of the time features are sines, half cosines")
        self.null_class = num_classes
        self.base_ch = base_ch
        emb_dim = 4 * base_ch
        self.time_mlp = nn.Sequential(nn.Linear(base_ch, emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim))
        self.class_emb = nn.Embedding(num_classes + 1, emb_dim)

        ch = base_ch
        self.conv_in = nn.Conv2d(in_ch, ch, 3, padding=1)
        self.down = nn.ModuleList()
        skips = [ch]
        for level, mult in enumerate(ch_mults):
            for _ in range(num_res_blocks):
                block = nn.ModuleList([ResBlock(ch, base_ch * mult, emb_dim)])
                ch = base_ch * mult
                if res in attn_res:
                    block.append(Attention(ch))
                self.down.append(block)
                skips.append(ch)
            if level < len(ch_mults) - 1:
                self.down.append(nn.ModuleList([Downsample(ch)]))
                skips.append(ch)
                res //= 2
        self.mid = nn.ModuleList([ResBlock(ch, ch, emb_dim), Attention(ch), ResBlock(ch, ch, emb_dim)])
        self.up = nn.ModuleList()
        for level, mult in reversed(list(enumerate(ch_mults))):
            for i in range(num_res_blocks + 1):
                block = nn.ModuleList([ResBlock(ch + skips.pop(), base_ch * mult, emb_dim)])
                ch = base_ch * mult
                if res in attn_res:
                    block.append(Attention(ch))
                if i == num_res_blocks and level > 0:
                    block.append(Upsample(ch))
                    res *= 2
                self.up.append(block)
        self.norm_out = norm(ch)
        self.conv_out = zero_init(nn.Conv2d(ch, in_ch, 3, padding=1))  # the first prediction is zero

    def forward(self, x, t, y):
        """x [B, C, h, w], t [B] in [0, 1], y [B] class index or null_class: output [B, C, h, w], float32."""
        emb = self.time_mlp(timestep_embedding(t, self.base_ch)) + self.class_emb(y)  # [B, emb_dim]
        h = self.conv_in(x)
        skips = [h]
        for block in self.down:
            for layer in block:
                h = layer(h, emb) if isinstance(layer, ResBlock) else layer(h)
            skips.append(h)
        for layer in self.mid:
            h = layer(h, emb) if isinstance(layer, ResBlock) else layer(h)
        for block in self.up:
            h = torch.cat([h, skips.pop()], dim=1)
            for layer in block:
                h = layer(h, emb) if isinstance(layer, ResBlock) else layer(h)
        return self.conv_out(F.silu(self.norm_out(h))).float()


# --- diffusion process -------------------------------------------------------------------------------------


class NoiseSchedule:
    """x_t = alpha(t) x0 + sigma(t) eps on continuous t in [0, 1]; t = 0 is clean.

    name: 'linear' (variance preserving, beta from 0.1 to 20; Song et al. 2021, eq. 33), 'cosine'
    (alpha = cos(pi t / 2), that of Nichol & Dhariwal 2021 without its offset) or 'flow'
    (alpha = 1 - t, sigma = t; Lipman et al. 2023).
    zero_terminal_snr: t = 1 is pure noise (Lin et al. 2024, alg. 1 for 'linear'); otherwise every schedule ends
    at the alpha(1) that 'linear' has by nature, exp(-5.025) = 0.0066.
    """

    ALPHA_1 = math.exp(-0.25 * (20.0 - 0.1) - 0.5 * 0.1)

    def __init__(self, name, zero_terminal_snr):
        if name not in ("linear", "cosine", "flow"):
            raise ValueError(f"unknown noise schedule {name!r}: linear, cosine or flow")
        self.name = name
        self.zero_terminal_snr = zero_terminal_snr

        self.t_max = 1.0 if zero_terminal_snr else math.acos(self.ALPHA_1) / (math.pi / 2)  # of cosine

    def _one_minus_alpha(self, t):
        # 1 - alpha, not alpha: near t = 0 it is what sigma needs without cancellation.
        if self.name == "linear":
            scale = 1 - self.ALPHA_1 if self.zero_terminal_snr else 1.0
            return -torch.expm1(-0.25 * t**2 * (20.0 - 0.1) - 0.5 * t * 0.1) / scale
        if self.name == "cosine":
            return 2 * torch.sin(0.25 * math.pi * self.t_max * t) ** 2
        return t * (1.0 if self.zero_terminal_snr else 1 - self.ALPHA_1)

    def alpha(self, t):
        """Share of the image in x_t, any shape of t."""
        if self.name == "cosine":  # as a sine, since cos(pi / 2) in floating point is not zero
            return torch.sin(0.5 * math.pi * (1 - self.t_max * t))
        return 1 - self._one_minus_alpha(t)

    def sigma(self, t):
        """Standard deviation of the noise in x_t."""
        u = self._one_minus_alpha(t)
        return u if self.name == "flow" else torch.sqrt(u * (2 - u))  # 1 - alpha^2 = (1 - alpha)(1 + alpha)

    def q_sample(self, x0, t, noise):
        """Draw x_t from q(x_t | x0). x0, noise [B, C, h, w], t [B]."""
        alpha, sigma = self.alpha(t)[:, None, None, None], self.sigma(t)[:, None, None, None]
        return alpha * x0 + sigma * noise


class Denoiser(nn.Module):
    """The UNet with its parametrisation: everything outside sees x0-hat only.

    prediction: what the network's output means, for x_t = alpha x0 + sigma eps:
    'eps' (Ho et al. 2020), 'v' = alpha eps - sigma x0 (Salimans & Ho 2022), 'x0', or
    'flow' = eps - x0 (velocity of the straight path; Lipman et al. 2023).
    loss_weighting: 'uniform' = plain MSE on that output; 'min_snr' = min(SNR, 5) on x0 (Hang et al. 2023).
    """

    def __init__(self, unet, schedule, prediction, loss_weighting="uniform"):
        super().__init__()
        if prediction not in ("eps", "v", "x0", "flow"):
            raise ValueError(f"unknown prediction {prediction!r}: eps, v, x0 or flow")
        if prediction == "eps" and schedule.zero_terminal_snr:
            raise ValueError("prediction eps says nothing about x0 where the signal is zero: use "
                             "--no-zero_terminal_snr with eps, or --prediction=v, x0 or flow")
        if loss_weighting not in ("uniform", "min_snr"):
            raise ValueError(f"unknown loss weighting {loss_weighting!r}: uniform or min_snr")
        self.unet = unet
        self.schedule = schedule
        self.prediction = prediction
        self.loss_weighting = loss_weighting

    def x0_coefficients(self, t):
        """(a, b), each [B, 1, 1, 1], of x0-hat = a x_t + b output."""
        alpha, sigma = self.schedule.alpha(t)[:, None, None, None], self.schedule.sigma(t)[:, None, None, None]
        if self.prediction == "eps":
            return 1 / alpha, -sigma / alpha
        if self.prediction == "v":
            power = alpha**2 + sigma**2  # 1 on variance-preserving schedules
            return alpha / power, -sigma / power
        if self.prediction == "flow":
            return 1 / (alpha + sigma), -sigma / (alpha + sigma)
        return torch.zeros_like(alpha), torch.ones_like(alpha)

    def target(self, x0, t, noise):
        """What the network should put out at (x0, t, noise): [B, C, h, w]."""
        if self.prediction == "eps":
            return noise
        if self.prediction == "v":
            alpha, sigma = self.schedule.alpha(t)[:, None, None, None], self.schedule.sigma(t)[:, None, None, None]
            return alpha * noise - sigma * x0
        return noise - x0 if self.prediction == "flow" else x0

    def denoise(self, xt, t, y, guidance_scale=1.0):
        """x0-hat [B, C, h, w] of x_t at t [B] for classes y [B].

        guidance_scale w: x0(null) + w (x0(y) - x0(null)), classifier-free guidance (Ho & Salimans 2022) on all
        channels; 1 is the plain conditional model and costs one network evaluation instead of two.
        """
        a, b = self.x0_coefficients(t)
        if guidance_scale == 1.0:
            return a * xt + b * self.unet(xt, t, y)
        null = torch.full_like(y, self.unet.null_class)
        out = self.unet(torch.cat([xt, xt]), torch.cat([t, t]), torch.cat([y, null]))
        cond, uncond = out.chunk(2)
        return a * xt + b * (uncond + guidance_scale * (cond - uncond))

    def forward(self, x0, t, noise, y):
        """Training loss of each image, float32 [B]: here, since torch.compile and DDP wrap `forward`."""
        xt = self.schedule.q_sample(x0, t, noise)
        error = self.unet(xt, t, y) - self.target(x0, t, noise)
        loss = error.square().flatten(1).mean(1)
        if self.loss_weighting == "min_snr":
            snr = (self.schedule.alpha(t) / self.schedule.sigma(t)) ** 2
            _, b = self.x0_coefficients(t)
            loss = loss * snr.clamp(max=5.0) * b.flatten() ** 2  # an output error is an x0 error times b
        return loss


# --- EMA ---------------------------------------------------------------------------------------------------


class EMA:
    """Exponential moving average of a module's weights, kept as a copy of it in `module`."""

    def __init__(self, module, decay):
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, module, step):
        """After optimiser step number `step` (from 1). The decay warms up as (1 + step) / (10 + step), so that a
        short run does not keep its random initial weights."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.module.parameters()), list(module.parameters()), 1 - decay)
