"""Stage 4: draw images from a trained latent diffusion model.

    python sample.py --ckpt=runs/ldm_.../ckpts/best.pt --num_samples=8
    torchrun --nproc_per_node=4 sample.py --ckpt=runs/ldm_.../ckpts/best.pt --num_samples=1000

Every sample has a seed of its own, (seed, class, number), so neither the batch size nor the number
of processes changes it. The checkpoint names its autoencoder and holds the latent scale factor.
"""
import copy
import functools
import pathlib
import re

import numpy as np
import torch

import data
import diffusion
import model
from lib import decode, dist, metrics, run, verdicts
from lib.args import (add_precision_arguments, add_sampling_arguments, file_path, make_parser,
                      parse_settings)
from lib.files import fail, finite, make_folder, read_json, write_json

ROW = 8  # images of a class in the sample grid
# What a set of samples depends on besides the checkpoint, in manifests and reports.
SAMPLING_SETTINGS = ("seed", "sampler", "num_sampling_steps", "guidance_scale",
                     "guidance_interval", "use_ema")

# --- loading a model ----------------------------------------------------------------------------


def load_autoencoder(ckpt_path, ctx, config_path=None):
    """(AutoencoderKL with averaged weights on the device, its settings, sha256 of the file).
    config_path: a run_meta.json that must describe the same architecture."""
    checkpoint = run.load_checkpoint(ckpt_path, "vae")
    settings = checkpoint["args"]
    vae = run.load_network(model.build_vae, settings, checkpoint["ema"], ckpt_path)
    if config_path:
        described = run.read_meta(pathlib.Path(config_path).parent)["args"]
        if any(finite(settings[name]) != described.get(name) for name in model.VAE_SHAPE):
            fail(f"{config_path} and {ckpt_path} are not of the same run: leave one out")
    return ctx.place(vae).eval().requires_grad_(False), settings, checkpoint["sha256"]


def autoencoder_of(checkpoint, ckpt_path):
    """Path of the autoencoder that the LDM checkpoint at ckpt_path was trained with."""
    path = run.find_moved(checkpoint["ae_ckpt_path"], run.run_folder(ckpt_path))
    if not path.exists():
        fail(f"the autoencoder is no longer at {path}: give its checkpoint with --ae_ckpt_path")
    return path


def build_denoiser(checkpoint, ckpt_path, use_ema=None):
    """Denoiser with the weights of an LDM checkpoint, on the CPU; averaged ones if use_ema, or if
    it is None and there are any. Ends the program if the checkpoint lacks them."""
    names = checkpoint["class_names"]
    for name in names:  # it becomes a file name: a stranger's `../x` must not leave the folder
        if not isinstance(name, str) or not name or name[0] == "." or "/" in name or "\0" in name:
            fail(f"{ckpt_path} has a class {name!r}, which is no file name: it is not loaded")
    if use_ema is None:
        use_ema = checkpoint["ema"] is not None
    weights = checkpoint["ema" if use_ema else "model"]
    if weights is None:
        fail(f"{ckpt_path} was trained without averaged weights: give --no-use_ema" if use_ema else
             f"{ckpt_path} holds averaged weights only: take last.pt for --no-use_ema")
    build = functools.partial(model.build_denoiser, latent_shape=checkpoint["latent_shape"],
                              num_classes=len(names), aug_dim=data.AUG_DIM)
    return run.load_network(build, checkpoint["args"], weights, ckpt_path)


def load_ldm(ckpt_path, ctx, ae_ckpt_path=None, use_ema=None):
    """(Denoiser, AutoencoderKL, checkpoint dict) of an LDM checkpoint, networks on the device.
    ae_ckpt_path: where the autoencoder is now, if it was moved; use_ema as in build_denoiser. Ends
    the program if the model was trained with another autoencoder."""
    checkpoint = run.load_checkpoint(ckpt_path, "ldm")
    denoiser = build_denoiser(checkpoint, ckpt_path, use_ema)
    path = ae_ckpt_path or autoencoder_of(checkpoint, ckpt_path)
    vae, _, vae_sha256 = load_autoencoder(path, ctx)
    if vae_sha256 != checkpoint["vae_sha256"]:
        fail(f"{path} is not the autoencoder that {ckpt_path} was trained with (its hash differs); "
             "give that one with --ae_ckpt_path, or train the LDM again")
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
    if args.use_ema is None:
        args.use_ema = checkpoint["ema"] is not None
    for name in ("guidance_scale", "guidance_interval"):
        if getattr(args, name) is None:
            setattr(args, name, settings[name])
    if args.guidance_scale != 1 and settings["prob_uncond"] == 0:
        fail("this model never trained its null class (prob_uncond was 0), so guidance has nothing "
             "to guide from: give --guidance_scale=1")
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


