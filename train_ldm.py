"""Stage 3: train a class-conditional diffusion model in the latent space of a trained autoencoder.

    python train_ldm.py --mode=overfit_one                       # first: can it learn one image?
    python train_ldm.py --mode=overfit_16                        # then a few
    torchrun --nproc_per_node=4 train_ldm.py --mode=full_train   # then all

Each mode is a set of defaults (PRESETS); an explicit flag wins. To resume a run that has a name
(--run_name or --resume_dir), type the same command again.
"""
import contextlib
import pathlib
import re
import shlex

import numpy as np
import torch

import data
import diffusion
import memorisation
import model
import sample
from lib.args import (BooleanFlag, add_autoencoder_arguments, at_least, int_list, interval,
                      parse_settings, trainer_parser)
from lib.dist import BatchOrder, RunningMeans, clip_and_step, setup
from lib.files import fail, notice
from lib.run import Run, find_autoencoder, load_checkpoint, read_latent_scale
from lib.verdicts import health, overfit_verdict, sweep_objective

LOSSES = ("train/loss", "train/grad_norm", *(f"train/loss_t{q}" for q in range(4)))

# --- modes and arguments ------------------------------------------------------------------------

PRESETS = {
    "full_train": dict(epochs=1000, log_every=100, sample_every=10, wandb=True),
    "overfit_one": dict(epochs=1000, log_every=10, sample_every=5, wandb=False),
    "overfit_8": dict(epochs=1500, log_every=25, sample_every=10, wandb=True),
    "overfit_16": dict(epochs=1500, log_every=25, sample_every=10, wandb=True),
    "overfit_32": dict(epochs=1500, log_every=50, sample_every=10, wandb=True),
}


def resolve_mode(args):
    """(mode, K) from --mode, --overfit_one and --overfit_k, K = 0 for all images; ends
    the program if they disagree."""
    match = re.fullmatch("full_train|overfit_(one|[1-9][0-9]*)", args.mode)
    if not match:
        fail(f"unknown --mode={args.mode}: full_train, overfit_one or overfit_K such as overfit_16")
    in_mode = 0 if match[1] is None else 1 if match[1] == "one" else int(match[1])
    asked = {in_mode, args.overfit_k, int(args.overfit_one)} - {0}
    if len(asked) > 1:
        fail(f"--mode={args.mode}, --overfit_one and --overfit_k ask for different numbers of "
             f"images: {', '.join(map(str, sorted(asked)))}")
    k = max(asked, default=0)
    return {0: "full_train", 1: "overfit_one"}.get(k, f"overfit_{k}"), k


def preset(args):
    """New defaults that follow from the mode. An overfit_K without a row of its own takes that of
    the nearest size."""
    mode, k = resolve_mode(args)
    row = PRESETS.get(mode, PRESETS["overfit_16" if k < 24 else "overfit_32"])
    if not k and args.data_root and not data.find_split(args.data_root, args.task, "val")[0]:
        return {**row, "epochs": memorisation.SAFE_PASSES}  # nothing else would say when to stop
    # Memorising: no class dropout, hence no null class to guide from, nothing augmented.
    return row if not k else {**row, "batch_per_device": min(k, 16), "prob_uncond": 0.0,
                              "guidance_scale": 1.0, "warmup_steps": 0, "augment": 0}


