"""Stage 4: draw images from a trained latent diffusion model.

    python sample.py --ckpt=runs/ldm_.../ckpts/best.pt --num_samples=8
    torchrun --nproc_per_node=4 sample.py --ckpt=runs/ldm_.../ckpts/best.pt --num_samples=1000

Every sample has a seed of its own, (seed, class, number), so neither the batch size nor the number
of processes changes it. The checkpoint names its autoencoder and holds the latent scale factor.
"""
import functools
import itertools
import math
import os
import pathlib
import re

import torch

import data
import diffusion
import model
from lib import dist, metrics, run, verdicts
from lib.args import (RENAMED_SAMPLERS, add_precision_arguments, add_sampling_arguments, at_least,
                      file_path, float_list, make_parser, parse_settings)
from lib.files import fail, finite, make_folder, read_json, write_json

# What a set of samples depends on besides the checkpoint, in manifests and reports.
SAMPLING_SETTINGS = ("seed", "sampler", "num_sampling_steps", "guidance_scale",
                     "guidance_interval", "use_ema")
CHANGES = ("compose", "weights", "base", "ckpt_b", "init_image")  # None in an ordinary set

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
    path = ae_ckpt_path or checkpoint["ae_ckpt_path"]
    if not os.path.exists(path):
        fail(f"no autoencoder at {path}: give its checkpoint with --ae_ckpt_path")
    vae, _, vae_sha256 = load_autoencoder(path, ctx)
    if vae_sha256 != checkpoint["vae_sha256"]:
        fail(f"{path} is not the autoencoder that {ckpt_path} was trained with (its hash differs); "
             "give that one with --ae_ckpt_path, or train the LDM again")
    checkpoint["ae_ckpt_path"] = path
    return ctx.place(denoiser).eval().requires_grad_(False), vae, checkpoint


def trained_classes(checkpoint):
    """{name: index} of the classes of an LDM checkpoint that had images."""
    return {checkpoint["class_names"][c]: c for c in sorted(checkpoint["trained_classes"])}


def prepare_sampling(args, ctx):
    """(Denoiser, AutoencoderKL, checkpoint dict, [(class index, number)] to draw) from the flags of
    add_sampling_arguments; None is as in training. Ends the program if they cannot be met."""
    if not args.ckpt:
        fail("which model? Give --ckpt=runs/ldm_.../ckpts/best.pt")
    denoiser, vae, checkpoint = load_ldm(args.ckpt, ctx, args.ae_ckpt_path, args.use_ema)
    settings, class_names = checkpoint["args"], checkpoint["class_names"]
    trained = trained_classes(checkpoint)
    names = re.split(r"\s*[,:]\s*", args.classes.strip()) if args.classes else [*trained]
    unknown = [name for name in names if name not in trained]
    if unknown == names and len(names) == 1 and "+" in names[0] and "compose" in args:
        class_names += names  # drawn as a class of its own, with the settings that its rule takes
        settings = settings | {"guidance_scale": 1.0}
        if args.compose in diffusion.RULES:
            settings |= {"sampler": "ancestral", "num_sampling_steps": 500}
    elif unknown or not names:
        fail(f"no class {', '.join(unknown)!r} in {args.ckpt}; it knows {', '.join(trained)}")
    if vars(args).get("init_image"):  # a patient is kept by the image's own noise alone
        settings = settings | {"sampler": "ddim", "num_sampling_steps": 40}
    for name in SAMPLING_SETTINGS:
        if getattr(args, name) is None:
            setattr(args, name, settings[name])
    args.sampler = RENAMED_SAMPLERS.get(args.sampler, args.sampler)  # of a run of earlier versions
    if args.guidance_scale != 1 and settings["prob_uncond"] == 0:
        fail(f"{args.ckpt} never trained a null class to guide from: give --guidance_scale=1")
    if ctx.compile:
        denoiser.unet.compile(mode=ctx.compile)
    requests = [(class_names.index(name), i) for name in dict.fromkeys(names)
                for i in range(args.num_samples)]
    return denoiser, vae, checkpoint, requests


