"""Stage 3: train a class-conditional diffusion model in the latent space of a trained autoencoder.

    python train_ldm.py --mode=overfit_one                       # first: can it learn one image?
    python train_ldm.py --mode=overfit_16                        # then a few
    torchrun --nproc_per_node=4 train_ldm.py --mode=full_train   # then all

Each mode is a set of defaults (PRESETS); an explicit flag wins. The same command again goes on where it stopped
if it names the run (--run_name or --resume_dir).
"""
import contextlib
import pathlib
import re
import time

import numpy as np
import torch

import data
import experiment
import metrics
import model
import sample
from experiment import BooleanFlag, at_least, fail, int_list, notice
from find_latent_scale import add_autoencoder_arguments, find_autoencoder, load_autoencoder

# --- modes and arguments -----------------------------------------------------------------------------------

PRESETS = {
    "full_train": dict(batch_per_device=16, epochs=1000, log_every=100, sample_every=10, wandb=True),
    "overfit_one": dict(batch_per_device=1, epochs=1000, log_every=10, sample_every=5, wandb=False),
    "overfit_8": dict(batch_per_device=8, epochs=1500, log_every=25, sample_every=10, wandb=True),
    "overfit_16": dict(batch_per_device=16, epochs=1500, log_every=25, sample_every=10, wandb=True),
    "overfit_32": dict(batch_per_device=16, epochs=1500, log_every=50, sample_every=10, wandb=True),
}


def resolve_mode(settings):
    """(mode, K) from --mode, --overfit_one and --overfit_k, K = 0 for all images. ValueError if they disagree."""
    mode = settings["mode"]
    if not re.fullmatch("full_train|overfit_one|overfit_[1-9][0-9]*", mode):
        raise ValueError(f"unknown --mode={mode}: full_train, overfit_one or overfit_K such as overfit_16")
    named = {"full_train": 0, "overfit_one": 1}
    in_mode = named[mode] if mode in named else int(mode.removeprefix("overfit_"))
    asked = {k for k in (in_mode, settings["overfit_k"], int(settings["overfit_one"])) if k}
    if len(asked) > 1:
        raise ValueError(f"--mode={mode}, --overfit_one and --overfit_k ask for different numbers of images: "
                         f"{', '.join(map(str, sorted(asked)))}")
    k = asked.pop() if asked else 0
    return {0: "full_train", 1: "overfit_one"}.get(k, f"overfit_{k}"), k


def preset(settings):
    """New defaults that follow from the mode. An overfit_K without a row of its own takes that of the nearest size."""
    mode, k = resolve_mode(settings)
    row = PRESETS.get(mode) or {**PRESETS["overfit_8" if k < 12 else "overfit_16" if k < 24 else "overfit_32"],
                                "batch_per_device": min(k, 16)}
    if k:  # memorising: no class dropout, hence no null class to guide from, and no warm-up
        row = {**row, "prob_uncond": 0.0, "guidance_scale": 1.0, "warmup_steps": 0}
    return row