def build_parser():
    """Parser of this stage."""
    parser = trainer_parser(
        __doc__, img_size=None, lr=3e-5, epochs=1000, batch_per_device=16,
        init_from_help="checkpoint of a train_ldm.py run whose averaged weights to start from")
    add_autoencoder_arguments(parser)
    add = parser.add_argument_group("mode").add_argument
    add("--mode", default="full_train", help="full_train, overfit_one or overfit_K")
    add("--latent_scale_factor", type=at_least(1e-6, float), help="None: of latent_scale.json")
    add("--cache_latents", action=BooleanFlag, default=True, help="encode all images once")
    # The UNet is conditioned on the augmentation, so samples are not augmented.
    add("--augment", type=at_least(0), default=0,
        help="augmented copies per image (shift, zoom, rotation, exposure; no flips)")
    add = parser.add_argument_group("UNet").add_argument
    add("--ldm_base_ch", type=at_least(1), default=96, help="channels of the first level")
    add("--ldm_ch_mults", type=int_list, default=(1, 2, 4), help="by level, each half the size")
    add("--ldm_num_res_blocks", type=at_least(1), default=2, help="residual blocks per level")
    add("--ldm_attn_res", type=int_list, default=(16,), help="sizes with attention")
    add = parser.add_argument_group("diffusion").add_argument
    add("--prediction", choices=("eps", "v", "x0", "flow"), default="flow", help="UNet's output")
    add("--noise_schedule", choices=("auto", "linear", "cosine", "flow"), default="auto",
        help="auto: flow for prediction flow, else cosine")
    add("--zero_terminal_snr", action=BooleanFlag, help="t = 1 is pure noise; None: but for eps")
    add("--loss_weighting", choices=("uniform", "min_snr"), default="uniform", help="over t")
    add("--prob_uncond", type=at_least(0, float, 0.999999), default=0.1, help="labels dropped")
    add("--use_ema", action=BooleanFlag, default=True, help="sample from averaged weights")
    add("--ema_decay", type=at_least(0, float, 1), default=0.999, help="of these, after a warm-up")
    add("--warmup_steps", type=at_least(0), default=500, help="steps over which lr rises")
    add("--grad_accum", type=at_least(1), default=1, help="micro-batches per step")
    add("--patience", type=at_least(0), default=0, help="evaluations without a lower val/loss")
    add = parser.add_argument_group("sampling in training").add_argument
    add("--sample_batch_size", type=at_least(2), default=8, help="images per class")
    add("--sampler", choices=tuple(diffusion.SAMPLERS), default="ancestral", help="see sample.py")
    add("--num_sampling_steps", type=at_least(1), default=500, help="of the sampler")
    add("--guidance_scale", type=at_least(1, float), default=1.0, help="1: no guidance")
    add("--guidance_interval", type=interval, default=(0.3, 0.7), help="LOW,HIGH of guided t")
    return parser


def parse_args(argv=None):
    """Settings of this stage, with mode, overfit_k, noise_schedule and zero_terminal_snr resolved;
    ends the program if they contradict each other."""
    args = parse_settings(build_parser(), argv, preset, kind="ldm")
    args.mode, args.overfit_k = resolve_mode(args)
    args.overfit_one = args.overfit_k == 1
    if args.noise_schedule == "auto":
        args.noise_schedule = "flow" if args.prediction == "flow" else "cosine"
    if args.zero_terminal_snr is None:
        args.zero_terminal_snr = args.prediction != "eps"
    if args.overfit_k and args.prob_uncond == 0:
        args.guidance_scale = 1.0  # there is no null class to guide from
    if args.guidance_scale != 1 and args.prob_uncond == 0:
        fail(f"--guidance_scale={args.guidance_scale:g} guides away from the null class, which "
             "--prob_uncond=0 never trains: give --guidance_scale=1 or --prob_uncond=0.1")
    return args


def check_inputs(args):
    """For --check: end the program if what it needs is missing, else print where it would go on."""
    data.check_folders(args)
    if args.check == "inputs":
        ae_path = find_autoencoder(args)
        read_latent_scale(args, ae_path, load_checkpoint(ae_path, "vae")["sha256"])
    Run.report(args, "ldm")


# --- model and step -----------------------------------------------------------------------------


def build_models(args, ctx, latent_shape, num_classes):
    """(Denoiser, EMA or None, AdamW) on the device, from args.seed; ends the program if settings
    contradict each other."""
    torch.manual_seed(args.seed)
    try:
        denoiser = ctx.place(
            model.build_denoiser(vars(args), latent_shape, num_classes, data.AUG_DIM))
    except ValueError as e:
        fail(e)
    ema = model.EMA(denoiser, args.ema_decay) if args.use_ema else None
    if ema and ctx.compile and ctx.device.type == "cuda":  # on a CPU it takes minutes for nothing
        ema.module.unet.compile(mode=ctx.compile)
    optimizer = torch.optim.AdamW(denoiser.parameters(), args.lr,
                                  weight_decay=args.weight_decay, fused=True)
    return denoiser, ema, optimizer


# Weights fit no other value of the first four, and mean nothing with one of the others.
FIXED = ("ldm_base_ch", "ldm_ch_mults", "ldm_num_res_blocks", "ldm_attn_res", "prediction",
         "noise_schedule", "zero_terminal_snr", "latent_scale_factor")


