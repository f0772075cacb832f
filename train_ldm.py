"""Stage 3: train a class-conditional diffusion model in the latent space of a trained autoencoder.

    python train_ldm.py --mode=overfit_one                       # first: can it learn one image?
    python train_ldm.py --mode=overfit_16                        # then a few
    torchrun --nproc_per_node=4 train_ldm.py --mode=full_train   # then all

Each mode is a set of defaults (PRESETS); an explicit flag wins. Typing the command again continues
the run if it names one (--run_name or --resume_dir).
"""
import contextlib
import os
import pathlib
import re
import time
from typing import NamedTuple

import numpy as np
import torch

import data
import diffusion
import experiment
import memorisation
import metrics
import model
from args import (BooleanFlag, add_autoencoder_arguments, add_data_arguments,
                  add_precision_arguments, add_training_arguments, at_least, changed_settings,
                  file_path, int_list, interval, make_parser, parse_settings, print_settings)
from experiment import fail, notice, say

# --- modes and arguments ------------------------------------------------------------------------

PRESETS = {
    "full_train": dict(
        batch_per_device=16, epochs=1000, log_every=100, sample_every=10, wandb=True),
    "overfit_one": dict(
        batch_per_device=1, epochs=1000, log_every=10, sample_every=5, wandb=False),
    "overfit_8": dict(
        batch_per_device=8, epochs=1500, log_every=25, sample_every=10, wandb=True),
    "overfit_16": dict(
        batch_per_device=16, epochs=1500, log_every=25, sample_every=10, wandb=True),
    "overfit_32": dict(
        batch_per_device=16, epochs=1500, log_every=50, sample_every=10, wandb=True),
}


def resolve_mode(args):
    """(mode, K) from --mode, --overfit_one and --overfit_k, K = 0 for all images; ValueError where
    they disagree."""
    if not re.fullmatch("full_train|overfit_one|overfit_[1-9][0-9]*", args.mode):
        raise ValueError(f"unknown --mode={args.mode}: full_train, overfit_one or overfit_K such "
                         "as overfit_16")
    named = {"full_train": 0, "overfit_one": 1}
    in_mode = named[args.mode] if args.mode in named else int(args.mode.removeprefix("overfit_"))
    asked = {k for k in (in_mode, args.overfit_k, int(args.overfit_one)) if k}
    if len(asked) > 1:
        raise ValueError(f"--mode={args.mode}, --overfit_one and --overfit_k ask for different "
                         f"numbers of images: {', '.join(map(str, sorted(asked)))}")
    k = asked.pop() if asked else 0
    return {0: "full_train", 1: "overfit_one"}.get(k, f"overfit_{k}"), k


def preset(args):
    """New defaults that follow from the mode. An overfit_K without a row of its own takes that of
    the nearest size."""
    mode, k = resolve_mode(args)
    nearest = "overfit_8" if k < 12 else "overfit_16" if k < 24 else "overfit_32"
    row = PRESETS.get(mode) or {**PRESETS[nearest], "batch_per_device": min(k, 16)}
    if k:  # memorising: no class dropout, hence no null class to guide from, nothing augmented
        row = {**row, "prob_uncond": 0.0, "guidance_scale": 1.0, "warmup_steps": 0, "augment": 0}
    return row


