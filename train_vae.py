"""Stage 1: train the KL autoencoder on chest radiographs.

    python train_vae.py                                          # the phantom set
    python train_vae.py --data_root=DATA --task=TB --z_channels=4
    torchrun --nproc_per_node=4 train_vae.py --data_root=DATA --task=TB

Typing the command again continues the run if it names one (--run_name or --resume_dir).
"""
import time
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import data
import experiment
import interop
import metrics
import model
from args import (BooleanFlag, add_data_arguments, add_precision_arguments,
                  add_training_arguments, at_least, changed_settings, file_path, int_list,
                  make_parser, parse_settings, print_settings, run_to_continue)
from experiment import fail, notice, say

LOSSES = ("train/loss", "train/rec", "train/kl", "train/g_loss", "train/d_loss", "train/grad_norm")


# --- arguments ----------------------------------------------------------------------------------


def build_parser():
    """Parser of this stage."""
    parser = make_parser(__doc__)
    add_data_arguments(parser)
    add_precision_arguments(parser)
    add_training_arguments(parser, lr=1e-4, epochs=200, batch_per_device=8)
    add = parser.add_argument_group("autoencoder").add_argument
    add("--z_channels", type=at_least(1), default=4, help="channels of the latent")
    add("--base_ch", type=at_least(1), default=64, help="channels at full resolution")
    add("--ch_mults", type=int_list, default=(1, 2, 4, 4),
        help="channels by level; each further level halves the size")
    add("--num_res_blocks", type=at_least(1), default=2, help="residual blocks per level")
    add("--attn_res", type=int_list, default=(), help="sizes with attention beside the middle")
    add("--patch_size", type=at_least(1), default=1,
        help="squares of so many pixels a side become channels first, which is faster; above 1 it "
             "is no longer the AutoencoderKL of LDM and diffusers")
    add("--linear_path", action=BooleanFlag, default=False,
        help="linear maps beside the networks, which learn far faster then; no longer the "
             "AutoencoderKL of LDM and diffusers either")
    add("--quant_conv", action=BooleanFlag, default=False,
        help="1x1 convolutions around the latent, which published autoencoders have")
    add("--init_from", type=file_path,
        help="weights and shape to start from: ckpts/last.pt of another run, or the folder of a "
             "diffusers AutoencoderKL; with --max_steps=0 it is taken as it is")
    add("--ema_decay", type=at_least(0, float, 1), default=0.999,
        help="decay of the averaged weights, which the later stages use")
    add("--cooldown", type=at_least(0, float, 1), default=0.0,
        help="last fraction of the run over which lr falls to 0 in a straight line")
    add("--augment", action=BooleanFlag, default=False,
        help="shift, zoom, rotate and expose half of the images a little otherwise; never flipped")
    add = parser.add_argument_group("loss").add_argument
    add("--pixel_weight", type=at_least(0, float), default=1.0, help="of the mean absolute error")
    add("--ssim_weight", type=at_least(0, float), default=0.2, help="of 1 - MS-SSIM")
    add("--perceptual_weight", type=at_least(0, float), default=0.0,
        help="of LPIPS (pip install lpips)")
    add("--kl_weight", type=at_least(0, float), default=1e-6,
        help="of the KL in nats per image, beside means over pixels: LDM's weight, for a sum over "
             "pixels and channels, divided by their number")
    add("--disc_start", type=at_least(0), default=20000, help="first step of the PatchGAN")
    add("--disc_weight", type=at_least(0, float), default=0.1,
        help="of the adversarial term; 0: no discriminator")
    add("--disc_lr", type=at_least(0, float), default=1e-4,
        help="learning rate of the discriminator, which must not win outright")
    add("--disc_base_ch", type=at_least(1), default=64,
        help="channels of the discriminator after its first layer")
    add("--disc_layers", type=at_least(1), default=3,
        help="further layers of the discriminator: 3 see patches of 70 pixels a side, 2 of 34")
    add("--disc_loss", choices=("hinge", "vanilla"), default="hinge", help="discriminator's loss")
    return parser