def prepare_composition(name, args, ctx, denoiser, checkpoint):
    """diffusion.Composition of the class A+B, of the models of --ckpt and --ckpt_b. Ends the
    program if they do not fit, or if the rule cannot do what the flags say."""
    rule, parts, models = args.compose or "add", name.split("+"), [(denoiser, checkpoint)]
    if args.ckpt_b:
        models.append(load_ldm(args.ckpt_b, ctx, checkpoint["ae_ckpt_path"], args.use_ema)[::2])
    for key in ("latent_scale_factor", "prediction", "noise_schedule", "zero_terminal_snr"):
        a, *b = ({**stored["args"], **stored}[key] for _, stored in models)
        if b not in ([], [a]):
            fail(f"{args.ckpt_b} has {key} {b[0]}, {args.ckpt} has {a}: they cannot be composed")
    if rule != "add" and (len(parts) > 2 or args.base or args.sampler != "ancestral"):
        fail(f"--compose={rule} takes two classes, --sampler=ancestral and no --base")
    weights = args.weights or (1.0,) * len(parts)
    if len(weights) != len(parts) or rule == "or" and min(weights) <= 0:
        fail(f"--weights takes a number for each of {name}, above 0 for --compose=or")
    if args.guidance_scale != 1 or rule in ("and", "product") and args.weights:
        fail(f"--compose={rule} takes no guidance; --weights are for add and or")
    classes = [trained_classes(stored) | (
        {"null": network.unet.null_class} if stored["args"]["prob_uncond"] > 0 else {})
        for network, stored in models]
    conditions, bases = [], []
    for part in parts:
        m = next((m for m, known in enumerate(classes) if part in known), None)
        if m is None or parts.count(part) > 1:
            known = ", ".join(dict.fromkeys(itertools.chain(*classes)))
            fail(f"--classes={name}: each part once, out of {known}")
        conditions.append((m, classes[m][part]))
        if rule == "add":
            base = args.base or ("normal" if "normal" in classes[m] else "null")
            if base not in classes[m]:
                fail(f"--base={base}: the model of {part} was not trained on that class")
            bases.append((m, classes[m][base]))
    return diffusion.Composition(rule, [network for network, _ in models], conditions, bases,
                                 weights, [])


# --- sampling -----------------------------------------------------------------------------------


def sample_latents(process, latent_shape, requests, class_names, args, ctx, tick=lambda: None):
    """Normalised latents [B, C, h, w] on the device for requests, [(class index, number)]. process:
    a Denoiser, or a function with the arguments of diffusion.sample but the first. A sample's noise
    comes from (args.seed, class name, number) on the CPU: the same on every device and in every
    batch. tick() is called before each network evaluation."""
    if isinstance(process, diffusion.Denoiser):
        process = functools.partial(diffusion.sample, process)
    rngs = [ctx.generator(args.seed, "sample", class_names[c], number) for c, number in requests]
    y = torch.tensor([c for c, _ in requests], device=ctx.device)

    def noise():
        parts = torch.stack([torch.randn(latent_shape, generator=rng) for rng in rngs])
        return ctx.to_device(parts).contiguous(memory_format=ctx.memory_format)

    return process(y, noise, args.sampler, args.num_sampling_steps, args.guidance_scale,
                   args.guidance_interval, ctx.autocast, tick)


@torch.no_grad()
def decode_latents(vae, z, latent_scale_factor, ctx, batch_size=16):
    """Images [N, 1, H, W] in [-1, 1] on the CPU from normalised latents [N, C, h, w]."""
    with ctx.autocast():
        images = [vae.decode(part.to(ctx.device) / latent_scale_factor)
                  for part in z.split(batch_size)]
    return torch.cat(images).clamp(-1, 1).cpu()


