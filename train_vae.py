"""Stage 1: train the KL autoencoder on chest radiographs.

    python train_vae.py                                          # the phantom set
    python train_vae.py --data_root=DATA --task=TB --z_channels=4
    torchrun --nproc_per_node=4 train_vae.py --data_root=DATA --task=TB

To resume a run that has a name (--run_name or --resume_dir), type the same command again.
"""
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

import data
import model
from lib import diffusers_io
from lib.args import BooleanFlag, at_least, int_list, parse_settings, trainer_parser
from lib.dist import BatchOrder, RunningMeans, clip_and_step, setup
from lib.files import data_flags, fail
from lib.metrics import (detail, lattice, linear_psnr, ms_ssim, octave_power, patch_moments, psnr,
                         ssim)
from lib.run import Run, load_checkpoint
from lib.verdicts import health

LOSSES = ("train/loss", "train/rec", "train/kl", "train/g_loss", "train/d_loss", "train/grad_norm")

# --- arguments ----------------------------------------------------------------------------------


def build_parser():
    """Parser of this stage."""
    parser = trainer_parser(
        __doc__, img_size=256, lr=1e-4, epochs=200, batch_per_device=8,
        init_from_help="weights and shape to start from: ckpts/last.pt of a run, or a folder of "
                       "diffusers' AutoencoderKL; with --max_steps=0 it is used as it is")
    add = parser.add_argument_group("autoencoder").add_argument
    add("--z_channels", type=at_least(1), default=4, help="channels of the latent")
    add("--base_ch", type=at_least(1), default=64, help="channels at full resolution")
    add("--ch_mults", type=int_list, default=(1, 2, 4, 4), help="by level, each half the size")
    add("--num_res_blocks", type=at_least(1, high=100), default=2, help="residual blocks per level")
    add("--attn_res", type=int_list, default=(), help="sizes with attention beside the middle")
    # Above 1, or with a linear path, it is no longer the AutoencoderKL of LDM and diffusers.
    add("--patch_size", type=at_least(1), default=1, help="side of pixel squares taken as channels")
    add("--linear_path", action=BooleanFlag, default=False,
        help="linear maps beside the networks, which then learn far faster")
    add("--quant_conv", action=BooleanFlag, default=False,
        help="1x1 convolutions around the latent, as in published autoencoders")
    add("--ema_decay", type=at_least(0, float, 1), default=0.999, help="of the averaged weights")
    add("--cooldown", type=at_least(0, float, 1), default=0.0, help="last part, with lr falling")
    add("--augment", action=BooleanFlag, default=False,
        help="augment half of the images (shift, zoom, rotation, exposure; no flips)")
    add = parser.add_argument_group("loss").add_argument
    add("--pixel_weight", type=at_least(0, float), default=1.0, help="of the mean absolute error")
    add("--ssim_weight", type=at_least(0, float), default=0.2, help="of 1 - MS-SSIM")
    add("--perceptual_weight", type=at_least(0, float), default=0.0, help="of LPIPS, if installed")
    # The other terms are means over pixels, so this is LDM's weight divided by their number.
    add("--kl_weight", type=at_least(0, float), default=1e-6, help="of the KL in nats per image")
    add("--disc_start", type=at_least(0), default=20000, help="first step of the PatchGAN")
    add("--disc_weight", type=at_least(0, float), default=0.1, help="of its term; 0: no PatchGAN")
    add("--disc_lr", type=at_least(0, float), default=1e-4, help="its learning rate")
    add("--disc_base_ch", type=at_least(1), default=64, help="its channels after the first layer")
    add("--disc_layers", type=at_least(1), default=3, help="3 see patches of 70 pixels, 2 of 34")
    add("--disc_loss", choices=("hinge", "vanilla"), default="hinge", help="its loss")
    return parser


def preset(args):
    """New defaults: the shape of the autoencoder of --resume_dir or --init_from."""
    path = f"{args.resume_dir}/ckpts/last.pt" if args.resume_dir else args.init_from
    if not path:
        return {}
    if folder := diffusers_io.vae_folder(path):
        return diffusers_io.vae_settings(folder, args.img_size)
    stored = load_checkpoint(path, "vae")["args"]
    return {name: stored[name] for name in model.VAE_SHAPE if name in stored}


def parse_args(argv=None):
    """Settings of this stage; ends the program if they contradict each other."""
    args = parse_settings(build_parser(), argv, preset, kind="vae")
    for name, value in preset(args).items():
        if name != "img_size" and getattr(args, name) != value:  # it is convolutional
            fail(f"the autoencoder to start from has {name}={value}: leave --{name} out")
    args.augment = args.augment and not (args.overfit_one or args.overfit_k)
    return args


