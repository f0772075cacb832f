"""Measure speed on this machine: the training step of both trainers, and sampling.

    python dev/bench.py             # about two minutes on two idle CPU cores
    python dev/bench.py --peer      # in turn with diffusers (pip install diffusers)

Candidates run in one process in turn, A B C A B C ...; the last column, such as `1.20 x`, is the
median over the rounds of the time relative to ours: above 1 is slower. FLOPs are those of
convolutions and matrix products. The peak is the highest rate that these reached between the rounds
in the same precision. The peer is diffusers with the same channels, blocks and attention. `script`:
float32, eager, nothing fused, as its training script runs. `tuned`: fused AdamW, foreach EMA, our
precision and compilation, the faster layout, weights cast once. Results: docs/benchmarks.md.
"""
import importlib.util
import itertools
import os
import pathlib
import statistics
import sys
import time
import warnings

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import model
import sample
import train_ldm
import train_vae
from lib import diffusers_io, dist
from lib.args import BooleanFlag, add_precision_arguments, at_least, make_parser, parse_settings
from lib.files import fail, write_json

CLASSES = ("normal", "tb")
ROW = ("{part:<6} {name:<17} {median:8.3f} s, {images_per_second:8.2f} images/s, "
       "{gflop_per_image:.2f} GFLOP per image, {fraction_of_peak:.0%} of the peak of "
       "{peak_gflops:.0f} GFLOP/s, {ratio:.2f} x")

# --- measuring ----------------------------------------------------------------------------------


def clock(function, device):
    """Seconds of a call, including the work it leaves to the device."""
    start = time.perf_counter()
    function()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - start


def count_flops(function):
    """FLOPs of a call, compiled or not; attention counts as plain matrix products."""
    with torch.compiler.set_stance("force_eager"), sdpa_kernel(SDPBackend.MATH):
        # Without torch.compile's warning about the counter's own hooks.
        with FlopCounterMode(display=False) as flops, warnings.catch_warnings(action="ignore"):
            function()
    return flops.get_total_flops()


def peak_rate(device, dtype):
    """FLOP/s of a matrix product or a 3x3 convolution: the best of three calls."""
    side, batch, size = (512, 8, 32) if device.type == "cpu" else (8192, 256, 64)
    a, b = torch.randn(2, side, side, device=device, dtype=dtype)
    x = torch.randn(batch, size, size, 192, device=device, dtype=dtype).movedim(3, 1)
    weight = torch.randn(192, 192, 3, 3, device=device, dtype=dtype)
    products = [(lambda: a @ b, 2 * side**3),
                (lambda: torch.conv2d(x, weight, padding=1), 2 * x.numel() * 192 * 9)]
    return max(flops / clock(function, device) for function, flops in products * 3)


def measure(part, images, candidates, repeats, device, warmup=2):
    """Rows, dicts of what ROW shows, of candidates [(name, dtype, run)], `images` images per run().

    They run in turn, `warmup` rounds untimed, then `repeats`. The peak is measured in every round,
    since a virtual CPU shares its matrix units: its speed changes by a factor of two in seconds.
    """
    peaks = {dtype: 0.0 for _, dtype, _ in candidates}
    rounds = []  # seconds of each candidate
    for _ in range(warmup + repeats):
        peaks = {dtype: max(peak, peak_rate(device, dtype)) for dtype, peak in peaks.items()}
        rounds.append([clock(run, device) for _, _, run in candidates])
    rows = []
    for i, (name, dtype, run) in enumerate(candidates):
        seconds = [times[i] for times in rounds[warmup:]]
        median, flops = statistics.median(seconds), count_flops(run)
        rows.append({
            "part": part, "name": name, "seconds": seconds, "median": median,
            "images_per_second": images / median, "gflop_per_image": flops / images / 1e9,
            "peak_gflops": peaks[dtype] / 1e9, "fraction_of_peak": flops / median / peaks[dtype],
            "ratio": statistics.median(times[i] / times[0] for times in rounds[warmup:])})
    return rows


# --- what is measured: functions that return the function to time -------------------------------