def sample_batches(process, vae, latent_scale_factor, requests, class_names, args, ctx, batch_size,
                   label, tick=lambda: None):
    """Yield ([(class index, number)], normalised latents, images in [-1, 1]), on the CPU, for each
    batch of requests. label: of the progress line; process, tick: of sample_latents."""
    starts, numbers = range(0, len(requests), batch_size), itertools.count()
    progress = run.Progress(label, len(starts) * args.num_sampling_steps)

    def count():
        tick()
        progress.update(next(numbers))

    for start in starts:
        batch = requests[start:start + batch_size]
        # If compiled, the last batch is filled up: another size would be compiled once more.
        fill = batch[-1:] * (batch_size - len(batch)) if ctx.compile and start > 0 else []
        z = sample_latents(process, vae.latent_shape, batch + fill, class_names, args, ctx, count)
        z = z[:len(batch)]
        yield batch, z.cpu(), decode_latents(vae, z, latent_scale_factor, ctx)


@torch.no_grad()
def appearance(x, z, decoded, latent_scale_factor, vae, ctx):
    """{mean power by octave and lattice of images x [N, 1, H, W] in [-1, 1], and mean squared
    change of normalised latents z [N, C, h, w] once the images `decoded` from them are encoded
    again}. Real latents come back; those that no image has, as in mottle, do not."""
    again = torch.cat([vae.encode(part.to(ctx.device)).mean.cpu() for part in decoded.split(16)])
    moved = (again * latent_scale_factor - z.cpu()).square().mean().item()
    return {"octave_power": metrics.octave_power(x).mean(0).tolist(),
            "lattice": metrics.lattice(x).mean().item(), "round_trip": moved}


def sample_metrics(x, z, labels, class_names, latent_scale_factor, vae, ctx, real):
    """Metrics final_latent_stats/*, sample_diversity/* and sample_quality/* of images x decoded
    from normalised latents z [N, C, h, w], with class indices [N]. real: the checkpoint's
    train_stats; without their `appearance`, as in overfit modes, there is no sample_quality/*."""
    values = metrics.latent_stats(z / latent_scale_factor, latent_scale_factor)
    values |= metrics.sample_diversity(z, labels, class_names, real.get("real_pairwise_mse_mean"))
    if "round_trip" in real:
        own = appearance(x, z, x, latent_scale_factor, vae, ctx)
        ratios = torch.tensor(own["octave_power"]) / torch.tensor(real["octave_power"])
        values |= {metrics.POWER: ratios[ratios.log().abs().argmax()].item(),  # furthest from 1
                   metrics.LATTICE: own["lattice"] / real.get("lattice", 1),  # not in older runs
                   metrics.ROUND_TRIP: own["round_trip"],
                   metrics.REAL_ROUND_TRIP: real["round_trip"]}
    return values


# --- the stage ----------------------------------------------------------------------------------


def build_parser():
    """Parser of this stage."""
    parser = make_parser(__doc__)
    add_precision_arguments(parser)
    add_sampling_arguments(parser, tuple(diffusion.SAMPLERS), num_samples=8)
    parser.add_argument("--real_dir", type=file_path,
        help="split folder such as data/TB/val: eight real images of each class above the samples")
    add = parser.add_argument_group("composition and editing").add_argument
    add("--compose", choices=("add", *diffusion.RULES), help="how --classes=A+B are joined. add: "
        "to --base; or: one of both; and: where both are equal; product: of both; None: add")
    add("--weights", type=float_list, help="comma list, a number per class; None: all 1")
    add("--base", help="class that findings are added to, or null; None: normal, if there is one")
    add("--ckpt_b", type=file_path, help="second model, of the same autoencoder and settings")
    add("--init_image", type=file_path, help="image to change to each of the classes")
    add("--strength", type=at_least(0, float, 1), default=0.7, help="0: its reconstruction")
    return parser


