"""Stage 4: draw images from a trained latent diffusion model; also the samplers that training uses.

    python sample.py --ckpt=runs/ldm_.../ckpts/last.pt --num_samples=8
    torchrun --nproc_per_node=4 sample.py --ckpt=runs/ldm_.../ckpts/last.pt --num_samples=1000

Every sample has a seed of its own, made of (seed, class, number), so neither batch size nor the number of
processes changes it. The checkpoint names its autoencoder and holds the latent scale factor.
"""
import math
import pathlib
import re
import shutil
from typing import NamedTuple

import torch

import experiment
import metrics
import model
from experiment import at_least, fail
from find_latent_scale import load_autoencoder

# --- samplers ----------------------------------------------------------------------------------------------
# Each starts from x = sigma(1) noise at t = 1 and walks `steps` equal steps in t down to 0, where x is x0-hat.
# denoise(x, t) gives x0-hat [B, C, h, w] at a float t; noise() gives standard normal noise shaped like x.


def times(schedule, steps):
    """[(t, alpha, sigma)] at steps + 1 times from 1 to 0, as Python floats."""
    t = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return list(zip(t.tolist(), schedule.alpha(t).tolist(), schedule.sigma(t).tolist(), strict=True))


def ancestral(denoise, schedule, x, steps, noise):
    """Draws x_s from q(x_s | x_t, x0-hat): DDPM (Ho et al. 2020, eq. 6-7; for any alpha, sigma Kingma et al.
    2021, appendix A.4)."""
    grid = times(schedule, steps)
    for (t, alpha_t, sigma_t), (_, alpha_s, sigma_s) in zip(grid, grid[1:], strict=False):
        x0 = denoise(x, t)
        alpha_ts = alpha_t / alpha_s
        var_ts = sigma_t**2 - alpha_ts**2 * sigma_s**2
        mean = (alpha_ts * sigma_s**2 * x + alpha_s * var_ts * x0) / sigma_t**2
        x = mean + math.sqrt(var_ts) * sigma_s / sigma_t * noise()
    return x


def ddim(denoise, schedule, x, steps, noise):
    """Deterministic DDIM (Song et al. 2021, eq. 12 with eta = 0)."""
    grid = times(schedule, steps)
    for (t, alpha_t, sigma_t), (_, alpha_s, sigma_s) in zip(grid, grid[1:], strict=False):
        x0 = denoise(x, t)
        eps = (x - alpha_t * x0) / sigma_t
        x = alpha_s * x0 + sigma_s * eps
    return x


def lambda_step(alpha_t, sigma_t, alpha_s, sigma_s):
    """h = lambda_s - lambda_t with lambda = log(alpha / sigma); infinite where alpha_t or sigma_s is 0."""
    return math.log(alpha_s * sigma_t / (alpha_t * sigma_s)) if alpha_t and sigma_s else math.inf


def second_order(x0, x0_before, h, h_before):
    """x0-hat in the middle of the step, on the line through the last two; x0 itself on the first and last step, with
    zero terminal SNR on the first two."""
    if x0_before is None or math.isinf(h):
        return x0
    return x0 + h / (2 * h_before) * (x0 - x0_before)


def dpmpp(denoise, schedule, x, steps, noise):
    """DPM-Solver++ 2M (Lu et al. 2022, alg. 2): deterministic."""
    grid = times(schedule, steps)
    x0_before = h_before = None
    for (t, alpha_t, sigma_t), (_, alpha_s, sigma_s) in zip(grid, grid[1:], strict=False):
        x0, h = denoise(x, t), lambda_step(alpha_t, sigma_t, alpha_s, sigma_s)
        direction = second_order(x0, x0_before, h, h_before)
        x = sigma_s / sigma_t * x - (alpha_t * sigma_s / sigma_t - alpha_s) * direction
        x0_before, h_before = x0, h
    return x


def dpmpp_sde(denoise, schedule, x, steps, noise):
    """SDE-DPM-Solver++ 2M (Lu et al. 2022): `ancestral`, of second order."""
    grid = times(schedule, steps)
    x0_before = h_before = None
    for (t, alpha_t, sigma_t), (_, alpha_s, sigma_s) in zip(grid, grid[1:], strict=False):
        x0, h = denoise(x, t), lambda_step(alpha_t, sigma_t, alpha_s, sigma_s)
        direction = second_order(x0, x0_before, h, h_before)
        decay = math.exp(-2 * h)  # share of x_t's noise that is kept; the rest is drawn anew
        x = sigma_s / sigma_t * math.exp(-h) * x + alpha_s * (1 - decay) * direction
        x = x + sigma_s * math.sqrt(1 - decay) * noise()
        x0_before, h_before = x0, h
    return x


