"""Tuberculosis and pneumonia composed on real films: the second table of docs/composition.md.

    PYTHONPATH=. python tests/experiments/films.py --data=CXR --both=L/ckpts/best.pt \
        --tb=T/ckpts/best.pt --pneumonia=P/ckpts/best.pt --out=O

`both` is a model of --task=ALL_CXR, the others are of one task each, all with one autoencoder.
Presence is judged by one classifier per task, trained on its real films.
"""
import argparse
import contextlib
import io
import pathlib

import numpy as np
import torch
import torch.nn.functional as F

import data
import evaluate
import sample
from composition import read
from lib import dist, metrics

STEPS = "--num_sampling_steps="
RULES = {
    "add to normal, w 1": "",
    "add to normal, w 1.3, 60 steps": f"--weights=1.3,1.3 {STEPS}60",
    "add to null, w 1": "--base=null",
    "or, 100 steps": f"--compose=or {STEPS}100",
    "and, 100 steps": f"--compose=and {STEPS}100",
    "product, 100 steps": f"--compose=product {STEPS}100"}


def images_of(args, task, split, ctx):
    """ImageSet of a task."""
    settings = argparse.Namespace(
        data_root=args.data, task=task, img_size=128, class_filter=-1, skip_bad_images=False,
        num_workers=1, output_root=str(args.out), overfit_k=0)
    return data.open_images(settings, ctx, split)


def draw(args, ckpt, folder, flags):
    """Pixels [N, 1, S, S] of a call of sample.py."""
    if not folder.exists():
        with contextlib.redirect_stdout(io.StringIO()):
            sample.main([f"--ckpt={ckpt}", f"--num_samples={args.num_samples}", "--dtype=fp32",
                         "--device=cpu", f"--out_dir={folder}", *flags.split()])
    return read(folder)


def main():
    parser = argparse.ArgumentParser()
    for name in ("data", "both", "tb", "pneumonia"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--num_samples", type=int, default=64)
    args = parser.parse_args()
    args.classifier_steps = 600
    ctx = dist.setup(argparse.Namespace(device="cpu"))
    _, vae, _ = sample.load_ldm(args.both, ctx)
    nets, train, held_out = [], [], []
    for task, name in (("TB", "tb"), ("PNEUMONIA", "pneumonia")):
        images = images_of(args, task, "train", ctx)
        nets.append([evaluate.train_classifier(
            evaluate.measured(evaluate.shrunk, images, ctx), evaluate.augment, (2,), seed, args,
            ctx, name) for seed in range(3)])
        of = images.class_names.index(name)
        train.append(images.images(np.flatnonzero(images.labels == of)))
        val = images_of(args, task, "val", ctx)
        held_out.append(val.images(np.flatnonzero(val.labels == of)))
    copies = metrics.CopyTest(data.thumbnails(torch.cat(train)))

    @torch.no_grad()
    def features(x):
        return torch.cat([F.adaptive_avg_pool2d(vae.encode(part).mean, 4).flatten(1)
                          for part in x.split(16)])

    real = [features(x) for x in train]

    @torch.no_grad()
    def row(name, x):
        small = evaluate.shrunk(x)
        shares = [torch.stack([net(small).softmax(1)[:, 1] for net in of]).mean(0) > 0.5
                  for of in nets]  # classes by name: normal first
        both = shares[0] & shares[1]
        low, high = metrics.binomial_interval(int(both.sum()), len(both))
        found, own = copies.search(data.thumbnails(x)), features(x)
        cells = [name, *(f"{share.float().mean():.2f}" for share in shares),
                 f"{both.float().mean():.2f} ({low:.2f} to {high:.2f})",
                 *(f"{metrics.frechet_distance(own, of):.2f}" for of in real),
                 f"{100 * found['share']:.1f} % ({found['probability']:.2f})"]
        print("| " + " | ".join(cells) + " |", flush=True)

    print("| | tb | pneumonia | both | FID to tb | to pneumonia | copies (probability) |")
    print("|" + " --- |" * 7)
    row("held-out films, tb", held_out[0])
    row("held-out films, pneumonia", held_out[1])
    for name in ("tb", "pneumonia"):
        row(f"one model, {name} alone",
            draw(args, args.both, args.out / f"alone_{name}", f"--classes={name}"))
    for model in ("one model", "two models"):
        ckpt, second = ((args.both, "") if model == "one model" else
                        (args.tb, f"--ckpt_b={args.pneumonia} "))
        for name, flags in RULES.items():
            folder = args.out / f"{model} {name}".replace(" ", "_").replace(",", "")
            row(f"{model}, {name}", draw(
                args, ckpt, folder, f"--classes=tb+pneumonia {second}{flags}"))


if __name__ == "__main__":
    main()