def ldm_problem(args, ctx):
    """(settings of train_ldm.py, shape of a latent, MicroBatch of random latents)."""
    settings = train_ldm.parse_args([
        f"--ldm_base_ch={args.base_ch}", f"--batch_per_device={args.batch}", f"--seed={args.seed}",
        "--sampler=dpmpp_2m", f"--num_sampling_steps={args.sampling_steps}", "--guidance_scale=1"])
    shape = (4, args.latent_size, args.latent_size)
    mean = torch.randn(args.batch, *shape, device=ctx.device)
    y = torch.arange(args.batch, device=ctx.device) % len(CLASSES)
    return settings, shape, train_ldm.MicroBatch((mean, torch.full_like(mean, -6.0)), y, None)


def vae_problem(args, ctx):
    """(settings of train_vae.py without its discriminator, which starts late; random images)."""
    settings = train_vae.parse_args([
        f"--img_size={args.img_size}", f"--base_ch={args.vae_base_ch}", "--num_res_blocks=1",
        "--disc_weight=0", f"--batch_per_device={args.vae_batch}", f"--seed={args.seed}"])
    return settings, torch.randn(args.vae_batch, 1, args.img_size, args.img_size, device=ctx.device)


def our_ldm_step(args, ctx):
    settings, shape, batch = ldm_problem(args, ctx)
    models = train_ldm.build_models(settings, ctx, shape, len(CLASSES))
    loss_fn = train_ldm.wrap(models[0], shape, settings, ctx)
    means, steps = train_ldm.LossMeans(ctx), itertools.count()
    return lambda: means.add(*train_ldm.train_step(
        *models, loss_fn, [batch], 1.0, next(steps), settings, ctx))


def our_vae_step(args, ctx):
    settings, x = vae_problem(args, ctx)
    models = train_vae.build_models(settings, ctx)
    wrapped = train_vae.wrap(models, settings, ctx)
    means, steps = dist.RunningMeans(ctx, train_vae.LOSSES), itertools.count()
    return lambda: means.add(*train_vae.train_step(
        models, *wrapped, None, x, next(steps), settings, ctx))


def our_sampling(args, ctx):
    settings, shape, _ = ldm_problem(args, ctx)
    denoiser = train_ldm.build_models(settings, ctx, shape, len(CLASSES))[0]
    if ctx.compile:
        denoiser.unet.compile()
    denoiser = sample.cast_weights(denoiser, ctx)
    requests = [(i % len(CLASSES), i) for i in range(args.batch)]
    return lambda: sample.sample_latents(denoiser, shape, requests, CLASSES, settings, ctx)


def place_peer(net, ctx, tuned):
    """A network of diffusers on the device, compiled as ours. Its faster layout is channels_last on
    a GPU; on a CPU PyTorch's group norm is slow in it. Inputs follow the weights."""
    fast = torch.channels_last if ctx.device.type == "cuda" else torch.contiguous_format
    net = net.to(ctx.device, memory_format=fast if tuned else torch.contiguous_format)
    return torch.compile(net) if ctx.compile else net


def peer_unet(args, ctx, tuned):
    """(UNet2DModel that equals model.UNet, MicroBatch of random latents)."""
    from diffusers import UNet2DModel
    settings, shape, batch = ldm_problem(args, ctx)
    config = diffusers_io.unet_config(vars(settings), shape, len(CLASSES))
    return place_peer(UNet2DModel(**config), ctx, tuned), batch


def peer_step(net, loss_fn, tuned):
    """A step on the loss that loss_fn() returns, as in the training scripts of diffusers."""
    from diffusers.training_utils import EMAModel
    optimizer = torch.optim.AdamW(net.parameters(), 1e-4, fused=tuned or None)
    ema = EMAModel(net.parameters(), foreach=tuned)

    def run():
        loss_fn().backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(net.parameters())
    return run


def peer_ldm_step(args, ctx, tuned):
    from diffusers import DDPMScheduler
    (net, batch), scheduler = peer_unet(args, ctx, tuned), DDPMScheduler(num_train_timesteps=1000)

    def loss():
        x0 = model.Posterior(*batch.posterior).sample(torch.randn_like(batch.posterior[0]))
        noise, t = torch.randn_like(x0), torch.randint(0, 1000, (len(x0),), device=x0.device)
        with ctx.autocast():
            output = net(scheduler.add_noise(x0, noise, t), t, class_labels=batch.y).sample
        return torch.nn.functional.mse_loss(output.float(), noise)
    return peer_step(net, loss, tuned)


