"""Stage 2: measure the latent scale factor of a trained autoencoder.

    python find_latent_scale.py --ae_ckpt_path=runs/ae_.../ckpts/last.pt --data_root=DATA --task=TB

Encodes the whole split and writes latent_scale.json beside the autoencoder's run_meta.json, where train_ldm.py
looks for it. latent_scale_factor = 1 / std of posterior samples, so that scaled latents have unit variance, which
is what the noise schedule assumes (Rombach et al. 2022, appendix G).
"""
import math
import pathlib

import numpy as np
import torch

import data
import experiment
import model


def make_parser():
    parser = experiment.make_parser(__doc__)
    parser.set_defaults(img_size=None)
    add_autoencoder_arguments(parser)
    return parser


def parse_args(argv=None):
    return experiment.parse_args(make_parser(), argv)


def add_autoencoder_arguments(parser):
    """--ae_ckpt_path and --ae_config_path, as find_latent_scale.py and train_ldm.py take them."""
    add = parser.add_argument_group("autoencoder").add_argument
    add("--ae_ckpt_path", help="ckpts/last.pt of a train_vae.py run; none: the newest run of the task")
    add("--ae_config_path", help="its run_meta.json; none: the one of its run folder")


def find_autoencoder(args):
    """Path of the autoencoder's checkpoint: the one given, else that of the newest train_vae.py run of the task.

    Newest by the time its run_meta.json says it was created. Ends the program where there is none.
    """
    if args.ae_ckpt_path:
        return pathlib.Path(args.ae_ckpt_path)
    if args.ae_config_path:
        return pathlib.Path(args.ae_config_path).parent / "ckpts" / "last.pt"
    found = []
    for path in pathlib.Path(args.output_root).glob("*/run_meta.json"):
        meta = experiment.read_meta(path.parent)
        if meta.get("kind") == "vae" and meta["args"].get("task") == args.task:
            found.append((str(meta.get("created")), str(path.parent)))
    if not found:
        experiment.fail(f"no autoencoder of task {args.task} in {args.output_root}: train one with "
                        f"`python train_vae.py --task={args.task}`, or name one with --ae_ckpt_path")
    return pathlib.Path(max(found)[1]) / "ckpts" / "last.pt"


def load_autoencoder(ckpt_path, config_path, procs):
    """(AutoencoderKL with its averaged weights on the device, its settings, sha256 of the checkpoint file)."""
    checkpoint = experiment.load_checkpoint(ckpt_path, "vae")
    settings = checkpoint["args"]
    names = ("img_size", "z_channels", "base_ch", "ch_mults", "num_res_blocks", "attn_res")
    if config_path:
        described = experiment.read_meta(pathlib.Path(config_path).parent)["args"]
        for name in names:
            if described.get(name) != (list(settings[name]) if isinstance(settings[name], tuple) else settings[name]):
                experiment.fail(f"{config_path} says {name}={described.get(name)}, but {ckpt_path} has "
                                f"{settings[name]}: the two are not of the same run")
    vae = model.AutoencoderKL(*(settings[name] for name in names))
    experiment.load_weights(vae, checkpoint["ema"], ckpt_path)
    vae = vae.to(procs.device, memory_format=procs.memory_format).eval().requires_grad_(False)
    return vae, settings, experiment.sha256_file(ckpt_path)


class Moments:
    """Streaming mean and standard deviation by channel in float64: sums shifted by the first batch's mean."""

    def __init__(self):
        self.count = 0

    def add(self, x):
        """x: [B, C, h, w]."""
        x = x.double().cpu()
        if self.count == 0:
            self.shift = x.mean((0, 2, 3))
            self.sum = self.square_sum = torch.zeros_like(self.shift)
        x = x - self.shift[:, None, None]
        self.count += x.numel() // x.shape[1]
        self.sum = self.sum + x.sum((0, 2, 3))
        self.square_sum = self.square_sum + x.square().sum((0, 2, 3))

    def channels(self):
        """(mean, std) of each channel, lists of floats."""
        mean = self.sum / self.count
        return (self.shift + mean).tolist(), (self.square_sum / self.count - mean**2).clamp(min=0).sqrt().tolist()

    def overall(self):
        """(mean, std) over all values of all channels."""
        means, stds = self.channels()
        mean = sum(means) / len(means)
        return mean, math.sqrt(sum(s**2 + (m - mean) ** 2 for m, s in zip(means, stds, strict=True)) / len(means))


def main(argv=None):
    args = parse_args(argv)
    procs = experiment.setup_processes(args)
    ckpt_path = find_autoencoder(args)
    vae, settings, vae_sha256 = load_autoencoder(ckpt_path, args.ae_config_path, procs)
    if args.img_size not in (None, settings["img_size"]):
        experiment.fail(f"--img_size={args.img_size}, but {ckpt_path} was trained at {settings['img_size']}; "
                        "leave it out")
    args.img_size = settings["img_size"]
    images = data.open_images(args, procs, args.split)
    latents = data.LatentSet(images, vae, vae_sha256, pathlib.Path(args.output_root) / "cache", procs)

    moments, noise_variance, lowest, highest = Moments(), 0.0, math.inf, -math.inf
    progress = experiment.Progress(procs, "measuring latents", len(images))
    for start in range(0, len(images), 64):
        mean, logvar = latents.posterior(np.arange(start, min(start + 64, len(images))))
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
        experiment.fail(f"the latents of {ckpt_path} have standard deviation {std}: this autoencoder is broken")
    channel_means, channel_stds = moments.channels()
    result = {
        "latent_scale_factor": 1 / std, "std": std, "mean": mean, "min": lowest, "max": highest,
        "channel_mean": channel_means, "channel_std": channel_stds,
        "channel_latent_scale_factor": [1 / s if s else None for s in channel_stds],
        "posterior_noise_share": noise_variance / len(images) / std**2, "num_images": len(images),
        "vae_sha256": vae_sha256, "task": args.task, "split": args.split, "class_filter": args.class_filter,
        "img_size": args.img_size, "seed": args.seed}
    out = ckpt_path.parent.parent / "latent_scale.json"
    if procs.main:
        experiment.write_json(out, result)
        for name in ("latent_scale_factor", "std", "mean", "channel_mean", "channel_std", "posterior_noise_share",
                     "num_images"):
            value = result[name]
            print(f"{name:<22}", [round(v, 4) for v in value] if isinstance(value, list) else f"{value:.6g}")
        print(f"written to {out}")
        print(f"next: python train_ldm.py --mode=full_train --ae_ckpt_path={ckpt_path} --task={args.task}"
              f" --img_size={args.img_size}" + (f" --data_root={args.data_root}" if args.data_root else ""))


if __name__ == "__main__":
    main()