def build_parser():
    """Parser of this stage."""
    parser = make_parser(__doc__)
    add_data_arguments(parser, img_size=None)
    add_precision_arguments(parser)
    add_training_arguments(parser, lr=3e-5, epochs=1000, batch_per_device=16)
    add_autoencoder_arguments(parser)
    add = parser.add_argument_group("mode").add_argument
    add("--mode", default="full_train", help="full_train, overfit_one or overfit_K")
    add("--latent_scale_factor", type=at_least(1e-6, float),
        help="None: from latent_scale.json beside the autoencoder")
    add("--cache_latents", action=BooleanFlag, default=True, help="encode the images once for all")
    add("--augment", type=at_least(0), default=0,
        help="versions of each image that are shifted, zoomed, rotated and exposed a little "
             "otherwise, never flipped; the UNet is told, so that samples are not")
    add = parser.add_argument_group("UNet").add_argument
    add("--ldm_base_ch", type=at_least(1), default=96, help="channels of the first level")
    add("--ldm_ch_mults", type=int_list, default=(1, 2, 4),
        help="channels by level; each further level halves the size")
    add("--ldm_num_res_blocks", type=at_least(1), default=2, help="residual blocks per level")
    add("--ldm_attn_res", type=int_list, default=(16,),
        help="latent sizes with attention beside the middle")
    add = parser.add_argument_group("diffusion").add_argument
    add("--prediction", choices=("eps", "v", "x0", "flow"), default="flow",
        help="what the UNet puts out")
    add("--noise_schedule", choices=("auto", "linear", "cosine", "flow"), default="auto",
        help="auto: flow for prediction flow, else cosine")
    add("--zero_terminal_snr", action=BooleanFlag,
        help="t = 1 is pure noise; None: yes, except for eps")
    add("--loss_weighting", choices=("uniform", "min_snr"), default="uniform", help="over t")
    add("--prob_uncond", type=at_least(0, float, 1), default=0.1,
        help="fraction of labels replaced by the null class")
    add("--use_ema", action=BooleanFlag, default=True, help="sample from averaged weights")
    add("--ema_decay", type=at_least(0, float, 1), default=0.999,
        help="of the averaged weights, after a warm-up")
    add("--warmup_steps", type=at_least(0), default=500,
        help="steps over which the learning rate rises")
    add("--grad_accum", type=at_least(1), default=1, help="micro-batches per step")
    add("--init_from", type=file_path,
        help="checkpoint of a train_ldm.py run whose averaged weights a new run starts from")
    add("--patience", type=at_least(0), default=0,
        help="stop after so many evaluations without a new lowest val/loss; 0: never")
    add = parser.add_argument_group("sampling in training").add_argument
    add("--sample_batch_size", type=at_least(2), default=8, help="images per class")
    add("--sampler", choices=tuple(diffusion.SAMPLERS), default="ancestral", help="see sample.py")
    add("--num_sampling_steps", type=at_least(1), default=500,
        help="network evaluations per image")
    add("--guidance_scale", type=at_least(0, float), default=1.0,
        help="classifier-free guidance; 1: none")
    add("--guidance_interval", type=interval, default=(0.3, 0.7),
        help="LOW,HIGH: guidance for t between them")
    return parser


def parse_args(argv=None):
    """Settings of this stage, with mode, overfit_k, noise_schedule and zero_terminal_snr resolved;
    ends the program on bad ones."""
    args = parse_settings(build_parser(), argv, preset, kind="ldm")
    args.mode, args.overfit_k = resolve_mode(args)
    args.overfit_one = args.overfit_k == 1
    if args.noise_schedule == "auto":
        args.noise_schedule = "flow" if args.prediction == "flow" else "cosine"
    if args.zero_terminal_snr is None:
        args.zero_terminal_snr = args.prediction != "eps"
    if args.max_steps == 0:
        fail("--max_steps=0 trains nothing: leave it out")
    if args.prob_uncond == 1:
        fail("--prob_uncond=1 replaces every label, so that no class is learned: give 0.1")
    if args.guidance_scale != 1 and args.prob_uncond == 0:
        if not args.overfit_k:
            fail(f"--guidance_scale={args.guidance_scale:g} guides away from the null class, which "
                 "--prob_uncond=0 never trains: give --guidance_scale=1 or --prob_uncond=0.1")
        notice(f"--guidance_scale={args.guidance_scale:g} is off: {args.mode} trains no null class "
               "to guide from")
        args.guidance_scale = 1.0
    return args


def read_scale(args, ckpt_path, vae_sha256):
    """The latent scale factor of the autoencoder. Ends the program, with the command that measures
    it, where it is missing, damaged or of another autoencoder."""
    if args.resume_dir and args.latent_scale_factor is None:
        own = experiment.read_run(args.resume_dir).get("latent_scale_factor")
        if isinstance(own, float):  # also where it was measured again since
            return own
    path = experiment.run_folder(ckpt_path) / "latent_scale.json"
    command = experiment.command_line("find_latent_scale.py", ae_ckpt_path=ckpt_path,
                                      **experiment.data_flags(args))
    given = args.latent_scale_factor
    if not path.exists():
        if given is None:
            fail(f"no {path}; make it with: {command}")
        return given
    stored = experiment.read_json(path, "latent scale")
    factor, std = stored.get("latent_scale_factor"), stored.get("std")
    whole = (isinstance(factor, float) and isinstance(std, float) and factor > 0
             and abs(factor * std - 1) < 1e-9)
    if stored.get("vae_sha256") != vae_sha256 or not whole:
        if given is None:
            fail(f"{path} is damaged or was measured on another state of this autoencoder; measure "
                 f"again with: {command}")
        return given
    if given is None:
        return factor
    if abs(given / factor - 1) > 0.01:
        notice(f"--latent_scale_factor={given} is {100 * (given / factor - 1):+.0f} % off the "
               f"measured {factor:.6g} in {path}")
    return given


