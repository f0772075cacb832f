"""Are the generated radiographs any good, are they copies of patients, and are they of use?

    python evaluate.py --ckpt=runs/ldm_.../ckpts/last.pt --data_root=DATA --task=TB
    python evaluate.py --samples_dir=FOLDER --data_root=DATA --task=TB

compares samples of a model, or a folder of images, with held-out images (--split=val): distances of
the distributions, copies of training images, and whether a classifier learns from the samples what
holds on real images (TSTR: train on synthetic, test on real). Beside every distance stands the
real-data baseline, what as many training images get, and how much chance moves the difference. A
distance means something only together with its feature space and its number of images.
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
BOOTSTRAPS = 50  # choices of images that the spread of a distance is taken from
FEWEST_FOR_MANIFOLDS = 100  # images; with 18 held-out ones uniform noise has a precision of 0.85
TRAININGS = 3  # of each classifier for AUROC: their spread is part of its interval
ON_SAMPLES = "real images, tested on samples"
ON_HELD_OUT = "real images, tested on held-out images"
TSTR = "samples, tested on held-out images"
BOTH = "both, tested on held-out images"
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
    add("--features",
        help="comma list of classifier (trained on the training split), vae, torchxrayvision, or "
        "paths of TorchScript networks; None: classifier and vae, where they can be had")
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

    def of_classes(self, classes):
        """The part whose class index is among `classes`."""
        keep = np.flatnonzero(np.isin(self.labels, classes))
        return FeatureGroup(self.labels[keep], self.features[keep])


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


def train_classifier(x, labels, num_classes, seed, args, procs, label):
    """Classifier of images [N, 1, S, S] with labels [N]; as many images of each class in a batch.

    label: what the images are, for the progress line.
    """
    torch.manual_seed(seed)
    net = Classifier(num_classes).to(procs.device)
    rng = torch.Generator().manual_seed(seed)
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


def real_classifier(train, num_classes, seed, args, procs, mirrored=False):
    """Classifier of the real training images, an ImageGroup of a data.ImageSet; its weights are
    kept in the cache folder. mirrored: it tells them (0) from their mirror images (1)."""
    settings = (train.images.key, train.labels.tolist(), seed, args.classifier_steps, mirrored)
    key = hashlib.sha256(f"classifier 2 {settings}".encode()).hexdigest()
    path = pathlib.Path(args.output_root, "cache", f"classifier_{key[:16]}.pt")
    if path.exists():
        try:
            net = Classifier(num_classes)
            net.load_state_dict(experiment.load_archive(path))
            return net.to(procs.device).eval().requires_grad_(False)
        except Exception as e:  # whatever a damaged file raises
            notice(f"{path} is damaged ({experiment.first_line(e)}): training the classifier again")
    x, labels, what = train.views, train.labels, "real images"
    if mirrored:
        x, what = torch.cat([x, x.flip(3)]), "real images and their mirror images"
        labels = torch.arange(len(x)) // len(train.views)
    net = train_classifier(x, labels, num_classes, seed, args, procs, what)
    experiment.make_folder(path.parent)
    experiment.write_atomic(path, lambda f: torch.save(net.state_dict(), f))
    return net


def scores(net, group, procs):
    """[N, num_classes] of an ImageGroup."""
    return apply(net, group.views.split(data.BATCH), procs)


def tstr(samples, train, held_out, num_classes, args, procs):
    """AUROC with 95 % interval, (value, low, high), by what was trained on and tested on; and the
    gain from samples as additional training images.

    samples, train, held_out: ImageGroup. The third entry is TSTR (Esteban et al. 2017); the second
    is what real images get. Each is the mean of TRAININGS trainings.
    """
    views = torch.cat([train.views, samples.views])
    labels = torch.cat([train.labels, samples.labels])
    tested = {name: [] for name in (ON_SAMPLES, ON_HELD_OUT, TSTR, BOTH)}
    for seed in range(args.seed, args.seed + TRAININGS):
        judge = real_classifier(train, num_classes, seed, args, procs)
        synthetic = train_classifier(samples.views, samples.labels, num_classes, seed, args, procs,
                                     "samples")
        both = train_classifier(views, labels, num_classes, seed, args, procs,
                                "real images and samples")
        tested[ON_SAMPLES].append(scores(judge, samples, procs))
        for name, net in ((ON_HELD_OUT, judge), (TSTR, synthetic), (BOTH, both)):
            tested[name].append(scores(net, held_out, procs))
    found = {name: metrics.mean_auroc(of_name, samples.labels if name == ON_SAMPLES
                                      else held_out.labels)
             for name, of_name in tested.items()}
    gain = metrics.auroc_gain(tested[BOTH], tested[ON_HELD_OUT], held_out.labels, args.seed)
    return found, gain


def mirrored_shares(samples, train, held_out, args, procs):
    """{what: (share taken for mirror images, low, high)} of samples and held-out images: neither
    feature space sees that a heart is on the wrong side."""
    net = real_classifier(train, 2, args.seed, args, procs, mirrored=True)
    found = {}
    for name, group in (("samples", samples), ("held_out", held_out)):
        count = int((scores(net, group, procs).argmax(1) == 1).sum())
        share = count / len(group.views)
        found[name] = (share, *metrics.binomial_interval(count, len(group.views)))
    return found


# --- feature spaces -----------------------------------------------------------------------------


def feature_networks(names, vae, classifier, procs):
    """{name: (function from images [B, 1, H, W] in [-1, 1] to features [B, D], what it is)} of a
    comma list; None: of those that can be had. vae, classifier: None where there is none."""
    if names is None:
        found = {"classifier": classifier, "vae": vae}
        names = ",".join(name for name, net in found.items() if net is not None)
        if not names:
            fail("no features to compare by: give --ae_ckpt_path, or --features")
    names = [name for name in (part.strip() for part in names.split(",")) if name]
    if not names:
        fail("--features names no feature space: give classifier, vae, or leave it out")
    return {name: feature_network(name, vae, classifier, procs) for name in names}


def feature_network(name, vae, classifier, procs):
    """One of feature_networks. Ends the program where `name` cannot be had."""
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
    is under 2, and no precision, recall, density and coverage under FEWEST_FOR_MANIFOLDS."""
    fewest = min(len(features), len(real_features))
    if fewest < 2:
        return {}
    found = {"fid": metrics.frechet_distance(features, real_features),
             "kid": metrics.kernel_distance(features, real_features)}
    if fewest >= FEWEST_FOR_MANIFOLDS:
        found |= metrics.manifold_metrics(features, real_features)
    return found


