"""Measure speed on this machine: the training step of both trainers, and sampling.

    python dev/bench.py                               # about two minutes on two idle CPU cores
    python dev/bench.py --peer                        # in turn with diffusers

What is compared runs in one process in turn, A B C A B C ...; the last column, as in `1.20 x`, is
the median over the rounds of a row's time by that of the first row of its part: above 1 is slower.
FLOPs are those of convolutions and matrix products, forward and backward. The peak is the most that
matrix products and 3x3 convolutions of the same precision reached between the rounds.

The peer is diffusers with the same channels, blocks and attention. `script` is how its training
script runs: float32, eager, contiguous, nothing fused. `tuned` has fused AdamW, foreach EMA, our
precision and compilation, the faster layout and, for sampling, weights that are cast once. What we
measured: docs/benchmarks.md.
"""
import importlib.util
import itertools
import pathlib
import re
import statistics
import sys
import time
import warnings

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import model  # noqa: E402
import sample  # noqa: E402
import train_ldm  # noqa: E402
import train_vae  # noqa: E402
from lib import diffusers_io, dist  # noqa: E402
from lib.args import (BooleanFlag, add_precision_arguments, at_least, make_parser,  # noqa: E402
                      parse_settings)
from lib.files import fail, write_json  # noqa: E402

CLASSES = ("normal", "tb")
Z = 4  # latent channels
ROW = ("{part:<6} {name:<17} {median:8.3f} s ({min:.3f} to {max:.3f}), {images_per_second:.2f} "
       "images/s, {gflop_per_image:.2f} GFLOP per image, {fraction_of_peak:.0%} of the peak of "
       "{peak_gflops:.0f} GFLOP/s, {ratio:.2f} x")

# --- measuring ----------------------------------------------------------------------------------


def clock(function, device):
    """Seconds of a call, with what it left the device to do."""
    start = time.perf_counter()
    function()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - start


def count_flops(function):
    """FLOPs of a call, compiled or not; attention as the plain matrix products it can be."""
    with torch.compiler.set_stance("force_eager"), sdpa_kernel(SDPBackend.MATH):
        # Hushed: torch.compile warns of the counter's own hooks.
        with FlopCounterMode(display=False) as flops, warnings.catch_warnings(action="ignore"):
            function()
    return flops.get_total_flops()


def peak_candidates(device, dtype):
    """[(function, FLOPs)]: a matrix product and a 3x3 convolution, on a CPU small enough to take
    less than a second each where bf16 is emulated."""
    side, batch, size = (512, 8, 32) if device.type == "cpu" else (8192, 256, 64)
    a, b = torch.randn(2, side, side, device=device, dtype=dtype)
    x = torch.randn(batch, size, size, 192, device=device, dtype=dtype).movedim(3, 1)
    weight = torch.randn(192, 192, 3, 3, device=device, dtype=dtype)
    return [(lambda: a @ b, 2 * side**3),
            (lambda: torch.conv2d(x, weight, padding=1), 2 * x.numel() * 192 * 9)]


def measure(part, images, tasks, repeats, device, warmup=2):
    """Rows, dictionaries of what ROW shows, of tasks [(name, dtype, run)] on a batch of `images`.

    Tasks are called in turn, `warmup` rounds untimed, then `repeats`. The peak, that of their
    dtypes, is taken in every round: a virtual CPU shares its matrix units with a neighbour, and
    what they give changes by a factor of two within seconds.
    """
    peaks = {dtype: 0.0 for _, dtype, _ in tasks}  # FLOP/s
    rounds = []  # seconds of each task
    for _ in range(warmup + repeats):
        for dtype in peaks:
            for function, work in peak_candidates(device, dtype) * 3:
                peaks[dtype] = max(peaks[dtype], work / clock(function, device))
        rounds.append([clock(run, device) for _, _, run in tasks])
    rounds = rounds[warmup:]
    rows = []
    for i, (name, dtype, run) in enumerate(tasks):
        seconds = [times[i] for times in rounds]
        median, flops = statistics.median(seconds), count_flops(run)
        rows.append({
            "part": part, "name": name, "seconds": seconds,
            "median": median, "min": min(seconds), "max": max(seconds),
            "images_per_second": images / median, "gflop_per_image": flops / images / 1e9,
            "peak_gflops": peaks[dtype] / 1e9, "fraction_of_peak": flops / median / peaks[dtype],
            "ratio": statistics.median(times[i] / times[0] for times in rounds)})
    return rows


# --- ours: the trainers' own functions; each returns what is timed ------------------------------