def make_parser():
    parser = experiment.make_parser(__doc__)
    experiment.add_training_arguments(parser, lr=3e-5, epochs=1000, batch_per_device=16)
    add_autoencoder_arguments(parser)
    parser.set_defaults(img_size=None)
    add = parser.add_argument_group("mode").add_argument
    add("--mode", default="full_train", help="full_train, overfit_one or overfit_K")
    add("--latent_scale_factor", type=at_least(1e-6, float), help="none: from latent_scale.json beside the autoencoder")
    add("--cache_latents", action=BooleanFlag, default=True, help="encode the images once and for all")
    add = parser.add_argument_group("UNet").add_argument
    add("--ldm_base_ch", type=at_least(1), default=96, help="channels of the first level")
    add("--ldm_ch_mults", type=int_list, default=(1, 2, 4), help="channels by level; each further one halves the size")
    add("--ldm_num_res_blocks", type=at_least(1), default=2, help="residual blocks a level")
    add("--ldm_attn_res", type=int_list, default=(16,), help="latent sizes with attention beside the middle block")
    add = parser.add_argument_group("diffusion").add_argument
    add("--prediction", choices=("eps", "v", "x0", "flow"), default="flow", help="what the UNet puts out")
    add("--noise_schedule", choices=("auto", "linear", "cosine", "flow"), default="auto",
        help="auto: flow for prediction flow, else cosine")
    add("--zero_terminal_snr", action=BooleanFlag, help="t = 1 is pure noise; none: yes, but for eps")
    add("--loss_weighting", choices=("uniform", "min_snr"), default="uniform", help="over t")
    add("--prob_uncond", type=at_least(0, float), default=0.1, help="share of labels replaced by the null class")
    add("--use_ema", action=BooleanFlag, default=True, help="sample from averaged weights")
    add("--ema_decay", type=at_least(0, float), default=0.999, help="of the averaged weights, after a warm-up")
    add("--warmup_steps", type=at_least(0), default=500, help="steps over which the learning rate rises")
    add("--grad_accum", type=at_least(1), default=1, help="micro-batches a step")
    add = parser.add_argument_group("sampling in training").add_argument
    add("--sample_batch_size", type=at_least(2), default=8, help="images a class")
    add("--sampler", choices=sample.SAMPLERS, default="ancestral", help="see sample.py")
    add("--num_sampling_steps", type=at_least(1), default=500, help="network evaluations an image")
    add("--guidance_scale", type=at_least(0, float), default=4.0, help="classifier-free guidance; 1: none")
    add("--guidance_interval", type=experiment.interval, default=(0.3, 0.7), help="LOW,HIGH: guidance for t between them")
    return parser


def parse_args(argv=None):
    """Settings with mode, overfit_k, noise_schedule and zero_terminal_snr resolved; ends the program on bad ones."""
    args = experiment.parse_args(make_parser(), argv, preset)
    args.mode, args.overfit_k = resolve_mode(vars(args))
    args.overfit_one = args.overfit_k == 1
    if args.noise_schedule == "auto":
        args.noise_schedule = "flow" if args.prediction == "flow" else "cosine"
    if args.zero_terminal_snr is None:
        args.zero_terminal_snr = args.prediction != "eps"
    if args.prob_uncond > 1:
        fail(f"--prob_uncond={args.prob_uncond} is a probability: at most 1")
    if args.guidance_scale != 1 and args.prob_uncond == 0:
        if not args.overfit_k:
            fail(f"--guidance_scale={args.guidance_scale:g} guides away from the null class, which --prob_uncond=0 "
                 "never trains: give --guidance_scale=1 or --prob_uncond=0.1")
        notice(f"--guidance_scale={args.guidance_scale:g} is off: {args.mode} trains no null class to guide from")
        args.guidance_scale = 1.0
    if args.sampler == "euler" and args.noise_schedule != "flow":
        fail(f"--sampler=euler is for --noise_schedule=flow, not {args.noise_schedule}: use --sampler=ddim")
    return args


def read_scale(args, ckpt_path, vae_sha256):
    """The latent scale factor of the autoencoder. Ends the program if it is missing or of another autoencoder."""
    path = ckpt_path.parent.parent / "latent_scale.json"
    command = f"python find_latent_scale.py --ae_ckpt_path={ckpt_path} --task={args.task}" + (
        f" --data_root={args.data_root}" if args.data_root else "") + (
        f" --output_root={args.output_root}" if args.output_root != "runs" else "")
    if not path.exists():
        if args.latent_scale_factor is None:
            fail(f"no {path}; make it with: {command}")
        return args.latent_scale_factor
    stored = experiment.read_json(path, "latent scale")
    factor, std = stored.get("latent_scale_factor"), stored.get("std")
    whole = isinstance(factor, float) and isinstance(std, float) and factor > 0 and abs(factor * std - 1) < 1e-9
    if stored.get("vae_sha256") != vae_sha256 or not whole:
        if args.latent_scale_factor is None:
            fail(f"{path} is damaged or was measured on another state of this autoencoder; measure again with: {command}")
        return args.latent_scale_factor
    if args.latent_scale_factor is not None:
        if abs(args.latent_scale_factor / factor - 1) > 0.01:
            off = 100 * (args.latent_scale_factor / factor - 1)
            notice(f"--latent_scale_factor={args.latent_scale_factor} is {off:+.0f} % off the measured "
                   f"{factor:.6g} in {path}")
        return args.latent_scale_factor
    return factor