def preset(args):
    """New defaults that follow from --init_from: the shape of that autoencoder."""
    if not args.init_from or run_to_continue(args):
        return {}
    folder = interop.vae_folder(args.init_from)
    if folder:
        return interop.vae_settings(folder, args.img_size)
    stored = experiment.stored_settings(args.init_from, "vae")
    experiment.check_names(experiment.VAE_SHAPE, stored, args.init_from)
    return {name: stored[name] for name in experiment.VAE_SHAPE}


def parse_args(argv=None):
    """Settings of this stage; ends the program on bad ones."""
    args = parse_settings(build_parser(), argv, preset, kind="vae")
    for name, value in preset(args).items():
        now = getattr(args, name)
        if now != value and name != "img_size":  # it is convolutional
            fail(f"--init_from={args.init_from} has {name}={value}, not {now}: leave --{name} out")
    if args.max_steps == 0 and not args.init_from:
        fail("--max_steps=0 trains nothing: give --init_from, or leave it out")
    least = model.PatchDiscriminator.smallest(args.disc_layers)
    if args.disc_weight > 0 and args.img_size < least:
        fail(f"--img_size={args.img_size} is too small for the discriminator ({least} at least): "
             "give fewer --disc_layers, or --disc_weight=0")
    args.augment = args.augment and not (args.overfit_one or args.overfit_k)
    return args


# --- models and losses --------------------------------------------------------------------------


class Models(NamedTuple):
    """What is trained. The compiled and DDP wrappers are only called: weights are read from the
    plain modules, so that no checkpoint knows of wrappers."""

    vae: model.AutoencoderKL
    ema: model.EMA
    disc: model.PatchDiscriminator
    vae_optimizer: torch.optim.AdamW
    disc_optimizer: torch.optim.AdamW


def build_models(args, procs):
    """Models on the device, from args.seed. ValueError where settings contradict each other."""
    torch.manual_seed(args.seed)
    vae = model.AutoencoderKL(args.img_size, args.z_channels, args.base_ch, args.ch_mults,
                              args.num_res_blocks, args.attn_res, args.patch_size,
                              args.linear_path, args.quant_conv)
    disc = model.PatchDiscriminator(args.disc_base_ch, args.disc_layers)
    vae = vae.to(procs.device, memory_format=procs.memory_format)
    disc = disc.to(procs.device, memory_format=procs.memory_format)

    def adamw(module, lr):
        betas = (0.5, 0.9)  # of VQGAN and LDM: little momentum, since the adversarial target moves
        return torch.optim.AdamW(module.parameters(), lr, betas, weight_decay=args.weight_decay,
                                 fused=True)
    return Models(vae, model.EMA(vae, args.ema_decay), disc, adamw(vae, args.lr),
                  adamw(disc, args.disc_lr))


def init_weights(models, path):
    """Start from the (averaged) weights of another autoencoder of the same shape, --init_from."""
    folder = interop.vae_folder(path)
    if folder:
        state = interop.vae_weights(models.vae, folder)
    else:
        state = experiment.load_checkpoint(path, "vae")["ema"]
    for module in (models.vae, models.ema.module):
        experiment.load_weights(module, state, path)


def wrap(models, args, procs):
    """(vae_fn, disc_fn): the networks as the step calls them, compiled and under DDP."""
    vae, disc = models.vae, models.disc
    size, batch = args.img_size, args.batch_per_device
    x = torch.zeros(batch, 1, size, size, device=procs.device)
    x = x.contiguous(memory_format=procs.memory_format)
    noise = torch.zeros(batch, *vae.latent_shape, device=procs.device)
    vae_fn = experiment.wrap_ddp(procs, torch.compile(vae) if procs.compile else vae, x, noise)
    if args.disc_weight == 0:
        return vae_fn, disc
    disc_fn = torch.compile(disc) if procs.compile else disc
    return vae_fn, experiment.wrap_ddp(procs, disc_fn, torch.cat([x, x]))


def load_lpips(device):
    """Perceptual loss (Zhang et al. 2018) of the optional lpips package, in evaluation mode."""
    try:
        import lpips
    except ImportError:
        fail("--perceptual_weight needs the lpips package: pip install lpips, or set it to 0")
    return lpips.LPIPS(net="vgg", verbose=False).to(device).eval().requires_grad_(False)