def spread(samples, pool, held_out, seed):
    """{name: standard deviation} of the difference that chance alone makes between FID, and KID, of
    two sets of training images with as many of each class as the samples: over BOOTSTRAPS choices,
    with replacement, of both sets and of the held-out images. All are FeatureGroups."""
    def again(group, like):
        """Features of as many images of each class as `like` has, of those that there are."""
        index = [rng.choice(np.flatnonzero(group.labels == c), (like == c).sum())
                 for c in np.intersect1d(like, group.labels)]
        return group.features[np.concatenate(index)]

    gaps = {"fid": [], "kid": []}
    for i in range(BOOTSTRAPS):
        rng = np.random.default_rng([seed, 1, i])
        real = again(held_out, held_out.labels)
        one, other = again(pool, samples.labels), again(pool, samples.labels)
        for name, distance in (("fid", metrics.frechet_distance), ("kid", metrics.kernel_distance)):
            gaps[name].append(distance(one, real) - distance(other, real))
    return {name: float(np.std(values, ddof=1)) for name, values in gaps.items()}


def group_rows(samples, pool, held_out, seed):
    """What is reported of some samples, {row: {name: number}}, beside held-out images and a pool of
    training images; all are FeatureGroups.

    `baseline` is what as many images from the pool get as there are samples, since FID falls with
    their number: the mean of BASELINE_DRAWS random choices. `spread` is how far two such sets are
    apart by chance. See `distances` for when there are none.
    """
    chosen = [as_many(pool.labels, samples.labels, [seed, i]) for i in range(BASELINE_DRAWS)]
    draws = [distances(pool.features[index], held_out.features) for index in chosen]
    ours = distances(samples.features, held_out.features)
    rows = {"samples": {"num": len(samples.labels), **ours}}
    if draws[0]:
        rows["baseline"] = {"num": len(chosen[0]), **{
            name: statistics.mean(draw[name] for draw in draws) for name in draws[0]}}
    if draws[0] and ours:
        rows["spread"] = spread(samples, pool, held_out, seed)
    return rows


