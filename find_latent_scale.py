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
import experiment
import metrics
import model
from args import (add_autoencoder_arguments, add_check_argument, add_data_arguments, make_parser,
                  parse_settings)
from experiment import fail


def build_parser():
    """Parser of this stage."""
    parser = make_parser(__doc__)
    add_data_arguments(parser, img_size=None)
    add_autoencoder_arguments(parser)
    add_check_argument(parser)
    return parser


class Moments:
    """Streaming mean and standard deviation by channel, in float64: sums shifted by the first
    batch's mean."""

    def __init__(self):
        self.count = 0

    def add(self, x):
        """x: [B, C, h, w]."""
        x = x.double().cpu()
        if self.count == 0:
            self.shift = x.mean((0, 2, 3))
            self.sum = torch.zeros_like(self.shift)
            self.square_sum = torch.zeros_like(self.shift)
        x = x - self.shift[:, None, None]
        self.count += x.numel() // x.shape[1]
        self.sum += x.sum((0, 2, 3))
        self.square_sum += x.square().sum((0, 2, 3))

    def channels(self):
        """(mean, std) of each channel, lists of floats."""
        mean = self.sum / self.count
        std = (self.square_sum / self.count - mean**2).clamp(min=0).sqrt()
        return (self.shift + mean).tolist(), std.tolist()

    def overall(self):
        """(mean, std) over all values of all channels."""
        means, stds = self.channels()
        mean = sum(means) / len(means)
        variances = [s**2 + (m - mean) ** 2 for m, s in zip(means, stds, strict=True)]
        return mean, math.sqrt(sum(variances) / len(variances))


def main(argv=None):
    args = parse_settings(build_parser(), argv)
    if args.check:
        data.check_folders(args)
        if args.check == "inputs":
            experiment.load_checkpoint(experiment.find_autoencoder(args), "vae")
        return

    # --- autoencoder and latents ---
    procs = experiment.setup_processes(args)
    ckpt_path = experiment.find_autoencoder(args)
    vae, settings, vae_sha256 = experiment.load_autoencoder(ckpt_path, procs, args.ae_config_path)
    if args.img_size not in (None, settings["img_size"]):
        fail(f"--img_size={args.img_size}, but {ckpt_path} was trained at "
             f"{settings['img_size']}; leave it out")
    args.img_size = settings["img_size"]
    data.adopt_root(args, settings, "the autoencoder")
    images = data.open_images(args, procs, args.split, pixels=False)
    cache = pathlib.Path(args.output_root, "cache")
    latents = data.LatentSet(images, vae, vae_sha256, cache, procs)

    # --- moments of posterior samples, not of means: the diffusion model is trained on samples ---
    moments = Moments()
    noise_variance, lowest, highest = 0.0, math.inf, -math.inf
    progress = experiment.Progress(procs, "measuring latents", len(images))
    for start in range(0, len(images), 64):
        index = np.arange(start, min(start + 64, len(images)))
        mean, logvar = latents.posterior(index)
        rng = experiment.generator("cpu", args.seed, "scale", start)
        noise = torch.randn(mean.shape, generator=rng).to(mean.device)
        z = model.Posterior(mean, logvar).sample(noise)
        moments.add(z)
        noise_variance += logvar.double().exp().mean().item() * len(z)
        lowest, highest = min(lowest, z.min().item()), max(highest, z.max().item())
        progress.update(start + len(z))
    progress.clear()
    mean, std = moments.overall()
    if not (math.isfinite(std) and std > 0):
        fail(f"the latents of {ckpt_path} have standard deviation {std}: this autoencoder is "
             "broken")

    # --- latent_scale.json ---
    channel_means, channel_stds = moments.channels()
    result = {
        "latent_scale_factor": 1 / std, "std": std, "mean": mean, "min": lowest, "max": highest,
        "channel_mean": channel_means, "channel_std": channel_stds,
        "channel_latent_scale_factor": [1 / s if s else None for s in channel_stds],
        "posterior_noise_share": noise_variance / len(images) / std**2, "num_images": len(images),
        "vae_sha256": vae_sha256, "task": args.task, "split": args.split,
        "class_filter": args.class_filter, "img_size": args.img_size, "seed": args.seed,
        "data": images.summary}
    if not procs.main:
        return
    for name in ("latent_scale_factor", "std", "mean", "channel_mean", "channel_std",
                 "posterior_noise_share", "num_images"):
        value = result[name]
        text = [round(v, 4) for v in value] if isinstance(value, list) else f"{value:.6g}"
        print(f"{name:<22} {text}")
    print(metrics.format_verdicts(metrics.health(result)))
    path = experiment.run_folder(ckpt_path) / "latent_scale.json"
    experiment.write_json(path, result)
    print(f"written to {path}")
    print("next: " + experiment.command_line("train_ldm.py", mode="full_train",
                                             ae_ckpt_path=ckpt_path, **experiment.data_flags(args)))


if __name__ == "__main__":
    main()