def reconstruction_loss(rec, x, args):
    """Weighted L1 and MS-SSIM loss of images [B, 1, H, W] in [-1, 1]: a scalar."""
    l1 = (rec - x).abs().mean()
    return args.pixel_weight * l1 + args.ssim_weight * (1 - metrics.ms_ssim(rec, x).mean())


def generator_loss(kind, logits):
    """What the autoencoder pays for patches that look made; see discriminator_loss."""
    return -logits.mean() if kind == "hinge" else F.softplus(-logits).mean()


def discriminator_loss(kind, real, fake):
    """Hinge (Lim & Ye 2017) or vanilla (Goodfellow et al. 2014) loss of patch logits."""
    if kind == "hinge":
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def cooldown(step, total_steps, fraction):
    """Factor of the learning rate at a step (from 0): 1, then in a straight line towards 0 over the
    last `fraction` of the run. After Haegele et al. 2024, section 3."""
    return min(1.0, (total_steps - step) / max(1.0, fraction * total_steps))


def read_images(images, index, step, args, procs):
    """The images `index` of this rank in a step, float32 [B, 1, S, S] on the device; with --augment
    half of them changed, by numbers that depend on the seed, the step and the place in the global
    batch."""
    x = experiment.send(images.images(index), procs.device)
    if args.augment:
        rng = experiment.generator("cpu", args.seed, "augment", step)
        total = procs.world_size * len(x)
        how = torch.rand(total, experiment.AUG_DIM, generator=rng) * 2 - 1
        how *= torch.rand(total, 1, generator=rng) < 0.5
        how = how[experiment.own_places(procs, len(x))]
        x = data.augment(x, experiment.send(how, procs.device))
    return x


def train_step(models, vae_fn, disc_fn, perceptual, x, step, args, procs):
    """One step on images x [B, 1, S, S] of this rank: (the numbers of LOSSES, 1.0 if it was skipped
    else 0.0), like x on the device. bench.py times this function."""
    x = x.contiguous(memory_format=procs.memory_format)
    noise, _ = experiment.draw(procs, len(x), models.vae.latent_shape, args.seed, "vae", step)
    use_disc = args.disc_weight > 0 and step >= args.disc_start
    g_loss = d_loss = torch.zeros((), device=procs.device)

    # --- autoencoder ---
    with procs.autocast():
        rec, posterior = vae_fn(x, noise)
        rec_loss = reconstruction_loss(rec, x, args)
        if perceptual is not None:
            rgb = (image.expand(-1, 3, -1, -1) for image in (rec, x))
            rec_loss = rec_loss + args.perceptual_weight * perceptual(*rgb).mean()
        kl = posterior.kl().mean()
        loss = rec_loss + args.kl_weight * kl
        if use_disc:
            models.disc.requires_grad_(False)  # its gradient is not needed here
            g_loss = generator_loss(args.disc_loss, models.disc(rec))
            loss = loss + args.disc_weight * g_loss
            models.disc.requires_grad_(True)
    loss.backward()
    grad_norm, bad = experiment.clip_and_step(models.vae, models.vae_optimizer, args.grad_clip)
    models.ema.update(models.vae, step + 1)

    # --- discriminator ---
    if use_disc:
        with procs.autocast():
            real, fake = disc_fn(torch.cat([x, rec.detach()])).chunk(2)
            d_loss = discriminator_loss(args.disc_loss, real, fake)
        d_loss.backward()
        _, disc_bad = experiment.clip_and_step(models.disc, models.disc_optimizer, args.grad_clip)
        bad = torch.maximum(bad, disc_bad)
    return (loss, rec_loss, kl, g_loss, d_loss, grad_norm), bad


# --- evaluation ---------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(vae, images, procs, batch_size, tick):
    """How good what the posterior means decode to is, over all images of all processes.

    PSNR, SSIM and L1; and as a fraction of the images' own: detail, and the power of the two finest
    octaves, which is where blur and noise show. tick() is called before each batch.
    """
    sums = torch.zeros(10, dtype=torch.float64)
    mine = range(procs.rank, len(images), procs.world_size)
    for start in range(0, len(mine), batch_size):
        tick()
        x = images.images(list(mine[start:start + batch_size])).to(procs.device)
        with procs.autocast():
            rec = vae.decode(vae.encode(x).mean).clamp(-1, 1)
        l1 = (rec - x).abs().mean((1, 2, 3))
        columns = [metrics.psnr(rec, x), metrics.ssim(rec, x), l1, torch.ones_like(l1)]
        for of in (rec, x):
            columns += [metrics.detail(of), *metrics.octave_power(of)[:, -2:].unbind(1)]
        sums += torch.stack([column.double().cpu() for column in columns], 1).sum(0)
    experiment.average(procs, sums)
    values = [*(sums[:3] / sums[3]), *(sums[4:7] / sums[7:].clamp_min(1e-12))]
    return {f"val/{name}": value.item() for name, value in zip(
        ("psnr", "ssim", "l1", "detail", "power_fine", "power_finest"), values, strict=True)}