def ldm_settings(args):
    """(settings of train_ldm.py, shape of a latent); samples are drawn without guidance."""
    settings = train_ldm.parse_args([
        f"--ldm_base_ch={args.base_ch}", f"--batch_per_device={args.batch}", f"--seed={args.seed}",
        "--sampler=dpmpp_2m", f"--num_sampling_steps={args.sampling_steps}", "--guidance_scale=1"])
    return settings, (Z, args.latent_size, args.latent_size)


def random_latents(args, device):
    """(mean, logvar, class indices) of a batch, as train_ldm.py reads it."""
    mean = torch.randn(args.batch, Z, args.latent_size, args.latent_size, device=device)
    return mean, torch.full_like(mean, -6.0), torch.arange(args.batch, device=device) % len(CLASSES)


def own_ldm_step(args, ctx):
    """A step of train_ldm.py."""
    settings, shape = ldm_settings(args)
    models = train_ldm.build_models(settings, ctx, shape, len(CLASSES))
    loss_fn = train_ldm.wrap(models[0], shape, settings, ctx)
    means, steps = train_ldm.LossMeans(ctx), itertools.count()
    mean, logvar, y = random_latents(args, ctx.device)
    batch = train_ldm.MicroBatch((mean, logvar), y, None)

    def run():
        means.add(*train_ldm.train_step(*models, loss_fn, [batch], 1.0, next(steps), settings,
                                        ctx))
    return run


def vae_settings(args, ctx):
    """(settings of train_vae.py, a batch of images)."""
    settings = train_vae.parse_args([
        f"--img_size={args.img_size}", f"--base_ch={args.vae_base_ch}", "--num_res_blocks=1",
        "--disc_weight=0", f"--batch_per_device={args.vae_batch}", f"--seed={args.seed}"])
    size = (args.vae_batch, 1, args.img_size, args.img_size)
    return settings, torch.rand(size, device=ctx.device) * 2 - 1


def own_vae_step(args, ctx):
    """A step of train_vae.py, without its discriminator, which starts late."""
    settings, x = vae_settings(args, ctx)
    models = train_vae.build_models(settings, ctx)
    wrapped = train_vae.wrap(models, settings, ctx)
    means, steps = dist.RunningMeans(ctx, train_vae.LOSSES), itertools.count()

    def run():
        means.add(*train_vae.train_step(models, *wrapped, None, x, next(steps), settings, ctx))
    return run


def own_sampling(args, ctx):
    """A batch of latents, as sample.py draws it."""
    settings, shape = ldm_settings(args)
    denoiser, _, _ = train_ldm.build_models(settings, ctx, shape, len(CLASSES))
    if ctx.compile:
        denoiser.unet.compile()
    denoiser = sample.cast_weights(denoiser, ctx)
    wanted = [(i % len(CLASSES), i) for i in range(args.batch)]
    return lambda: sample.sample_latents(denoiser, shape, wanted, CLASSES, settings, ctx)


# --- the peer: likewise -------------------------------------------------------------------------


def lay_out(net, ctx, tuned):
    """Move a network of diffusers to the device, and if tuned into the faster layout."""
    # A convolution takes the layout of its weight: inputs need no change. On CPUs PyTorch's group
    # norm is slow in channels_last.
    on_gpu = ctx.device.type == "cuda"
    layout = torch.channels_last if tuned and on_gpu else torch.contiguous_format
    return net.to(ctx.device, memory_format=layout)


def peer_unet(args, ctx, tuned):
    """UNet2DModel that is model.UNet, as export.py makes it."""
    import diffusers
    settings, shape = ldm_settings(args)
    net = diffusers.UNet2DModel(**diffusers_io.unet_config(vars(settings), shape, len(CLASSES)))
    net = lay_out(net, ctx, tuned)
    return torch.compile(net) if ctx.compile else net


def peer_step(net, tuned):
    """Function that takes a loss and does with it what its training scripts do."""
    from diffusers.training_utils import EMAModel
    optimizer = torch.optim.AdamW(net.parameters(), 1e-4, fused=tuned or None)
    ema = EMAModel(net.parameters(), foreach=tuned)

    def step(loss):
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(net.parameters())
    return step


def peer_ldm_step(args, ctx, tuned):
    """A training step as its training script does it."""
    from diffusers import DDPMScheduler
    net, scheduler = peer_unet(args, ctx, tuned), DDPMScheduler(num_train_timesteps=1000)
    step = peer_step(net, tuned)
    mean, logvar, y = random_latents(args, ctx.device)

    def run():
        x0 = model.Posterior(mean, logvar).sample(torch.randn_like(mean))
        noise, t = torch.randn_like(x0), torch.randint(0, 1000, (len(x0),), device=x0.device)
        with ctx.autocast():
            output = net(scheduler.add_noise(x0, noise, t), t, class_labels=y).sample
        step(torch.nn.functional.mse_loss(output.float(), noise))
    return run