def check_inputs(args):
    """End the program where what --check is to look for is missing."""
    data.check_folders(args)
    if args.check == "inputs":
        ae_path = experiment.find_autoencoder(args)
        experiment.load_checkpoint(ae_path, "vae")
        read_scale(args, ae_path, experiment.sha256_file(ae_path))
        if args.init_from:
            experiment.load_checkpoint(args.init_from, "ldm")


def notice_scale_of_others(args, ckpt_path, images):
    """Say so where the scale factor was measured on other images than `images`, an ImageSet."""
    path = experiment.run_folder(ckpt_path) / "latent_scale.json"
    if not path.exists():
        return
    stored = experiment.read_json(path, "latent scale")
    if (stored.get("task"), stored.get("split")) == (args.task, args.split):
        data.notice_changes(stored.get("data"), images, f"{path} was measured")


# What the output of a network means: weights are of no use with others.
PROCESS_SETTINGS = ("prediction", "noise_schedule", "zero_terminal_snr")


# --- model and step -----------------------------------------------------------------------------


def build_models(args, procs, latent_shape, num_classes):
    """(Denoiser, EMA or None, AdamW) on the device, from args.seed. ValueError where settings
    contradict each other."""
    torch.manual_seed(args.seed)
    denoiser = experiment.build_denoiser(vars(args), latent_shape, num_classes)
    denoiser = denoiser.to(procs.device, memory_format=procs.memory_format)
    ema = model.EMA(denoiser, args.ema_decay) if args.use_ema else None
    if ema and procs.device.type == "cuda":  # on a CPU it takes minutes and gains nothing
        experiment.compile_for_sampling(ema.module, procs)
    optimizer = torch.optim.AdamW(denoiser.parameters(), args.lr,
                                  weight_decay=args.weight_decay, fused=True)
    return denoiser, ema, optimizer


def init_weights(denoiser, ema, args, scale, vae_sha256, class_names):
    """Start from the averaged weights of --init_from, a model of the same shape and autoencoder.

    Classes are found by name; a new one starts as the null class, which stands for all of them.
    """
    path = args.init_from
    checkpoint = experiment.load_checkpoint(path, "ldm")
    experiment.check_complete(checkpoint, path)
    if checkpoint["vae_sha256"] != vae_sha256:
        fail(f"--init_from={path} was trained with another autoencoder: give its autoencoder as "
             f"--ae_ckpt_path={checkpoint['ae_ckpt_path']}")
    wanted = {name: getattr(args, name) for name in PROCESS_SETTINGS}
    stored = checkpoint["args"] | {"latent_scale_factor": checkpoint["latent_scale_factor"]}
    for name, now in {**wanted, "latent_scale_factor": scale}.items():
        if stored[name] != now:
            fail(f"--init_from={path} was trained with --{name}={stored[name]}, and its weights "
                 f"mean nothing with {now}: give --{name}={stored[name]}")
    state = dict(checkpoint["ema"] or checkpoint["model"])
    known = checkpoint["class_names"]
    rows = [known.index(name) if name in known else len(known) for name in class_names]
    table = state["unet.class_emb.weight"]
    state["unet.class_emb.weight"] = table[[*rows, len(known)]]
    told, own = "unet.aug_emb.weight", denoiser.state_dict()  # of --augment, on either side
    if told in own:
        state.setdefault(told, own[told])
    else:
        state.pop(told, None)
    for module in (denoiser, ema.module) if ema else (denoiser,):
        experiment.load_weights(module, state, path)
    if new := [name for name in class_names if name not in known]:
        notice(f"{path} knows no class {', '.join(new)}: it starts as the null class")


def notice_idle_attention(args, latent_size):
    """Say so where --ldm_attn_res names no feature size, as its default does for small images."""
    sizes = [latent_size >> level for level in range(len(args.ldm_ch_mults))]
    if not set(args.ldm_attn_res) & set(sizes):
        notice(f"--ldm_attn_res={','.join(map(str, args.ldm_attn_res))} is none of the feature "
               f"sizes {','.join(map(str, sizes))}: attention in the middle block only")


