"""Stage 1: train the KL autoencoder on chest radiographs.

    python train_vae.py                                          # the phantom set
    python train_vae.py --data_root=DATA --task=TB --z_channels=4
    torchrun --nproc_per_node=4 train_vae.py --data_root=DATA --task=TB

The same command again goes on where it stopped if it names the run (--run_name or --resume_dir).
"""
import time

import numpy as np
import torch
import torch.nn.functional as F

import data
import experiment
import metrics
import model
from experiment import at_least, int_list


def make_parser():
    parser = experiment.make_parser(__doc__)
    experiment.add_training_arguments(parser, lr=1e-4, epochs=200, batch_per_device=8)
    add = parser.add_argument_group("autoencoder").add_argument
    add("--z_channels", type=at_least(1), default=4, help="channels of the latent")
    add("--base_ch", type=at_least(1), default=64, help="channels at full resolution")
    add("--ch_mults", type=int_list, default=(1, 2, 4, 4), help="channels by level; each further level halves the size")
    add("--num_res_blocks", type=at_least(1), default=2, help="residual blocks a level")
    add("--attn_res", type=int_list, default=(), help="sizes with attention beside the middle block")
    add("--ema_decay", type=at_least(0, float), default=0.999, help="decay of the averaged weights that are used later")
    add = parser.add_argument_group("loss").add_argument
    add("--pixel_weight", type=at_least(0, float), default=1.0, help="of the mean absolute error")
    add("--ssim_weight", type=at_least(0, float), default=0.2, help="of 1 - MS-SSIM")
    add("--perceptual_weight", type=at_least(0, float), default=0.0, help="of LPIPS (pip install lpips)")
    add("--kl_weight", type=at_least(0, float), default=1e-6, help="of the KL in nats an image")
    add("--disc_start", type=at_least(0), default=20000, help="step from which the PatchGAN takes part")
    add("--disc_weight", type=at_least(0, float), default=0.5, help="of the adversarial term; 0: no discriminator")
    add("--disc_loss", choices=("hinge", "vanilla"), default="hinge", help="discriminator's loss")
    return parser


def parse_args(argv=None):
    return experiment.parse_args(make_parser(), argv)


def reconstruction_loss(rec, x, args):
    """Weighted L1 and MS-SSIM loss of images [B, 1, H, W] in [-1, 1]: a scalar."""
    return args.pixel_weight * (rec - x).abs().mean() + args.ssim_weight * (1 - metrics.ms_ssim(rec, x).mean())


def discriminator_loss(kind, real, fake):
    """Hinge (Lim & Ye 2017) or vanilla (Goodfellow et al. 2014) loss of patch logits."""
    if kind == "hinge":
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def adaptive_weight(procs, rec_loss, g_loss, last_layer):
    """How much the adversarial gradient is scaled up to the reconstruction's (Esser et al. 2021, eq. 7).

    The gradients are averaged over the processes first, so that all use the weight of the whole batch.
    """
    rec_grad = torch.autograd.grad(rec_loss, last_layer, retain_graph=True)[0]
    g_grad = torch.autograd.grad(g_loss, last_layer, retain_graph=True)[0]
    rec_grad, g_grad = experiment.average(procs, torch.stack([rec_grad, g_grad])).unbind(0)
    return (rec_grad.norm() / (g_grad.norm() + 1e-4)).clamp(0, 1e4)


@torch.no_grad()
def evaluate(vae, images, procs, batch_size):
    """PSNR, SSIM and L1 of the posterior mean's reconstruction, averaged over all images of all processes."""
    sums = torch.zeros(4, dtype=torch.float64)
    mine = range(procs.rank, len(images), procs.world_size)
    for start in range(0, len(mine), batch_size):
        x = images.images(list(mine[start:start + batch_size])).to(procs.device)
        with procs.autocast():
            rec = vae.decode(vae.encode(x).mean).clamp(-1, 1)
        values = torch.stack([metrics.psnr(rec, x), metrics.ssim(rec, x), (rec - x).abs().mean((1, 2, 3))])  # [3, B]
        sums[:3] += values.double().sum(1).cpu()
        sums[3] += len(x)
    experiment.average(procs, sums)
    return dict(zip(("val/psnr", "val/ssim", "val/l1"), (sums[:3] / sums[3]).tolist(), strict=True))


