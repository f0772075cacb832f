"""Stage 4: draw images from a trained latent diffusion model.

    python sample.py --ckpt=runs/ldm_.../ckpts/best.pt --num_samples=8
    torchrun --nproc_per_node=4 sample.py --ckpt=runs/ldm_.../ckpts/best.pt --num_samples=1000

Every sample has a seed of its own, made of (seed, class, number), so neither batch size nor the
number of processes changes it. The checkpoint names its autoencoder and holds the latent scale
factor.
"""
import pathlib
import shutil

import torch

import data
import diffusion
import experiment
import metrics
from args import (add_precision_arguments, add_sampling_arguments, file_path, make_parser,
                  parse_settings)
from experiment import fail

ROW = 8  # images of a class in the sample grid


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
    ends the program where there are none, or where one cannot be decoded."""
    folder = pathlib.Path(folder).absolute()
    listing = data.scan(folder.parent.parent, folder.parent.name, folder.name, class_names)
    if listing is None:
        fail(f"no folder --real_dir={folder}")
    rows = {}
    for name in class_names:
        paths = [pathlib.Path(listing.root, file.path) for file in listing.files
                 if file.class_name == name]
        try:
            if paths:
                rows[name] = data.decode_some(paths, img_size, ROW)
        except (OSError, ValueError) as e:
            fail(f"an image in {folder} cannot be decoded: {e}")
    return rows


def check_space(folder, count, img_size, num_samples):
    """End the program where `count` images will not fit on the disk of `folder`."""
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    needed, free = count * img_size**2, shutil.disk_usage(existing).free
    if needed > free:
        fail(f"{count} images need about {needed / 1e9:.1f} GB, but {existing} has "
             f"{free / 1e9:.1f} GB free: lower --num_samples={num_samples}")


def prepare_folder(folder, checkpoint, wanted, args):
    """Make the folder and its manifest.json, which lists what is going to be drawn.

    wanted: [(class index, number)]. Images of the same settings that are there already stay listed;
    the program ends where there are images of others, so that no folder mixes two.
    """
    class_names = checkpoint["class_names"]
    settings = {name: getattr(args, name) for name in experiment.SAMPLING_SETTINGS}
    for name in ("step", "vae_sha256", "latent_scale_factor"):
        settings[name] = checkpoint[name]
    settings["ckpt_sha256"] = experiment.sha256_file(args.ckpt)
    settings = experiment.finite(settings)  # as they are read back
    images = {}
    for c, i in wanted:
        file = file_name(class_names, c, i)
        images[file] = {"file": file, "class": class_names[c], "number": i}
    path = folder / "manifest.json"
    advice = "give another --out_dir, or remove the folder"
    if path.exists():
        before = experiment.read_json(path, "manifest of samples")
        for name, value in settings.items():
            if before.get(name) != value:
                fail(f"{folder} holds samples of other settings ({name} {before.get(name)}, now "
                     f"{value}): {advice}")
        images |= {image["file"]: image for image in before["images"]
                   if (folder / image["file"]).exists()}
    elif any(folder.glob("*.png")):
        fail(f"{folder} holds images without a manifest.json: {advice}")
    experiment.make_folder(folder)
    experiment.write_json(path, {"ckpt": args.ckpt, **settings, "images": [*images.values()]})


def write_report(folder, checkpoint, wanted, z, real, args):
    """metrics.json and grid.png beside the images, and the verdicts on the console.

    wanted: [(class index, number)] of the images; z: their normalised latents; real: of real_rows.
    """
    class_names, scale = checkpoint["class_names"], checkpoint["latent_scale_factor"]

    # --- numbers: of the first thousand per class, since pairs grow with the square ---
    first = [k for k, (_, i) in enumerate(wanted) if i < 1000]
    real_mse = checkpoint["train_stats"]["real_pairwise_mse_mean"]
    labels = [wanted[k][0] for k in first]
    values = metrics.latent_stats(z / scale, scale)
    values |= metrics.sample_diversity(z[first], labels, class_names, real_mse)
    verdicts = metrics.health(values, train_stats=checkpoint["train_stats"],
                              overfit=checkpoint["args"]["overfit_k"] > 0)
    experiment.write_json(folder / "metrics.json", values | {
        "verdicts": [v._asdict() for v in verdicts]})

    # --- picture ---
    rows, labels = [], []
    for c in dict.fromkeys(c for c, _ in wanted):
        if class_names[c] in real:
            rows.append(real[class_names[c]])
            labels.append(f"{class_names[c]}   real")
        shown = [file_name(class_names, k, i) for k, i in wanted if k == c and i < ROW]
        rows.append(torch.stack([experiment.load_image(folder / file) for file in shown]))
        labels.append(f"{class_names[c]}   {args.sampler} {args.num_sampling_steps} steps, "
                      f"guidance {args.guidance_scale:g}")
    experiment.save_grid(folder / "grid.png", rows, labels)
    print(metrics.format_verdicts(verdicts))
    print(f"{len(wanted)} images in {folder}; sample grid: {folder / 'grid.png'}")


def file_name(class_names, c, number):
    """File of sample `number` of class index c."""
    return f"{class_names[c]}_{number:05d}.png"


def main(argv=None):
    args = parse_settings(build_parser(), argv)
    procs = experiment.setup_processes(args)
    ldm = experiment.prepare_sampling(args, procs)
    checkpoint, class_names = ldm.checkpoint, ldm.checkpoint["class_names"]
    real = {}
    if args.real_dir:  # read before hours of sampling
        real = experiment.on_main(procs, lambda: real_rows(
            args.real_dir, class_names, checkpoint["args"]["img_size"]))
    run_folder = experiment.run_folder(args.ckpt)
    folder = pathlib.Path(args.out_dir or run_folder / f"samples_{args.sampler}_{args.seed}")
    count = len(ldm.classes) * args.num_samples
    check_space(folder, count, checkpoint["args"]["img_size"], args.num_samples)
    wanted = [(c, i) for c in ldm.classes for i in range(args.num_samples)]
    experiment.on_main(procs, lambda: prepare_folder(folder, checkpoint, wanted, args))

    # --- every process draws its part, and writes it at once ---
    mine = wanted[procs.rank::procs.world_size]
    total = len(mine) * args.num_sampling_steps
    progress = experiment.Progress(procs, f"sampling ({args.sampler})", total)
    latents = [torch.zeros(0, *checkpoint["latent_shape"])]
    for batch, z, x in experiment.sample_batches(
            ldm.denoiser, ldm.vae, checkpoint["latent_scale_factor"], mine, class_names, args,
            procs, args.batch_size, progress.update):
        for (c, i), image in zip(batch, x, strict=True):
            experiment.save_image(folder / file_name(class_names, c, i), image)
        latents.append(z)
    progress.clear()

    z = experiment.gather(procs, torch.cat(latents))  # and now all images are written
    if procs.main:
        write_report(folder, checkpoint, wanted, z, real, args)


if __name__ == "__main__":
    main()