@torch.no_grad()
def save_reconstructions(path, vae, images, procs, epoch):
    """Grid of up to eight images above what the autoencoder makes of them."""
    index = np.linspace(0, len(images) - 1, min(8, len(images))).astype(int)
    x = images.images(index).to(procs.device)
    with procs.autocast():
        rec = vae.decode(vae.encode(x).mean)
    experiment.save_grid(path, [x, rec], ["input", f"reconstruction, epoch {epoch}"])


# --- the program --------------------------------------------------------------------------------


def main(argv=None):
    args = parse_args(argv)
    if args.check:
        data.check_folders(args)
        experiment.report_run(args)
        return

    # --- processes, models, data ---
    procs = experiment.setup_processes(args)
    device = procs.device
    try:
        models = build_models(args, procs)
    except ValueError as e:
        fail(e)
    if args.init_from and not args.resume_dir:
        init_weights(models, args.init_from)
    perceptual = load_lpips(device) if args.perceptual_weight > 0 else None
    train_set = data.open_images(args, procs, args.split)
    k = 1 if args.overfit_one else args.overfit_k
    # Memorising is judged by the images that were memorised.
    val_set = None
    if not k:
        val_set = data.open_images(args, procs, "val", optional=True, train=train_set)
    if k:
        train_set = train_set.subset(data.overfit_indices(train_set.labels, k))
    if args.overfit_one:  # repeated, so that an epoch is more than one step
        train_set = train_set.subset([0] * args.repeat_len)
    batch, world_size = args.batch_per_device, procs.world_size
    epoch_steps = experiment.steps_per_epoch(len(train_set), batch, world_size)
    total_steps = experiment.count_steps(args, epoch_steps)
    if args.disc_weight > 0 and 0 < total_steps <= args.disc_start and not k:
        notice(f"the discriminator would begin at step {args.disc_start}, but the run ends after "
               f"{total_steps}, and images stay blurred: give --disc_start={total_steps // 2}")

    # --- run folder, or the run to go on with ---
    run = experiment.Run(args, procs, "vae", f"ae_{args.task.lower()}_z{args.z_channels}", {
        "class_names": train_set.class_names, "img_size": args.img_size,
        "latent_shape": models.vae.latent_shape, "data": train_set.summary,
        "changed": changed_settings(args, build_parser())})
    data.notice_changes(run.before.get("data"), train_set, f"{run.folder} was last started")
    step, train_metrics = 0, {}
    # Counted on the device: a look at each step would make the CPU wait for the GPU.
    bad_in_a_row = torch.zeros((), device=device)
    if checkpoint := run.load():
        experiment.load_weights(models.vae, checkpoint["model"], run.checkpoint_path)
        experiment.load_weights(models.ema.module, checkpoint["ema"], run.checkpoint_path)
        experiment.load_weights(models.disc, checkpoint["disc"], run.checkpoint_path)
        experiment.load_optimizer(models.vae_optimizer, checkpoint["vae_optimizer"])
        experiment.load_optimizer(models.disc_optimizer, checkpoint["disc_optimizer"])
        # The stored setting came along; that of the command line wins.
        for optimizer in (models.vae_optimizer, models.disc_optimizer):
            experiment.set_groups(optimizer, weight_decay=args.weight_decay)
        step, train_metrics = checkpoint["step"], checkpoint["train_metrics"]
        bad_in_a_row = checkpoint["bad_steps"].to(device)
        run.check_steps(step, total_steps)

    def state():
        return {"model": models.vae.state_dict(), "ema": models.ema.module.state_dict(),
                "disc": models.disc.state_dict(),
                "vae_optimizer": models.vae_optimizer.state_dict(),
                "disc_optimizer": models.disc_optimizer.state_dict(),
                "step": step, "bad_steps": bad_in_a_row, "train_metrics": train_metrics,
                "args": vars(args), "latent_shape": models.vae.latent_shape}

    if procs.main:
        parameters = sum(p.numel() for p in models.vae.parameters())
        print_settings(args, build_parser(), {
            "run folder": run.folder, "continues at step": step, "images": len(train_set),
            "validation images": len(val_set) if val_set else 0,
            "classes": data.count_classes(train_set),
            "latent": "x".join(map(str, models.vae.latent_shape)),
            "parameters": f"{parameters / 1e6:.1f} M",
            "steps": f"{total_steps} ({epoch_steps} per epoch)",
            "global batch": batch * world_size,
            "device": f"{device} x {world_size}, {procs.dtype}, "
                      f"compile {'on' if procs.compile else 'off'}"})
    stop = experiment.StopSignal(procs)  # from here on there is something to lose
    run.start(args, checkpoint or state())

    # Only now, with the settings on the screen: compiling takes minutes.
    vae_fn, disc_fn = wrap(models, args, procs)
    means = experiment.RunningMeans(procs, LOSSES)
    progress = experiment.Progress(procs, "step", total_steps, step)
    diverged, val_metrics, status = False, {}, ""
    saved_step, save_time = step, time.perf_counter()
    log_step, log_time = step, time.perf_counter()

    def leave_if_asked():  # in an evaluation there is nothing to lose
        if stop.name:
            run.stop(step, stop.name)

    while True:
        # --- checkpoint: before an evaluation, so that a stop in there loses nothing ---
        evaluating = step == total_steps or (
            step > 0 and step % (args.sample_every * epoch_steps) == 0)
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
            if val_set:
                val_metrics = evaluate(models.ema.module, val_set, procs, batch, leave_if_asked)
            if procs.main:
                run.wait_for_checkpoint()  # of a full disk, it is what the user should hear
                path = run.folder / "samples" / f"recon_ep{epoch:04d}.png"
                shown = val_set or train_set
                save_reconstructions(path, models.ema.module, shown, procs, epoch)
                run.log(step, epoch, val_metrics)
                run.log_images(step, epoch, {"recon": path})
                progress.clear()
                numbers = "".join(f"  {k} {v:.4f}" for k, v in val_metrics.items())
                say(f"epoch {epoch}:{numbers}  {path}")
            log_step, log_time = step, time.perf_counter()  # images/s are those of training
        if step >= total_steps:
            break

        # --- one step ---
        index, epoch = experiment.batch_indices(step, len(train_set), batch, args.seed, procs.rank,
                                                world_size)
        factor = cooldown(step, total_steps, args.cooldown)
        experiment.set_groups(models.vae_optimizer, lr=args.lr * factor)
        experiment.set_groups(models.disc_optimizer, lr=args.disc_lr * factor)
        x = read_images(train_set, index, step, args, procs)
        losses, bad = train_step(models, vae_fn, disc_fn, perceptual, x, step, args, procs)
        means.add(losses, bad)
        bad_in_a_row = (bad_in_a_row + 1) * bad
        step += 1

        # --- logging ---
        if step % args.log_every == 0 or step == total_steps:
            seconds = time.perf_counter() - log_time
            train_metrics = means.read() | {
                "train/learning_rate": args.lr * factor,
                "train/images_per_second": (step - log_step) * batch * world_size / seconds}
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
    verdicts = []
    if procs.main:
        # Not of train/loss: the adversarial part of it has no trend, since its judge learns too.
        verdicts = metrics.health(train_metrics, run.history("train/rec"), diverged=diverged)
    if verdicts:
        say(metrics.format_verdicts(verdicts))
    run.finish(step, {**train_metrics, **val_metrics}, verdicts, run.checkpoint_path, diverged)
    if procs.main:
        say("report: " + experiment.command_line("report.py", run.folder))
        say("next: " + experiment.command_line(
            "find_latent_scale.py", ae_ckpt_path=run.checkpoint_path,
            **experiment.data_flags(args)))


if __name__ == "__main__":
    main()