def main(argv=None):
    args = parse_args(argv)

    # --- processes and data ---
    procs = experiment.setup_processes(args)
    device = procs.device
    try:
        torch.manual_seed(args.seed)
        vae = model.AutoencoderKL(args.img_size, args.z_channels, args.base_ch, args.ch_mults,
                                  args.num_res_blocks, args.attn_res)
    except ValueError as e:
        experiment.fail(e)
    if args.disc_weight > 0 and args.img_size < 24:
        experiment.fail(f"--img_size={args.img_size} is too small for the discriminator (24 at least): give --disc_weight=0")
    perceptual = None
    if args.perceptual_weight > 0:
        try:
            import lpips
        except ImportError:
            experiment.fail("--perceptual_weight needs the lpips package: pip install lpips, or set it to 0")
        perceptual = lpips.LPIPS(net="vgg", verbose=False).to(device).eval().requires_grad_(False)
    train_set = data.open_images(args, procs, args.split)
    k = 1 if args.overfit_one else args.overfit_k
    if k:
        train_set = train_set.subset(data.overfit_indices(train_set.labels, k))
    if args.overfit_one:
        train_set = train_set.subset([0] * args.repeat_len)
    val_set = None if k else data.open_images(args, procs, "val", optional=True)
    global_batch = args.batch_per_device * procs.world_size
    epoch_steps = experiment.steps_per_epoch(len(train_set), args.batch_per_device, procs.world_size)
    total_steps = args.epochs * epoch_steps
    total_steps = min(total_steps, args.max_steps) if args.max_steps else total_steps

    # --- models and optimisers ---
    vae = vae.to(device, memory_format=procs.memory_format)
    ema = model.EMA(vae, args.ema_decay)
    disc = model.PatchDiscriminator().to(device, memory_format=procs.memory_format)
    betas = (0.5, 0.9)  # of VQGAN and LDM: little momentum, since the adversarial target moves
    vae_optimizer = torch.optim.AdamW(vae.parameters(), args.lr, betas, weight_decay=args.weight_decay, fused=True)
    disc_optimizer = torch.optim.AdamW(disc.parameters(), args.lr, betas, weight_decay=args.weight_decay, fused=True)

    # --- run folder, or the run to go on with ---
    run = experiment.Run(args, procs, "vae", f"ae_{args.task.lower()}_z{args.z_channels}", {
        "class_names": train_set.class_names, "img_size": args.img_size, "latent_shape": vae.latent_shape})
    window = experiment.Window(procs, ("train/loss", "train/rec", "train/kl", "train/g_loss", "train/d_loss",
                                       "train/grad_norm"))
    step, bad_steps, train_metrics = 0, torch.zeros((), device=device), {}
    if checkpoint := run.load():
        experiment.load_weights(vae, checkpoint["model"], run.checkpoint_path)
        experiment.load_weights(ema.module, checkpoint["ema"], run.checkpoint_path)
        experiment.load_weights(disc, checkpoint["disc"], run.checkpoint_path)
        vae_optimizer.load_state_dict(checkpoint["vae_optimizer"])
        disc_optimizer.load_state_dict(checkpoint["disc_optimizer"])
        experiment.set_learning_rate(vae_optimizer, args.lr)
        experiment.set_learning_rate(disc_optimizer, args.lr)
        window.load(checkpoint["window"])
        step, train_metrics = checkpoint["step"], checkpoint["train_metrics"]
        bad_steps = checkpoint["bad_steps"].to(device)

    def state():
        return {"model": vae.state_dict(), "ema": ema.module.state_dict(), "disc": disc.state_dict(),
                "vae_optimizer": vae_optimizer.state_dict(), "disc_optimizer": disc_optimizer.state_dict(),
                "step": step, "bad_steps": bad_steps, "window": window.state(),
                "train_metrics": train_metrics,
                "args": vars(args), "latent_shape": vae.latent_shape}

    if procs.main:
        experiment.print_settings(args, make_parser(), {
            "run folder": run.folder, "continues at step": step, "images": len(train_set),
            "validation images": len(val_set) if val_set else 0, "classes": ", ".join(train_set.class_names),
            "latent": "x".join(map(str, vae.latent_shape)),
            "parameters": f"{sum(p.numel() for p in vae.parameters()) / 1e6:.1f} M",
            "steps": f"{total_steps} ({epoch_steps} an epoch)", "global batch": global_batch,
            "device": f"{device} x {procs.world_size}, {procs.dtype}, compile {'on' if procs.compile else 'off'}"})
    run.start(args, checkpoint or state())

    # The compiled and DDP wrappers are only called; weights are read from the plain modules.
    zeros = torch.zeros(2 * args.batch_per_device, 1, args.img_size, args.img_size, device=device)
    zeros = zeros.contiguous(memory_format=procs.memory_format)
    noise = torch.zeros(args.batch_per_device, *vae.latent_shape, device=device)
    vae_step = experiment.data_parallel(procs, torch.compile(vae) if procs.compile else vae, zeros[::2], noise)
    disc_step = experiment.data_parallel(procs, torch.compile(disc) if procs.compile else disc, zeros)
    stop = experiment.StopSignal(procs)
    progress = experiment.Progress(procs, "step", total_steps, step)
    log_time, last_save, log_step, saved_step = time.perf_counter(), time.perf_counter(), step, step
    val_metrics, diverged, stopping, together = {}, False, False, True

    def evaluate_and_save_grid(epoch):
        source = val_set or train_set
        shown = source.images(np.linspace(0, len(source) - 1, min(8, len(source))).astype(int)).to(device)
        with torch.no_grad(), procs.autocast():
            rec = ema.module.decode(ema.module.encode(shown).mean)
        values = evaluate(ema.module, val_set, procs, args.batch_per_device) if val_set else {}
        if procs.main:
            path = run.folder / "samples" / f"recon_ep{epoch:04d}.png"
            experiment.save_grid(path, [shown, rec], ["input", f"reconstruction, epoch {epoch}"])
            progress.clear()
            numbers = "".join(f"  {k} {v:.4f}" for k, v in values.items())
            print(f"epoch {epoch}:{numbers}  {path}", flush=True)
            run.log(step, epoch, values)
            run.log_images(step, {"recon": path})
        return values

    try:
        while True:
            # --- evaluation: after the checkpoint, so that a stop in here loses nothing ---
            if step and (step == total_steps or step % (args.sample_every * epoch_steps) == 0):
                if step != saved_step:  # going on with a finished run leaves its checkpoint, and so its hash, as it is
                    run.save(state())
                last_save = time.perf_counter()
                with stop.immediate():
                    val_metrics = evaluate_and_save_grid(step // epoch_steps)
            if step >= total_steps:
                break

            # --- one step: noise from (seed, step, rank), so that a resumed run draws the same ---
            index, epoch = experiment.batch_indices(step, len(train_set), args.batch_per_device, args.seed,
                                                    procs.rank, procs.world_size)
            x = train_set.images(index).to(device, memory_format=procs.memory_format)
            rng = experiment.generator(device, args.seed, "vae", step, procs.rank)
            noise = torch.randn(len(x), *vae.latent_shape, device=device, generator=rng)
            use_disc = args.disc_weight > 0 and step >= args.disc_start
            with procs.autocast():
                rec, posterior = vae_step(x, noise)
                rec_loss = reconstruction_loss(rec, x, args)
                if perceptual:
                    rec_loss = rec_loss + args.perceptual_weight * perceptual(rec.expand(-1, 3, -1, -1),
                                                                              x.expand(-1, 3, -1, -1)).mean()
                kl = posterior.kl().mean()
                loss = rec_loss + args.kl_weight * kl
                g_loss = d_loss = torch.zeros((), device=device)
                if use_disc:
                    disc.requires_grad_(False)
                    logits = disc(rec)
                    g_loss = -logits.mean() if args.disc_loss == "hinge" else F.softplus(-logits).mean()
                    weight = adaptive_weight(procs, rec_loss, g_loss, vae.last_layer)
                    loss = loss + args.disc_weight * weight * g_loss
                    disc.requires_grad_(True)
            loss.backward()
            grad_norm, bad = experiment.clip_and_step(vae, vae_optimizer, args.grad_clip)
            ema.update(vae, step + 1)
            if use_disc:
                with procs.autocast():
                    real, fake = disc_step(torch.cat([x, rec.detach()])).chunk(2)
                    d_loss = discriminator_loss(args.disc_loss, real, fake)
                d_loss.backward()
                _, disc_bad = experiment.clip_and_step(disc, disc_optimizer, args.grad_clip)
                bad = torch.maximum(bad, disc_bad)
            bad_steps = (bad_steps + 1) * bad
            window.add((loss, rec_loss, kl, g_loss, d_loss, grad_norm), bad)
            step += 1

            # --- logging ---
            if step % args.log_every == 0 or step == total_steps:
                seconds = time.perf_counter() - log_time
                train_metrics = window.means() | {
                    "train/learning_rate": args.lr,
                    "train/images_per_second": (step - log_step) * global_batch / seconds}
                log_time, log_step = time.perf_counter(), step
                run.log(step, epoch, train_metrics)
                if procs.main:
                    progress.clear()
                    print(f"step {step} epoch {epoch} loss {train_metrics['train/loss']:.4f} "
                          f"rec {train_metrics['train/rec']:.4f} kl {train_metrics['train/kl']:.0f} "
                          f"grad_norm {train_metrics['train/grad_norm']:.3f} "
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
    verdicts = []
    if procs.main and not stopping:
        verdicts = metrics.health(train_metrics, run.history("train/loss"), diverged=diverged)
        print(metrics.format_verdicts(verdicts))
    run.end(step, {**train_metrics, **val_metrics, "verdicts": [v._asdict() for v in verdicts]},
            stop.name or stopping, diverged, together)
    if procs.main:
        print(f"next: python find_latent_scale.py --ae_ckpt_path={run.checkpoint_path} --task={args.task}"
              f" --img_size={args.img_size}" + (f" --data_root={args.data_root}" if args.data_root else ""))


if __name__ == "__main__":
    main()