def peer_vae_step(args, ctx, tuned):
    """A training step of its autoencoder with our loss."""
    import diffusers
    settings, x = vae_settings(args, ctx)
    net = diffusers.AutoencoderKL(**diffusers_io.vae_config(vars(settings), 1.0))
    step = peer_step(lay_out(net, ctx, tuned), tuned)

    def forward(x):
        posterior = net.encode(x).latent_dist
        return net.decode(posterior.sample()).sample.float(), posterior.kl().mean()

    forward = torch.compile(forward) if ctx.compile else forward

    def run():
        with ctx.autocast():
            rec, kl = forward(x)
            loss = train_vae.reconstruction_loss(rec, x, settings) + settings.kl_weight * kl
        step(loss)
    return run


def peer_sampling(args, ctx, tuned):
    """A batch of latents by its DPM-Solver++."""
    from diffusers import DPMSolverMultistepScheduler
    net, scheduler = peer_unet(args, ctx, tuned), DPMSolverMultistepScheduler()
    net = sample.cast_weights(net, ctx) if tuned else net
    mean, _, y = random_latents(args, ctx.device)

    def run():
        scheduler.set_timesteps(args.sampling_steps, device=mean.device)
        x = torch.randn_like(mean)
        with torch.no_grad(), ctx.autocast():
            for t in scheduler.timesteps:
                output = net(x, t, class_labels=y).sample.float()
                x = scheduler.step(output, t, x).prev_sample
    return run


# --- the program --------------------------------------------------------------------------------

OURS = {"train": own_ldm_step, "vae": own_vae_step, "sample": own_sampling}
PEERS = {"train": peer_ldm_step, "vae": peer_vae_step, "sample": peer_sampling}


def tasks_of(part, args, ctx):
    """[(name, dtype, run)] of a part: ours and, with --peer, both of the peer."""
    tasks = [("ours", ctx.dtype, OURS[part](args, ctx))]
    if args.peer:
        script = ctx._replace(dtype=torch.float32, compile=False)
        tasks += [("diffusers, script", script.dtype, PEERS[part](args, script, tuned=False)),
                  ("diffusers, tuned", ctx.dtype, PEERS[part](args, ctx, tuned=True))]
    return tasks


def device_name(device):
    """Model of the GPU, or of the CPU with the vector instructions and threads that torch uses."""
    if device.type != "cpu":
        return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    found = re.search("model name.*: (.*)", cpuinfo.read_text() if cpuinfo.exists() else "")
    return (f"{found[1] if found else 'CPU'}, {torch.backends.cpu.get_cpu_capability()}, "
            f"{torch.get_num_threads()} threads")


def build_parser():
    """Parser of this program."""
    parser = make_parser(__doc__)
    add_precision_arguments(parser)
    add = parser.add_argument_group("benchmark").add_argument
    add("--only", default=",".join(OURS), help="comma list of parts")
    add("--peer", action=BooleanFlag, default=False, help="the same by diffusers, in turn")
    add("--repeats", type=at_least(1), default=5, help="timed rounds")
    add("--threads", type=at_least(0), default=0, help="of the CPU; 0: as in training")
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
    parts = [part.strip() for part in args.only.split(",")]
    if not OURS.keys() >= set(parts):
        fail(f"--only={args.only} has no such part: give some of {','.join(OURS)}")
    if args.peer and importlib.util.find_spec("diffusers") is None:
        fail("--peer compares with diffusers: pip install diffusers")
    ctx = dist.setup(args)
    torch.set_num_threads(args.threads or torch.get_num_threads())
    facts = {"device": device_name(ctx.device), "layout": str(ctx.memory_format),
             "precision": f"{ctx.dtype} (--dtype={args.dtype})", "compile": ctx.compile,
             "torch": torch.__version__}
    print(", ".join(f"{name} {value}" for name, value in facts.items()), flush=True)
    rows = []
    for part in parts:
        tasks = tasks_of(part, args, ctx)
        images = args.vae_batch if part == "vae" else args.batch
        new = measure(part, images, tasks, args.repeats, ctx.device)
        print(*[ROW.format(**row) for row in new], sep="\n", flush=True)
        rows += new
    if args.json:
        write_json(args.json, {"facts": facts, "args": vars(args), "rows": rows})


if __name__ == "__main__":
    main()
