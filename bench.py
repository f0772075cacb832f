"""Measure speed on this machine: training steps, sampling, first step, epoch, processes, compiled graph.

    python bench.py                                        # small; about ten minutes on two idle CPU cores
    python bench.py --only=train,vae --peer                # in turn with diffusers (pip install diffusers)
    python bench.py --latent_size=16,32 --json=bench.json

What is compared runs in one process in turn, A B C A B C ...; the last column, as in `1.20 x`, is the median over
the rounds of its time by that of the first line of its part: above 1 is slower. FLOPs are those of convolutions
and matrix products, forward and backward, as torch.utils.flop_counter counts them; their share of peak is by what
the fastest of ten large matrix products reaches here in the same precision. A convolution can be more efficient
than that product, so more than 100 % is possible.

The peer does the same work with UNet2DModel or AutoencoderKL of the same channels, blocks and attention and its
own schedulers and EMAModel. `script` is how its training script runs: float32, eager, plain layout, nothing fused;
the others have fused AdamW and foreach EMA and differ in precision and layout.
"""
import argparse
import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import data
import experiment
import model
import sample
import train_ldm
import train_vae
from experiment import BooleanFlag, at_least, fail, int_list

CLASSES, Z = ("normal", "tb"), 4  # classes and latent channels of everything below
UNET_MULTS, VAE_MULTS, VAE_BLOCKS = (1, 2, 4), (1, 2, 4, 4), 1

# --- measuring ---------------------------------------------------------------------------------------------


def alternate(runs, repeats, device, warmup=2):
    """{name: [seconds of each round]} of {name: function} called in turn, after untimed rounds."""
    seconds = {name: [] for name in runs}
    for i in range(warmup + repeats):
        for name, function in runs.items():
            start = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if i >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def row(part, what, seconds, reference=None, **numbers):
    """One line of the table. reference: seconds to compare with round by round."""
    if reference:
        numbers["ratio"] = statistics.median(b / a for a, b in zip(reference, seconds, strict=True))
    return {"part": part, "what": what, "median": statistics.median(seconds), "seconds": seconds, **numbers}


def matmul_peak(device, dtype):
    """FLOP/s of the fastest of ten square matrix products."""
    n = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / min(alternate({"": lambda: a @ b}, 10, device)[""])


def count_flops(function):
    """FLOPs of a call, compiled or not; attention runs as plain matrix products, in which form it is counted."""
    with torch.compiler.set_stance("force_eager"), sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as flops:
            function()
    return flops.get_total_flops()


def step_rows(part, steps, inputs, args, procs):
    """Rows of {(name, dtype): training step}; all are compared with the first."""
    runs = {key: lambda step=step: step(*inputs) for key, step in steps.items()}
    seconds = alternate(runs, args.repeats, procs.device)
    peaks = {dtype: matmul_peak(procs.device, dtype) for _, dtype in steps}
    rows = []
    for (name, dtype), s in seconds.items():
        flops, median = count_flops(runs[name, dtype]), statistics.median(s)
        rows.append(row(part, name, s, next(iter(seconds.values())), images_per_second=len(inputs[0]) / median,
                        gflop_per_image=flops / len(inputs[0]) / 1e9, peak_gflops=peaks[dtype] / 1e9,
                        share_of_peak=flops / median / peaks[dtype]))
    return rows


# --- the project's training steps --------------------------------------------------------------------------


def own_settings(procs):
    """{name: Processes}: as training runs here and, where that is compiled, eager beside it."""
    return {"compiled": procs, "eager": procs._replace(compile=False)} if procs.compile else {"eager": procs}