# --- models and losses --------------------------------------------------------------------------


def build_models(args, ctx):
    """What is trained, on the device, from args.seed: plain modules, so that no checkpoint knows of
    compiled and DDP wrappers. Ends the program if settings contradict each other."""
    torch.manual_seed(args.seed)
    try:
        vae = ctx.place(model.build_vae(vars(args)))
    except ValueError as e:
        fail(e)
    disc = ctx.place(model.PatchDiscriminator(args.disc_base_ch, args.disc_layers))
    # Betas of VQGAN and LDM: little momentum, since the adversarial target moves.
    vae_optimizer, disc_optimizer = (
        torch.optim.AdamW(module.parameters(), lr, (0.5, 0.9), weight_decay=args.weight_decay,
                          fused=True)
        for module, lr in ((vae, args.lr), (disc, args.disc_lr)))
    return SimpleNamespace(vae=vae, ema=model.EMA(vae, args.ema_decay), disc=disc,
                           vae_optimizer=vae_optimizer, disc_optimizer=disc_optimizer)


def initial_weights(args):
    """State dict of --init_from, the averaged weights of another run or a diffusers folder; None if
    there is none, or the run goes on."""
    if not args.init_from or args.resume_dir:
        return None
    if folder := diffusers_io.vae_folder(args.init_from):
        return diffusers_io.vae_weights(args, folder)
    return load_checkpoint(args.init_from, "vae")["ema"]


def wrap(models, args, ctx):
    """(vae_fn, disc_fn): the networks as the step calls them, compiled and under DDP."""
    vae, disc = models.vae, models.disc
    x = torch.zeros(args.batch_per_device, 1, args.img_size, args.img_size, device=ctx.device)
    x = x.contiguous(memory_format=ctx.memory_format)
    noise = torch.zeros(len(x), *vae.latent_shape, device=ctx.device)
    vae_fn = ctx.wrap_ddp(torch.compile(vae, mode=ctx.compile) if ctx.compile else vae, x, noise)
    if args.disc_weight == 0:
        return vae_fn, disc
    disc_fn = torch.compile(disc, mode=ctx.compile) if ctx.compile else disc
    return vae_fn, ctx.wrap_ddp(disc_fn, torch.cat([x, x]))


def load_lpips(device):
    """Perceptual loss (Zhang et al. 2018) of the optional lpips package, in evaluation mode."""
    try:
        import lpips
    except ImportError:
        fail("--perceptual_weight needs the lpips package: pip install lpips, or set it to 0")
    return lpips.LPIPS(net="vgg", verbose=False).to(device).eval().requires_grad_(False)


def generator_loss(kind, logits):
    """Loss of the autoencoder on patch logits of its reconstructions; see discriminator_loss."""
    return -logits.mean() if kind == "hinge" else F.softplus(-logits).mean()


def discriminator_loss(kind, real, fake):
    """Hinge (Lim & Ye 2017) or vanilla (Goodfellow et al. 2014) loss of patch logits."""
    if kind == "hinge":
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def read_images(images, index, step, args, ctx):
    """The images `index` of this rank in a step, float32 [B, 1, S, S] on the device; with --augment
    half of them augmented, depending on the seed, the step and the place in the global batch."""
    x = ctx.to_device(images.images(index))
    if args.augment:
        rng, total = ctx.generator(args.seed, "augment", step), ctx.world_size * len(x)
        labels = torch.rand(total, data.AUG_DIM, generator=rng) * 2 - 1
        labels *= torch.rand(total, 1, generator=rng) < 0.5
        x = data.augment(x, ctx.to_device(labels[ctx.local_slice(len(x))]))
    return x