def peer_vae_step(args, ctx, tuned):
    from diffusers import AutoencoderKL
    settings, x = vae_problem(args, ctx)
    net = AutoencoderKL(**diffusers_io.vae_config(vars(settings), 1.0))
    net = place_peer(net, ctx, tuned)

    def loss():
        with ctx.autocast():
            rec = net(x, sample_posterior=True).sample
        return train_vae.reconstruction_loss(rec.float(), x, settings)
    return peer_step(net, loss, tuned)


def peer_sampling(args, ctx, tuned):
    from diffusers import DPMSolverMultistepScheduler
    (net, batch), scheduler = peer_unet(args, ctx, tuned), DPMSolverMultistepScheduler()
    net = sample.cast_weights(net, ctx) if tuned else net

    @torch.no_grad()
    def run():
        scheduler.set_timesteps(args.sampling_steps, device=ctx.device)
        x = torch.randn_like(batch.posterior[0])
        for t in scheduler.timesteps:
            with ctx.autocast():
                output = net(x, t, class_labels=batch.y).sample
            x = scheduler.step(output.float(), t, x).prev_sample
    return run


# --- the program --------------------------------------------------------------------------------

PARTS = {"train": (our_ldm_step, peer_ldm_step), "vae": (our_vae_step, peer_vae_step),
         "sample": (our_sampling, peer_sampling)}


def candidates_of(part, args, ctx):
    """[(name, dtype, run)] of a part: ours and, with --peer, both of the peer."""
    ours, peer = PARTS[part]
    candidates = [("ours", ctx.dtype, ours(args, ctx))]
    if args.peer:
        script = ctx._replace(dtype=torch.float32, compile=False)
        candidates += [("diffusers, script", script.dtype, peer(args, script, tuned=False)),
                       ("diffusers, tuned", ctx.dtype, peer(args, ctx, tuned=True))]
    return candidates


def main(argv=None):
    parser = make_parser(__doc__)
    add_precision_arguments(parser)
    add = parser.add_argument_group("benchmark").add_argument
    add("--only", default=",".join(PARTS), help="comma list of parts")
    add("--peer", action=BooleanFlag, default=False, help="in turn with diffusers")
    add("--repeats", type=at_least(1), default=5, help="timed rounds")
    add("--threads", type=at_least(0), default=0, help="CPU threads; 0: as in training")
    add("--json", help="file for all numbers")
    add("--latent_size", type=at_least(1), default=16, help="side of the latents")
    add("--base_ch", type=at_least(1), default=96, help="channels of the UNet's first level")
    add("--batch", type=at_least(1), default=16, help="latents per step, and sampled at once")
    add("--sampling_steps", type=at_least(1), default=20, help="network evaluations per sample")
    add("--img_size", type=at_least(1), default=128, help="side of the autoencoder's images")
    add("--vae_base_ch", type=at_least(1), default=32, help="its channels at full resolution")
    add("--vae_batch", type=at_least(1), default=4, help="images per step of the autoencoder")
    args = parse_settings(parser, argv)
    parts = args.only.split(",")
    if not PARTS.keys() >= set(parts):
        fail(f"--only={args.only} has an unknown part: give some of {','.join(PARTS)}")
    if args.peer and importlib.util.find_spec("diffusers") is None:
        fail("--peer compares with diffusers: pip install diffusers")
    ctx = dist.setup(args)
    torch.set_num_threads(args.threads or torch.get_num_threads())
    on_gpu, cpu = ctx.device.type == "cuda", torch.backends.cpu.get_cpu_capability()
    device = torch.cuda.get_device_name(ctx.device) if on_gpu else f"{ctx.device} {cpu}"
    facts = {"device": device, "threads": torch.get_num_threads(), "dtype": str(ctx.dtype),
             "compile": ctx.compile, "torch": torch.__version__, "load average": os.getloadavg()[0]}
    print(", ".join(f"{name} {value}" for name, value in facts.items()), flush=True)
    rows = []
    for part in parts:
        images = args.vae_batch if part == "vae" else args.batch
        new = measure(part, images, candidates_of(part, args, ctx), args.repeats, ctx.device)
        print(*[ROW.format(**row) for row in new], sep="\n", flush=True)
        rows += new
    if args.json:
        write_json(args.json, {"facts": facts, "args": vars(args), "rows": rows})


if __name__ == "__main__":
    main()