def ldm_step(args, procs, size):
    """(step(mean, logvar), Denoiser): the body of train_ldm.py's loop, on posteriors [B, 4, size, size]."""
    device = procs.device
    s = train_ldm.parse_args([f"--ldm_base_ch={args.base_ch}", "--ldm_ch_mults=" + ",".join(map(str, UNET_MULTS))])
    torch.manual_seed(args.seed)
    denoiser = sample.build_denoiser(vars(s), (Z, size, size), len(CLASSES))
    denoiser = denoiser.to(device, memory_format=procs.memory_format)
    ema = model.EMA(denoiser, s.ema_decay)
    optimizer = torch.optim.AdamW(denoiser.parameters(), s.lr, weight_decay=s.weight_decay, fused=True)
    zeros = torch.zeros(args.batch, Z, size, size, device=device).contiguous(memory_format=procs.memory_format)
    loss_fn = experiment.data_parallel(procs, torch.compile(denoiser) if procs.compile else denoiser, zeros,
                                       zeros[:, 0, 0, 0], zeros, zeros[:, 0, 0, 0].long())
    window, done = experiment.Window(procs, ["train/loss", "train/grad_norm"]), 0

    def step(mean, logvar):
        nonlocal done
        rng = experiment.generator(device, args.seed, "ldm", done, procs.rank)
        labels = torch.arange(len(mean), device=device) % len(CLASSES)
        x0, t, noise, y = train_ldm.draw_inputs((mean, logvar), labels, 1.0, s.prob_uncond, denoiser.unet.null_class, rng)
        with procs.autocast():
            loss = loss_fn(x0.contiguous(memory_format=procs.memory_format), t, noise, y)
        loss.mean().backward()
        grad_norm, bad = experiment.clip_and_step(denoiser, optimizer, s.grad_clip)
        ema.update(denoiser, done + 1)
        window.add((loss.mean(), grad_norm), bad)
        done += 1
    return step, denoiser


def autoencoder(args, procs):
    torch.manual_seed(args.seed)
    vae = model.AutoencoderKL(args.img_size, Z, args.vae_base_ch, VAE_MULTS, VAE_BLOCKS)
    return vae.to(procs.device, memory_format=procs.memory_format)


def vae_loss(rec, x, kl, s):
    """The loss of train_vae.py before its discriminator starts, for both sides."""
    return train_vae.reconstruction_loss(rec, x, s) + s.kl_weight * kl.mean()


def vae_step(args, procs):
    """step(x): the body of train_vae.py's loop before its discriminator starts, on images [B, 1, S, S]."""
    s, vae = train_vae.parse_args([]), autoencoder(args, procs)
    ema = model.EMA(vae, s.ema_decay)
    optimizer = torch.optim.AdamW(vae.parameters(), s.lr, (0.5, 0.9), weight_decay=s.weight_decay, fused=True)
    vae_fn = torch.compile(vae) if procs.compile else vae

    def step(x):
        noise = torch.randn(len(x), *vae.latent_shape, device=procs.device)
        with procs.autocast():
            rec, posterior = vae_fn(x.contiguous(memory_format=procs.memory_format), noise)
            loss = vae_loss(rec, x, posterior.kl(), s)
        loss.backward()
        experiment.clip_and_step(vae, optimizer, s.grad_clip)
        ema.update(vae, 1000)
    return step


# --- the peer's --------------------------------------------------------------------------------------------


class PeerSetting(NamedTuple):
    name: str
    dtype: torch.dtype
    layout: torch.memory_format
    tuned: bool = True  # fused AdamW, foreach EMA
    compiled: bool = False


def peer_settings(args, procs):
    """As its script runs it, both layouts in every precision worth a try and, where we are, compiled."""
    if not args.peer:
        return []
    plain, last = torch.contiguous_format, torch.channels_last
    settings = [PeerSetting("peer, script", torch.float32, plain, tuned=False)]
    for dtype in dict.fromkeys((torch.float32, procs.dtype)):
        for name, layout in (("plain", plain), ("channels_last", last)):
            settings.append(PeerSetting(f"peer, {str(dtype)[6:]}, {name}", dtype, layout))
    return settings + [PeerSetting("peer, compiled", procs.dtype, procs.memory_format, compiled=True)] * procs.compile


def peer_unet(args, procs, size, setting):
    """UNet2DModel with the layers of model.UNet."""
    from diffusers import UNet2DModel
    groups, attn_res = model.norm(args.base_ch).num_groups, train_ldm.make_parser().get_default("ldm_attn_res")
    attn = ["Attn" if size >> level in attn_res else "" for level in range(len(UNET_MULTS))]
    net = UNet2DModel(
        sample_size=size, in_channels=Z, out_channels=Z, block_out_channels=[args.base_ch * m for m in UNET_MULTS],
        down_block_types=[f"{a}DownBlock2D" for a in attn], up_block_types=[f"{a}UpBlock2D" for a in attn[::-1]],
        layers_per_block=2, attention_head_dim=args.base_ch, resnet_time_scale_shift="scale_shift",
        num_class_embeds=len(CLASSES) + 1, norm_num_groups=groups, attn_norm_num_groups=groups)
    return net.to(procs.device, memory_format=setting.layout)


