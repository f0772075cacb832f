"""Composition on phantoms, whose joint is known: the table of docs/composition.md.

    python -m lib.phantom --out=P/train --num_train=400 --img_size=64 --classes normal tb effusion
    python -m lib.phantom --out=P/judge --num_train=400 --img_size=64 --seed=1 \
        --classes normal tb effusion tb+effusion
    python -m lib.phantom --out=P/both --num_train=600 --num_val=0 --img_size=64 --seed=2 \
        --classes tb+effusion
    PYTHONPATH=. python tests/experiments/composition.py --ckpt=L/ckpts/best.pt --phantoms=P

An autoencoder and a model of normal, tb and effusion (never both in one image) come first, trained
on P/train with the demo's settings (see the Makefile). Presence is judged by two classifiers
trained on P/judge.
"""
import argparse
import contextlib
import io
import pathlib
import shutil

import numpy as np
import torch
import torch.nn.functional as F

import data
import evaluate
import sample
from lib import decode, dist, metrics
from lib.phantom import CLASSES, draw_phantom

ROWS = {  # name: flags of sample.py
    "tb alone": "--classes=tb",
    "effusion alone": "--classes=effusion",
    "add to normal, w 1": "",
    "add to normal, w 1.2": "--weights=1.2,1.2",
    "add to normal, w 1.5": "--weights=1.5,1.5",
    "add to normal, w 2": "--weights=2,2",
    "add to normal, w 1, 60 steps": "--num_sampling_steps=60",
    "add to normal, w 1.3, 60 steps": "--weights=1.3,1.3 --num_sampling_steps=60",
    "add to normal, w 1.5, 60 steps": "--weights=1.5,1.5 --num_sampling_steps=60",
    "add to null, w 1": "--base=null",
    "add to null, w 1.5": "--base=null --weights=1.5,1.5",
    "or, 100 steps": "--compose=or --num_sampling_steps=100",
    "and, 100 steps": "--compose=and --num_sampling_steps=100",
    "product, 100 steps": "--compose=product --num_sampling_steps=100",
}


def read(folder, start=0, stop=None):
    """Pixels [N, 1, S, S] of the PNG files below a folder."""
    paths = sorted(pathlib.Path(folder).rglob("*[0-9].png"))
    grey = np.stack([decode.read_grey(path) for path in paths[start:stop]])
    return torch.from_numpy(grey)[:, None] * 2 - 1


def judges(folder, args, ctx):
    """A classifier of the presence of each finding, from phantoms with none, one and both."""
    parts = {name: read(folder / name) for name in CLASSES}
    x = torch.cat([*parts.values()])
    args.classifier_steps = 1500
    for finding in ("tb", "effusion"):
        truth = np.repeat([int(finding in name.split("+")) for name in parts],
                          [len(part) for part in parts.values()])
        yield evaluate.train_classifier(
            evaluate.Labelled(truth, x), evaluate.augment, (2,), 0, args, ctx, finding)


def correlated(count):
    """Phantoms [N, 1, 64, 64] with both findings, the effusion on the side with more of the
    lesions: a pair that is not independent."""
    found, seed = [], 0
    while len(found) < count:
        normal, tb, effusion, both = (draw_phantom(
            np.random.default_rng([7, seed]), name, 64).astype(int) for name in CLASSES)
        left = [(image - normal)[:, 32:].sum() > (image - normal)[:, :32].sum()
                for image in (tb, effusion)]
        found += [both] if left[0] == left[1] else []
        seed += 1
    return data.to_float(np.stack(found).astype(np.uint16) * 257)


@torch.no_grad()
def row(name, x, real, pool, nets, features):
    """A line of the table for images x: presence of tb, effusion and both, distance, diversity."""
    present = [net(x).argmax(1).bool() for net in nets]
    both = present[0] & present[1]
    low, high = metrics.binomial_interval(int(both.sum()), len(both))
    own = [evaluate.Labelled(np.zeros(len(of), int), features(of)) for of in (x, pool, real)]
    fid = evaluate.distance(*own, 0)
    spread = [metrics.pairwise_mse(of.values)["mean"] for of in own]
    print(f"| {name} | {present[0].float().mean():.2f} | {present[1].float().mean():.2f} | "
          f"{both.float().mean():.2f} ({low:.2f} to {high:.2f}) | {fid['fid']:.2f} "
          f"({fid['baseline']:.2f} +- {fid['bootstrap_std']:.2f}) | {spread[0] / spread[2]:.2f} |",
          flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--ckpt", required=True)
    parser.add_argument("--phantoms", type=pathlib.Path, required=True)
    parser.add_argument("--num_samples", type=int, default=192)
    parser.add_argument("--out", type=pathlib.Path, default="composition_samples")
    args = parser.parse_args()
    ctx = dist.setup(argparse.Namespace(device="cpu"))
    _, vae, _ = sample.load_ldm(args.ckpt, ctx)
    nets = list(judges(args.phantoms / "judge/TB/train", args, ctx))
    real = read(args.phantoms / "both/TB/train/tb+effusion", 0, 300)
    pool = read(args.phantoms / "both/TB/train/tb+effusion", 300)

    @torch.no_grad()
    def features(x):
        return F.adaptive_avg_pool2d(vae.encode(x).mean, 4).flatten(1)

    print("| | tb | effusion | both | FID vae (baseline) | diversity |\n" + "| --- " * 6 + "|")
    row("real phantoms with both", pool[:args.num_samples], real, pool, nets, features)
    with torch.no_grad():
        decoded = torch.cat([vae.decode(vae.encode(part).mean).clamp(-1, 1)
                             for part in pool[:args.num_samples].split(64)])
    row("the same, decoded", decoded, real, pool, nets, features)
    for name, flags in ROWS.items():
        folder = args.out / name.replace(" ", "_")
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.redirect_stdout(io.StringIO()):
            sample.main([f"--ckpt={args.ckpt}", "--classes=tb+effusion", "--device=cpu",
                         f"--num_samples={args.num_samples}", "--dtype=fp32", "--batch_size=64",
                         f"--out_dir={folder}", *flags.split()])
        row(name, read(folder), real, pool, nets, features)
    print("\nbeside phantoms whose effusion is on the side with more of the lesions:")
    same_side = correlated(600)
    for name, x in (("others of them", same_side[:192]), ("independent phantoms", pool[:192]),
                    ("samples", read(args.out / "add_to_normal,_w_1.3,_60_steps"))):
        row(name, x, same_side[300:], same_side[:300], nets, features)


if __name__ == "__main__":
    main()
