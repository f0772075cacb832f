"""Editing on phantoms, of which each has a true counterpart: the table of docs/composition.md.

    PYTHONPATH=. python tests/experiments/editing.py --ckpt=L/ckpts/best.pt

A seed of lib.phantom is one patient with and without lesions. Patients that no model has seen are
edited from tb to normal, where the counterpart is the answer, and from normal to tb, where lesions
may fall elsewhere. The model: see composition.py beside this file.
"""
import argparse

import numpy as np
import torch

import data
import diffusion
import sample
from lib import dist
from lib.phantom import draw_phantom


def patients(class_name, count):
    """Phantoms [N, 1, 64, 64] in [-1, 1] of seeds 0 to count."""
    drawn = [draw_phantom(np.random.default_rng([9, i]), class_name, 64) for i in range(count)]
    return data.to_float(np.stack(drawn).astype(np.uint16) * 257)


def rms(x):
    """Root mean square of each image [N, 1, S, S], in per cent of the grey range: its mean."""
    return 50 * x.square().mean((1, 2, 3)).sqrt().mean().item()


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--ckpt", required=True)
    parser.add_argument("--num", type=int, default=64)
    args = parser.parse_args()
    ctx = dist.setup(argparse.Namespace(device="cpu"))
    denoiser, vae, checkpoint = sample.load_ldm(args.ckpt, ctx)
    scale, classes = checkpoint["latent_scale_factor"], sample.trained_classes(checkpoint)
    images = {name: patients(name, args.num) for name in ("normal", "tb")}
    lesion = (images["tb"] - images["normal"]).abs() > 0.1  # over 5 % of the grey range
    print(f"lesions cover {lesion.double().mean():.1%} of the image")
    print("| edit | sampler | strength | distance to the counterpart | to the image | on the "
          "lesion |\n" + "| --- " * 6 + "|")
    for own, other in (("tb", "normal"), ("normal", "tb")):
        z = vae.encode(images[own]).mean * scale
        rec = sample.decode_latents(vae, z, scale, ctx)
        print(f"| {own}, reconstructed | | 0 | {rms(rec - images[other]):.2f} | "
              f"{rms(rec - images[own]):.2f} | |", flush=True)
        for sampler, steps in (("ddim", 40), ("dpmpp_2m_sde", 20)):
            for strength in (0.3, 0.5, 0.7, 0.9):
                rng = torch.Generator().manual_seed(0)
                y = torch.full((args.num,), classes[other])
                edited = diffusion.edit(
                    denoiser, z, classes[own], strength, y,
                    lambda: torch.randn(z.shape, generator=rng), sampler, steps, 1.0, (0.0, 1.0))
                x = sample.decode_latents(vae, edited, scale, ctx)
                change = (x - rec).square()
                share = (change * lesion).sum() / change.sum()
                print(f"| {own} to {other} | {sampler}, {steps} steps | {strength} | "
                      f"{rms(x - images[other]):.2f} | {rms(x - images[own]):.2f} | {share:.0%} |",
                      flush=True)


if __name__ == "__main__":
    main()