def peer_step(net, loss_of, setting):
    """step(*inputs): backward of loss_of(*inputs), clipping, AdamW and EMA as its training script does them."""
    from diffusers.training_utils import EMAModel
    optimizer = torch.optim.AdamW(net.parameters(), 1e-4, fused=setting.tuned or None)
    ema = EMAModel(net.parameters(), foreach=setting.tuned)

    def step(*inputs):
        loss_of(*inputs).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(net.parameters())
    return step


def peer_ldm_step(args, procs, size, setting):
    from diffusers import DDPMScheduler
    net, scheduler = peer_unet(args, procs, size, setting).train(), DDPMScheduler(num_train_timesteps=1000)
    forward = torch.compile(net) if setting.compiled else net

    def loss_of(mean, logvar):
        x0 = model.Posterior(mean, logvar).sample(torch.randn_like(mean))
        noise, t = torch.randn_like(x0), torch.randint(0, 1000, (len(x0),), device=procs.device)
        y = torch.arange(len(x0), device=procs.device) % len(CLASSES)
        noisy = scheduler.add_noise(x0, noise, t).contiguous(memory_format=setting.layout)
        with procs._replace(dtype=setting.dtype).autocast():
            output = forward(noisy, t, class_labels=y).sample
        return F.mse_loss(output.float(), noise)
    return peer_step(net, loss_of, setting)


def peer_vae_step(args, procs, setting):
    """AutoencoderKL with the layers of model.AutoencoderKL (and two 1x1 convolutions on the latent), our loss."""
    from diffusers import AutoencoderKL
    s = train_vae.parse_args([])
    net = AutoencoderKL(
        in_channels=1, out_channels=1, latent_channels=Z, block_out_channels=[args.vae_base_ch * m for m in VAE_MULTS],
        down_block_types=["DownEncoderBlock2D"] * len(VAE_MULTS), up_block_types=["UpDecoderBlock2D"] * len(VAE_MULTS),
        layers_per_block=VAE_BLOCKS, norm_num_groups=model.norm(args.vae_base_ch).num_groups)
    net = net.to(procs.device, memory_format=setting.layout).train()

    def forward(x):
        posterior = net.encode(x).latent_dist
        return net.decode(posterior.sample()).sample, posterior.kl()
    forward = torch.compile(forward) if setting.compiled else forward

    def loss_of(x):
        with procs._replace(dtype=setting.dtype).autocast():
            rec, kl = forward(x.contiguous(memory_format=setting.layout))
            return vae_loss(rec.float(), x, kl.float(), s)
    return peer_step(net, loss_of, setting)


def peer_sampler(args, procs, size, setting, y, steps):
    """Function that draws a batch of latents of classes y with its DPM-Solver++."""
    from diffusers import DPMSolverMultistepScheduler
    net, scheduler = peer_unet(args, procs, size, setting).eval(), DPMSolverMultistepScheduler()
    forward = torch.compile(net) if setting.compiled else net

    def draw():
        scheduler.set_timesteps(steps, device=procs.device)
        x = torch.randn(len(y), Z, size, size, device=procs.device).contiguous(memory_format=setting.layout)
        for t in scheduler.timesteps:
            with procs._replace(dtype=setting.dtype).autocast():
                output = forward(x, t, class_labels=y).sample
            x = scheduler.step(output.float(), t, x).prev_sample
    return draw


# --- parts: each returns rows ------------------------------------------------------------------------------


def random_posterior(args, procs, size):
    mean = torch.randn(args.batch, Z, size, size, device=procs.device)
    return mean, torch.full_like(mean, -6.0)