# --- evaluation --------------------------------------------------------------------------------------------


@torch.no_grad()
def training_reference(latents, args, scale, vae, procs):
    """What samples are compared with, from up to 64 training images a class: (statistics, overfitting targets).

    statistics: mean, std, min, max of unscaled latents and real_pairwise_mse_mean of normalised ones.
    targets: for overfit modes (normalised posterior means, their decoded images, mean posterior variance).
    """
    labels = latents.images.labels
    index = np.concatenate([np.flatnonzero(labels == c)[:64] for c in np.unique(labels)])
    mean, logvar = (torch.cat(p) for p in zip(*(latents.posterior(index[i:i + 64]) for i in range(0, len(index), 64)),
                                              strict=True))
    rng = experiment.generator("cpu", args.seed, "reference")
    z = model.Posterior(mean, logvar).sample(torch.randn(mean.shape, generator=rng).to(mean.device))
    names = latents.images.class_names
    stats = {k.split("/")[1]: v for k, v in metrics.latent_stats(z, scale).items()}
    pairs = metrics.sample_diversity(z * scale, labels[index], names, None)
    stats["real_pairwise_mse_mean"] = pairs.get("sample_diversity/pairwise_mse_mean")
    if not args.overfit_k:
        return stats, None
    z_train = mean.cpu() * scale
    return stats, (z_train, sample.decode_latents(vae, z_train, scale, procs), (logvar.exp().mean() * scale**2).item())


def evaluate(denoiser, vae, args, scale, classes, class_names, stats, targets, procs, epoch):
    """Sample every class: (metrics, images [N, 1, H, W], class index of each), the same on all ranks."""
    wanted = [(c, i) for c in classes for i in range(args.sample_batch_size)]
    mine = wanted[procs.rank::procs.world_size]
    progress = experiment.Progress(procs, f"epoch {epoch}: sampling", len(mine) * args.num_sampling_steps)
    batches = sample.sample_batches(denoiser, vae, scale, class_names, mine, args, procs, 16, progress)
    z, x = [torch.zeros(0, *vae.latent_shape)], [torch.zeros(0, 1, args.img_size, args.img_size)]
    for _, batch_z, batch_x in batches:
        z.append(batch_z)
        x.append(batch_x)
    z, x = (experiment.gather(procs, torch.cat(parts)) for parts in (z, x))
    labels = [c for c, _ in wanted]
    values = metrics.latent_stats(z / scale, scale) | metrics.sample_diversity(
        z, labels, class_names, stats["real_pairwise_mse_mean"])
    if targets:
        z_train, x_train, posterior_variance = targets
        # A perfect copy is a draw from the posterior, so its variance comes on top of the tolerance.
        values |= metrics.overfit_verdict(z, z_train, x, x_train, mse_threshold=0.1 + posterior_variance)
    return values, x, labels


# --- training ----------------------------------------------------------------------------------------------


def draw_inputs(posterior, y, scale, prob_uncond, null_class, rng):
    """(x0, t, noise, y) of a batch, as Denoiser.forward takes them: all random numbers from rng.

    posterior: (mean, logvar) of unscaled latents, each [B, C, h, w]; y [B]: class indices, of which the share
    prob_uncond becomes null_class.
    """
    mean, logvar = posterior
    posterior_noise, noise = torch.randn(2, *mean.shape, device=mean.device, generator=rng)
    x0 = model.Posterior(mean, logvar).sample(posterior_noise) * scale
    # Times spread evenly over [0, 1] from one random start have less variance (Kingma et al. 2021, I.1).
    t = torch.arange(len(mean), device=mean.device) / len(mean)
    t = (t + torch.rand(1, device=mean.device, generator=rng)) % 1
    dropped = torch.rand(len(mean), device=mean.device, generator=rng) < prob_uncond
    return x0, t, noise, torch.where(dropped, null_class, y)


