"""Stage 4: draw images from a trained latent diffusion model.

    python sample.py --ckpt=runs/ldm_.../ckpts/best.pt --num_samples=8
    torchrun --nproc_per_node=4 sample.py --ckpt=runs/ldm_.../ckpts/best.pt --num_samples=1000

Every sample has a seed of its own, (seed, class, number), so neither the batch size nor the number
of processes changes it. The checkpoint names its autoencoder and holds the latent scale factor.
"""
import copy
import itertools
import os
import pathlib
import re

import numpy as np
import torch

import data
import diffusion
import model
from lib import decode, dist, metrics, run, verdicts
from lib.args import (RENAMED_SAMPLERS, add_precision_arguments, add_sampling_arguments, file_path,
                      make_parser, parse_settings)
from lib.files import fail, finite, make_folder, read_json, write_json

# What a set of samples depends on besides the checkpoint, in manifests and reports.
SAMPLING_SETTINGS = ("seed", "sampler", "num_sampling_steps", "guidance_scale",
                     "guidance_interval", "use_ema")

# --- loading a model ----------------------------------------------------------------------------


def load_autoencoder(ckpt_path, ctx):
    """(AutoencoderKL with averaged weights on the device, its settings, sha256 of the file)."""
    checkpoint = run.load_checkpoint(ckpt_path, "vae")
    vae = run.load_network(model.build_vae, checkpoint["args"], checkpoint["ema"], ckpt_path)
    return ctx.place(vae).eval().requires_grad_(False), checkpoint["args"], checkpoint["sha256"]


def build_denoiser(checkpoint, ckpt_path, use_ema=None):
    """Denoiser with the weights of an LDM checkpoint, on the CPU. use_ema: averaged ones; None: if
    there are any. Ends the program if the checkpoint lacks them."""
    names = checkpoint["class_names"]
    for name in names:  # it becomes a file name: a stranger's `../x` must not leave the folder
        if not isinstance(name, str) or not name or name[0] == "." or "/" in name or "\0" in name:
            fail(f"{ckpt_path} has a class {name!r}, which is no file name: it is not loaded")
    if use_ema is None:
        use_ema = checkpoint["ema"] is not None
    weights = checkpoint["ema" if use_ema else "model"]
    if weights is None:
        fail(f"{ckpt_path} has no averaged weights: give --no-use_ema" if use_ema else
             f"{ckpt_path} has averaged weights only: take last.pt for --no-use_ema")

    def build(settings):
        return model.build_denoiser(settings, checkpoint["latent_shape"], len(names), data.AUG_DIM)
    return run.load_network(build, checkpoint["args"], weights, ckpt_path)


def load_ldm(ckpt_path, ctx, ae_ckpt_path=None, use_ema=None):
    """(Denoiser, AutoencoderKL, checkpoint dict), networks on the device, ae_ckpt_path where the
    autoencoder is now. Ends the program if the model was trained with another one."""
    checkpoint = run.load_checkpoint(ckpt_path, "ldm")
    denoiser = build_denoiser(checkpoint, ckpt_path, use_ema)
    path = ae_ckpt_path or run.find_moved(checkpoint["ae_ckpt_path"], run.run_folder(ckpt_path))
    if not os.path.exists(path):
        fail(f"no autoencoder at {path}: give its checkpoint with --ae_ckpt_path")
    vae, _, vae_sha256 = load_autoencoder(path, ctx)
    if vae_sha256 != checkpoint["vae_sha256"]:
        fail(f"{path} is not the autoencoder that {ckpt_path} was trained with (its hash differs); "
             "give that one with --ae_ckpt_path, or train the LDM again")
    checkpoint["ae_ckpt_path"] = path
    return ctx.place(denoiser).eval().requires_grad_(False), vae, checkpoint