def bench_train(args, procs):
    rows = []
    for size in args.latent_size:
        steps = {(name, p.dtype): ldm_step(args, p, size)[0] for name, p in own_settings(procs).items()}
        steps |= {(s.name, s.dtype): peer_ldm_step(args, procs, size, s) for s in peer_settings(args, procs)}
        rows += step_rows(f"train {size}x{size}", steps, random_posterior(args, procs, size), args, procs)
    return rows


def bench_vae(args, procs):
    steps = {(name, p.dtype): vae_step(args, p) for name, p in own_settings(procs).items()}
    steps |= {(s.name, s.dtype): peer_vae_step(args, procs, s) for s in peer_settings(args, procs)}
    x = torch.rand(args.vae_batch, 1, args.img_size, args.img_size, device=procs.device) * 2 - 1
    return step_rows(f"vae {args.img_size} px", steps, (x,), args, procs)


@torch.no_grad()
def bench_sample(args, procs):
    """A batch of latents without guidance: DPM-Solver++ with few steps, ancestral with many (timed once)."""
    size, (few, many), evaluations = args.latent_size[0], args.sampling_steps, []
    denoiser = ldm_step(args, procs, size)[1].eval()
    if procs.compile:
        denoiser.unet = torch.compile(denoiser.unet)
    wanted = [(i % len(CLASSES), i) for i in range(args.batch)]
    y = torch.tensor([c for c, _ in wanted], device=procs.device)

    def own(sampler, steps):
        evaluations.clear()
        how = argparse.Namespace(seed=args.seed, sampler=sampler, num_sampling_steps=steps, guidance_scale=1.0,
                                 guidance_interval=(0, 1))
        sample.sample_latents(denoiser, (Z, size, size), wanted, CLASSES, how, procs, lambda: evaluations.append(1))

    runs = {"dpmpp": lambda: own("dpmpp", few)}
    runs |= {s.name: peer_sampler(args, procs, size, s, y, few) for s in peer_settings(args, procs)}
    seconds = alternate(runs, args.repeats, procs.device)
    part, ours = f"sample {size}x{size}", seconds["dpmpp"]
    rows = [row(part, f"{name}, {few} steps", s, ours, seconds_per_image=statistics.median(s) / args.batch,
                evaluations=few) for name, s in seconds.items()]
    slow = alternate({"": lambda: own("ancestral", many)}, 1, procs.device, warmup=0)[""]
    return rows + [row(part, f"ancestral, {many} steps", slow, [statistics.median(ours)],
                       seconds_per_image=slow[0] / args.batch, evaluations=len(evaluations))]


def bench_epoch(args, procs):
    """Latents from the cache or encoded on the fly: reading an epoch of them, and training on them as well."""
    vae = autoencoder(args, procs).eval().requires_grad_(False)
    step, _ = ldm_step(args, procs, vae.latent_shape[1])
    with tempfile.TemporaryDirectory() as folder:
        images = data.open_images(argparse.Namespace(**vars(args) | {"output_root": folder}), procs, args.split)
        images = images.subset(range(min(len(images), args.epoch_images)))
        sets = {name: data.LatentSet(images, vae, "untrained", folder, procs, cached)
                for name, cached in (("cached latents", True), ("encoded on the fly", False))}

        def epoch(latents, train):
            for i in range(experiment.steps_per_epoch(len(images), args.batch, 1)):
                posterior = latents.posterior(experiment.batch_indices(i, len(images), args.batch, args.seed)[0])
                if train:
                    step(*posterior)
        runs = {(part, name): lambda latents=latents, train=train: epoch(latents, train)
                for part, train in (("read", False), ("train", True)) for name, latents in sets.items()}
        seconds = alternate(runs, args.repeats, procs.device, warmup=1)
    return [row(f"epoch, {part}", name, s, seconds[part, "cached latents"]) for (part, name), s in seconds.items()]


def child(args, processes=1, **changes):
    """What `measure_child` prints in a program of its own, or several under torchrun; `start` is when it began."""
    names = ("latent_size", "base_ch", "batch", "threads", "repeats", "seed", "device", "dtype", "compile")
    flags = {name: getattr(args, name) for name in names} | {"latent_size": args.latent_size[0]} | changes
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    command = [sys.executable, *launcher, __file__, "--child", *(f"--{k}={v}" for k, v in flags.items())]
    start = time.time()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        fail(f"a measurement in a program of its own failed, see above: {' '.join(command)}")
    return {"start": start, **json.loads(done.stdout.splitlines()[-1])}