def main(argv=None):
    args = parse_args(argv)

    # --- processes, autoencoder, data ---
    procs = experiment.setup_processes(args)
    device = procs.device
    ae_ckpt_path = find_autoencoder(args)
    vae, ae_settings, vae_sha256 = load_autoencoder(ae_ckpt_path, args.ae_config_path, procs)
    if args.img_size not in (None, ae_settings["img_size"]):
        fail(f"--img_size={args.img_size}, but the autoencoder {ae_ckpt_path} works at {ae_settings['img_size']}: "
             "leave it out, or train an autoencoder of that size")
    args.img_size, args.ae_ckpt_path = ae_settings["img_size"], str(ae_ckpt_path)
    scale = read_scale(args, ae_ckpt_path, vae_sha256)
    images = data.open_images(args, procs, args.split)
    class_names, latent_shape = images.class_names, vae.latent_shape
    try:
        torch.manual_seed(args.seed)
        denoiser = sample.build_denoiser(vars(args), latent_shape, len(class_names))
    except ValueError as e:
        fail(e)
    sizes = [latent_shape[1] >> level for level in range(len(args.ldm_ch_mults))]
    if not set(args.ldm_attn_res) & set(sizes):
        notice(f"--ldm_attn_res={','.join(map(str, args.ldm_attn_res))} is none of the feature sizes "
               f"{','.join(map(str, sizes))}: attention in the middle block only")
    if args.overfit_k:
        images = images.subset(data.overfit_indices(images.labels, args.overfit_k))
    latents = data.LatentSet(images, vae, vae_sha256, pathlib.Path(args.output_root) / "cache", procs,
                             args.cache_latents)
    stats, targets = training_reference(latents, args, scale, vae, procs)
    classes = sorted(set(images.labels.tolist()))
    epoch_len = len(images) * (args.repeat_len if args.overfit_one else 1)
    step_batch = args.batch_per_device * args.grad_accum
    global_batch = step_batch * procs.world_size
    epoch_steps = experiment.steps_per_epoch(epoch_len, step_batch, procs.world_size)
    total_steps = args.epochs * epoch_steps
    total_steps = min(total_steps, args.max_steps) if args.max_steps else total_steps

    # --- model and optimiser ---
    denoiser = denoiser.to(device, memory_format=procs.memory_format)
    ema = model.EMA(denoiser, args.ema_decay) if args.use_ema else None
    optimizer = torch.optim.AdamW(denoiser.parameters(), args.lr, weight_decay=args.weight_decay, fused=True)

    # --- run folder, or the run to go on with ---
    run = experiment.Run(args, procs, "ldm", f"ldm_{args.task.lower()}_{args.mode}", {
        "class_names": class_names, "img_size": args.img_size, "latent_shape": latent_shape,
        "latent_scale_factor": scale, "vae_sha256": vae_sha256})
    window = experiment.Window(procs, ["train/loss", "train/grad_norm", *(f"loss_t{q}" for q in range(4)),
                                       *(f"count_t{q}" for q in range(4))])
    step, bad_steps, train_metrics = 0, torch.zeros((), device=device), {}
    if checkpoint := run.load():
        if checkpoint["vae_sha256"] != vae_sha256 or checkpoint["latent_scale_factor"] != scale:
            fail(f"{run.folder} was trained with another autoencoder or latent scale factor "
                 f"({checkpoint['latent_scale_factor']:.6g}, now {scale:.6g}): start a new run")
        if checkpoint["class_names"] != class_names:
            fail(f"{run.folder} was trained on the classes {', '.join(checkpoint['class_names'])}, not on "
                 f"{', '.join(class_names)}: give the --data_root and --task it was started with")
        for name in ("prediction", "noise_schedule", "zero_terminal_snr"):
            if checkpoint["args"][name] != getattr(args, name):
                fail(f"{run.folder} was trained with {name}={checkpoint['args'][name]}; its weights mean nothing with "
                     f"{getattr(args, name)}: start a new run")
        experiment.load_weights(denoiser, checkpoint["model"], run.checkpoint_path)
        if ema:
            experiment.load_weights(ema.module, checkpoint["ema"] or checkpoint["model"], run.checkpoint_path)
        optimizer.load_state_dict(checkpoint["optimizer"])
        window.load(checkpoint["window"])
        step, train_metrics = checkpoint["step"], checkpoint["train_metrics"]
        bad_steps = checkpoint["bad_steps"].to(device)

    def state():
        return {"model": denoiser.state_dict(), "ema": ema.module.state_dict() if ema else None,
                "optimizer": optimizer.state_dict(), "step": step, "bad_steps": bad_steps, "window": window.state(),
                "train_metrics": train_metrics,
                "args": vars(args), "class_names": class_names, "trained_classes": classes,
                "latent_shape": latent_shape, "latent_scale_factor": scale, "vae_sha256": vae_sha256,
                "ae_ckpt_path": str(ae_ckpt_path.resolve()),
                "train_stats": stats}

    if procs.main:
        experiment.print_settings(args, make_parser(), {
            "run folder": run.folder, "continues at step": step, "autoencoder": ae_ckpt_path,
            "latent scale factor": f"{scale:.6g}", "latent": "x".join(map(str, latent_shape)), "images": len(images),
            "classes": ", ".join(class_names[c] for c in classes),
            "parameters": f"{sum(p.numel() for p in denoiser.parameters()) / 1e6:.1f} M",
            "steps": f"{total_steps} ({epoch_steps} an epoch)", "global batch": global_batch,
            "device": f"{device} x {procs.world_size}, {procs.dtype}, compile {'on' if procs.compile else 'off'}"})
    run.start(args, checkpoint or state())

    # The compiled and DDP wrappers are only called; weights are read from the plain module.
    zeros = torch.zeros(args.batch_per_device, *latent_shape, device=device).contiguous(memory_format=procs.memory_format)
    loss_fn = experiment.data_parallel(procs, torch.compile(denoiser) if procs.compile else denoiser, zeros,
                                       zeros[:, 0, 0, 0], zeros, zeros[:, 0, 0, 0].long())
    labels = torch.from_numpy(images.labels).to(device)
    stop = experiment.StopSignal(procs)
    progress = experiment.Progress(procs, "step", total_steps, step)
    log_time, last_save, log_step, saved_step = time.perf_counter(), time.perf_counter(), step, step
    sample_metrics, verdicts, diverged, stopping, together = {}, [], False, False, True

    try:
        while True:
            # --- evaluation: after the checkpoint, so that a stop in here loses nothing ---
            if step and (step == total_steps or step % (args.sample_every * epoch_steps) == 0):
                if step != saved_step:  # going on with a finished run leaves its checkpoint, and so its hash, as it is
                    run.save(state())
                last_save = time.perf_counter()
                epoch = step // epoch_steps
                with stop.immediate():
                    sample_metrics, x, x_labels = evaluate(
                        ema.module if ema else denoiser, vae, args, scale, classes, class_names, stats, targets, procs,
                        epoch)
                    if procs.main:
                        progress.clear()
                        paths = {}
                        for c in classes:
                            name = class_names[c]
                            paths[name] = run.folder / "samples" / f"sample_ep{epoch:04d}_{name}.png"
                            experiment.save_grid(paths[name], [x[torch.tensor(x_labels) == c]],
                                                 [f"{name}, epoch {epoch}, guidance {args.guidance_scale:g}"])
                        verdicts = metrics.health(train_metrics | sample_metrics, run.history("train/loss"), stats,
                                                  overfit=args.overfit_k > 0)
                        sample_metrics = metrics.sweep_objective(sample_metrics, verdicts)
                        run.log(step, epoch, sample_metrics)
                        run.log_images(step, paths)
                        print(f"epoch {epoch}, step {step}: {', '.join(map(str, paths.values()))}")
                        print(metrics.format_verdicts(verdicts), flush=True)
                log_time, log_step = time.perf_counter(), step
            if step >= total_steps:
                break

            # --- one step: all random numbers come from (seed, step, rank), so a resumed run draws the same ---
            index, epoch = experiment.batch_indices(step, epoch_len, step_batch, args.seed, procs.rank,
                                                    procs.world_size)
            index = index % len(images)  # overfit_one repeats its image
            rng = experiment.generator(device, args.seed, "ldm", step, procs.rank)
            warmup = min(1.0, (step + 1) / args.warmup_steps) if args.warmup_steps else 1.0
            experiment.set_learning_rate(optimizer, args.lr * warmup)
            losses, times = [], []
            for micro, part in enumerate(np.split(index, args.grad_accum)):
                x0, t, noise, y = draw_inputs(latents.posterior(part), labels[torch.from_numpy(part).to(device)], scale,
                                              args.prob_uncond, denoiser.unet.null_class, rng)
                last = micro == args.grad_accum - 1
                with contextlib.nullcontext() if last or procs.world_size == 1 else loss_fn.no_sync():
                    with procs.autocast():
                        loss = loss_fn(x0.contiguous(memory_format=procs.memory_format), t, noise, y)
                    (loss.mean() / args.grad_accum).backward()
                losses.append(loss.detach())
                times.append(t)
            grad_norm, bad = experiment.clip_and_step(denoiser, optimizer, args.grad_clip)
            if ema:
                ema.update(denoiser, step + 1)
            loss = torch.cat(losses)
            quarter = ((torch.cat(times)[:, None] * 4).long() == torch.arange(4, device=device)).float()  # [B, 4]
            window.add((loss.mean(), grad_norm, *(loss @ quarter), *quarter.sum(0)), bad)
            bad_steps = (bad_steps + 1) * bad
            step += 1

            # --- logging ---
            if step % args.log_every == 0 or step == total_steps:
                seconds = time.perf_counter() - log_time
                means = window.means()
                train_metrics = {
                    **{name: means[name] for name in ("train/loss", "train/grad_norm", "train/bad_steps")},
                    "train/learning_rate": args.lr * warmup,
                    "train/images_per_second": (step - log_step) * global_batch / seconds,
                    **{f"train/loss_t{q}": means[f"loss_t{q}"] / means[f"count_t{q}"]
                       for q in range(4) if means[f"count_t{q}"] > 0}}
                log_time, log_step = time.perf_counter(), step
                run.log(step, epoch, train_metrics)
                if procs.main:
                    progress.clear()
                    print(f"step {step} epoch {epoch} loss {means['train/loss']:.4f} "
                          f"grad_norm {means['train/grad_norm']:.3f} "
                          f"{train_metrics['train/images_per_second']:.1f} images/s"
                          f"{experiment.skipped_text(train_metrics)}", flush=True)
                if bad_steps.item() >= args.max_bad_steps:
                    diverged = True
                    break
            progress.update(step, "loss {train/loss:.4f} {train/images_per_second:.1f} images/s".format(**train_metrics)
                            if train_metrics else "")
            stopping, saving = stop.poll(time.perf_counter() - last_save > 60 * args.save_minutes)
            if stopping or saving:
                run.save(state())
                last_save, saved_step = time.perf_counter(), step
            if stopping:
                break
    except experiment.Stopped:  # the checkpoint is on disk; another rank may be in the middle of its evaluation
        stopping, together = True, False

    # --- summary ---
    if procs.main and diverged:
        verdicts = metrics.health(train_metrics, run.history("train/loss"), diverged=True) + [
            v for v in verdicts if not v.metric.startswith("train/")]  # of the last evaluation
        print(metrics.format_verdicts(verdicts))
    if procs.main and targets and not stopping and not diverged:
        print(metrics.format_overfit(sample_metrics))
    run.end(step, {**train_metrics, **sample_metrics, "train_stats": stats,
                   "verdicts": [v._asdict() for v in verdicts]}, stop.name or stopping, diverged, together)
    if procs.main:
        print(f"next: python sample.py --ckpt={run.checkpoint_path}")


if __name__ == "__main__":
    main()