def wrap(denoiser, latent_shape, args, procs):
    """The loss as the step calls it, compiled and under DDP. The wrappers are only called: weights
    are read from the plain module, so that no checkpoint knows of them."""
    mean = torch.zeros(args.batch_per_device, *latent_shape, device=procs.device)
    y = torch.zeros(len(mean), dtype=torch.long, device=procs.device)
    draws = [d[:len(y)] for d in draw_inputs(latent_shape, "example", args, procs)]
    how = torch.zeros(len(y), experiment.AUG_DIM, device=procs.device) if args.augment else None
    example = sample_inputs(MicroBatch((mean, mean), y, how), 1.0, draws, denoiser, procs)
    loss_fn = torch.compile(denoiser) if procs.compile else denoiser
    return experiment.wrap_ddp(procs, loss_fn, *example)


def draw_inputs(latent_shape, step, args, procs):
    """The random numbers of this rank's images in a step: noise of the posterior and noise of the
    diffusion [B, C, h, w], t [B], and whether the label is dropped [B], B for all micro-batches.

    They depend on the seed, the step and an image's place in the global batch: a run that was
    stopped, or goes on with other processes, draws the same.
    """
    batch = experiment.step_batch(vars(args))
    noise, rng = experiment.draw(procs, batch, (2, *latent_shape), args.seed, "ldm", step)
    total = procs.world_size * batch
    mine = experiment.own_places(procs, batch)
    # Times spread evenly from one random start have less variance (Kingma et al. 2021, I.1).
    t = torch.arange(total, device=procs.device)[mine] / total
    t = (t + torch.rand(1, device=procs.device, generator=rng)) % 1
    dropped = torch.rand(total, device=procs.device, generator=rng)[mine] < args.prob_uncond
    return noise[:, 0].contiguous(), noise[:, 1].contiguous(), t, dropped


class MicroBatch(NamedTuple):
    """Images of one pass through the network."""

    posterior: tuple  # (mean, logvar) of unscaled latents, each [B, C, h, w]
    y: torch.Tensor  # [B] class indices
    how: torch.Tensor  # [B, 6]: how each was augmented, see data.augment; None without --augment


def draw_versions(count, step, args, procs):
    """Which version of this rank's images a step takes: half of them as they are (0), the others
    one of the args.augment augmented ones; int [B]. They depend on what draw_inputs depends on."""
    if not args.augment:
        return np.zeros(count, int)
    rng = experiment.generator("cpu", args.seed, "versions", step)
    total = procs.world_size * count
    versions = torch.randint(1, args.augment + 1, (total,), generator=rng)
    versions *= torch.rand(total, generator=rng) < 0.5
    return versions[experiment.own_places(procs, count)].numpy()


def read_batches(latents, labels, index, step, args, procs):
    """[MicroBatch] of the images `index` of this rank in a step."""
    versions = draw_versions(len(index), step, args, procs)
    parts = zip(np.split(index, args.grad_accum), np.split(versions, args.grad_accum), strict=True)
    return [MicroBatch(latents.posterior(i, v),
                       labels[experiment.send(torch.from_numpy(i), procs.device)],
                       latents.how_augmented(i, v) if args.augment else None) for i, v in parts]


def sample_inputs(batch, scale, draws, denoiser, procs):
    """(x0, t, noise, y) of a MicroBatch, as Denoiser.forward takes them, and how it was augmented
    where the network is told; draws: of draw_inputs."""
    posterior_noise, noise, t, dropped = draws
    x0 = model.Posterior(*batch.posterior).sample(posterior_noise) * scale
    y = torch.where(dropped, denoiser.unet.null_class, batch.y)
    inputs = x0.contiguous(memory_format=procs.memory_format), t, noise, y
    return inputs if batch.how is None else (*inputs, batch.how)


def train_step(denoiser, ema, optimizer, loss_fn, micro_batches, scale, step, args, procs):
    """One optimiser step on a list of MicroBatch.

    Returns (loss of each image [B], its t [B], gradient norm, 1.0 if the step was skipped else
    0.0), tensors on the device. bench.py times this function.
    """
    draws = draw_inputs(micro_batches[0].posterior[0].shape[1:], step, args, procs)
    losses, times = [], []
    for i, batch in enumerate(micro_batches):
        part = [d[i * len(batch.y):(i + 1) * len(batch.y)] for d in draws]
        inputs = sample_inputs(batch, scale, part, denoiser, procs)
        last = i == len(micro_batches) - 1
        # DDP adds the gradients of the ranks up once per step, in the last micro-batch.
        alone = procs.world_size == 1 or last
        with contextlib.nullcontext() if alone else loss_fn.no_sync():
            with procs.autocast():
                loss = loss_fn(*inputs)
            (loss.mean() / len(micro_batches)).backward()
        losses.append(loss.detach())
        times.append(inputs[1])
    grad_norm, bad = experiment.clip_and_step(denoiser, optimizer, args.grad_clip)
    if ema:
        ema.update(denoiser, step + 1)
    return torch.cat(losses), torch.cat(times), grad_norm, bad