def peak_resident():
    """Peak memory of this program in bytes; NaN where the system does not tell.

    Not getrusage: a new program's ru_maxrss starts at what the one that started it held.
    """
    try:
        with open("/proc/self/status") as f:
            return next(1024 * int(line.split()[1]) for line in f if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return math.nan


def measure_child(args, procs):
    """Print when the first training step was done, the seconds of the next ones, and the program's peak memory."""
    size, peer = args.latent_size[0], peer_settings(args, procs)
    step = peer_ldm_step(args, procs, size, peer[0]) if peer else ldm_step(args, procs, size)[0]
    posterior = random_posterior(args, procs, size)
    runs = {"": lambda: step(*posterior)}
    alternate(runs, 1, procs.device, warmup=0)
    first, seconds = time.time(), alternate(runs, args.repeats, procs.device, warmup=1)[""]
    memory = torch.cuda.max_memory_allocated() if procs.device.type == "cuda" else peak_resident()
    if procs.main:
        print(json.dumps({"first": first, "seconds": seconds, "memory": memory, "threads": torch.get_num_threads()}))


def bench_first_step(args, procs):
    """From the program's start to the end of its first training step; peak memory of the program, on a GPU of its
    tensors."""
    runs = {"eager": {"compile": "off"}} | ({"compiled": {"compile": "on"}} if procs.compile else {})
    runs |= {"peer, script": {"compile": "off", "peer": True}} if args.peer else {}
    results = {name: [] for name in runs}
    for _ in range(3):
        for name, changes in runs.items():
            results[name].append(child(args, repeats=1, **changes))
    seconds = {name: [r["first"] - r["start"] for r in found] for name, found in results.items()}
    return [row("first step", name, s, seconds["eager"], peak_mib=max(r["memory"] for r in results[name]) / 2**20)
            for name, s in seconds.items()]


def bench_processes(args, procs):
    """Training steps of one process and of two with a batch each. On a CPU they share the cores out."""
    if procs.device.type == "cuda" and torch.cuda.device_count() < 2:
        experiment.notice("1 against 2 processes needs two GPUs: left out")
        return []
    results = {1: [], 2: []}
    for _ in range(2):
        for n, found in results.items():
            found.append(child(args, n))
    seconds = {n: [s for r in found for s in r["seconds"]] for n, found in results.items()}
    return [row("processes", f"{n}, threads each: {results[n][0]['threads']}", s, seconds[1],
                images_per_second=n * args.batch / statistics.median(s)) for n, s in seconds.items()]


def bench_graph(args, procs):
    """Graph breaks and recompilations of what training compiles, over three passes with new numbers, as Dynamo counts
    them. It traces as in training, but no code is generated: the seconds are not those of training."""
    size, device, rows = args.latent_size[0], procs.device, []
    denoiser, vae = ldm_step(args, procs._replace(compile=False), size)[1], autoencoder(args, procs)

    def ldm_inputs(i):
        x0, noise = torch.randn(2, args.batch, Z, size, size, device=device)
        return x0, torch.rand(args.batch, device=device), noise, torch.full((args.batch,), i, device=device)

    def vae_inputs(i):
        return (torch.rand(args.vae_batch, 1, args.img_size, args.img_size, device=device),
                torch.randn(args.vae_batch, *vae.latent_shape, device=device))

    def one_pass(function, inputs):
        with procs.autocast():
            output = function(*inputs)
        (output if torch.is_tensor(output) else output[0]).mean().backward()

    for name, module, inputs in (("UNet", denoiser, ldm_inputs), ("autoencoder", vae, vae_inputs)):
        torch._dynamo.reset()
        counters.clear()
        compiled, seconds, graphs = torch.compile(module, backend="eager"), [], []
        for i in range(3):
            seconds += alternate({"": lambda i=i: one_pass(compiled, inputs(i))}, 1, device, warmup=0)[""]  # noqa: B023
            graphs.append(counters["stats"]["unique_graphs"])
        rows.append(row("graph", name, seconds, graph_breaks=sum(counters["graph_break"].values()),
                        recompiles=graphs[-1] - graphs[0]))
    return rows


PARTS = {"train": bench_train, "sample": bench_sample, "first_step": bench_first_step, "epoch": bench_epoch,
         "processes": bench_processes, "vae": bench_vae, "graph": bench_graph}
FORMATS = {"images_per_second": "{:.2f} images/s", "seconds_per_image": "{:.3f} s an image",
           "evaluations": "{} evaluations", "gflop_per_image": "{:.1f} GFLOP an image", "peak_mib": "{:.0f} MiB",
           "share_of_peak": "{:.0%} of peak", "graph_breaks": "{} graph breaks", "recompiles": "{} recompiles",
           "ratio": "{:.2f} x"}

# --- the program -------------------------------------------------------------------------------------------


def table(rows):
    """Text with one line a row: median seconds and their range, then whatever numbers the row has."""
    return "\n".join(
        f"{r['part']:<14} {r['what']:<28} {r['median']:8.3f} s ({min(r['seconds']):.3f} - {max(r['seconds']):.3f})  "
        + ", ".join(text.format(r[k]) for k, text in FORMATS.items() if k in r) for r in rows)


def make_parser():
    parser = experiment.make_parser(__doc__)
    parser.set_defaults(img_size=128)
    add = parser.add_argument_group("benchmark").add_argument
    add("--only", default=",".join(PARTS), help="comma list of parts")
    add("--peer", action=BooleanFlag, default=False, help="the same on diffusers, in turn")
    add("--json", help="file for all numbers; -: standard output, with the table on standard error")
    add("--repeats", type=at_least(1), default=5, help="timed rounds")
    add("--threads", type=at_least(0), default=0, help="of the CPU, shared by all processes; 0: as in training")
    add("--latent_size", type=int_list, default=(16,), help="sides of the latents to train on")
    add("--base_ch", type=at_least(2), default=96, help="UNet channels of the first level")
    add("--batch", type=at_least(1), default=16, help="latents a step, and sampled at once")
    add("--sampling_steps", type=int_list, default=(20, 500), help="of the fast sampler and the reference")
    add("--epoch_images", type=at_least(1), default=32, help="images of the epoch")
    add("--vae_base_ch", type=at_least(1), default=32, help="autoencoder channels at full resolution")
    add("--vae_batch", type=at_least(1), default=4, help="images a step of the autoencoder")
    add("--child", action=BooleanFlag, default=False, help=argparse.SUPPRESS)
    return parser


def main(argv=None):
    args = experiment.parse_args(make_parser(), argv)
    parts = [part.strip() for part in args.only.split(",")]
    for part in parts:
        if part not in PARTS:
            fail(f"--only={part} is no part: {', '.join(PARTS)}")
    if len(args.sampling_steps) != 2 or not args.latent_size:
        fail("--sampling_steps takes two numbers such as 20,500, and --latent_size at least one")
    if args.peer:
        try:
            import diffusers  # noqa: F401
        except ImportError:
            fail("--peer compares with diffusers: pip install diffusers")
    procs = experiment.setup_processes(args)
    if args.threads:
        torch.set_num_threads(max(1, args.threads // procs.world_size))
    if args.child:
        measure_child(args, procs)
        return
    cuda = procs.device.type == "cuda"
    why = "--dtype" if args.dtype != "auto" else "bf16 is fast here" if procs.dtype == torch.bfloat16 else (
        "bf16 is emulated here")
    facts = {"device": torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads",
             "precision": f"{procs.dtype} ({why})", "layout": str(procs.memory_format), "compile": procs.compile,
             "torch": torch.__version__, "load average": os.getloadavg()[0]}
    rows = []
    with contextlib.redirect_stdout(sys.stderr) if args.json == "-" else contextlib.nullcontext():
        print(", ".join(f"{k} {v}" for k, v in facts.items()), flush=True)
        for part in parts:
            new = PARTS[part](args, procs)
            print(table(new), flush=True)
            rows += new
    result = experiment.finite({"facts": facts, "args": vars(args), "rows": rows})
    if args.json == "-":
        print(json.dumps(result, indent=2))
    elif args.json:
        experiment.write_json(args.json, result)


if __name__ == "__main__":
    main()