def train_step(models, vae_fn, disc_fn, perceptual, x, step, args, ctx):
    """One step on images x [B, 1, S, S] of this rank: (the numbers of LOSSES, 1.0 if it was skipped
    else 0.0), tensors on the device. dev/bench.py times this function."""
    x = x.contiguous(memory_format=ctx.memory_format)
    noise, _ = ctx.global_noise(len(x), models.vae.latent_shape, args.seed, "vae", step)
    use_disc = args.disc_weight > 0 and step >= args.disc_start
    g_loss = d_loss = torch.zeros((), device=ctx.device)

    # --- autoencoder ---
    with ctx.autocast():
        rec, posterior = vae_fn(x, noise)
        rec_loss = args.pixel_weight * (rec - x).abs().mean()
        rec_loss = rec_loss + args.ssim_weight * (1 - ms_ssim(rec, x).mean())
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
    grad_norm, skipped = clip_and_step(models.vae, models.vae_optimizer, args.grad_clip)
    models.ema.update(models.vae, step + 1)

    # --- discriminator ---
    if use_disc:
        with ctx.autocast():
            real, fake = disc_fn(torch.cat([x, rec.detach()])).chunk(2)
            d_loss = discriminator_loss(args.disc_loss, real, fake)
        d_loss.backward()
        _, disc_skipped = clip_and_step(models.disc, models.disc_optimizer, args.grad_clip)
        skipped = torch.maximum(skipped, disc_skipped)
    return (loss, rec_loss, kl, g_loss, d_loss, grad_norm), skipped


@torch.no_grad()
def remove_pattern(vae, images, ctx):
    """Have the linear path subtract the mean error at each pixel of its squares, over up to 256
    images: repeated from square to square it is a lattice, and the losses hardly see it."""
    errors = []
    for i in data.spread(len(images), 256):
        x = images.images([i]).to(ctx.device)
        error = F.pixel_unshuffle(vae.decode(vae.encode(x).mean) - x, vae.factor)
        edge = error.shape[-1] // 8  # where padding makes errors of its own
        errors.append(F.pad(error, [-edge] * 4).mean((0, 2, 3)))
    vae.linear_decoder.pattern += torch.stack(errors).mean(0).view(vae.factor, vae.factor)


# --- evaluation ---------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(vae, images, ctx, batch_size, tick):
    """Quality of what the posterior means decode to, over all images of all ranks: PSNR, SSIM, L1;
    detail, lattice and the power of the two finest octaves, where blur and noise show, as fractions
    of the images' own; psnr_linear, the PSNR of as many principal components per patch as there are
    latent channels. tick() is called before each batch."""
    sums = torch.zeros(12, dtype=torch.float64)
    moments = torch.zeros(vae.factor**2 + 1, vae.factor**2 + 1, dtype=torch.float64)
    local = range(ctx.rank, len(images), ctx.world_size)
    for start in range(0, len(local), batch_size):
        tick()
        x = images.images(list(local[start:start + batch_size])).to(ctx.device)
        with ctx.autocast():
            rec = vae.decode(vae.encode(x).mean).clamp(-1, 1)
        l1 = (rec - x).abs().mean((1, 2, 3))
        columns = [psnr(rec, x), ssim(rec, x), l1, torch.ones_like(l1)]
        for of in (rec, x):
            columns += [detail(of), lattice(of), *octave_power(of)[:, -2:].unbind(1)]
        sums += torch.stack([column.double().cpu() for column in columns], 1).sum(0)
        moments += patch_moments(x, vae.factor)
    ctx.average(sums)
    ctx.average(moments)
    values = [*(sums[:3] / sums[3]), *(sums[4:8] / sums[8:].clamp_min(1e-12))]
    names = ("psnr", "ssim", "l1", "detail", "lattice", "power_fine", "power_finest")
    return {f"val/{name}": value.item() for name, value in zip(names, values, strict=True)} | {
        "val/psnr_linear": linear_psnr(moments, vae.latent_shape[0])}


@torch.no_grad()
def save_reconstructions(run, vae, images, ctx, epoch):
    """Path of a grid of up to eight images above their reconstructions."""
    x = images.images(data.spread(len(images), 8)).to(ctx.device)
    with ctx.autocast():
        rec = vae.decode(vae.encode(x).mean)
    return run.save_grid(f"recon_ep{epoch:04d}", [x, rec],
                         ["input", f"reconstruction, epoch {epoch}"])


# --- the program --------------------------------------------------------------------------------