class LossMeans:
    """RunningMeans of the loss, its gradient, and the loss by quarter of the noise range."""

    def __init__(self, procs):
        quarters = [f"{what}_t{q}" for what in ("loss", "count") for q in range(4)]
        self.means = experiment.RunningMeans(procs, ["train/loss", "train/grad_norm", *quarters])

    def add(self, loss, t, grad_norm, bad):
        """What train_step returned."""
        quarter = (t[:, None] * 4).long() == torch.arange(4, device=t.device)  # [B, 4]
        quarter = quarter.float()
        self.means.add((loss.mean(), grad_norm, *(loss @ quarter), *quarter.sum(0)), bad)

    def read(self):
        """Metrics since the last call, by their names in metrics.jsonl. All ranks must call it."""
        means = self.means.read()
        values = {k: means[k] for k in ("train/loss", "train/grad_norm", "train/bad_steps")}
        for q in range(4):
            if means[f"count_t{q}"] > 0:
                values[f"train/loss_t{q}"] = means[f"loss_t{q}"] / means[f"count_t{q}"]
        return values


# --- evaluation ---------------------------------------------------------------------------------


class Reference(NamedTuple):
    """What samples are compared with, from up to 64 training images per class."""

    stats: dict  # mean, std, min, max of unscaled latents, real_pairwise_mse_mean of normalised
    z: torch.Tensor = None  # overfit modes only: the normalised posterior means,
    x: torch.Tensor = None  # what they decode to,
    posterior_variance: float = 0.0  # and how far a perfect copy is from them


@torch.no_grad()
def training_reference(latents, args, scale, vae, procs):
    """Reference of the training set `latents`."""
    labels = latents.images.labels
    index = np.concatenate([np.flatnonzero(labels == c)[:64] for c in np.unique(labels)])
    parts = [latents.posterior(index[i:i + 64]) for i in range(0, len(index), 64)]
    mean, logvar = (torch.cat(part) for part in zip(*parts, strict=True))
    rng = experiment.generator("cpu", args.seed, "reference")
    noise = torch.randn(mean.shape, generator=rng).to(mean.device)
    z = model.Posterior(mean, logvar).sample(noise)
    values = metrics.latent_stats(z, scale)
    stats = {name.split("/")[1]: value for name, value in values.items()}
    pairs = metrics.sample_diversity(z * scale, labels[index], latents.images.class_names, None)
    if not 0.9 < stats["std"] * scale < 1.1:
        notice("the training latents times the scale factor have a standard deviation of "
               f"{stats['std'] * scale:.2f}, not 1: was it measured on other images?")
    stats["real_pairwise_mse_mean"] = pairs.get("sample_diversity/pairwise_mse_mean")
    if not args.overfit_k:
        return Reference(stats)
    z_train = mean.cpu() * scale
    x_train = experiment.decode_latents(vae, z_train, scale, procs)
    return Reference(stats, z_train, x_train, (logvar.exp().mean() * scale**2).item())


def evaluate(denoiser, vae, scale, classes, class_names, reference, args, procs, label,
             leave_if_asked):
    """Sample every class: (metrics, images [N, 1, S, S], class index of each), alike on all ranks.

    label: of the progress line. leave_if_asked() is called before each network evaluation.
    """
    wanted = [(c, i) for c in classes for i in range(args.sample_batch_size)]
    mine = wanted[procs.rank::procs.world_size]
    progress = experiment.Progress(procs, label, len(mine) * args.num_sampling_steps)

    def tick(done):
        leave_if_asked()
        progress.update(done)

    size = args.img_size
    z, x = [torch.zeros(0, *vae.latent_shape)], [torch.zeros(0, 1, size, size)]
    for _, batch_z, batch_x in experiment.sample_batches(
            denoiser, vae, scale, mine, class_names, args, procs, 16, tick):
        z.append(batch_z)
        x.append(batch_x)
    progress.clear()
    z = experiment.gather(procs, torch.cat(z))
    x = experiment.gather(procs, torch.cat(x))
    labels = [c for c, _ in wanted]
    real = reference.stats["real_pairwise_mse_mean"]
    values = metrics.latent_stats(z / scale, scale)
    values |= metrics.sample_diversity(z, labels, class_names, real)
    if args.overfit_k:
        # A perfect copy is a draw from the posterior: its variance comes on top of the tolerance.
        threshold = 0.1 + reference.posterior_variance
        values |= metrics.overfit_verdict(z, reference.z, x, reference.x, mse_threshold=threshold)
    return values, x, labels