def sample_latents(denoiser, latent_shape, requests, class_names, args, ctx, tick=None):
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
    images = []
    for part in z.split(batch_size):
        with ctx.autocast():
            x = vae.decode(part.to(ctx.device) / latent_scale_factor)
        images.append(x.clamp(-1, 1).cpu())
    return torch.cat(images)


def sample_batches(denoiser, vae, latent_scale_factor, requests, class_names, args, ctx, batch_size,
                   label, tick=None):
    """Yield ([(class index, number)], normalised latents, images in [-1, 1]), on the CPU, for
    batches of `requests`. label: of the progress line; tick() is called before each network
    evaluation. Ends the program if a batch does not fit into memory."""
    denoiser = cast_weights(denoiser, ctx)
    # In evaluations of one image: batches differ in size.
    progress = run.Progress(ctx, label, len(requests) * args.num_sampling_steps)
    done = 0
    for start in range(0, len(requests), batch_size):
        batch = full = requests[start:start + batch_size]
        if ctx.compile and start > 0:  # another size would be compiled once more
            full = batch + batch[-1:] * (batch_size - len(batch))

        def count(batch=batch):
            nonlocal done
            done += len(batch)
            if tick:
                tick()
            progress.update(done)

        try:
            z = sample_latents(denoiser, vae.latent_shape, full, class_names, args, ctx, count)
            x = decode_latents(vae, z[:len(batch)], latent_scale_factor, ctx)
        except RuntimeError as e:  # torch.OutOfMemoryError is one; a CPU "can't allocate memory"
            if "memory" not in str(e):
                raise
            fail(f"{batch_size} images at once do not fit into memory: lower the batch size")
        yield batch, z[:len(batch)].cpu(), x
    progress.clear()


def latent_metrics(z, labels, class_names, latent_scale_factor, real_pairwise_mse):
    """Metrics final_latent_stats/* and sample_diversity/* of normalised latents z [N, C, h, w] with
    class indices [N]. real_pairwise_mse: that of the training latents, or None."""
    values = metrics.latent_stats(z / latent_scale_factor, latent_scale_factor)
    return values | metrics.sample_diversity(z, labels, class_names, real_pairwise_mse)


# --- the stage ----------------------------------------------------------------------------------


def build_parser():
    """Parser of this stage."""
    parser = make_parser(__doc__)
    add_precision_arguments(parser)
    add_sampling_arguments(parser, tuple(diffusion.SAMPLERS), sampler="ancestral",
                           num_sampling_steps=500, num_samples=8)
    parser.add_argument("--real_dir", type=file_path,
        help="split folder such as data/TB/val: eight real images above each class of the grid")
    return parser