def prepare_sampling(args, ctx):
    """(Denoiser, AutoencoderKL, checkpoint dict, [(class index, number)] to draw) from the flags of
    add_sampling_arguments; None is as in training. Ends the program if they cannot be met."""
    if not args.ckpt:
        fail("which model? Give --ckpt=runs/ldm_.../ckpts/best.pt")
    denoiser, vae, checkpoint = load_ldm(args.ckpt, ctx, args.ae_ckpt_path, args.use_ema)
    settings, class_names = checkpoint["args"], checkpoint["class_names"]
    trained = [n for c, n in enumerate(class_names) if c in checkpoint["trained_classes"]]
    names = re.split(r"\s*[,:]\s*", args.classes.strip()) if args.classes else trained
    unknown = [name for name in names if name not in trained]
    if unknown or not names:
        fail(f"no class {', '.join(unknown)!r} in {args.ckpt}; it knows {', '.join(trained)}")
    for name in SAMPLING_SETTINGS:
        if getattr(args, name) is None:
            setattr(args, name, settings[name])
    args.sampler = RENAMED_SAMPLERS.get(args.sampler, args.sampler)  # of a run of earlier versions
    if args.guidance_scale != 1 and settings["prob_uncond"] == 0:
        fail(f"{args.ckpt} never trained a null class to guide from: give --guidance_scale=1")
    if ctx.compile:
        denoiser.unet.compile()
    requests = [(class_names.index(name), i) for name in dict.fromkeys(names)
                for i in range(args.num_samples)]
    return denoiser, vae, checkpoint, requests


# --- sampling -----------------------------------------------------------------------------------


def cast_weights(module, ctx):
    """A copy with bf16 weights if autocast would cast them in every evaluation, which it does in
    bf16 without torch.compile; otherwise the module itself."""
    if ctx.dtype != torch.bfloat16 or ctx.compile:
        return module
    module = copy.deepcopy(module)
    for layer in module.modules():
        if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear)):
            layer.bfloat16()
    return module


def sample_latents(denoiser, latent_shape, requests, class_names, args, ctx, tick=lambda: None):
    """Normalised latents [B, C, h, w] on the device for requests, [(class index, number)]. A
    sample's noise comes from (args.seed, class name, number) on the CPU: the same on every device
    and in every batch. tick() is called before each network evaluation."""
    rngs = [ctx.generator(args.seed, "sample", class_names[c], number) for c, number in requests]
    y = torch.tensor([c for c, _ in requests], device=ctx.device)

    def noise():
        parts = torch.stack([torch.randn(latent_shape, generator=rng) for rng in rngs])
        return ctx.to_device(parts).contiguous(memory_format=ctx.memory_format)

    return diffusion.sample(denoiser, y, noise, args.sampler, args.num_sampling_steps,
                            args.guidance_scale, args.guidance_interval, ctx.autocast, tick)


@torch.no_grad()
def decode_latents(vae, z, latent_scale_factor, ctx, batch_size=16):
    """Images [N, 1, H, W] in [-1, 1] on the CPU from normalised latents [N, C, h, w]."""
    with ctx.autocast():
        images = [vae.decode(part.to(ctx.device) / latent_scale_factor)
                  for part in z.split(batch_size)]
    return torch.cat(images).clamp(-1, 1).cpu()


def sample_batches(denoiser, vae, latent_scale_factor, requests, class_names, args, ctx, batch_size,
                   label, tick=lambda: None):
    """Yield ([(class index, number)], normalised latents, images in [-1, 1]), on the CPU, for each
    batch of requests. label: of the progress line; tick(): called before each evaluation."""
    denoiser = cast_weights(denoiser, ctx)
    starts, numbers = range(0, len(requests), batch_size), itertools.count()
    progress = run.Progress(ctx, label, len(starts) * args.num_sampling_steps)

    def count():
        tick()
        progress.update(next(numbers))

    for start in starts:
        batch = requests[start:start + batch_size]
        # If compiled, the last batch is filled up: another size would be compiled once more.
        fill = batch[-1:] * (batch_size - len(batch)) if ctx.compile and start > 0 else []
        z = sample_latents(denoiser, vae.latent_shape, batch + fill, class_names, args, ctx, count)
        z = z[:len(batch)]
        yield batch, z.cpu(), decode_latents(vae, z, latent_scale_factor, ctx)
    progress.clear()