def mean_looks(rows):
    """Row of the report on looks [N, 3]."""
    return {"num": len(rows), **dict(zip(LOOKS, rows.mean(0).tolist(), strict=True))}


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
    found = []
    if "copies" in report:
        copies = report["copies"]
        above = copies["probability"] < 0.025
        found.append(verdict(
            "copies/share", copies["share"], above and copies["share"] > 0.2, above,
            "Share of samples as close to one training image as hardly any training image is to "
            f"another; by chance {copies['expected']:.3f}, and as much or more with a probability "
            f"of {copies['probability']:.2g}.",
            "Look at the pairs. Train for fewer steps or on more images; publish no copies of "
            "patients."))
    for space, groups in report["groups"].items():
        found += distance_verdicts(space, groups["all"])

    rows = report["looks"]["all"]
    possible, text = rows["held_out"], "held-out images"
    if "decoded" in rows:
        possible, text = rows["decoded"], "held-out images through the autoencoder"
    detail = rows["samples"]["detail"] / max(possible["detail"], 1e-6)
    real = rows["samples"]["detail"] / max(rows["held_out"]["detail"], 1e-6)
    found.append(verdict(
        "detail", detail, not 0.4 < detail < 2.5, not 0.7 < detail < 1.5,
        f"Detail of the samples, relative to {text}; relative to held-out images {real:.2f}.",
        "Train longer, for too little as for too much, which is noise. What the autoencoder takes "
        "away, only a better one gives back: train it longer, or with its discriminator."))

    if "mirrored" in report:
        share, low, _ = report["mirrored"]["samples"]
        _, _, real_high = report["mirrored"]["held_out"]
        found.append(verdict(
            "mirrored", share, low > 0.5, low > max(real_high, 0.2),  # blur costs it some certainty
            "Share of samples that a classifier takes for mirror images; of held-out images "
            f"{report['mirrored']['held_out'][0]:.2f}.",
            "A heart on the right: some training images are mirrored, or an augmentation flips."))

    if "auroc" in report:
        value, low, high = report["auroc"][ON_SAMPLES]
        real_value, _, real_high = report["auroc"][ON_HELD_OUT]
        caricature = low > real_high
        advice = "Below 0.5 the labels are swapped. Near it: train longer, raise --guidance_scale."
        if caricature:
            advice = "Clearer cases than real ones are caricatures: lower --guidance_scale."
        found.append(verdict(
            "class fidelity", value, high < 0.5, low <= 0.5 or caricature,
            "AUROC on samples of a classifier that was trained on real images; on held-out images "
            f"{real_value:.2f}.", advice))
    if "gain" in report:
        value, low, high = report["gain"]
        meaning = "the interval holds 0, so they are of no proven use"
        if low > 0:
            meaning = "they are of use"
        elif high < 0:
            meaning = "they do harm"
        found.append(verdict(
            "gain", value, False, high < 0,
            f"AUROC gained with samples as additional training images ({low:.3f} to {high:.3f}): "
            f"{meaning}.",
            "Do not train on them: look at class fidelity and at the distances."))
    return found


def distance_verdicts(space, rows):
    """Verdicts on the distances in one feature space."""
    samples, baseline, found = rows["samples"], rows.get("baseline", {}), []
    for name in ("fid", "kid"):
        chance = rows.get("spread", {}).get(name, 0.0)
        if name not in samples or chance < 1e-9:  # one training image, or all the same
            continue
        spreads = (samples[name] - baseline[name]) / chance
        found.append(verdict(
            f"{name} ({space})", samples[name], not spreads < 10, not spreads < 3,
            f"{name.upper()} to held-out images; {spreads:.1f} spreads above the baseline's "
            f"{baseline[name]:.3f}.",
            "Samples are not distributed like real images: compare black and detail, look at the "
            "grid; lower --guidance_scale, train longer."))
    for name, meaning, advice in (
            ("precision", "Fraction of samples that lie among the held-out images",
             "Samples do not look real: train longer; check the autoencoder's reconstructions."),
            ("recall", "Fraction of held-out images that lie among the samples",
             "Samples leave much out: lower --guidance_scale, then train longer."),
            ("coverage", "Fraction of held-out images with a sample nearby",
             "Samples leave much out: lower --guidance_scale, then train longer.")):
        if name not in samples or name not in baseline:
            continue
        value, reference = samples[name], baseline[name]
        found.append(verdict(f"{name} ({space})", value, not value >= 0.2 * reference,
                             not value >= 0.6 * reference,
                             f"{meaning}; the baseline has {reference:.2f}.", advice))
    return found


# Heading, width and decimals of the columns of numbers.
COLUMNS = {
    "fid": ("FID", 9, 3), "kid": ("KID", 9, 4), "precision": ("precision", 10, 3),
    "recall": ("recall", 7, 3), "density": ("density", 8, 3), "coverage": ("coverage", 9, 3)}
LOOK_COLUMNS = {
    "black_fraction": ("black", 7, 3), "percentile_1": ("1st pct", 8, 4),
    "detail": ("detail", 7, 4)}