def save_samples(run, epoch, x, labels, class_names, args):
    """One labelled grid per class in the run's samples/: {class name: path}."""
    run.wait_for_checkpoint()  # of a full disk, it is what the user should hear
    paths = {}
    for c in sorted(set(labels)):
        name = class_names[c]
        paths[name] = run.folder / "samples" / f"sample_ep{epoch:04d}_{name}.png"
        label = f"{name}, epoch {epoch}, guidance {args.guidance_scale:g}"
        experiment.save_grid(paths[name], [x[torch.tensor(labels) == c]], [label])
    return paths


def save_real(folder, images, args):
    """Grids of eight training images of each class of an ImageSet, to see the samples beside:
    FOLDER/real_<class>.png. Those that are there stay: only a run's first evaluation reads these
    few films, and no start."""
    root = data.image_root(args)
    for c in np.unique(images.labels):
        name = images.class_names[c]
        path = folder / f"real_{name}.png"
        if path.exists():
            continue
        files = images.names[images.labels == c]
        paths = [os.path.join(root, os.fsdecode(file)) for file in files]
        try:
            x = data.decode_some(paths, args.img_size, 8)
        except (OSError, ValueError) as e:
            notice(f"no {path}: {e}")  # it was decoded once, and training does not need it
        else:
            experiment.save_grid(path, [x], [f"{name}, real"])


def check_resumed(checkpoint, folder, args, scale, vae_sha256, class_names):
    """End the program where the weights of a checkpoint mean nothing with today's settings."""
    experiment.check_names(("best", "recent"), checkpoint, folder)
    stored = checkpoint["latent_scale_factor"]
    if checkpoint["vae_sha256"] != vae_sha256:
        fail(f"{folder} was trained with another state of the autoencoder: start a new run")
    if stored != scale:
        fail(f"{folder} was trained with the latent scale factor {stored:.6g}, now {scale:.6g}: "
             "start a new run")
    if checkpoint["class_names"] != class_names:
        fail(f"{folder} was trained on the classes {', '.join(checkpoint['class_names'])}, not on "
             f"{', '.join(class_names)}: give the --data_root and --task it was started with")
    for name in PROCESS_SETTINGS:
        before, now = checkpoint["args"][name], getattr(args, name)
        if before != now:
            fail(f"{folder} was trained with {name}={before}; its weights mean nothing with {now}: "
                 "start a new run")


# --- the program --------------------------------------------------------------------------------


