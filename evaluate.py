"""Are the generated radiographs any good, are they copies of patients, and are they of use?

    python evaluate.py --ckpt=runs/ldm_.../ckpts/last.pt --data_root=DATA --task=TB
    python evaluate.py --samples_dir=FOLDER --data_root=DATA --task=TB

compares samples of a model, or a folder of images, with held-out images (--split=val): distances of
the distributions, copies of training images, and whether a classifier learns from the samples what
holds on real images (TSTR: train on synthetic, test on real). Beside every distance stands the
real-data baseline, what as many training images get. A distance means something only together with
its feature space and its number of images.
"""
import dataclasses
import hashlib
import math
import pathlib
import statistics
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

import data
import diffusion
import experiment
import metrics
import phantom
from args import (add_data_arguments, add_precision_arguments, add_sampling_arguments, at_least,
                  file_path, make_parser, parse_settings)
from experiment import fail, notice

CLASSIFIER_SIZE = 64  # side in pixels of what the classifier sees
BASELINE_DRAWS = 8  # choices of training images that the baseline is the mean of
TSTR = "samples, tested on held-out images"
NO_SAMPLES = {"manifest.json", "metrics.json", "grid.png", "evaluation.json",
              "evaluation_pairs.png"}  # what sample.py and this program write beside samples


# --- arguments ----------------------------------------------------------------------------------


def build_parser():
    """Parser of this stage."""
    parser = make_parser(__doc__)
    add_data_arguments(parser, split="val", img_size=None)
    add_precision_arguments(parser)
    add_sampling_arguments(parser, tuple(diffusion.SAMPLERS), sampler="dpmpp_sde",
                           num_sampling_steps=20, num_samples=64)
    add = parser.add_argument_group("evaluation").add_argument
    add("--samples_dir", type=file_path,
        help="measure this folder: what its manifest.json lists, else CLASS/*.png, CLASS_*.png")
    add("--features", default="classifier",
        help="classifier (trained on the training split), vae, torchxrayvision, or the path of a "
        "TorchScript network")
    add("--classifier_steps", type=at_least(1), default=600,
        help="training of each classifier, 32 images per step")
    return parser


# --- images -------------------------------------------------------------------------------------


@dataclasses.dataclass
class Samples:
    """Generated images, read like a data.ImageSet."""

    rows: np.ndarray  # uint16 [N, S, S], as data.decode makes them
    labels: np.ndarray  # class index of each

    def __len__(self):
        return len(self.rows)

    def images(self, indices):
        """float32 [B, 1, S, S] in [-1, 1]."""
        return data.to_float(self.rows[indices])


class ImageGroup(NamedTuple):
    """The samples, the training images or the held-out images, and reductions of all of them."""

    images: object  # data.ImageSet or Samples
    labels: torch.Tensor  # [N] class indices
    views: torch.Tensor  # [N, 1, 64, 64] in [-1, 1]: what the classifier sees
    thumbnails: torch.Tensor  # [N, 1024]: what copies are looked for in


class FeatureGroup(NamedTuple):
    """What the distributions of a set of images are compared by."""

    labels: np.ndarray  # [N] class indices
    features: torch.Tensor  # [N, D]
    looks: torch.Tensor  # [N, 3], see `looks`

    def of_classes(self, classes):
        """The part whose class index is among `classes`."""
        keep = np.flatnonzero(np.isin(self.labels, classes))
        return FeatureGroup(self.labels[keep], self.features[keep], self.looks[keep])


def draw_samples(ldm, args, procs):
    """Samples of an experiment.TrainedModel with 8 bits per pixel, as sample.py saves them."""
    wanted = [(c, i) for c in ldm.classes for i in range(args.num_samples)]
    total = len(wanted) * args.num_sampling_steps
    progress = experiment.Progress(procs, f"sampling ({args.sampler})", total)
    rows = []
    for _, _, x in experiment.sample_batches(
            ldm.denoiser, ldm.vae, ldm.checkpoint["latent_scale_factor"], wanted,
            ldm.checkpoint["class_names"], args, procs, args.batch_size, progress.update):
        rows.append(experiment.to_uint8(x)[:, 0].numpy().astype(np.uint16) * 257)
    progress.clear()
    return Samples(np.concatenate(rows), np.array([c for c, _ in wanted]))