def real_rows(folder, class_names, img_size):
    """{label: up to eight images of a class, float32 [N, 1, S, S] in [-1, 1]} of a split's folder.
    Ends the program if there are none."""
    if not os.path.isdir(folder):
        fail(f"no folder --real_dir={folder}: give one such as data/TB/val")
    root, task, split = os.path.abspath(folder).rsplit(os.sep, 2)
    files, rows = data.scan(root, task, split, class_names).files, {}
    for name in class_names:
        paths = [f"{root}/{file.path}" for file in files if file.class_name == name]
        images = [data.read_image(paths[i], img_size) for i in data.spread(len(paths), 8)]
        rows |= {f"{name}   real": torch.cat(images)} if images else {}
    return rows


def prepare_folder(folder, checkpoint, requests, args):
    """{(class index, number): path} of the images to draw, in `folder`, which is made with a
    manifest.json of their settings. Ends the program if it holds images of others, so that no
    folder mixes two."""
    given = [name for name in SAMPLING_SETTINGS + CHANGES if getattr(args, name) is not None]
    given += ["strength"] * bool(args.init_image)
    settings = {name: getattr(args, name) for name in given}
    settings |= {name: checkpoint[name] for name in ("step", "vae_sha256", "latent_scale_factor")}
    settings = finite({**settings, "ckpt_sha256": checkpoint["sha256"]})  # as they are read back
    if any(folder.glob("*.png")):
        before = read_json(folder / "manifest.json")
        for name, value in settings.items():
            if before.get(name) != value:
                fail(f"{folder} holds samples of other settings ({name} {before.get(name)}, now "
                     f"{value}): give another --out_dir, or remove the folder")
    make_folder(folder)
    write_json(folder / "manifest.json", {"ckpt": args.ckpt, **settings})
    return {(c, i): folder / f"{checkpoint['class_names'][c]}_{i:05d}.png" for c, i in requests}


def write_report(folder, checkpoint, paths, z, rows, own, vae, args, ctx):
    """metrics.json of the first 64 images per class and grid.png of eight, beside the images, and
    the verdicts on the console. paths: of prepare_folder; z: the normalised latents of these; rows:
    {label: images} that the grid begins with; own: class of an edited image, else -1."""
    class_names, stats = checkpoint["class_names"], checkpoint["train_stats"]
    first = [(c, i) for c, i in paths if i < 64]
    labels = torch.tensor([c for c, _ in first])
    x = torch.cat([data.read_image(paths[request]) for request in first])
    values = sample_metrics(x, z[[i < 64 for _, i in paths]], labels, class_names,
                            checkpoint["latent_scale_factor"], vae, ctx, stats)
    found = verdicts.health(values, train_stats=stats, guidance_scale=args.guidance_scale,
                            overfit=checkpoint["args"]["overfit_k"] > 0 or own >= 0)
    write_json(folder / "metrics.json", values | {"verdicts": [v._asdict() for v in found]})
    drawn = {class_names[c]: x[labels == c][:8] for c in labels.unique()}
    settings = f"{args.sampler} {args.num_sampling_steps} steps, guidance {args.guidance_scale:g}"
    rows |= edit_rows(drawn, class_names[own]) if own >= 0 else {
        f"{name}   {settings}": images for name, images in drawn.items()}
    run.save_grid(folder / "grid.png", [*rows.values()], [*rows])
    print(verdicts.format_verdicts(found))
    print(f"{len(paths)} images in {folder}; sample grid: {folder / 'grid.png'}")