def main(argv=None):
    args = parse_args(argv)
    if args.check:
        data.check_folders(args)
        Run.report(args, "vae")
        return

    # --- processes, models, data ---
    ctx = setup(args)
    initial = initial_weights(args)
    models = build_models(args, ctx)
    perceptual = load_lpips(ctx.device) if args.perceptual_weight > 0 else None
    train_set, val_set = data.open_images(args, ctx, args.split), None
    if args.overfit_one or args.overfit_k:  # judged by the images that were memorised
        index = data.overfit_indices(train_set.labels, args.overfit_k or 1)
        # One image is repeated, so that an epoch is more than one step.
        train_set = train_set.subset(np.repeat(index, args.repeat_len if len(index) == 1 else 1))
    else:
        val_set = data.open_images(args, ctx, "val", optional=True, train=train_set)
    batch = args.batch_per_device
    order = BatchOrder(len(train_set), batch, args.seed, ctx.rank, ctx.world_size)
    total_steps = order.total_steps(args.epochs, args.max_steps)

    # --- run folder: a new one, or the run to go on with ---
    run = Run(args, ctx, "vae", f"ae_{args.task.lower()}_z{args.z_channels}", {
        "class_names": train_set.class_names, "img_size": args.img_size,
        "latent_shape": models.vae.latent_shape, "data": train_set.summary})
    data.notice_changes(run.before.get("data"), train_set, f"{run.folder} was last started")
    step, train_metrics, val_metrics = 0, {}, {}
    means, diverged = RunningMeans(ctx, LOSSES), False
    networks = {"model": models.vae, "ema": models.ema.module, "disc": models.disc}
    optimizers = {"vae_optimizer": models.vae_optimizer, "disc_optimizer": models.disc_optimizer}
    if checkpoint := run.load():
        run.restore({network: checkpoint[name] for name, network in networks.items()},
                    {optimizer: checkpoint[name] for name, optimizer in optimizers.items()})
        step, train_metrics = checkpoint["step"], checkpoint["train_metrics"]
        means.in_a_row = checkpoint["bad_steps"].to(ctx.device)
    elif initial:
        run.restore({models.vae: initial, models.ema.module: initial})

    def state():
        weights = {name: part.state_dict() for name, part in (networks | optimizers).items()}
        return {**weights, "step": step, "bad_steps": means.in_a_row, "args": vars(args),
                "train_metrics": train_metrics, "latent_shape": models.vae.latent_shape}

    run.start(state(), total_steps, build_parser(), {
        "images": len(train_set), "validation images": len(val_set) if val_set else 0,
        "classes": data.count_files(train_set.summary), "global batch": batch * ctx.world_size,
        "steps": f"{total_steps} ({order.epoch_steps} per epoch)"})
    # Only now, with the settings on the screen: compiling takes minutes.
    vae_fn, disc_fn = wrap(models, args, ctx)

    while True:
        # --- checkpoint, at most every --save_minutes ---
        evaluating = step == total_steps or (
            step > 0 and step % (args.sample_every * order.epoch_steps) == 0)
        run.save_if_due(state, now=step == total_steps)  # may leave, all ranks alike

        # --- evaluation, with the averaged weights ---
        if evaluating:
            epoch, averaged = step // order.epoch_steps, models.ema.module
            if val_set:
                val_metrics = evaluate(averaged, val_set, ctx, batch,
                                       lambda: run.stop_if_asked(state))
            if ctx.is_main:
                path = save_reconstructions(run, averaged, val_set or train_set, ctx, epoch)
                found = health(val_metrics) if step < total_steps else ()  # else at the end
                run.log_evaluation(step, epoch, val_metrics, {"recon": path}, found)
        if step >= total_steps:
            break

        # --- one step: read, set the learning rates, forward, backward, update ---
        index, epoch = order.indices(step)
        # 1, then linearly towards 0 in the last part of the run (Haegele et al. 2024, section 3).
        factor = min(1.0, (total_steps - step) / max(1.0, args.cooldown * total_steps))
        for optimizer, lr in zip(optimizers.values(), (args.lr, args.disc_lr), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = lr * factor
        x = read_images(train_set, index, step, args, ctx)
        losses, skipped = train_step(models, vae_fn, disc_fn, perceptual, x, step, args, ctx)
        means.add(losses, skipped)
        step += 1
        if step == total_steps and args.linear_path:
            remove_pattern(models.ema.module, train_set, ctx)

        # --- logging: the only place that waits for the device ---
        if step % args.log_every == 0 or step == total_steps:
            train_metrics = run.log_training(
                step, epoch, means.read() | {"train/learning_rate": args.lr * factor},
                images_per_step=batch * ctx.world_size)
            if diverged := means.in_a_row.item() >= args.max_bad_steps:
                break
        run.progress.update(step)

    # --- end ---
    # Not of train/loss: its adversarial part has no trend, since its judge learns too.
    verdicts = health(train_metrics | val_metrics, run.history("train/rec"), diverged=diverged)
    run.finish(step, {**train_metrics, **val_metrics}, verdicts, run.last_path, diverged,
               "find_latent_scale.py", ae_ckpt_path=run.last_path, **data_flags(args))


if __name__ == "__main__":
    main()