def euler(denoise, schedule, x, steps, noise):
    """Euler steps along dx/dsigma = eps - x0 (Lipman et al. 2023): the straight path, so for schedule 'flow' only."""
    if schedule.name != "flow":
        raise ValueError(f"sampler euler follows the straight path of schedule flow, not {schedule.name}: use ddim")
    grid = times(schedule, steps)
    for (t, alpha_t, sigma_t), (_, _, sigma_s) in zip(grid, grid[1:], strict=False):
        x0 = denoise(x, t)
        x = x + (sigma_s - sigma_t) * ((x - alpha_t * x0) / sigma_t - x0)
    return x


SAMPLERS = {"ancestral": ancestral, "ddim": ddim, "dpmpp": dpmpp, "dpmpp_sde": dpmpp_sde, "euler": euler}


@torch.no_grad()
def sample_latents(denoiser, latent_shape, samples, class_names, args, procs, progress=None):
    """Normalised latents [B, C, h, w] of `samples`, a list of (class index, number).

    args: seed, sampler, num_sampling_steps, guidance_scale, guidance_interval. A sample's noise comes from (seed,
    class name, number) on the CPU: the same on every device, in every batch. Guidance is on for t in the interval
    only (Kynkaanniemi et al. 2024). progress() is called before each network evaluation.
    """
    rngs = [experiment.generator("cpu", args.seed, "sample", class_names[c], number) for c, number in samples]
    y = torch.tensor([c for c, _ in samples], device=procs.device)
    low, high = args.guidance_interval

    def noise():
        return torch.stack([torch.randn(latent_shape, generator=rng) for rng in rngs]).to(procs.device)

    def denoise(x, t):
        if progress:
            progress()
        with procs.autocast():
            return denoiser.denoise(x, torch.full((len(x),), t, device=x.device), y,
                                    args.guidance_scale if low <= t <= high else 1.0)

    schedule = denoiser.schedule
    x = noise() * schedule.sigma(torch.ones(1)).item()
    x = x.contiguous(memory_format=procs.memory_format)
    return SAMPLERS[args.sampler](denoise, schedule, x, args.num_sampling_steps, noise)


@torch.no_grad()
def decode_latents(vae, z, latent_scale_factor, procs, batch_size=16):
    """Images [N, 1, H, W] in [-1, 1] on the CPU from normalised latents."""
    with procs.autocast():
        return torch.cat([vae.decode(part.to(procs.device) / latent_scale_factor).clamp(-1, 1).cpu()
                          for part in z.split(batch_size)])


def sample_batches(denoiser, vae, latent_scale_factor, class_names, wanted, args, procs, batch_size, progress):
    """Yield ([(class index, number)], normalised latents, images in [-1, 1]), on the CPU, for batches of `wanted`.

    args as in sample_latents; progress: experiment.Progress over len(wanted) * num_sampling_steps evaluations.
    """
    done = 0
    for start in range(0, len(wanted), batch_size):
        batch = wanted[start:start + batch_size]

        def tick(batch=batch, start=start):
            nonlocal done
            done += len(batch)
            progress.update(done, f"image {start + len(batch)} of {len(wanted)}")

        try:
            z = sample_latents(denoiser, vae.latent_shape, batch, class_names, args, procs, tick)
            x = decode_latents(vae, z, latent_scale_factor, procs)
        except RuntimeError as e:  # torch.OutOfMemoryError is one; a CPU says "can't allocate memory"
            if "memory" not in str(e):
                raise
            fail(f"{len(batch)} images at once do not fit into memory: lower --batch_size={batch_size}")
        yield batch, z.cpu(), x
    progress.clear()


# --- model from a checkpoint -------------------------------------------------------------------------------


def build_denoiser(settings, latent_shape, num_classes):
    """Denoiser from a dict of train_ldm.py's settings. ValueError where they do not fit together."""
    unet = model.UNet(latent_shape, num_classes, settings["ldm_base_ch"], settings["ldm_ch_mults"],
                      settings["ldm_num_res_blocks"], settings["ldm_attn_res"])
    schedule = model.NoiseSchedule(settings["noise_schedule"], settings["zero_terminal_snr"])
    return model.Denoiser(unet, schedule, settings["prediction"], settings["loss_weighting"])