def check_start(args, scale, vae_sha256):
    """Class names of a run that goes on, else None. Ends the program if the weights of --resume_dir
    or --init_from are not for this network, diffusion process, latent scale and autoencoder."""
    source = f"{args.resume_dir}/ckpts/last.pt" if args.resume_dir else args.init_from
    if not source:
        return None
    checkpoint = load_checkpoint(source, "ldm")
    if checkpoint["vae_sha256"] != vae_sha256:
        fail(f"{source} was trained with another autoencoder (its hash differs): give "
             f"--ae_ckpt_path={checkpoint['ae_ckpt_path']} as it was then, or start a new run")
    before = {**checkpoint["args"], **checkpoint}
    for name, value in {**vars(args), "latent_scale_factor": scale}.items():
        if name in FIXED and before.get(name) != value:
            flag = shlex.quote(f"--{name}={before.get(name)}")
            fail(f"{source} was trained with {name}={before.get(name)}, and its weights mean "
                 f"nothing with {value}: give {flag}, or start a new run")
    return checkpoint["class_names"] if args.resume_dir else None


def initial_weights(denoiser, args, class_names):
    """State dict for `denoiser` from the averaged weights of --init_from. Classes are matched by
    name; a new one starts from the null class, which stands for all."""
    checkpoint = load_checkpoint(args.init_from, "ldm")
    known = checkpoint["class_names"]
    if new := ", ".join(name for name in class_names if name not in known):
        notice(f"{args.init_from} does not know class {new}: it starts from the null class")
    rows = [known.index(name) if name in known else len(known) for name in class_names]
    state = sample.build_denoiser(checkpoint, args.init_from).state_dict()
    state["unet.class_emb.weight"] = state["unet.class_emb.weight"][[*rows, len(known)]]
    # Either side may lack the weights of --augment.
    return {name: state.get(name, value) for name, value in denoiser.state_dict().items()}


def load_weights(run, denoiser, ema, optimizer, args, class_names):
    """Load the checkpoint of a run that goes on, and return it; a new run takes the weights of
    --init_from, if any."""
    modules = (denoiser, ema.module) if ema else (denoiser,)
    checkpoint = run.load()
    if checkpoint:
        stored = (checkpoint["model"], checkpoint["ema"] or checkpoint["model"])
        run.restore(dict(zip(modules, stored, strict=False)),
                    {optimizer: checkpoint["optimizer"]})
    elif args.init_from:
        run.restore(dict.fromkeys(modules, initial_weights(denoiser, args, class_names)))
    return checkpoint


def wrap(denoiser, batch, args, ctx):
    """The loss as the step calls it, compiled and under DDP; batch: any that read_batch returned.
    The wrappers are only called: weights are read from the plain module, so no checkpoint knows of
    them."""
    example = network_inputs(batch, 1.0, "example", denoiser, args, ctx)[0]
    # A CUDA graph's next run writes over gradients that a micro-batch was to add to.
    mode = ctx.compile if args.grad_accum == 1 else "default"
    loss_fn = torch.compile(denoiser, mode=mode) if ctx.compile else denoiser
    return ctx.wrap_ddp(loss_fn, *example)


def draw_inputs(latent_shape, step, args, ctx):
    """The random numbers of this rank's images in a step: noise of the posterior and noise of the
    diffusion [B, C, h, w], t [B], and whether the label is dropped [B], B for all micro-batches."""
    batch = args.batch_per_device * args.grad_accum
    noise, rng = ctx.global_noise(batch, (2, *latent_shape), args.seed, "ldm", step)
    total, local = ctx.world_size * batch, ctx.local_slice(batch)
    # Times spread evenly from one random start have less variance (Kingma et al. 2021, I.1).
    t = torch.arange(total, device=ctx.device)[local] / total
    t = (t + torch.rand(1, device=ctx.device, generator=rng)) % 1
    dropped = torch.rand(total, device=ctx.device, generator=rng)[local] < args.prob_uncond
    return noise[:, 0].contiguous(), noise[:, 1].contiguous(), t, dropped


def draw_copies(count, step, args, ctx):
    """Which augmented copy of each image this rank trains on in a step, int [B]: 0, the image
    itself, half of the time."""
    if not args.augment:
        return np.zeros(count, int)
    rng, total = ctx.generator(args.seed, "versions", step), ctx.world_size * count
    copies = torch.randint(1, args.augment + 1, (total,), generator=rng)
    copies *= torch.rand(total, generator=rng) < 0.5
    return copies[ctx.local_slice(count)].numpy()


def read_batch(latents, index, step, args, ctx):
    """What this rank trains on in a step, of the images `index`: (mean, logvar) of unscaled
    latents, each [B, C, h, w]; classes [B]; augmentation labels [B, 6], None without --augment."""
    copies = draw_copies(len(index), step, args, ctx)
    y = ctx.to_device(torch.from_numpy(latents.images.labels[index]))
    aug = latents.augment_labels(index, copies) if args.augment else None
    return latents.posterior(index, copies), y, aug