def prepare_edit(args, ctx, denoiser, vae, checkpoint, classes):
    """What --init_image asks for: ({label: image and reconstruction [2, 1, S, S]}, the class of the
    image: that of its folder, if it is one of `classes`, else the first of them, and the process
    for sample_latents)."""
    path, scale = pathlib.Path(args.init_image), checkpoint["latent_scale_factor"]
    x = data.read_image(path, checkpoint["args"]["img_size"])
    folder = path.resolve().parent.name
    own = next((c for c in classes if checkpoint["class_names"][c] == folder), classes[0])
    with torch.no_grad(), ctx.autocast():
        z = vae.encode(x.to(ctx.device)).mean * scale
    pair = torch.cat([x, decode_latents(vae, z, scale, ctx)])
    return ({f"{path.name}, its reconstruction": pair}, own,
            functools.partial(diffusion.edit, denoiser, z, own, args.strength))


def edit_rows(drawn, own):
    """{label: images} of {class: image [1, 1, S, S]} drawn from one image: each, and below it what
    differs from class `own`, in tones from -25 to 25 % of the grey range with 0 in the middle."""
    x = torch.cat([*drawn.values()])
    return {", ".join(drawn): x,
            f"less {own}; white: 25 % brighter": 2 * (x - drawn[own]).clamp(-0.5, 0.5)}


def describe(composition):
    """What the rule of a composition says of the images that this process drew, in a line."""
    if composition.rule == "or":
        log_ratio = torch.cat([words["log_ratio"] for words in composition.said])
        odds = math.log(composition.weights[0] / composition.weights[1])
        return f"or: {(log_ratio + odds > 0).double().mean():.0%} are of the first class"
    least = min(words["effective_sample_size"].item() for words in composition.said)
    doubt = ", no draws from the product: raise --batch_size" if least < 4 else ""
    return f"product: the effective sample size of a batch is {least:.1f}{doubt}"


def main(argv=None):
    args = parse_settings(build_parser(), argv)
    ctx = dist.setup(args)
    denoiser, vae, checkpoint, requests = prepare_sampling(args, ctx)
    names, img_size = checkpoint["class_names"], checkpoint["args"]["img_size"]
    classes = [c for c, i in requests if i == 0]
    process, prefix, rows, own, composition = denoiser, "samples", {}, -1, None
    if classes[0] not in checkpoint["trained_classes"]:
        composition = prepare_composition(args.classes, args, ctx, denoiser, checkpoint)
        process = functools.partial(diffusion.compose, composition)
        prefix = f"{args.classes}_{composition.rule}"
    elif any(getattr(args, name) for name in CHANGES if name != "init_image"):
        fail("--compose, --weights, --base and --ckpt_b are for classes joined by +: --classes=A+B")
    elif args.init_image:
        rows, own, process = prepare_edit(args, ctx, denoiser, vae, checkpoint, classes)
        requests = [(c, 0) for c in classes]
        prefix = f"edit_{pathlib.Path(args.init_image).stem}_{args.strength:g}"
    if args.real_dir:
        rows |= ctx.on_main(lambda: real_rows(args.real_dir, names, img_size))
    name = (f"{prefix}_{args.sampler}_{args.num_sampling_steps}_guidance{args.guidance_scale:g}"
            f"_seed{args.seed}")
    folder = pathlib.Path(args.out_dir or run.run_folder(args.ckpt) / name)
    paths = ctx.on_main(lambda: prepare_folder(folder, checkpoint, requests, args))

    # --- every process draws its share, and writes each batch at once ---
    latents = [torch.zeros(0, *checkpoint["latent_shape"])]
    keys = ["edit"] * len(names) if own >= 0 else names  # an edited image has one noise for all
    for batch, z, x in sample_batches(
            process, vae, checkpoint["latent_scale_factor"], requests[ctx.rank::ctx.world_size],
            keys, args, ctx, args.batch_size, f"sampling ({args.sampler})"):
        for request, image in zip(batch, x, strict=True):
            run.save_image(paths[request], image)
        latents.append(z)

    z = ctx.gather(torch.cat(latents))  # and now all images are written
    if ctx.is_main:
        write_report(folder, checkpoint, paths, z, rows, own, vae, args, ctx)
        if composition and composition.said and composition.said[0]:
            print(describe(composition))


if __name__ == "__main__":
    main()