def load_ldm(ckpt_path, procs, ae_ckpt_path=None, use_ema=None):
    """(Denoiser, AutoencoderKL, checkpoint dict) from an LDM checkpoint, on the device.

    ae_ckpt_path: where the autoencoder is now, if it was moved. Ends the program if it is not the one that the
    model was trained with.
    """
    checkpoint = experiment.load_checkpoint(ckpt_path, "ldm")
    denoiser = build_denoiser(checkpoint["args"], checkpoint["latent_shape"], len(checkpoint["class_names"]))
    if use_ema and checkpoint["ema"] is None:
        fail(f"{ckpt_path} was trained without EMA weights: give --no-use_ema")
    use_ema = checkpoint["ema"] is not None if use_ema is None else use_ema
    experiment.load_weights(denoiser, checkpoint["ema" if use_ema else "model"], ckpt_path)
    denoiser = denoiser.to(procs.device, memory_format=procs.memory_format).eval().requires_grad_(False)
    path = ae_ckpt_path or checkpoint["ae_ckpt_path"]
    if not ae_ckpt_path and not pathlib.Path(path).exists():
        fail(f"the autoencoder is not at {path} any more: give its checkpoint with --ae_ckpt_path")
    vae, _, vae_sha256 = load_autoencoder(path, None, procs)
    if vae_sha256 != checkpoint["vae_sha256"]:
        fail(f"{path} is not the autoencoder that {ckpt_path} was trained with (its hash differs); give that one with "
             "--ae_ckpt_path, or train the LDM again")
    return denoiser, vae, checkpoint


# --- the stage ---------------------------------------------------------------------------------------------


def add_sampling_arguments(parser):
    """The arguments of sample.py, which evaluate.py takes too."""
    add = parser.add_argument_group("sampling").add_argument
    add("--ckpt", help="ckpts/last.pt of a train_ldm.py run")
    add("--ae_ckpt_path", help="the autoencoder's checkpoint, only if it was moved")
    add("--classes", help="comma list of class names; none: all")
    add("--num_samples", type=at_least(1), default=8, help="images a class")
    add("--sampler", choices=SAMPLERS, default="ancestral", help="ancestral: DDPM; dpmpp, dpmpp_sde: DPM-Solver++ 2M, without and with fresh noise")
    add("--num_sampling_steps", type=at_least(1), default=500, help="network evaluations an image")
    add("--guidance_scale", type=at_least(0, float), help="classifier-free guidance, 1 = none; none: as in training")
    add("--guidance_interval", type=experiment.interval, help="LOW,HIGH: guidance for t between them; none: as in training")
    add("--use_ema", action=experiment.BooleanFlag, help="averaged weights; none: if the checkpoint has them")
    add("--batch_size", type=at_least(1), default=16, help="images sampled at once")
    add("--out_dir", help="folder for the results; none: in the run folder")


class Model(NamedTuple):
    """A loaded LDM and what to draw from it."""

    denoiser: model.Denoiser
    vae: model.AutoencoderKL
    checkpoint: dict
    classes: list  # indices


def prepare(args, procs):
    """Model from the sampling arguments, in which what is None is set as in training. Ends the program where they
    ask for what the model cannot do."""
    if not args.ckpt:
        fail("which model? Give --ckpt=runs/ldm_.../ckpts/last.pt")
    denoiser, vae, checkpoint = load_ldm(args.ckpt, procs, args.ae_ckpt_path, args.use_ema)
    class_names, trained = checkpoint["class_names"], checkpoint["trained_classes"]
    names = [n.strip() for n in re.split("[,:]", args.classes)] if args.classes else [class_names[c] for c in trained]
    for name in names:
        if name not in class_names:
            fail(f"no class {name!r} in {args.ckpt}; it knows {', '.join(class_names)}")
        if class_names.index(name) not in trained:
            fail(f"{args.ckpt} saw no image of class {name!r} in training")
    settings = checkpoint["args"]
    for name in ("guidance_scale", "guidance_interval"):
        if getattr(args, name) is None:
            setattr(args, name, settings[name])
    if args.guidance_scale != 1 and settings["prob_uncond"] == 0:
        fail("this model never trained its null class (prob_uncond was 0), so guidance has nothing to guide from: "
             "give --guidance_scale=1")
    if args.sampler == "euler" and denoiser.schedule.name != "flow":
        fail(f"--sampler=euler is for noise_schedule flow, this model has {denoiser.schedule.name}: use --sampler=ddim")
    if procs.compile:
        denoiser.unet = torch.compile(denoiser.unet)
    return Model(denoiser, vae, checkpoint, [class_names.index(name) for name in dict.fromkeys(names)])