def latent_metrics(z, labels, class_names, latent_scale_factor, real_pairwise_mse):
    """Metrics final_latent_stats/* and sample_diversity/* of normalised latents z [N, C, h, w] with
    class indices [N]. real_pairwise_mse: that of the training latents, or None."""
    return (metrics.latent_stats(z / latent_scale_factor, latent_scale_factor)
            | metrics.sample_diversity(z, labels, class_names, real_pairwise_mse))


@torch.no_grad()
def appearance(z, latent_scale_factor, x, vae, ctx):
    """For image_metrics, of normalised latents z [N, C, h, w] and images x [N, 1, H, W] in
    [-1, 1]: mean power by octave of x, and mean squared change of z when it is decoded and encoded
    again. Real latents come back; those that no image has, as in mottle, do not."""
    decoded = decode_latents(vae, z, latent_scale_factor, ctx).split(16)
    again = torch.cat([vae.encode(part.to(ctx.device)).mean.cpu() for part in decoded])
    moved = (again * latent_scale_factor - z.cpu()).square().mean().item()
    return {"octave_power": metrics.octave_power(x).mean(0).tolist(), "round_trip": moved}


def image_metrics(z, latent_scale_factor, x, vae, ctx, real):
    """Metrics sample_quality/* of samples, arguments as of `appearance`; real: a dict with what
    that returned of training images. None if it lacks it, as in earlier checkpoints."""
    if "round_trip" not in real:
        return {}
    own = appearance(z, latent_scale_factor, x, vae, ctx)
    ratios = torch.tensor(own["octave_power"]) / torch.tensor(real["octave_power"])
    return {metrics.POWER: ratios[ratios.log().abs().argmax()].item(),  # the furthest from 1
            metrics.ROUND_TRIP: own["round_trip"], metrics.REAL_ROUND_TRIP: real["round_trip"]}


# --- the stage ----------------------------------------------------------------------------------


def build_parser():
    """Parser of this stage."""
    parser = make_parser(__doc__)
    add_precision_arguments(parser)
    add_sampling_arguments(parser, tuple(diffusion.SAMPLERS), num_samples=8)
    parser.add_argument("--real_dir", type=file_path,
        help="split folder such as data/TB/val: eight real images above each class of the grid")
    return parser


