"""Measure speed on this machine: the training step of both trainers, and sampling.

    python dev/bench.py                 # about a minute on two idle CPU cores
    python dev/bench.py --peer          # the UNet in turn with diffusers (pip install diffusers)

Everything runs in one process in turn, A B A B ...; `ratio` is the median over the rounds of a
row's time divided by that of the first row of its part: above 1 is slower. What the peer is, and
what we measured: docs/benchmarks.md.
"""
import os
import pathlib
import statistics
import sys
import time

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import model
import sample
import train_ldm
import train_vae
from lib import diffusers_io, dist
from lib.args import BooleanFlag, add_precision_arguments, at_least, make_parser, parse_settings
from lib.files import fail, write_json

CLASSES = ("normal", "tb")
ROW = "{part:<6} {name:<10} {images_per_second:8.2f} images/s, ratio {ratio:.2f}"

# --- measuring ----------------------------------------------------------------------------------


def clock(function, device):
    """Seconds that a call takes, with all that it gave the device to do."""
    start = time.perf_counter()
    function()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - start


def measure(part, images, tasks, repeats, device):
    """[row, a dict of numbers] of tasks {name: function} on a batch of `images`, which are called
    in turn, two rounds untimed."""
    rounds = [[clock(function, device) for function in tasks.values()]
              for _ in range(2 + repeats)][2:]
    return [{"part": part, "name": name, "seconds": [times[i] for times in rounds],
             "images_per_second": images / statistics.median(times[i] for times in rounds),
             "ratio": statistics.median(times[i] / times[0] for times in rounds)}
            for i, name in enumerate(tasks)]


# --- the work: the stages' own functions, with our UNet or the peer's -----------------------------


def peer_unet(settings, latent_shape, device):
    """UNet2DModel of diffusers with the blocks and the interface of model.UNet, in the memory
    layout in which it is faster: on CPUs PyTorch's group norm is slow in channels_last."""
    try:
        import diffusers
    except ImportError:
        fail("--peer compares with diffusers: pip install diffusers")

    layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format

    class UNet(diffusers.UNet2DModel):
        null_class = len(CLASSES)

        def forward(self, x, t, y):
            x = x.contiguous(memory_format=layout)
            return super().forward(x, 1000 * t, class_labels=y).sample.float()
    unet = UNet(**diffusers_io.unet_config(vars(settings), latent_shape, len(CLASSES)))
    return unet.to(device, memory_format=layout)


def ldm_models(args, ctx, peer):
    """((Denoiser, EMA, AdamW), settings of train_ldm.py without guidance, shape of a latent)."""
    settings = train_ldm.parse_args([
        f"--ldm_base_ch={args.base_ch}", f"--batch_per_device={args.batch}", "--sampler=dpmpp_2m",
        f"--num_sampling_steps={args.sampling_steps}", "--guidance_scale=1"])
    shape = (4, args.latent_size, args.latent_size)
    denoiser, ema, optimizer = train_ldm.build_models(settings, ctx, shape, len(CLASSES))
    if peer:
        denoiser.unet = peer_unet(settings, shape, ctx.device)
        ema = model.EMA(denoiser, settings.ema_decay)
        optimizer = torch.optim.AdamW(denoiser.parameters(), settings.lr, fused=True)
    return (denoiser, ema, optimizer), settings, shape


def ldm_step(args, ctx, peer=False):
    """Function that takes one step of train_ldm.py."""
    models, settings, shape = ldm_models(args, ctx, peer)
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


def sampling(args, ctx, peer=False):
    """Function that draws a batch of latents as sample.py does."""
    (denoiser, _, _), settings, shape = ldm_models(args, ctx, peer)
    if ctx.compile:
        denoiser.unet.compile(mode=ctx.compile)
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
    add("--peer", action=BooleanFlag, default=False, help="the UNet in turn with that of diffusers")
    add("--repeats", type=at_least(1), default=5, help="timed rounds")
    add("--json", help="file for all numbers")
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
    args.max_steps = None  # as in a long run
    parts = args.only.split(",")
    if not PARTS.keys() >= set(parts):
        fail(f"--only={args.only}: choose from {','.join(PARTS)}")
    ctx = dist.setup(args)
    name = torch.cuda.get_device_name() if ctx.device.type == "cuda" else (
        f"CPU, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads")
    facts = {"device": name, "precision": str(ctx.dtype), "layout": str(ctx.memory_format),
             "compile": ctx.compile or "off", "torch": torch.__version__,
             "load average": os.getloadavg()[0]}
    print(", ".join(f"{name} {value}" for name, value in facts.items()), flush=True)
    rows = []
    for part in parts:
        tasks = {"ours": PARTS[part](args, ctx)}
        if args.peer and part != "vae":
            tasks["diffusers"] = PARTS[part](args, ctx, peer=True)
        if ctx.device.type == "cuda":  # what deterministic algorithms cost: see dist.setup
            free = torch.backends.cudnn.flags(enabled=True, benchmark=True, deterministic=False)
            tasks["free cuDNN"] = free(PARTS[part](args, ctx))
        images = args.vae_batch if part == "vae" else args.batch
        for row in measure(part, images, tasks, args.repeats, ctx.device):
            print(ROW.format(**row), flush=True)
            rows.append(row)
        if args.json:  # after each part: a run that is cut off keeps what it measured
            write_json(args.json, {"facts": facts, "args": vars(args), "rows": rows})


if __name__ == "__main__":
    main()