def main(argv=None):
    args = parse_args(argv)
    if args.check:
        check_inputs(args)
        experiment.report_run(args)
        return

    # --- processes, autoencoder, data ---
    procs = experiment.setup_processes(args)
    ae_path = experiment.find_autoencoder(args)
    vae, ae_settings, vae_sha256 = experiment.load_autoencoder(ae_path, procs, args.ae_config_path)
    if args.img_size not in (None, ae_settings["img_size"]):
        fail(f"--img_size={args.img_size}, but the autoencoder {ae_path} works at "
             f"{ae_settings['img_size']}: leave it out, or train an autoencoder of that size")
    args.img_size, args.ae_ckpt_path = ae_settings["img_size"], str(ae_path)
    data.adopt_root(args, ae_settings, "the autoencoder")
    scale = read_scale(args, ae_path, vae_sha256)  # before hours of decoding
    images = data.open_images(args, procs, args.split, pixels=not args.cache_latents)
    notice_scale_of_others(args, ae_path, images)
    class_names, latent_shape = images.class_names, vae.latent_shape
    try:
        denoiser, ema, optimizer = build_models(args, procs, latent_shape, len(class_names))
    except ValueError as e:
        fail(e)
    notice_idle_attention(args, latent_shape[1])
    if args.overfit_k:
        images = images.subset(data.overfit_indices(images.labels, args.overfit_k))
    cache = pathlib.Path(args.output_root, "cache")
    latents = data.LatentSet(images, vae, vae_sha256, cache, procs, args.cache_latents,
                             versions=args.augment)
    reference = training_reference(latents, args, scale, vae, procs)
    watch = memorisation.Watch(latents, vae, vae_sha256, scale, cache, args, procs)
    classes = sorted(set(images.labels.tolist()))
    epoch_len = len(images) * (args.repeat_len if args.overfit_one else 1)
    step_batch = experiment.step_batch(vars(args))  # images of this rank
    epoch_steps = experiment.steps_per_epoch(epoch_len, step_batch, procs.world_size)
    total_steps = experiment.count_steps(args, epoch_steps)

    if args.init_from and not args.resume_dir:
        init_weights(denoiser, ema, args, scale, vae_sha256, class_names)

    # --- run folder, or the run to go on with ---
    run = experiment.Run(args, procs, "ldm", f"ldm_{args.task.lower()}_{args.mode}", {
        "class_names": class_names, "img_size": args.img_size, "latent_shape": latent_shape,
        "latent_scale_factor": scale, "vae_sha256": vae_sha256, "data": images.summary,
        "changed": changed_settings(args, build_parser())})
    data.notice_changes(run.before.get("data"), images, f"{run.folder} was last started")
    step, train_metrics = 0, {}
    # Counted on the device: a look at each step would make the CPU wait for the GPU.
    bad_in_a_row = torch.zeros((), device=procs.device)
    if checkpoint := run.load():
        check_resumed(checkpoint, run.folder, args, scale, vae_sha256, class_names)
        experiment.load_weights(denoiser, checkpoint["model"], run.checkpoint_path)
        if ema:
            averaged = checkpoint["ema"] or checkpoint["model"]
            experiment.load_weights(ema.module, averaged, run.checkpoint_path)
        experiment.load_optimizer(optimizer, checkpoint["optimizer"])
        # The stored settings came along; those of the command line win.
        experiment.set_groups(optimizer, weight_decay=args.weight_decay)
        step, train_metrics = checkpoint["step"], checkpoint["train_metrics"]
        bad_in_a_row = checkpoint["bad_steps"].to(procs.device)
        watch.load(checkpoint)
        run.check_steps(step, total_steps)

    def state():
        return {"model": denoiser.state_dict(), "ema": ema.module.state_dict() if ema else None,
                "optimizer": optimizer.state_dict(), "step": step, "bad_steps": bad_in_a_row,
                "train_metrics": train_metrics, **watch.state(), "args": vars(args),
                "class_names": class_names, "trained_classes": classes,
                "latent_shape": latent_shape,
                "latent_scale_factor": scale, "vae_sha256": vae_sha256,
                "ae_ckpt_path": str(ae_path.resolve()), "train_stats": reference.stats}

    if procs.main:
        parameters = sum(p.numel() for p in denoiser.parameters())
        print_settings(args, build_parser(), {
            "run folder": run.folder, "continues at step": step, "autoencoder": ae_path,
            "latent scale factor": f"{scale:.6g}", "latent": "x".join(map(str, latent_shape)),
            "images": len(images), "classes": data.count_classes(images),
            "validation images": watch.num_val,
            "parameters": f"{parameters / 1e6:.1f} M",
            "steps": f"{total_steps} ({epoch_steps} per epoch)",
            "global batch": step_batch * procs.world_size,
            "device": f"{procs.device} x {procs.world_size}, {procs.dtype}, "
                      f"compile {'on' if procs.compile else 'off'}"})
    stop = experiment.StopSignal(procs)  # from here on there is something to lose
    run.start(args, checkpoint or state())
    # Only now, with the settings on the screen: compiling takes minutes.
    loss_fn = wrap(denoiser, latent_shape, args, procs)
    labels = torch.from_numpy(images.labels).to(procs.device)
    means = LossMeans(procs)
    progress = experiment.Progress(procs, "step", total_steps, step)
    diverged, sample_metrics, verdicts, status = False, {}, [], ""
    saved_step, save_time = step, time.perf_counter()
    log_step, log_time = step, time.perf_counter()

    def leave_if_asked():  # in an evaluation there is nothing to lose
        if stop.name:
            run.stop(step, stop.name)

    while True:
        # --- checkpoint: before an evaluation, so that a stop in there loses nothing ---
        evaluating = step > 0 and (step == total_steps or
                                   step % (args.sample_every * epoch_steps) == 0)
        save_due = time.perf_counter() - save_time > 60 * args.save_minutes
        stopping, saving = stop.poll(save_due)  # all ranks agree here
        # A finished run that is started again keeps its checkpoint, and so its hash, as it is.
        if (stopping or saving or evaluating) and step != saved_step:
            run.save(state())
            saved_step, save_time = step, time.perf_counter()
        if stopping:
            break

        # --- evaluation, with the averaged weights ---
        if evaluating:
            epoch = step // epoch_steps
            progress.clear()
            averaged = ema.module if ema else denoiser
            sample_metrics, x, x_labels = evaluate(
                averaged, vae, scale, classes, class_names, reference, args, procs,
                f"epoch {epoch}: sampling", leave_if_asked)
            sample_metrics |= watch.measure(averaged, x, step, epoch)
            if watch.best.step == step:
                run.save_best(state())
            if procs.main:
                save_real(run.folder / "samples", images, args)
                paths = save_samples(run, epoch, x, x_labels, class_names, args)
                verdicts = metrics.health(
                    train_metrics | sample_metrics, run.history("train/loss"), reference.stats,
                    overfit=args.overfit_k > 0, best_epoch=watch.best.epoch,
                    val_history=(run.history(metrics.VAL), run.history(metrics.VAL_TRAIN)))
                sample_metrics = metrics.sweep_objective(sample_metrics, verdicts)
                run.log(step, epoch, sample_metrics)
                run.log_images(step, epoch, paths)
                run.log_verdicts(verdicts)
                say(f"epoch {epoch}, step {step}: {', '.join(map(str, paths.values()))}")
                say(metrics.format_verdicts(verdicts))
            log_step, log_time = step, time.perf_counter()  # images/s are those of training
        patience_over = 0 < args.patience <= watch.best.since
        if step >= total_steps or patience_over:
            break

        # --- one step ---
        index, epoch = experiment.batch_indices(step, epoch_len, step_batch, args.seed, procs.rank,
                                                procs.world_size)
        index = index % len(images)  # overfit_one repeats its image
        micro_batches = read_batches(latents, labels, index, step, args, procs)
        warmup = min(1.0, (step + 1) / args.warmup_steps) if args.warmup_steps else 1.0
        experiment.set_groups(optimizer, lr=args.lr * warmup)
        loss, t, grad_norm, bad = train_step(denoiser, ema, optimizer, loss_fn, micro_batches,
                                             scale, step, args, procs)
        means.add(loss, t, grad_norm, bad)
        bad_in_a_row = (bad_in_a_row + 1) * bad
        step += 1

        # --- logging ---
        if step % args.log_every == 0 or step == total_steps:
            seconds = time.perf_counter() - log_time
            images_seen = (step - log_step) * step_batch * procs.world_size
            train_metrics = means.read() | {"train/learning_rate": args.lr * warmup,
                                            "train/images_per_second": images_seen / seconds}
            log_step, log_time = step, time.perf_counter()
            run.log(step, epoch, train_metrics)
            status = metrics.format_training(train_metrics)
            if procs.main:
                progress.clear()
                say(f"step {step} epoch {epoch} {status}")
            diverged = bad_in_a_row.item() >= args.max_bad_steps
            if diverged:
                break
        progress.update(step, status)

    # --- end: the first rank to leave takes the others along, so wait for the checkpoint ---
    run.settle()
    if stopping:
        run.stop(step, stop.name)
    if procs.main and diverged:
        verdicts = metrics.health(train_metrics, run.history("train/loss"), diverged=True) + [
            v for v in verdicts if not v.metric.startswith("train/")]  # of the last evaluation
        say(metrics.format_verdicts(verdicts))
    if procs.main and args.overfit_k and not diverged:
        say(metrics.format_overfit(sample_metrics))
    if patience_over:
        notice(f"stopped at step {step} of {total_steps}: no lower val/loss in {args.patience} "
               "evaluations (--patience)")
    ckpt = run.best_path if watch.best.step else run.checkpoint_path
    run.finish(step, {**train_metrics, **sample_metrics, "train_stats": reference.stats,
                      "best": watch.best._asdict()}, verdicts, ckpt, diverged)
    if procs.main:
        if watch.best.step:
            say(f"the one to use: {ckpt}, of epoch {watch.best.epoch}, with the lowest val/loss "
                f"({watch.best.loss:.4g})")
        say("report: " + experiment.command_line("report.py", run.folder))
        say("next: " + experiment.command_line("sample.py", ckpt=ckpt))


if __name__ == "__main__":
    main()
