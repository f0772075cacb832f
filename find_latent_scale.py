"""Stage 2: measure the latent scale factor of a trained autoencoder.

    python find_latent_scale.py --ae_ckpt_path=runs/ae_.../ckpts/last.pt --data_root=DATA --task=TB

Encodes the whole split and writes latent_scale.json beside the autoencoder's run_meta.json, where
train_ldm.py looks for it. latent_scale_factor = 1 / std of posterior samples, so that scaled
latents have unit variance, which the noise schedule assumes (Rombach et al. 2022, appendix G).
"""
import math
import pathlib

import numpy as np
import torch

import data
import model
import sample
from lib import dist, run, verdicts
from lib.args import (add_autoencoder_arguments, add_check_argument, add_data_arguments,
                      make_parser, parse_settings)
from lib.files import command_line, data_flags, fail, write_json


def build_parser():
    """Parser of this stage."""
    parser = make_parser(__doc__)
    add_data_arguments(parser, img_size=None)
    add_autoencoder_arguments(parser)
    add_check_argument(parser)
    return parser


def measure(latents, seed, ctx):
    """{name: number} about posterior samples of all latents. Not about their means: the diffusion
    model is trained on samples. Sums are float64."""
    num_images = len(latents.images)
    total = squares = noise_variance = 0.0
    for start in range(0, num_images, 64):
        mean, logvar = latents.posterior(np.arange(start, min(start + 64, num_images)))
        noise = torch.randn(mean.shape, generator=ctx.generator(seed, "scale", start))
        z = model.Posterior(mean, logvar).sample(noise.to(mean.device)).double()
        total = total + z.mean((2, 3)).sum(0)  # [C]
        squares = squares + z.square().mean((2, 3)).sum(0)
        noise_variance = noise_variance + logvar.double().exp().mean((1, 2, 3)).sum()
    means, powers = total / num_images, squares / num_images
    mean = means.mean().item()
    std = math.sqrt(max(0.0, powers.mean().item() - mean**2))  # of all values of all channels
    if not 0 < std < math.inf:
        fail(f"the latents have standard deviation {std}: this autoencoder is broken")
    stds = (powers - means**2).clamp(min=0).sqrt()
    return {"latent_scale_factor": 1 / std, "std": std, "mean": mean,
            "channel_mean": means.tolist(), "channel_std": stds.tolist(),
            "channel_latent_scale_factor": (1 / stds).tolist(),
            "posterior_noise_share": noise_variance.item() / num_images / std**2,
            "num_images": num_images}


def main(argv=None):
    args = parse_settings(build_parser(), argv)
    if args.check:
        data.check_folders(args)
        if args.check == "inputs":
            run.load_checkpoint(run.find_autoencoder(args), "vae")
        return

    ctx = dist.setup(args)
    ckpt_path = run.find_autoencoder(args)
    vae, settings, vae_sha256 = sample.load_autoencoder(ckpt_path, ctx)
    data.adopt_settings(args, settings, f"the autoencoder {ckpt_path}")
    images = data.open_images(args, ctx, args.split)
    cache = pathlib.Path(args.output_root, "cache")
    result = measure(data.LatentSet(images, vae, vae_sha256, cache, ctx), args.seed, ctx)
    if not ctx.is_main:
        return
    for name, value in result.items():
        print(f"{name:<28} {value}")
    print(verdicts.format_verdicts(verdicts.health(result)))
    path = run.run_folder(ckpt_path) / "latent_scale.json"
    write_json(path, result | {
        "vae_sha256": vae_sha256, "task": args.task, "split": args.split,
        "class_filter": args.class_filter, "img_size": args.img_size, "seed": args.seed})
    print(f"written to {path}")
    print("next: " + command_line("train_ldm.py", mode="full_train", ae_ckpt_path=ckpt_path,
                                  **data_flags(args)))


if __name__ == "__main__":
    main()