def print_table(title, groups, columns):
    """Rows {group: {row: {name: number}}} under a heading."""
    print(title)
    headings = "".join(f" {text:>{width}}" for text, width, _ in columns.values())
    print(f"{'':<12} {'':<12} {'N':>5}{headings}")
    for name, rows in groups.items():
        for row, values in rows.items():
            cells = "".join(
                f" {values[key]:{width}.{decimals}f}" if key in values else " " * (width + 1)
                for key, (_, width, decimals) in columns.items())
            print(f"{name:<12} {row:<12} {values.get('num', ''):>5}{cells}".rstrip())


def print_report(report):
    """The report on the console."""
    print(f"distances to held-out images ({report['split']}); baseline: as many training images as "
          f"samples, mean of {BASELINE_DRAWS} choices; spread: of two such sets, by chance")
    for space, groups in report["groups"].items():
        print_table(f"features: {report['features'][space]}", groups, COLUMNS)
    print_table("looks; decoded: held-out images through the autoencoder", report["looks"],
                LOOK_COLUMNS)
    if "copies" in report:
        copies = report["copies"]
        print(f"copies: {100 * copies['share']:.1f} % of samples are closer to one of "
              f"{copies['distinct']} distinct training images than these are to one another (by "
              f"chance {100 * copies['expected']:.1f} %; as many or more with probability "
              f"{copies['probability']:.2g})")
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
    if args.split == "train":
        notice("--split=train are the images that the model was trained on: distances to them "
               "flatter it")
    if min(len(real), len(sample_labels)) < FEWEST_FOR_MANIFOLDS:
        notice(f"under {FEWEST_FOR_MANIFOLDS} images in the samples or in split {args.split}: no "
               "precision, recall, density, coverage, which would say nothing")
    experiment.make_folder(folder)
    train_group, real_group = (reduce_images(images, procs) for images in (train, real))
    num_classes, judge = len(class_names), None
    if len(np.unique(train.labels)) > 1:
        judge = real_classifier(train_group, num_classes, args.seed, args, procs)
    networks = feature_networks(args.features, vae, judge, procs)

    # --- distributions, by class and overall ---
    if args.ckpt:
        samples = draw_samples(ldm, args, procs)
    sample_group = reduce_images(samples, procs)
    pool = train.subset(as_many(train.labels, np.repeat(samples.labels, BASELINE_DRAWS), args.seed))
    report = {"split": args.split, "seed": args.seed, **sampling, "features": {}, "groups": {}}
    for space, (network, text) in networks.items():
        sets = [FeatureGroup(images.labels, apply(network, data.batches(images), procs))
                for images in (samples, pool, real)]
        report["features"][space] = text
        report["groups"][space] = {
            name: group_rows(*(group.of_classes(classes) for group in sets), args.seed)
            for name, classes in groups.items()}
    looked_at = {"samples": samples, "held_out": real}
    seen = {row: apply(looks, data.batches(images), procs) for row, images in looked_at.items()}
    if vae is not None:  # what it leaves of real images is about the most that samples can have
        seen["decoded"] = apply(lambda x: looks(vae.decode(vae.encode(x).mean).clamp(-1, 1)),
                                data.batches(real), procs)
        looked_at["decoded"] = real
    report["looks"] = {
        name: {row: mean_looks(seen[row][np.isin(images.labels, classes)])
               for row, images in looked_at.items()}
        for name, classes in groups.items()}

    # --- copies of training images ---
    written = [folder / "evaluation.json"]
    try:
        copies = metrics.copies(sample_group.thumbnails, train_group.thumbnails)
    except ValueError as e:
        notice(e)
    else:
        closest = copies.pop("ratio").argsort()[:10]
        originals = copies.pop("nearest")[closest]
        report["copies"] = {**copies, "pixels": data.THUMBNAIL_SIZE}
        written.append(folder / "evaluation_pairs.png")
        experiment.save_grid(
            written[-1], [samples.images(closest.numpy()), train.images(originals.numpy())],
            ["the ten samples closest to a training image", "that training image"])

    # --- mirror images; TSTR: does a classifier learn from the samples? ---
    report["mirrored"] = mirrored_shares(sample_group, train_group, real_group, args, procs)
    if with_auroc:
        report["auroc"], report["gain"] = tstr(
            sample_group, train_group, real_group, num_classes, args, procs)

    # --- verdicts and report ---
    found = verdicts(report)
    experiment.write_json(written[0], {**report, "verdicts": [v._asdict() for v in found]})
    print_report(report)
    print(metrics.format_verdicts(found))
    print(f"written: {', '.join(map(str, written))}")


if __name__ == "__main__":
    main()
