"""Measure speed on this machine: the training step of both trainers, and sampling.

    python dev/bench.py                 # about a minute on two idle CPU cores
    python dev/bench.py --only=train --latent_size=32 --seconds=20

docs/benchmarks.md: how to compare two versions of the code, and what we measured.
"""
import os
import pathlib
import sys

import torch
from torch.utils import benchmark

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import sample
import train_ldm
import train_vae
from lib import dist
from lib.args import add_precision_arguments, at_least, make_parser, parse_settings
from lib.files import fail

CLASSES = ("normal", "tb")

# --- the work: the stages' own functions ---------------------------------------------------------


def ldm_models(args, ctx):
    """((Denoiser, EMA, AdamW), settings of train_ldm.py without guidance, shape of a latent)."""
    settings = train_ldm.parse_args([
        f"--ldm_base_ch={args.base_ch}", f"--batch_per_device={args.batch}", "--sampler=dpmpp_2m",
        f"--num_sampling_steps={args.sampling_steps}", "--guidance_scale=1"])
    shape = (4, args.latent_size, args.latent_size)
    return train_ldm.build_models(settings, ctx, shape, len(CLASSES)), settings, shape


def ldm_step(args, ctx):
    """Function that takes one step of train_ldm.py."""
    models, settings, shape = ldm_models(args, ctx)
    mean = torch.randn(args.batch, *shape, device=ctx.device)
    y = torch.arange(args.batch, device=ctx.device) % len(CLASSES)
    batch = (mean, torch.full_like(mean, -6.0)), y, None
    loss_fn = train_ldm.wrap(models[0], batch, settings, ctx)
    return lambda: train_ldm.train_step(*models, loss_fn, batch, 1.0, 0, settings, ctx)


def vae_step(args, ctx):
    """Function that takes one step of train_vae.py, before its discriminator starts."""
    settings = train_vae.parse_args([
        f"--img_size={args.img_size}", f"--base_ch={args.vae_base_ch}", "--num_res_blocks=1",
        "--disc_weight=0", f"--batch_per_device={args.vae_batch}"])
    models = train_vae.build_models(settings, ctx)
    wrapped = train_vae.wrap(models, settings, ctx)
    x = torch.rand(args.vae_batch, 1, args.img_size, args.img_size, device=ctx.device) * 2 - 1
    return lambda: train_vae.train_step(models, *wrapped, None, x, 0, settings, ctx)


def sampling(args, ctx):
    """Function that draws a batch of latents as sample.py does."""
    (denoiser, _, _), settings, shape = ldm_models(args, ctx)
    if ctx.compile:
        denoiser.unet.compile()
    denoiser = sample.cast_weights(denoiser, ctx)
    requests = [(i % len(CLASSES), i) for i in range(args.batch)]
    return lambda: sample.sample_latents(denoiser, shape, requests, CLASSES, settings, ctx)


# --- the program --------------------------------------------------------------------------------

PARTS = {"train": ldm_step, "vae": vae_step, "sample": sampling}


def build_parser():
    """Parser of this program."""
    parser = make_parser(__doc__)
    add_precision_arguments(parser)
    add = parser.add_argument_group("benchmark").add_argument
    add("--only", default=",".join(PARTS), help="comma list of parts")
    add("--seconds", type=at_least(0, float), default=10.0, help="of measuring, for each part")
    add("--latent_size", type=at_least(1), default=16, help="side of the latents")
    add("--base_ch", type=at_least(1), default=96, help="channels of the UNet's first level")
    add("--batch", type=at_least(1), default=16, help="latents per step, and sampled at once")
    add("--sampling_steps", type=at_least(1), default=20, help="network evaluations per sample")
    add("--img_size", type=at_least(1), default=128, help="side of the autoencoder's images")
    add("--vae_base_ch", type=at_least(1), default=32, help="its channels at full resolution")
    add("--vae_batch", type=at_least(1), default=4, help="images per step of the autoencoder")
    return parser


def main(argv=None):
    args = parse_settings(build_parser(), argv)
    parts = args.only.split(",")
    if not PARTS.keys() >= set(parts):
        fail(f"--only={args.only}: choose from {','.join(PARTS)}")
    ctx = dist.setup(args)
    device = torch.cuda.get_device_name() if ctx.device.type == "cuda" else (
        f"CPU, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads")
    print(f"{device}, {ctx.dtype}, {ctx.memory_format}, compile {ctx.compile}, "
          f"torch {torch.__version__}, load average {os.getloadavg()[0]:.1f}", flush=True)
    for part in parts:
        function = PARTS[part](args, ctx)
        function()  # compiles
        timer = benchmark.Timer("function()", globals={"function": function},
                                num_threads=torch.get_num_threads())
        took = timer.blocked_autorange(min_run_time=args.seconds)
        images = args.vae_batch if part == "vae" else args.batch
        print(f"{part:<6} {images / took.median:8.2f} images/s, median of {len(took.times)}, "
              f"interquartile range {100 * took.iqr / took.median:.0f} %", flush=True)


if __name__ == "__main__":
    main()
