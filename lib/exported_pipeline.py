"""Sample synthetic chest X-rays with diffusers, from the folder that holds this file.

    python pipeline.py --num_samples=4 --out=samples

export.py wrote it, with unet/, vae/, scheduler/ and classes.json. Needs torch, diffusers, pillow.
"""
import argparse
import json
import pathlib

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from PIL import Image

HERE = pathlib.Path(__file__).resolve().parent


class CXRAutoencoder(AutoencoderKL):
    """AutoencoderKL on patches of patch_size x patch_size pixels as channels; linear_path adds a
    linear map beside the encoder and the decoder."""

    @register_to_config
    def __init__(self, in_channels, out_channels, down_block_types, up_block_types,
                 block_out_channels, layers_per_block, latent_channels, norm_num_groups,
                 sample_size, scaling_factor, use_quant_conv, use_post_quant_conv, patch_size,
                 linear_path):
        # All arguments are in self.config now.
        super().__init__(**{name: value for name, value in self.config.items()
                            if name not in ("patch_size", "linear_path") and name[0] != "_"})
        self.linear_encoder = self.linear_decoder = None
        if linear_path:
            factor = patch_size * 2 ** (len(block_out_channels) - 1)
            self.linear_encoder = torch.nn.Conv2d(1, latent_channels, factor, factor)
            self.linear_decoder = torch.nn.ConvTranspose2d(latent_channels, 1, factor, factor)

    def _encode(self, x):
        mean, logvar = super()._encode(F.pixel_unshuffle(x, self.config.patch_size)).chunk(2, 1)
        if self.linear_encoder is not None:
            mean = mean + self.linear_encoder(x)
        return torch.cat([mean, logvar], 1)

    def _decode(self, z, return_dict=True):
        x = F.pixel_shuffle(super()._decode(z).sample, self.config.patch_size)
        if self.linear_decoder is not None:
            x = x + self.linear_decoder(z)
        return DecoderOutput(sample=x) if return_dict else (x,)


def load(folder):
    """The model or scheduler in a folder, of the class that its config names."""
    [config] = folder.glob("*config.json")
    classes = (UNet2DModel, AutoencoderKL, CXRAutoencoder, DDIMScheduler,
               FlowMatchEulerDiscreteScheduler)
    name = json.loads(config.read_text())["_class_name"]
    return next(cls for cls in classes if cls.__name__ == name).from_pretrained(folder)


class Pipeline:
    """UNet, autoencoder, scheduler, classes {name: index} and guidance of an exported model."""

    def __init__(self, folder=HERE, device="cpu"):
        folder = pathlib.Path(folder)
        self.unet = load(folder / "unet").to(device).eval()
        self.vae = load(folder / "vae").to(device).eval()
        self.scheduler = load(folder / "scheduler")
        settings = json.loads((folder / "classes.json").read_text())
        self.classes, self.guidance_scale = settings["classes"], settings["guidance_scale"]
        self.guidance_interval = settings["guidance_interval"]

    def noise(self, num_samples, rng):
        """Standard normal noise [N, C, h, w] to start from; rng: torch.Generator on the CPU."""
        config = self.unet.config
        shape = (num_samples, config.in_channels, config.sample_size, config.sample_size)
        return torch.randn(shape, generator=rng).to(self.unet.device)

    @torch.no_grad()
    def sample(self, noise, class_name, steps=50):
        """Images [N, 1, H, W] in [-1, 1] of a class. steps: network evaluations; must divide 1000
        if the scheduler is DDIM."""
        x, (low, high) = noise, self.guidance_interval
        y = torch.full((len(x),), self.classes[class_name], device=x.device)
        null = torch.full_like(y, self.unet.config.num_class_embeds - 1)
        if isinstance(self.scheduler, FlowMatchEulerDiscreteScheduler):
            self.scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])
            times, options = self.scheduler.timesteps, {}
        elif 1000 % steps == 0:
            self.scheduler.set_timesteps(steps)
            times, options = range(1000, 0, -1000 // steps), {"use_clipped_model_output": True}
            x = x * (1 - self.scheduler.alphas_cumprod[1000]) ** 0.5
        else:
            raise SystemExit(f"error: DDIM's steps must divide 1000, and {steps} do not: give 50")
        for t in times:
            out = self.unet(x, t, y).sample
            if self.guidance_scale != 1 and low <= t / 1000 <= high:
                unconditional = self.unet(x, t, null).sample
                out = unconditional + self.guidance_scale * (out - unconditional)
            x = self.scheduler.step(out, t, x, **options).prev_sample
        return self.vae.decode(x / self.vae.config.scaling_factor).sample.clamp(-1, 1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num_samples", type=int, default=4, help="images per class")
    parser.add_argument("--steps", type=int, default=50, help="network evaluations per image")
    parser.add_argument("--batch_size", type=int, default=16, help="images sampled at once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("samples"))
    args = parser.parse_args()
    pipeline = Pipeline(device=args.device)
    args.out.mkdir(parents=True, exist_ok=True)
    rng = torch.Generator().manual_seed(args.seed)  # shared: every image has its own noise
    for name in pipeline.classes:
        for start in range(0, args.num_samples, args.batch_size):
            count = min(args.batch_size, args.num_samples - start)
            x = pipeline.sample(pipeline.noise(count, rng), name, args.steps)
            for i, image in enumerate(((x[:, 0] + 1) * 127.5).round().byte().cpu().numpy()):
                Image.fromarray(image).save(args.out / f"{name}_{start + i:05d}.png")
    print(f"{args.num_samples} images of each class ({', '.join(pipeline.classes)}) in {args.out}")


if __name__ == "__main__":
    main()