def listed_samples(folder):
    """{path: class name} of what sample.py's manifest.json lists; ends the program where some of it
    is missing."""
    manifest = experiment.read_json(folder / "manifest.json", "manifest of samples")
    try:
        found = {folder / image["file"]: image["class"] for image in manifest["images"]}
        if any(path.parent != folder for path in found):  # a stranger's ../../private.png
            raise ValueError
    except (KeyError, TypeError, ValueError):
        fail(f"{folder / 'manifest.json'} is not one of sample.py: move it away to measure all "
             "images beside it")
    missing = [path for path in found if not path.exists()]
    if missing:
        fail(f"{len(missing)} of the {len(found)} images that {folder / 'manifest.json'} lists are "
             f"missing ({missing[0].name}): sampling was broken off, run the sample.py command "
             "again")
    return found


def named_samples(folder, class_names):
    """{path: class name or None} of the files in a folder, by CLASS/* and CLASS_*.

    The longest class name that fits counts, since one may begin another.
    """
    found = {}
    for path in folder.iterdir():
        name = data.class_name(path.name)
        if path.is_dir():
            found |= dict.fromkeys(path.iterdir(), name)
        else:
            fits = [c for c in class_names if name.startswith(f"{c}_")]
            found[path] = max(fits, key=len, default=None)
    return {path: name for path, name in found.items()
            if not path.name.startswith(".") and path.name not in NO_SAMPLES}


def read_samples(folder, class_names, img_size):
    """Samples in a folder of images; img_size None: that of the first.

    Ends the program where there are none, or where one cannot be decoded. Notices name the classes
    without an image, and count the files that are left out.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        fail(f"no folder --samples_dir={folder}")
    found = named_samples(folder, class_names)
    if (folder / "manifest.json").exists():
        found = dict.fromkeys(found) | listed_samples(folder)
    members, left_out = [], []
    for path, name in found.items():
        if name in class_names and path.suffix.lower() in data.EXTENSIONS:
            members.append((class_names.index(name), path))
        else:
            left_out.append(path)
    if not members:
        fail(f"no images in {folder}: they must be called CLASS_*.png or lie in folders CLASS, "
             f"with the classes of the data, {', '.join(class_names)}")
    if left_out:
        notice(f"{folder}: {len(left_out)} files are left out, since they are no images of a class "
               f"of the data, or not in the manifest: {min(left_out).name}, ...")
    members.sort()
    labels = np.array([c for c, _ in members])
    for c in np.setdiff1d(np.arange(len(class_names)), labels):
        notice(f"{folder}: no samples of class {class_names[c]}")
    try:
        if img_size is None:
            with Image.open(members[0][1]) as image:
                img_size = min(image.size)
        rows = np.stack([data.decode(path, img_size) for _, path in members])
    except (OSError, ValueError) as e:
        fail(f"an image in {folder} cannot be decoded: {e}")
    return Samples(rows, labels)


@torch.no_grad()
def apply(function, parts, procs):
    """function of each of the tensors [B, ...] on the device: float32 [N, ...] on the CPU."""
    return torch.cat([function(part.to(procs.device)).float().cpu() for part in parts])


def view(x):
    """Images [N, 1, H, W] averaged down to the classifier's size, [N, 1, 64, 64]."""
    return F.interpolate(x, CLASSIFIER_SIZE, mode="area")


LOOKS = ("black_fraction", "percentile_1", "detail")