def real_rows(folder, class_names, img_size):
    """{class name: up to eight of its images, float32 [N, 1, S, S] in [-1, 1]} of a split's folder;
    ends the program if there are none, or if one cannot be decoded."""
    folder = pathlib.Path(folder).absolute()
    if not folder.is_dir():
        fail(f"no folder --real_dir={folder}")
    listing = data.scan(folder.parent.parent, folder.parent.name, folder.name, class_names)
    rows = {}
    for name in sorted({file.class_name for file in listing.files}):
        files = [file for file in listing.files if file.class_name == name]
        chosen = files[::max(1, len(files) // ROW)][:ROW]
        try:
            squares = [decode.read_square(f"{listing.root}/{f.path}", img_size) for f in chosen]
        except (OSError, ValueError) as e:
            fail(f"an image in {folder} cannot be decoded: {e}")
        rows[name] = data.to_float(np.stack(squares))
    return rows


def prepare_folder(folder, checkpoint, requests, args):
    """Make the folder and its manifest.json, which lists what is going to be drawn: requests,
    [(class index, number)]. Images of the same settings that are there already stay listed; the
    program ends if there are images of others, so that no folder mixes two."""
    class_names = checkpoint["class_names"]
    settings = {name: getattr(args, name) for name in SAMPLING_SETTINGS}
    settings |= {name: checkpoint[name] for name in ("step", "vae_sha256", "latent_scale_factor")}
    settings = finite({**settings, "ckpt_sha256": checkpoint["sha256"]})  # as they are read back
    path, before = folder / "manifest.json", {**settings, "images": []}
    if path.exists():
        before = read_json(path, "manifest of samples")
    elif any(folder.glob("*.png")):
        fail(f"{folder} holds images without a manifest.json: give another --out_dir")
    for name, value in settings.items():
        if before.get(name) != value:
            fail(f"{folder} holds samples of other settings ({name} {before.get(name)}, now "
                 f"{value}): give another --out_dir, or remove the folder")
    images = {}
    for c, i in requests:
        file = file_name(class_names, c, i)
        images[file] = {"file": file, "class": class_names[c], "number": i}
    images |= {image["file"]: image for image in before["images"]
               if (folder / image["file"]).exists()}
    make_folder(folder)
    write_json(path, {"ckpt": args.ckpt, **settings, "images": [*images.values()]})


def write_report(folder, checkpoint, requests, z, real, args):
    """metrics.json and grid.png beside the images, and the verdicts on the console. requests:
    [(class index, number)]; z: their normalised latents; real: of real_rows."""
    class_names = checkpoint["class_names"]
    # Of the first thousand per class, since pairs grow with the square.
    first = [k for k, (_, i) in enumerate(requests) if i < 1000]
    values = latent_metrics(z[first], [requests[k][0] for k in first], class_names,
                            checkpoint["latent_scale_factor"],
                            checkpoint["train_stats"].get("real_pairwise_mse_mean"))
    found = verdicts.health(values, train_stats=checkpoint["train_stats"],
                            overfit=checkpoint["args"]["overfit_k"] > 0,
                            guidance_scale=args.guidance_scale)
    write_json(folder / "metrics.json", values | {"verdicts": [v._asdict() for v in found]})
    rows, labels = [], []
    for c in dict.fromkeys(c for c, _ in requests):
        if class_names[c] in real:
            rows.append(real[class_names[c]])
            labels.append(f"{class_names[c]}   real")
        shown = [file_name(class_names, k, i) for k, i in requests if k == c and i < ROW]
        rows.append(torch.stack([run.load_image(folder / file) for file in shown]))
        labels.append(f"{class_names[c]}   {args.sampler} {args.num_sampling_steps} steps, "
                      f"guidance {args.guidance_scale:g}")
    run.save_grid(folder / "grid.png", rows, labels)
    print(verdicts.format_verdicts(found))
    print(f"{len(requests)} images in {folder}; sample grid: {folder / 'grid.png'}")


def file_name(class_names, c, number):
    """File of sample `number` of class index c."""
    return f"{class_names[c]}_{number:05d}.png"


def main(argv=None):
    args = parse_settings(build_parser(), argv)
    ctx = dist.setup(args)
    denoiser, vae, checkpoint, requests = prepare_sampling(args, ctx)
    class_names = checkpoint["class_names"]
    real = {}
    if args.real_dir:  # read before hours of sampling
        size = checkpoint["args"]["img_size"]
        real = ctx.on_main(lambda: real_rows(args.real_dir, class_names, size))
    default = run.run_folder(args.ckpt) / f"samples_{args.sampler}_{args.seed}"
    folder = pathlib.Path(args.out_dir or default)
    ctx.on_main(lambda: prepare_folder(folder, checkpoint, requests, args))

    # --- every process draws its share, and writes each batch at once ---
    latents = [torch.zeros(0, *checkpoint["latent_shape"])]
    for batch, z, x in sample_batches(
            denoiser, vae, checkpoint["latent_scale_factor"],
            requests[ctx.rank::ctx.world_size], class_names, args, ctx, args.batch_size,
            f"sampling ({args.sampler})"):
        for (c, i), image in zip(batch, x, strict=True):
            run.save_image(folder / file_name(class_names, c, i), image)
        latents.append(z)

    z = ctx.gather(torch.cat(latents))  # and now all images are written
    if ctx.is_main:
        write_report(folder, checkpoint, requests, z, real, args)


if __name__ == "__main__":
    main()