def network_inputs(batch, scale, step, denoiser, args, ctx):
    """[(x0, t, noise, y) as Denoiser.forward takes them, and augmentation labels if it is
    conditioned on them] for each micro-batch of what read_batch returned."""
    posterior, y, aug = batch
    posterior_noise, noise, t, dropped = draw_inputs(posterior[0].shape[1:], step, args, ctx)
    x0 = model.Posterior(*posterior).sample(posterior_noise) * scale
    x0 = x0.contiguous(memory_format=ctx.memory_format)
    y = torch.where(dropped, denoiser.unet.null_class, y)
    inputs = (x0, t, noise, y) if aug is None else (x0, t, noise, y, aug)
    return list(zip(*(part.chunk(args.grad_accum) for part in inputs), strict=True))


def train_step(denoiser, ema, optimizer, loss_fn, batch, scale, step, args, ctx):
    """One optimiser step on what read_batch returned: (the numbers of LOSSES, 1.0 if it was skipped
    else 0.0), tensors on the device. dev/bench.py times this function."""
    losses, times = [], []
    for inputs in network_inputs(batch, scale, step, denoiser, args, ctx):
        times.append(inputs[1])
        # DDP sums the gradients of the ranks once per step, in the last micro-batch.
        alone = ctx.world_size == 1 or len(times) == args.grad_accum
        with contextlib.nullcontext() if alone else loss_fn.no_sync():
            with ctx.autocast():
                loss = loss_fn(*inputs)
            (loss.mean() / args.grad_accum).backward()
        losses.append(loss.detach())
    grad_norm, skipped = clip_and_step(denoiser, optimizer, args.grad_clip)
    if ema:
        ema.update(denoiser, step + 1)
    loss, t = torch.cat(losses), torch.cat(times)
    quarter = ((t[:, None] * 4).long() == torch.arange(4, device=t.device)).float()  # [B, 4]
    by_quarter = loss @ quarter / quarter.sum(0)  # NaN if there are no images in it
    return (loss.mean(), grad_norm, *by_quarter), skipped


# --- evaluation ---------------------------------------------------------------------------------