def looks(x):
    """Of images [N, 1, H, W], [N, 3] from 0 to 1: fraction of pixels under 5 % grey, 1st percentile
    of grey, and detail: the root mean square of what averaging 2 x 2 pixels takes away, which
    blurred images lack."""
    grey = (x + 1) / 2
    flat = grey.flatten(1)
    black = (flat < 0.05).float().mean(1)
    percentile = flat.kthvalue(max(1, flat.shape[1] // 100), dim=1).values
    even = grey[..., :grey.shape[2] // 2 * 2, :grey.shape[3] // 2 * 2]
    fine = even - F.interpolate(F.avg_pool2d(even, 2), scale_factor=2)
    return torch.stack([black, percentile, fine.square().flatten(1).mean(1).sqrt()], 1)


def reduce_images(images, procs):
    """ImageGroup of a data.ImageSet or Samples."""
    return ImageGroup(images, torch.from_numpy(images.labels),
                      apply(view, data.batches(images), procs),
                      apply(data.thumbnails, data.batches(images), procs))


# --- classifier ---------------------------------------------------------------------------------


class Classifier(nn.Module):
    """Small CNN: images [B, 1, S, S] in [-1, 1] to logits [B, num_classes], via 64 features."""

    def __init__(self, num_classes):
        super().__init__()
        layers, ch = [], 1
        for width in (16, 32, 64, 64):
            kernel = 3 if layers else 5
            layers += [nn.Conv2d(ch, width, kernel, stride=2, padding=1), nn.GroupNorm(8, width),
                       nn.ReLU()]
            ch = width
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(ch, num_classes)

    def features(self, x):
        """[B, 64]."""
        return self.body(view(x))

    def forward(self, x):
        return self.head(self.features(x))


def augment(x, rng):
    """Small rotation, zoom, shift, contrast and brightness changes of x [B, 1, S, S]; no flip: it
    moves the heart."""
    def uniform(most):
        return ((torch.rand(len(x), generator=rng) * 2 - 1) * most).to(x.device)

    angle, zoom = uniform(0.12), 1 + uniform(0.12)
    rows = [torch.stack([zoom * angle.cos(), -zoom * angle.sin(), uniform(0.1)], 1),
            torch.stack([zoom * angle.sin(), zoom * angle.cos(), uniform(0.1)], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), x.shape, align_corners=False)
    x = F.grid_sample(x, grid, align_corners=False, padding_mode="border")
    contrast, brightness = 1 + uniform(0.3), uniform(0.3)
    return x * contrast[:, None, None, None] + brightness[:, None, None, None]


def train_classifier(x, labels, num_classes, args, procs, label):
    """Classifier of images [N, 1, S, S] with labels [N]; as many images of each class in a batch.

    label: what the images are, for the progress line.
    """
    torch.manual_seed(args.seed)
    net = Classifier(num_classes).to(procs.device)
    rng = torch.Generator().manual_seed(args.seed)
    members = [(labels == c).nonzero()[:, 0] for c in range(num_classes)]
    members = [m for m in members if len(m)]
    count = 32 // len(members) or 1  # of each class
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=0.05, fused=True)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.classifier_steps)
    text = f"training a classifier on {label}"
    progress = experiment.Progress(procs, text, args.classifier_steps)
    for step in range(args.classifier_steps):
        index = torch.cat([m[torch.randint(len(m), (count,), generator=rng)] for m in members])
        logits = net(augment(x[index].to(procs.device), rng))
        F.cross_entropy(logits, labels[index].to(procs.device)).backward()
        optimizer.step()
        decay.step()
        optimizer.zero_grad()
        progress.update(step + 1)
    progress.clear()
    return net.eval().requires_grad_(False)


def real_classifier(train, num_classes, args, procs):
    """Classifier trained on the real training images; its weights are kept in the cache folder.

    train: ImageGroup of a data.ImageSet.
    """
    settings = (train.images.key, train.labels.tolist(), args.seed, args.classifier_steps)
    key = hashlib.sha256(f"classifier 1 {settings}".encode()).hexdigest()
    path = pathlib.Path(args.output_root, "cache", f"classifier_{key[:16]}.pt")
    if path.exists():
        try:
            net = Classifier(num_classes)
            net.load_state_dict(experiment.load_archive(path))
            return net.to(procs.device).eval().requires_grad_(False)
        except Exception as e:  # whatever a damaged file raises
            notice(f"{path} is damaged ({experiment.first_line(e)}): training the classifier again")
    net = train_classifier(train.views, train.labels, num_classes, args, procs, "real images")
    experiment.make_folder(path.parent)
    experiment.write_atomic(path, lambda f: torch.save(net.state_dict(), f))
    return net


def tstr(samples, train, held_out, judge, num_classes, args, procs):
    """AUROC with 95 % interval, (value, low, high), by what was trained on and tested on.

    samples, train, held_out: ImageGroup. judge: Classifier trained on the training images. The
    third entry is TSTR (Esteban et al. 2017); the second is what real images get.
    """
    def tested_on(net, group):
        scores = apply(net, group.views.split(data.BATCH), procs)
        return metrics.auroc_interval(scores, group.labels)

    views = torch.cat([train.views, samples.views])
    labels = torch.cat([train.labels, samples.labels])
    synthetic = train_classifier(samples.views, samples.labels, num_classes, args, procs, "samples")
    both = train_classifier(views, labels, num_classes, args, procs, "real images and samples")
    return {"real images, tested on samples": tested_on(judge, samples),
            "real images, tested on held-out images": tested_on(judge, held_out),
            TSTR: tested_on(synthetic, held_out),
            "both, tested on held-out images": tested_on(both, held_out)}


# --- feature spaces -----------------------------------------------------------------------------


def feature_network(name, vae, classifier, procs):
    """(function from images [B, 1, H, W] in [-1, 1] to features [B, D], its name in the report).

    vae, classifier: None where there is none. Ends the program where `name` cannot be had.
    """
    if name == "classifier":
        if classifier is None:
            fail("--features=classifier needs two classes to tell apart: give --features=vae")
        return classifier.features, "classifier trained on the real training split, 64 features"
    if name == "vae":
        if vae is None:
            fail("--features=vae with --samples_dir needs an autoencoder: give --ae_ckpt_path")

        def features(x):
            return F.adaptive_avg_pool2d(vae.encode(x).mean, 4).flatten(1)
        return features, "autoencoder means on a 4x4 grid"
    if name == "torchxrayvision":
        try:
            import torchxrayvision
        except ImportError:
            fail("--features=torchxrayvision needs that package: pip install torchxrayvision")
        net = torchxrayvision.models.DenseNet(weights="densenet121-res224-all")
        net = net.to(procs.device).eval()

        def features(x):  # it expects values from -1024 to 1024
            return net.features2(F.interpolate(x, (224, 224), mode="area") * 1024)
        return features, f"torchxrayvision {net.weights}"
    return torchscript_network(name, procs), f"TorchScript {pathlib.Path(name).name}"


def torchscript_network(path, procs):
    """The function of a TorchScript file, which gets images [B, 3, H, W] with values 0 to 255, as
    the usual Inception file wants them."""
    if not pathlib.Path(path).is_file():
        fail(f"--features={path} is no file: give classifier, vae, torchxrayvision or TorchScript")
    try:
        net = torch.jit.load(path, map_location=procs.device).eval()
    except RuntimeError as e:
        fail(f"{path} is no TorchScript file: {experiment.first_line(e)}")
    options = {}
    if "return_features" in {a.name for a in net.forward.schema.arguments}:
        options["return_features"] = True  # the usual Inception file gives class scores otherwise

    def features(x):
        out = net(((x + 1) * 127.5).expand(-1, 3, -1, -1), **options)
        if out.ndim != 2 or len(out) != len(x):
            fail(f"{path} maps images [B, 3, H, W] to {[*out.shape]}, not to features [B, D]: give "
                 "another --features")
        return out
    return features


# --- distributions ------------------------------------------------------------------------------


def as_many(labels, like, seed):
    """Positions of a random choice from `labels` with as many members of each class as `like` has,
    or all there are."""
    rng = np.random.default_rng(seed)
    chosen = []
    for c in np.unique(like):
        chosen.append(rng.permutation(np.flatnonzero(labels == c))[:(like == c).sum()])
    return np.concatenate(chosen)


def distances(features, real_features):
    """{name: number} of features [N, D] against those of held-out images [M, D]; none where N or M
    is under 2."""
    if min(len(features), len(real_features)) < 2:
        return {}
    return {"fid": metrics.frechet_distance(features, real_features),
            "kid": metrics.kernel_distance(features, real_features),
            **metrics.manifold_metrics(features, real_features)}


def mean_looks(rows):
    """Row of the report on looks [N, 3]."""
    return {"num": len(rows), **dict(zip(LOOKS, rows.mean(0).tolist(), strict=True))}


def group_rows(samples, pool, held_out, seed):
    """What is reported of some samples, {row: {name: number}}, beside held-out images and a pool of
    training images; all are FeatureGroups.

    `baseline` is what as many images from the pool get as there are samples, since FID falls with
    their number: the mean of BASELINE_DRAWS random choices. `baseline_std` is the standard
    deviation of these. See `distances` for when there are none.
    """
    chosen = [as_many(pool.labels, samples.labels, [seed, i]) for i in range(BASELINE_DRAWS)]
    draws = [distances(pool.features[index], held_out.features) for index in chosen]
    values = {name: [draw[name] for draw in draws] for name in draws[0]}
    rows = {
        "samples": {**mean_looks(samples.looks), **distances(samples.features, held_out.features)},
        "baseline": {**mean_looks(pool.looks), "num": len(chosen[0]),
                     **{name: statistics.mean(v) for name, v in values.items()}},
        "baseline_std": {name: statistics.stdev(v) for name, v in values.items()
                         if not math.isnan(sum(v))},
        "held_out": mean_looks(held_out.looks)}
    return {name: row for name, row in rows.items() if row}


def group_classes(labels, class_names):
    """{group of rows in the report: its class indices}: `all`, and each class with two images among
    the samples, the training images and the held-out images; notices name the other classes.

    labels: {what they are: class indices [N]}, the samples' first.
    """
    groups = {"all": np.arange(len(class_names))}
    for what, own in labels.items():
        if len(own) < 2:
            notice(f"under two images in {what}: no FID, KID, precision, recall")
    for c in np.unique(next(iter(labels.values()))):
        few = [what for what, own in labels.items() if (own == c).sum() < 2]
        if few:
            notice(f"class {class_names[c]} has under two images in {' and '.join(few)}, which "
                   "distances need: it has no rows of its own")
        else:
            groups[class_names[c]] = [c]
    return groups


def every_class_is_there(labels, class_names):
    """Whether AUROC can be had, which needs two classes and images of all of them in each set of
    `labels`, as in group_classes; a notice says why not."""
    if len(class_names) < 2:
        notice("one class only: no classifier to judge the samples by")
        return False
    lacking = []
    for what, own in labels.items():
        missing = [name for c, name in enumerate(class_names) if c not in own]
        if missing:
            lacking.append(f"no image of class {', '.join(missing)} in {what}")
    if lacking:
        notice(f"{'; '.join(lacking)}: no AUROC")
    return not lacking


# --- report -------------------------------------------------------------------------------------


def verdict(metric, value, bad, watch, meaning, advice):
    """metrics.Verdict with the level that the two conditions say; NaN is bad."""
    level = "bad" if bad or math.isnan(value) else "watch" if watch else "ok"
    return metrics.Verdict(metric, level, f"{value:.3f}", meaning, advice)


def verdicts(report):
    """The few things in a report that a reader should not miss, as metrics.Verdicts."""
    rows, found = report["groups"]["all"], []
    samples, baseline = rows["samples"], rows["baseline"]
    if "memorisation" in report:
        copies = report["memorisation"]
        low = copies["interval"][0]
        found.append(verdict(
            "memorisation", copies["fraction"], low > 0.2, low > copies["expected"],
            "Fraction of samples closer to a training image than held-out images are; by chance "
            f"{copies['expected']:.2f}.",
            "Look at the pairs. Train for fewer steps or on more images; publish no copies of "
            "patients."))
    for name, meaning, advice in (
            ("precision", "Fraction of samples that lie among the held-out images",
             "Samples do not look real: train longer; check the autoencoder's reconstructions."),
            ("recall", "Fraction of held-out images that lie among the samples",
             "Samples leave much out: lower --guidance_scale, then train longer.")):
        if name not in samples or name not in baseline:
            continue
        value, reference = samples[name], baseline[name]
        found.append(verdict(name, value, not value >= 0.2 * reference,
                             not value >= 0.6 * reference,
                             f"{meaning}; the baseline has {reference:.2f}.", advice))

    real_detail = max(rows["held_out"]["detail"], 1e-6)
    detail = samples["detail"] / real_detail
    meaning = "Detail of the samples, relative to held-out images"
    if "decoded" in rows:
        meaning += f"; the autoencoder leaves {rows['decoded']['detail'] / real_detail:.2f} of it"
    found.append(verdict(
        "detail", detail, not 0.4 < detail < 2.5, not 0.7 < detail < 1.5, f"{meaning}.",
        "Too little: train the autoencoder longer or with its discriminator. Too much is noise: "
        "train longer."))

    if "auroc" in report:
        value, low, high = report["auroc"]["real images, tested on samples"]
        found.append(verdict(
            "class fidelity", value, high < 0.5, low <= 0.5,
            "AUROC on samples of a classifier that was trained on real images.",
            "Below 0.5 the labels are swapped. Near it: train longer, raise --guidance_scale."))
    return found


# Heading, width and decimals of the columns of numbers.
COLUMNS = {
    "fid": ("FID", 9, 3), "kid": ("KID", 9, 4), "precision": ("precision", 10, 3),
    "recall": ("recall", 7, 3), "density": ("density", 8, 3), "coverage": ("coverage", 9, 3),
    "black_fraction": ("black", 7, 3), "percentile_1": ("1st pct", 8, 4),
    "detail": ("detail", 7, 4)}


def print_report(report):
    """The report on the console."""
    print(f"features: {report['features']}; distances are to held-out images ({report['split']})")
    print(f"baseline: as many training images as there are samples, mean of {BASELINE_DRAWS} "
          "random choices; decoded: held-out images through the autoencoder")
    headings = "".join(f" {text:>{width}}" for text, width, _ in COLUMNS.values())
    print(f"{'':<12} {'':<12} {'N':>5}{headings}")
    for name, rows in report["groups"].items():
        for row, values in rows.items():
            cells = "".join(
                f" {values[key]:{width}.{decimals}f}" if key in values else " " * (width + 1)
                for key, (_, width, decimals) in COLUMNS.items())
            print(f"{name:<12} {row:<12} {values.get('num', ''):>5}{cells}".rstrip())
    if "memorisation" in report:
        copies = report["memorisation"]
        low, high = copies["interval"]
        print(f"memorisation: {100 * copies['fraction']:.1f} % of samples are closer to a training "
              f"image than held-out images are (95 %: {100 * low:.1f} to {100 * high:.1f} %; by "
              f"chance {100 * copies['expected']:.1f} %)")
    for name, (value, low, high) in report.get("auroc", {}).items():
        note = "  TSTR" if name == TSTR else ""
        print(f"AUROC, trained on {name:<39} {value:.3f} ({low:.3f} to {high:.3f}){note}")


# --- the stage ----------------------------------------------------------------------------------


def main(argv=None):
    args = parse_settings(build_parser(), argv)
    procs = experiment.setup_processes(args)
    if procs.world_size > 1:
        fail("evaluate.py runs in one process: start it with python, not torchrun")
    if bool(args.ckpt) == bool(args.samples_dir):
        fail("what is to be measured? Give either --ckpt=runs/ldm_.../ckpts/last.pt or "
             "--samples_dir=FOLDER")
    if not args.ckpt and not args.data_root and not args.img_size:
        fail("without --data_root the samples are compared with the phantom set: give --img_size")

    # --- what is measured: a model, or a folder of images ---
    vae, sampling = None, {}
    if args.ckpt:
        ldm = experiment.prepare_sampling(args, procs)
        vae, checkpoint = ldm.vae, ldm.checkpoint
        data.adopt_root(args, checkpoint["args"], "the model")
        class_names, img_size = checkpoint["class_names"], checkpoint["args"]["img_size"]
        if args.img_size not in (None, img_size):
            fail(f"--img_size={args.img_size}, but {args.ckpt} was trained at {img_size}: leave it "
                 "out")
        sampling = {name: getattr(args, name) for name in experiment.SAMPLING_SETTINGS}
        sampling["step"] = checkpoint["step"]
        folder = pathlib.Path(args.out_dir or experiment.run_folder(args.ckpt))
    else:
        root = args.data_root or phantom.phantom_root(args.output_root, args.img_size)
        class_names = data.scan(root, args.task, "train").class_names
        samples = read_samples(args.samples_dir, class_names, args.img_size)
        img_size = samples.rows.shape[-1]
        if args.ae_ckpt_path:
            vae, _, _ = experiment.load_autoencoder(args.ae_ckpt_path, procs)
        folder = pathlib.Path(args.out_dir or args.samples_dir)
    args.img_size = img_size

    # --- real images of that size: before sampling, since mistakes show here ---
    train = data.open_images(args, procs, "train", class_names=class_names)
    real = train  # --split=train
    if args.split != "train":
        real = data.open_images(args, procs, args.split, train=train)
    sample_labels = np.repeat(ldm.classes, args.num_samples) if args.ckpt else samples.labels
    labels = {"the samples": sample_labels, "split train": train.labels,
              f"split {args.split}": real.labels}
    if not np.isin(train.labels, sample_labels).any():
        fail("the training images have none of the samples' classes: nothing to compare with")
    groups = group_classes(labels, class_names)
    with_auroc = every_class_is_there(labels, class_names)
    with_copies = args.split != "train" and len(real) > 1
    if args.split == "train":
        notice("--split=train are the images that the model was trained on: distances to them "
               "flatter it, and copies cannot be told from other samples (no memorisation)")
    elif not with_copies:
        notice(f"one image in split {args.split}: no memorisation")
    experiment.make_folder(folder)
    train_group, real_group = (reduce_images(images, procs) for images in (train, real))
    num_classes, judge = len(class_names), None
    if len(np.unique(train.labels)) > 1:
        judge = real_classifier(train_group, num_classes, args, procs)
    network, features_name = feature_network(args.features, vae, judge, procs)

    # --- distributions, by class and overall ---
    if args.ckpt:
        samples = draw_samples(ldm, args, procs)
    sample_group = reduce_images(samples, procs)
    pool = train.subset(as_many(train.labels, np.repeat(samples.labels, BASELINE_DRAWS), args.seed))
    sets = [FeatureGroup(images.labels,
                         apply(network, data.batches(images), procs),
                         apply(looks, data.batches(images), procs))
            for images in (samples, pool, real)]
    if vae is not None:  # what it leaves of real images is about the most that samples can have
        decoded = apply(lambda x: looks(vae.decode(vae.encode(x).mean).clamp(-1, 1)),
                        data.batches(real), procs)
    report = {"features": features_name, "split": args.split, "seed": args.seed, **sampling,
              "groups": {}}
    for name, classes in groups.items():
        rows = group_rows(*(group.of_classes(classes) for group in sets), args.seed)
        if vae is not None:
            rows["decoded"] = mean_looks(decoded[np.isin(real.labels, classes)])
        report["groups"][name] = rows

    # --- copies of training images ---
    written = [folder / "evaluation.json"]
    if with_copies:
        copies = metrics.memorisation(
            sample_group.thumbnails, train_group.thumbnails, real_group.thumbnails)
        closest = copies.pop("ratio").argsort()[:10]
        originals = copies.pop("nearest")[closest]
        report["memorisation"] = {**copies, "pixels": data.THUMBNAIL_SIZE}
        written.append(folder / "evaluation_pairs.png")
        experiment.save_grid(
            written[-1], [samples.images(closest.numpy()), train.images(originals.numpy())],
            ["the ten samples closest to a training image", "that training image"])

    # --- TSTR: does a classifier learn from the samples? ---
    if with_auroc:
        report["auroc"] = tstr(
            sample_group, train_group, real_group, judge, num_classes, args, procs)

    # --- verdicts and report ---
    found = verdicts(report)
    experiment.write_json(written[0], {**report, "verdicts": [v._asdict() for v in found]})
    print_report(report)
    print(metrics.format_verdicts(found))
    print(f"written: {', '.join(map(str, written))}")


if __name__ == "__main__":
    main()
