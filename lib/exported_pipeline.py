"""Sample synthetic chest X-rays with diffusers, from the folder that holds this file.

    python pipeline.py --classes=tb --num_samples=4 --out=samples

Or, in Python, `DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)("tb").images`.
export.py wrote the folder. Needs torch, diffusers, safetensors and pillow.
"""
import argparse
import pathlib

import diffusers
import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from PIL import Image


class CXRAutoencoder(diffusers.ModelMixin, diffusers.ConfigMixin):
    """An AutoencoderKL on patches of patch_size x patch_size pixels as channels; linear_path adds a
    linear map beside its encoder and its decoder. act_fn is one that no AutoencoderKL has, so that
    nothing takes these weights for those of one."""

    @register_to_config
    def __init__(self, autoencoder, patch_size, linear_path, scaling_factor,
                 act_fn="CXRAutoencoder"):
        super().__init__()
        self.network = diffusers.AutoencoderKL(**autoencoder)
        if linear_path:
            channels = autoencoder["latent_channels"]
            factor = patch_size * 2 ** (len(autoencoder["block_out_channels"]) - 1)
            self.linear_encoder = torch.nn.Conv2d(1, channels, factor, factor)
            self.linear_decoder = torch.nn.ConvTranspose2d(channels, 1, factor, factor)
            self.linear_decoder.register_buffer("pattern", torch.zeros(factor, factor))

    def encode(self, x):
        """Images [B, 1, H, W] in [-1, 1] to an AutoencoderKLOutput, as of AutoencoderKL."""
        posterior = self.network.encode(F.pixel_unshuffle(x, self.config.patch_size)).latent_dist
        if self.config.linear_path:
            posterior.mean = posterior.mean + self.linear_encoder(x)
        return AutoencoderKLOutput(latent_dist=posterior)

    def decode(self, z):
        """Unscaled latents [B, C, h, w] to a DecoderOutput, as of AutoencoderKL."""
        x = F.pixel_shuffle(self.network.decode(z).sample, self.config.patch_size)
        if self.config.linear_path:
            x = x + self.linear_decoder(z) - self.linear_decoder.pattern.repeat(z.shape[2:])
        return DecoderOutput(sample=x)


class CXRPipeline(diffusers.DiffusionPipeline):
    """UNet, autoencoder, scheduler, classes {name: index} and guidance of an exported model."""

    def __init__(self, unet, vae, scheduler, classes=None, guidance_scale=1.0,
                 guidance_interval=(0.0, 1.0)):
        super().__init__()
        self.register_modules(unet=unet, vae=vae, scheduler=scheduler)
        self.register_to_config(classes=classes, guidance_scale=guidance_scale,
                                guidance_interval=guidance_interval)

    @torch.no_grad()
    def sample(self, noise, class_name, steps=50):
        """Images [N, 1, H, W] in [-1, 1] of a class, from standard normal noise [N, C, h, w].
        steps: network evaluations; must divide 1000 if the scheduler is DDIM."""
        x, scale, (low, high) = noise, self.config.guidance_scale, self.config.guidance_interval
        y = torch.full((len(x),), self.config.classes[class_name], device=x.device)
        null = torch.full_like(y, self.unet.config.num_class_embeds - 1)
        if isinstance(self.scheduler, diffusers.FlowMatchEulerDiscreteScheduler):
            self.scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])
            shift, options = 0, {}
        elif 1000 % steps == 0:
            self.scheduler.set_timesteps(steps)
            shift, options = 1, {"use_clipped_model_output": True}  # its step k is (k + 1) / 1000
            x = x * (1 - self.scheduler.alphas_cumprod[-1]) ** 0.5
        else:
            raise SystemExit(f"error: DDIM's steps must divide 1000, and {steps} do not: give 50")
        for t in self.scheduler.timesteps:
            out = self.unet(x, t + shift, y).sample
            if scale != 1 and low <= (t + shift) / 1000 <= high:
                unconditional = self.unet(x, t + shift, null).sample
                out = unconditional + scale * (out - unconditional)
            x = self.scheduler.step(out, t, x, **options).prev_sample
        return self.vae.decode(x / self.vae.config.scaling_factor).sample.clamp(-1, 1)

    def __call__(self, class_name, num_samples=1, steps=50, generator=None):
        """ImagePipelineOutput of grey PIL images of a class; generator: torch.Generator, CPU."""
        size, channels = self.unet.config.sample_size, self.unet.config.in_channels
        noise = torch.randn(num_samples, channels, size, size, generator=generator)
        x = self.sample(noise.to(self.unet.device), class_name, steps)
        grey = ((x[:, 0] + 1) * 127.5).round().byte().cpu().numpy()
        return diffusers.ImagePipelineOutput(images=[Image.fromarray(image) for image in grey])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--classes", help="comma list of class names; None: all")
    parser.add_argument("--num_samples", type=int, default=4, help="images per class")
    parser.add_argument("--steps", type=int, default=50, help="network evaluations per image")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("samples"))
    args = parser.parse_args()
    folder = pathlib.Path(__file__).resolve().parent
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    known = list(pipeline.config.classes)
    names = args.classes.split(",") if args.classes else known
    if not set(names) <= set(known):
        parser.error(f"--classes={args.classes}, but the model knows {', '.join(known)}")
    args.out.mkdir(parents=True, exist_ok=True)
    rng = torch.Generator().manual_seed(args.seed)  # shared: every image has its own noise
    for name in names:
        for start in range(0, args.num_samples, 16):
            count = min(16, args.num_samples - start)
            for i, image in enumerate(pipeline(name, count, args.steps, rng).images, start):
                image.save(args.out / f"{name}_{i:05d}.png")
    print(f"{args.num_samples} images of each class ({', '.join(names)}) in {args.out}")


if __name__ == "__main__":
    main()
