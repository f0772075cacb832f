"""Measure a trained latent diffusion model against real radiographs it has not seen.

    python evaluate.py --ckpt=runs/ldm_.../ckpts/last.pt --data_root=DATA --task=TB --num_samples=64

Samples every class and compares with the `val` split: Frechet and kernel distance in the autoencoder's feature
space (posterior means, averaged over a 4x4 grid), and how much of an image is truly black. The same numbers of
the training images against the same split stand beside them: what a perfect model of the training data would get.
"""
import pathlib

import numpy as np
import torch
import torch.nn.functional as F

import data
import experiment
import metrics
import sample

BLACK = -0.9  # 5 % grey; borders of films lie below


def make_parser():
    parser = experiment.make_parser(__doc__)
    parser.set_defaults(split="val", img_size=None)
    sample.add_sampling_arguments(parser)
    return parser


@torch.no_grad()
def vae_features(vae, images, scale, procs):
    """[N, 16 z_channels] float32: normalised posterior means of images [N, 1, H, W], averaged over a 4x4 grid."""
    parts = [F.adaptive_avg_pool2d(vae.encode(x.to(procs.device)).mean * scale, 4).flatten(1).cpu()
             for x in images.split(16)]
    return torch.cat(parts)


def black_levels(x):
    """Of images [N, 1, H, W]: mean share of pixels under 5 % grey, and mean of each image's 1st percentile (0 to 1)."""
    grey = (x.flatten(1) + 1) / 2
    return {"black_share": (grey < (BLACK + 1) / 2).float().mean().item(),
            "darkest_percent": grey.kthvalue(max(1, grey.shape[1] // 100), dim=1).values.mean().item()}


def compare(features, x, real_features):
    return {"frechet": metrics.frechet_distance(features, real_features),
            "kernel_distance": metrics.kernel_distance(features, real_features), **black_levels(x)}


def main(argv=None):
    args = experiment.parse_args(make_parser(), argv)
    procs = experiment.setup_processes(args)
    if procs.world_size > 1:
        experiment.fail("evaluate.py runs in one process")
    ldm = sample.prepare(args, procs)
    checkpoint = ldm.checkpoint
    args.img_size = checkpoint["args"]["img_size"]
    real, train = data.open_images(args, procs, args.split), data.open_images(args, procs, "train")
    if real.class_names != checkpoint["class_names"]:
        experiment.fail(f"the model knows the classes {', '.join(checkpoint['class_names'])}, the data have "
                        f"{', '.join(real.class_names)}: give the --task it was trained on")

    wanted = [(c, i) for c in ldm.classes for i in range(args.num_samples)]
    x = torch.cat([images for _, _, images in sample.sample_batches(ldm, wanted, args, procs)])
    real_x, train_x = (s.images(np.arange(len(s))) for s in (real, train))
    scale = checkpoint["latent_scale_factor"]
    features, real_features, train_features = (vae_features(ldm.vae, i, scale, procs) for i in (x, real_x, train_x))
    labels = np.array([c for c, _ in wanted])

    report = {"features": "vae", "num_samples_per_class": args.num_samples, "num_real": len(real),
              "num_train": len(train)}
    print(f"{'':<12} {'':<8} {'frechet':>9} {'kernel':>9} {'black':>7} {'darkest 1 %':>12}      N real {len(real)}, "
          f"train {len(train)}, samples {len(x)}")
    for name in ["all", *(checkpoint["class_names"][c] for c in ldm.classes)]:
        keep = [slice(None)] * 3 if name == "all" else [
            np.flatnonzero(a == checkpoint["class_names"].index(name)) for a in (labels, real.labels, train.labels)]
        rows = {"samples": compare(features[keep[0]], x[keep[0]], real_features[keep[1]]),
                "train": compare(train_features[keep[2]], train_x[keep[2]], real_features[keep[1]]),
                "real": black_levels(real_x[keep[1]])}
        report[name] = rows
        for row, v in rows.items():
            distances = f"{v['frechet']:9.4f} {v['kernel_distance']:9.5f}" if "frechet" in v else " " * 19
            print(f"{name:<12} {row:<8} {distances} {v['black_share']:7.3f} {v['darkest_percent']:12.4f}")
    out = pathlib.Path(args.out_dir or pathlib.Path(args.ckpt).parent.parent) / "evaluation.json"
    experiment.make_folder(out.parent)
    experiment.write_json(out, report | {"sampler": args.sampler, "num_sampling_steps": args.num_sampling_steps,
                                         "guidance_scale": ldm.guidance_scale, "seed": args.seed})
    print(f"written to {out}")


if __name__ == "__main__":
    main()