def make_parser():
    parser = experiment.make_parser(__doc__)
    add_sampling_arguments(parser)
    return parser


def main(argv=None):
    args = experiment.parse_args(make_parser(), argv)
    procs = experiment.setup_processes(args)
    ldm = prepare(args, procs)
    checkpoint, class_names = ldm.checkpoint, ldm.checkpoint["class_names"]
    out = pathlib.Path(args.out_dir or pathlib.Path(args.ckpt).parent.parent / f"samples_{args.sampler}_{args.seed}")
    count = len(ldm.classes) * args.num_samples
    existing = next(p for p in (out, *out.absolute().parents) if p.exists())
    needed, free = count * checkpoint["args"]["img_size"] ** 2, shutil.disk_usage(existing).free
    if needed > free:
        fail(f"{count} images need about {needed / 1e9:.1f} GB, but {existing} has {free / 1e9:.1f} GB free: lower "
             f"--num_samples={args.num_samples}")
    wanted = [(c, i) for c in ldm.classes for i in range(args.num_samples)]
    with experiment.main_first(procs):
        experiment.make_folder(out)

    latents = [torch.zeros(0, *checkpoint["latent_shape"])]
    mine = wanted[procs.rank::procs.world_size]
    progress = experiment.Progress(procs, f"sampling ({args.sampler})", len(mine) * args.num_sampling_steps)
    for batch, z, x in sample_batches(ldm.denoiser, ldm.vae, checkpoint["latent_scale_factor"], class_names, mine, args,
                                      procs, args.batch_size, progress):
        for (c, i), image in zip(batch, x, strict=True):
            experiment.save_image(out / f"{class_names[c]}_{i:05d}.png", image)
        latents.append(z)
    z = experiment.gather(procs, torch.cat(latents))  # and now all images are written
    if procs.main:
        write_report(out, checkpoint, wanted, z, {
            "ckpt": str(args.ckpt), "step": checkpoint["step"], "sampler": args.sampler, "seed": args.seed,
            "num_sampling_steps": args.num_sampling_steps, "guidance_scale": args.guidance_scale,
            "guidance_interval": args.guidance_interval, "use_ema": args.use_ema})


def write_report(out, checkpoint, wanted, z, how):
    """manifest.json, metrics.json and grid.png beside the images, and the verdicts on the console."""
    class_names, scale = checkpoint["class_names"], checkpoint["latent_scale_factor"]
    files = [f"{class_names[c]}_{i:05d}.png" for c, i in wanted]
    experiment.write_json(out / "manifest.json", how | {
        "vae_sha256": checkpoint["vae_sha256"], "latent_scale_factor": scale,
        "images": [{"file": f, "class": class_names[c], "number": i} for f, (c, i) in zip(files, wanted, strict=True)]})
    first = [k for k, (_, i) in enumerate(wanted) if i < 1000]  # pairs grow with the square
    values = metrics.latent_stats(z / scale, scale) | metrics.sample_diversity(
        z[first], [wanted[k][0] for k in first], class_names, checkpoint["train_stats"]["real_pairwise_mse_mean"])
    verdicts = metrics.health(values, train_stats=checkpoint["train_stats"],
                              overfit=checkpoint["args"]["overfit_k"] > 0)
    experiment.write_json(out / "metrics.json", values | {"verdicts": [v._asdict() for v in verdicts]})
    rows, labels = [], []
    for c in dict.fromkeys(c for c, _ in wanted):
        shown = [f for f, (k, i) in zip(files, wanted, strict=True) if k == c and i < 8]
        rows.append(torch.stack([experiment.load_image(out / f) for f in shown]))
        labels.append(f"{class_names[c]}   {how['sampler']} {how['num_sampling_steps']} steps, "
                      f"guidance {how['guidance_scale']:g}")
    experiment.save_grid(out / "grid.png", rows, labels)
    print(metrics.format_verdicts(verdicts))
    print(f"{len(files)} images in {out}; sample grid: {out / 'grid.png'}")


if __name__ == "__main__":
    main()