@torch.no_grad()
def training_reference(latents, args, scale, vae, ctx):
    """What samples are compared with, from up to 64 training images per class: {mean, std, min and
    max of unscaled latents, real_pairwise_mse_mean of normalised ones, and of about 32 images what
    sample.appearance returns}; in overfit modes arguments of overfit_verdict, else None."""
    labels = latents.images.labels
    index = np.concatenate([np.flatnonzero(labels == c)[:64] for c in np.unique(labels)])
    mean, logvar = latents.posterior(index)
    noise = torch.randn(mean.shape, generator=ctx.generator(args.seed, "reference"))
    z = model.Posterior(mean, logvar).sample(noise.to(mean.device)) * scale
    values = sample.sample_metrics(
        None, z, labels[index], latents.images.class_names, scale, vae, ctx, real={})
    stats = {name.partition("/")[2]: value for name, value in values.items()
             if name.startswith("final_latent_stats/")}
    stats["real_pairwise_mse_mean"] = values.get("sample_diversity/pairwise_mse_mean")
    if not 0.9 < stats["std"] * scale < 1.1:
        notice("the training latents times the scale factor have a standard deviation of "
               f"{stats['std'] * scale:.2f}, not 1: was it measured on other images?")
    if not args.overfit_k:
        few = slice(None, None, max(1, len(index) // 32))
        x = latents.images.images(index[few])
        decoded = sample.decode_latents(vae, z[few], scale, ctx)
        return stats | sample.appearance(x, z[few], decoded, scale, vae, ctx), None
    z_train = mean.cpu() * scale
    # A perfect copy is a draw from the posterior: its variance comes on top of the tolerance.
    threshold = 0.1 + (logvar.exp().mean() * scale**2).item()
    return stats, {"z_train": z_train, "mse_threshold": threshold,
                   "x_train": sample.decode_latents(vae, z_train, scale, ctx)}


def evaluate(denoiser, vae, scale, classes, class_names, train_stats, memorised, args, ctx, step,
             tick):
    """(metrics, images [N, 1, S, S], class index of each) of args.sample_batch_size samples of each
    class, drawn by all ranks together, alike on all ranks. Their noise is another at each step:
    copies are counted over several. train_stats, memorised: of training_reference; tick(): called
    before each evaluation of the network."""
    first = step * args.sample_batch_size
    requests = [(c, first + i) for c in classes for i in range(args.sample_batch_size)]
    local = requests[ctx.rank::ctx.world_size]
    z, x = [torch.zeros(0, *vae.latent_shape)], [torch.zeros(0, 1, args.img_size, args.img_size)]
    for _, batch_z, batch_x in sample.sample_batches(
            denoiser, vae, scale, local, class_names, args, ctx, 16, f"step {step}: sampling",
            tick):
        z.append(batch_z)
        x.append(batch_x)
    z, x = ctx.gather(torch.cat(z)), ctx.gather(torch.cat(x))
    labels = [c for c, _ in requests]
    values = sample.sample_metrics(x, z, labels, class_names, scale, vae, ctx, train_stats)
    if memorised:
        values |= overfit_verdict(z_samples=z, x_samples=x, **memorised)
    return values, x, labels


def save_pictures(run, epoch, x, labels, images, args):
    """{class name: path} of a labelled grid of each class's samples x; beside it, once, a grid of
    eight training images."""
    paths = {}
    for c in sorted(set(labels)):
        name, own = images.class_names[c], x[torch.tensor(labels) == c]
        paths[name] = run.save_grid(f"sample_ep{epoch:04d}_{name}", [own],
                                    [f"{name}, epoch {epoch}, guidance {args.guidance_scale:g}"])
        if not (run.folder / "samples" / f"real_{name}.png").exists():
            members = np.flatnonzero(images.labels == c)
            chosen = images.images(members[data.spread(len(members), 8)])
            run.save_grid(f"real_{name}", [chosen], [f"{name}, real"])
    return paths


# --- the program --------------------------------------------------------------------------------


def main(argv=None):
    args = parse_args(argv)
    if args.check:
        check_inputs(args)
        return

    # --- processes, autoencoder, data ---
    ctx = setup(args)
    ae_path = args.ae_ckpt_path = str(find_autoencoder(args))  # for when this run goes on, too
    vae, ae_settings, vae_sha256 = sample.load_autoencoder(ae_path, ctx)
    data.adopt_settings(args, ae_settings, f"the autoencoder {ae_path}")
    scale = read_latent_scale(args, ae_path, vae_sha256)
    known = check_start(args, scale, vae_sha256)  # before hours of decoding
    images = data.open_images(args, ctx, args.split, class_names=known)
    class_names, latent_shape = images.class_names, vae.latent_shape
    denoiser, ema, optimizer = models = build_models(args, ctx, latent_shape, len(class_names))
    if args.overfit_k:
        images = images.subset(data.overfit_indices(images.labels, args.overfit_k))
    cache = pathlib.Path(args.output_root, "cache")
    latents = data.LatentSet(images, vae, vae_sha256, cache, ctx, args.cache_latents, args.augment)
    train_stats, memorised = training_reference(latents, args, scale, vae, ctx)
    monitor = memorisation.MemorisationMonitor(latents, vae, vae_sha256, scale, cache, args, ctx)
    classes = sorted(set(images.labels.tolist()))

    # --- run folder: a new one, or the run to go on with ---
    facts = {"class_names": class_names, "latent_shape": latent_shape,
             "latent_scale_factor": scale, "vae_sha256": vae_sha256}
    run = Run(args, ctx, "ldm", f"ldm_{args.task.lower()}_{args.mode}",
              {**facts, "img_size": args.img_size, "data": images.summary})
    data.notice_changes(run.before.get("data"), images, f"{run.folder} was last started")
    step, train_metrics, sample_metrics, verdicts = 0, {}, {}, []
    means, diverged = RunningMeans(ctx, LOSSES), False
    if checkpoint := load_weights(run, *models, args, class_names):
        step, train_metrics = checkpoint["step"], checkpoint["train_metrics"]
        means.in_a_row = checkpoint["bad_steps"].to(ctx.device)
        monitor.load(checkpoint)

    step_images = args.batch_per_device * args.grad_accum  # of this rank
    order = BatchOrder(len(images) * (args.repeat_len if args.overfit_one else 1), step_images,
                       args.seed, ctx.rank, ctx.world_size)
    total_steps = order.total_steps(args.epochs, args.max_steps)
    if 0 < total_steps < args.warmup_steps:
        notice(f"the learning rate still rises when the run ends: give --warmup_steps="
               f"{total_steps // 10}, or more --max_steps than {args.warmup_steps}")
    if not (monitor.num_val or args.overfit_k):
        notice(f"no validation images to choose best.pt and to stop by: training ends after "
               f"--epochs={args.epochs}; up to {memorisation.SAFE_PASSES} no model has copied")

    def state():
        return {"model": denoiser.state_dict(), "ema": ema.module.state_dict() if ema else None,
                "optimizer": optimizer.state_dict(), "step": step, "bad_steps": means.in_a_row,
                "train_metrics": train_metrics, **monitor.state(), **facts, "args": vars(args),
                "trained_classes": classes, "ae_ckpt_path": str(pathlib.Path(ae_path).resolve()),
                "train_stats": train_stats}

    run.start(state(), total_steps, build_parser(), {
        "autoencoder": ae_path, "latent scale factor": f"{scale:.6g}", "latent": latent_shape,
        "images": len(images), "classes": data.count_files(images.summary),
        "validation images": monitor.num_val, "global batch": step_images * ctx.world_size,
        "parameters": f"{sum(p.numel() for p in denoiser.parameters()) / 1e6:.1f} M",
        "steps": f"{total_steps} ({order.epoch_steps} per epoch)"})
    # Only now, with the settings on the screen: compiling takes minutes.
    example = read_batch(latents, order.indices(0)[0] % len(images), 0, args, ctx)
    loss_fn = wrap(denoiser, example, args, ctx)

    while True:
        # --- checkpoint, at most every --save_minutes ---
        evaluating = step > 0 and (step == total_steps or
                                   step % (args.sample_every * order.epoch_steps) == 0)
        run.save_if_due(state, now=step == total_steps)  # may leave, all ranks alike

        # --- evaluation, with the averaged weights ---
        if evaluating:
            epoch, averaged = step // order.epoch_steps, ema.module if ema else denoiser
            sample_metrics, x, x_labels = evaluate(
                averaged, vae, scale, classes, class_names, train_stats, memorised, args, ctx,
                step, lambda: run.stop_if_asked(state))
            sample_metrics |= monitor.measure(averaged, x, step, epoch)
            if monitor.best.step == step:
                run.save_best(state())
            if ctx.is_main:
                verdicts = health(
                    train_metrics | sample_metrics, run.history("train/loss"), train_stats,
                    overfit=args.overfit_k > 0, best_epoch=monitor.best.epoch,
                    guidance_scale=args.guidance_scale,
                    val_history=(run.history("val/loss"), run.history("val/train_loss")))
                sample_metrics = sweep_objective(sample_metrics, verdicts)
                pictures = save_pictures(run, epoch, x, x_labels, images, args)
                run.log_evaluation(step, epoch, sample_metrics, pictures, verdicts)
        patience_over = 0 < args.patience <= monitor.best.since
        if step >= total_steps or patience_over:
            break

        # --- one step: read, set the learning rate, forward, backward, update ---
        index, epoch = order.indices(step)
        index = index % len(images)  # overfit_one repeats its image
        batch = read_batch(latents, index, step, args, ctx)
        warmup = min(1.0, (step + 1) / args.warmup_steps) if args.warmup_steps else 1.0
        for group in optimizer.param_groups:
            group["lr"] = args.lr * warmup
        losses, skipped = train_step(*models, loss_fn, batch, scale, step, args, ctx)
        means.add(losses, skipped)
        step += 1

        # --- logging: the only place that waits for the device ---
        if step % args.log_every == 0 or step == total_steps:
            train_metrics = run.log_training(
                step, epoch, means.read() | {"train/learning_rate": args.lr * warmup},
                images_per_step=step_images * ctx.world_size)
            if diverged := means.in_a_row.item() >= args.max_bad_steps:
                break
        run.progress.update(step)

    # --- end: best.pt is the one to use, if validation images chose it ---
    if ctx.is_main and diverged:
        verdicts = health(train_metrics, run.history("train/loss"), diverged=True) + [
            v for v in verdicts if not v.metric.startswith("train/")]  # of the last evaluation
    if patience_over:
        notice(f"stopped at step {step} of {total_steps}: --patience={args.patience} is over")
    checkpoint_path = run.best_path if monitor.best.step else run.last_path
    summary = {**train_metrics, **sample_metrics, "train_stats": train_stats,
               "best": monitor.best._asdict()}
    run.finish(step, summary, verdicts, checkpoint_path, diverged, "sample.py",
               ckpt=checkpoint_path)


if __name__ == "__main__":
    main()