def real_rows(folder, class_names, img_size):
    """{class index: up to eight images, float32 [N, 1, S, S] in [-1, 1]} of a split's folder. Ends
    the program if there are none, or if one cannot be decoded."""
    if not os.path.isdir(folder):
        fail(f"no folder --real_dir={folder}: give one such as data/TB/val")
    root, task, split = os.path.abspath(folder).rsplit(os.sep, 2)
    listing, rows = data.scan(root, task, split, class_names), {}
    for c, name in enumerate(class_names):
        paths = [f"{root}/{file.path}" for file in listing.files if file.class_name == name]
        try:
            rows[c] = [decode.read_square(path, img_size)
                       for path in paths[::max(1, len(paths) // 8)][:8]]
        except (OSError, ValueError) as e:
            fail(f"an image in {folder} cannot be decoded: {e}")
    return {c: data.to_float(np.stack(images)) for c, images in rows.items() if images}


def prepare_folder(folder, checkpoint, requests, args):
    """{(class index, number): path} of the images to draw, in `folder`, which is made with its
    manifest.json. Images of the same settings that are there stay listed; the program ends if there
    are others, so that no folder mixes two."""
    settings = {name: getattr(args, name) for name in SAMPLING_SETTINGS}
    settings |= {name: checkpoint[name] for name in ("step", "vae_sha256", "latent_scale_factor")}
    settings = finite({**settings, "ckpt_sha256": checkpoint["sha256"]})  # as they are read back
    manifest, before = folder / "manifest.json", {**settings, "images": []}
    if any(folder.glob("*.png")):
        before = read_json(manifest)
    for name, value in settings.items():
        if before.get(name) != value:
            fail(f"{folder} holds samples of other settings ({name} {before.get(name)}, now "
                 f"{value}): give another --out_dir, or remove the folder")
    names = checkpoint["class_names"]
    paths = {(c, i): folder / f"{names[c]}_{i:05d}.png" for c, i in requests}
    images = {path.name: {"file": path.name, "class": names[c], "number": i}
              for (c, i), path in paths.items()}
    images |= {image["file"]: image for image in before["images"]
               if (folder / image["file"]).exists()}
    make_folder(folder)
    write_json(manifest, {"ckpt": args.ckpt, **settings, "images": [*images.values()]})
    return paths


def write_report(folder, checkpoint, paths, z, real, vae, args, ctx):
    """metrics.json and grid.png beside the images, and the verdicts on the console. paths: of
    prepare_folder; z: the normalised latents of these images; real: of real_rows."""
    class_names, stats = checkpoint["class_names"], checkpoint["train_stats"]
    scale, overfit = checkpoint["latent_scale_factor"], checkpoint["args"]["overfit_k"] > 0
    # Of the first thousand per class, since pairs grow with the square.
    labels = [c for c, i in paths if i < 1000]
    values = latent_metrics(z[[i < 1000 for _, i in paths]], labels, class_names,
                            scale, stats.get("real_pairwise_mse_mean"))
    if not overfit:
        first = [i < 16 for _, i in paths]
        x = torch.stack([run.load_image(path) for (_, i), path in paths.items() if i < 16])
        values |= image_metrics(z[first], scale, x, vae, ctx, stats)
    found = verdicts.health(values, train_stats=stats, overfit=overfit)
    write_json(folder / "metrics.json", values | {"verdicts": [v._asdict() for v in found]})
    rows, names = [], []
    for c in dict.fromkeys(labels):
        if c in real:
            rows.append(real[c])
            names.append(f"{class_names[c]}   real")
        rows.append(torch.stack([run.load_image(path) for (k, i), path in paths.items()
                                 if k == c and i < 8]))
        names.append(f"{class_names[c]}   {args.sampler} {args.num_sampling_steps} steps, "
                     f"guidance {args.guidance_scale:g}")
    run.save_grid(folder / "grid.png", rows, names)
    print(verdicts.format_verdicts(found))
    print(f"{len(paths)} images in {folder}; sample grid: {folder / 'grid.png'}")


def main(argv=None):
    args = parse_settings(build_parser(), argv)
    ctx = dist.setup(args)
    denoiser, vae, checkpoint, requests = prepare_sampling(args, ctx)
    name = (f"samples_{args.sampler}_{args.num_sampling_steps}_guidance{args.guidance_scale:g}"
            f"_seed{args.seed}")
    folder = pathlib.Path(args.out_dir or run.run_folder(args.ckpt) / name)
    real = args.real_dir and ctx.on_main(lambda: real_rows(
        args.real_dir, checkpoint["class_names"], checkpoint["args"]["img_size"]))
    paths = ctx.on_main(lambda: prepare_folder(folder, checkpoint, requests, args))

    # --- every process draws its share, and writes each batch at once ---
    latents = [torch.zeros(0, *checkpoint["latent_shape"])]
    for batch, z, x in sample_batches(
            denoiser, vae, checkpoint["latent_scale_factor"],
            requests[ctx.rank::ctx.world_size], checkpoint["class_names"], args, ctx,
            args.batch_size, f"sampling ({args.sampler})"):
        for request, image in zip(batch, x, strict=True):
            run.save_image(paths[request], image)
        latents.append(z)

    z = ctx.gather(torch.cat(latents))  # and now all images are written
    if ctx.is_main:
        write_report(folder, checkpoint, paths, z, real or {}, vae, args, ctx)


if __name__ == "__main__":
    main()
