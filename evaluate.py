"""Are the generated radiographs any good, are they copies of patients, and are they of use?

    python evaluate.py --ckpt=runs/ldm_.../ckpts/best.pt --data_root=DATA --task=TB
    python evaluate.py --samples_dir=FOLDER --data_root=DATA --task=TB

compares samples of a model, or a folder of images, with held-out images (--split=val): distances of
the distributions, sharpness, whether a network can tell the two apart, copies of training images,
and whether a classifier learns from the samples what holds on real images (TSTR: train on
synthetic, test on real). Beside every distance stands the real-data baseline, what as many training
images get, and how much chance moves the difference. A distance means something only together with
its feature space and its number of images.
"""
import argparse
import dataclasses
import functools
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
from args import (BooleanFlag, add_data_arguments, add_precision_arguments, add_sampling_arguments,
                  at_least, file_path, make_parser, parse_settings)
from experiment import fail, notice

SMALLEST = 16  # side in pixels of the images that the classifiers take
CLASSIFIER_SIZE = 64  # side in pixels of what the classifier sees
BASELINE_DRAWS = 8  # choices of training images that the baseline is the mean of
BOOTSTRAPS = 50  # choices of images that the spread of a distance is taken from
FEWEST_FOR_MANIFOLDS = 100  # images; with 18 held-out ones uniform noise has a precision of 0.85
MOST_FOR_DETECTIVE = 500  # images of each kind that it is trained and tested on
TRAININGS = 3  # of each classifier for AUROC: their spread is part of its interval
ON_SAMPLES = "real images, tested on samples"
ON_HELD_OUT = "real images, tested on held-out images"
TSTR = "samples, tested on held-out images"
BOTH = "both, tested on held-out images"
AGAIN = "real images and as many repeats, held-out images"
FIRST = "samples, then real images, held-out images"
NO_SAMPLES = {"manifest.json", "metrics.json", "grid.png", "evaluation.json",
              "evaluation_pairs.png"}  # what sample.py and this program write beside samples


# --- arguments ----------------------------------------------------------------------------------


def build_parser():
    """Parser of this stage."""
    parser = make_parser(__doc__)
    add_data_arguments(parser, split="val", img_size=None)
    add_precision_arguments(parser)
    add_sampling_arguments(parser, tuple(diffusion.SAMPLERS), sampler="dpmpp_sde",
                           num_sampling_steps=8, num_samples=64)
    add = parser.add_argument_group("evaluation").add_argument
    add("--samples_dir", type=file_path,
        help="measure this folder: what its manifest.json lists, else CLASS/*.png, CLASS_*.png")
    add("--features",
        help="comma list of classifier (trained on the training split), vae, torchxrayvision, or "
        "paths of TorchScript networks; None: classifier and vae, where they can be had")
    add("--classifier_steps", type=at_least(1), default=600,
        help="training of each classifier, 32 images per step")
    add("--wandb", action=BooleanFlag, default=True,
        help="show the report on the W&B page of the model's run, if it has one")
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

    def subset(self, indices):
        """Samples: some of them."""
        return Samples(self.rows[indices], self.labels[indices])


class ImageGroup(NamedTuple):
    """The samples, the training images or the held-out images, and reductions of all of them."""

    images: object  # data.ImageSet or Samples
    labels: torch.Tensor  # [N] class indices
    views: torch.Tensor  # [N, 1, 64, 64] in [-1, 1]: what the classifier sees


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
    """Of images [B, 1, S, S], [B, 3 + octaves]: fraction of pixels under 5 % grey, 1st percentile
    of grey, metrics.detail and metrics.octave_power."""
    flat = (x.flatten(1) + 1) / 2
    black = (flat < 0.05).float().mean(1)
    percentile = flat.kthvalue(max(1, flat.shape[1] // 100), dim=1).values
    columns = torch.stack([black, percentile, metrics.detail(x)], 1)
    return torch.cat([columns.double().cpu(), metrics.octave_power(x)], 1)


@torch.no_grad()
def decoded(vae, parts, procs):
    """What an autoencoder makes of each of the images [B, 1, S, S]: as many."""
    for part in parts:
        yield vae.decode(vae.encode(part.to(procs.device)).mean).clamp(-1, 1)


def look_rows(seen, classes):
    """What is reported of some classes: {row: {"num": N, look: mean}}, of {what the images are:
    (class indices [N], looks [N, 3 + octaves])}."""
    rows = {}
    for row, (labels, values) in seen.items():
        own = values[np.isin(labels, classes), :len(LOOKS)]
        rows[row] = {"num": len(own), **dict(zip(LOOKS, own.mean(0).tolist(), strict=True))}
    return rows


def power_rows(seen, classes, octaves):
    """Like look_rows, {row: {"num": N, octave: ratio of the power to that of the held-out images}}.
    octaves: their names."""
    power = {row: values[np.isin(labels, classes), len(LOOKS):]
             for row, (labels, values) in seen.items()}
    real = power.pop("held_out").mean(0).clamp_min(1e-12)
    return {row: {"num": len(own), **dict(zip(octaves, (own.mean(0) / real).tolist(), strict=True))}
            for row, own in power.items()}


def reduce_images(images, procs):
    """ImageGroup of a data.ImageSet or Samples."""
    return ImageGroup(images, torch.from_numpy(images.labels),
                      apply(view, data.batches(images), procs))


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


def train_classifier(build, vary, x, labels, seed, steps, procs, label):
    """The network that build() makes, trained for so many steps on images [N, 1, S, S] with labels
    [N], as many of each class in a batch, which vary(x, rng) augments. label: what they are, for
    the progress line.
    """
    torch.manual_seed(seed)
    net = build().to(procs.device).train().requires_grad_(True)
    rng = torch.Generator().manual_seed(seed)
    members = [(labels == c).nonzero()[:, 0] for c in labels.unique()]
    count = 32 // len(members) or 1  # of each class
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=0.05, fused=True)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    progress = experiment.Progress(procs, f"training a classifier on {label}", steps)
    for step in range(steps):
        index = torch.cat([m[torch.randint(len(m), (count,), generator=rng)] for m in members])
        logits = net(vary(x[index].to(procs.device), rng))
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
    build = functools.partial(Classifier, num_classes)
    net = train_classifier(build, augment, x, labels, seed, args.classifier_steps, procs, what)
    experiment.make_folder(path.parent)
    experiment.write_atomic(path, lambda f: torch.save(net.state_dict(), f))
    return net


def scores(net, group, procs):
    """[N, num_classes] of an ImageGroup."""
    return apply(net, group.views.split(data.BATCH), procs)


def tstr(samples, train, held_out, num_classes, args, procs):
    """AUROC with 95 % interval, (value, low, high), by what was trained on and tested on; and the
    gains from samples, {BOTH, FIRST: (gain, low, high)}.

    samples, train, held_out: ImageGroup. TSTR: Esteban et al. 2017. A gain is what samples beside
    the real images, or before them, add to AGAIN: as many repeats of real images instead, for as
    many steps, so that more images or more training alone do not count. Each AUROC is the mean of
    TRAININGS trainings.
    """
    views, labels = train.views, train.labels
    repeats = torch.cat([torch.from_numpy(np.resize(np.flatnonzero(labels == c), int(count)))
                         for c, count in zip(*samples.labels.unique(return_counts=True),
                                             strict=True) if (labels == c).any()])
    steps, half = args.classifier_steps, max(1, args.classifier_steps // 2)
    build = functools.partial(Classifier, num_classes)
    learn = functools.partial(train_classifier, vary=augment, procs=procs)
    tested = {name: [] for name in (ON_SAMPLES, ON_HELD_OUT, TSTR, BOTH, AGAIN, FIRST)}
    for seed in range(args.seed, args.seed + TRAININGS):
        judge = real_classifier(train, num_classes, seed, args, procs)
        synthetic = learn(build, x=samples.views, labels=samples.labels, seed=seed, steps=steps,
                          label="samples")
        both = learn(build, x=torch.cat([views, samples.views]),
                     labels=torch.cat([labels, samples.labels]), seed=seed, steps=steps,
                     label="real images and samples")
        again = learn(build, x=torch.cat([views, views[repeats]]),
                      labels=torch.cat([labels, labels[repeats]]), seed=seed, steps=steps,
                      label="real images and repeats")
        before = learn(build, x=samples.views, labels=samples.labels, seed=seed, steps=half,
                       label="samples")
        first = learn(lambda net=before: net, x=views, labels=labels, seed=seed, steps=half,
                      label="real images after samples")
        tested[ON_SAMPLES].append(scores(judge, samples, procs))
        for name, net in ((ON_HELD_OUT, judge), (TSTR, synthetic), (BOTH, both), (AGAIN, again),
                          (FIRST, first)):
            tested[name].append(scores(net, held_out, procs))
    found = {name: metrics.mean_auroc(of_name, samples.labels if name == ON_SAMPLES
                                      else held_out.labels)
             for name, of_name in tested.items()}
    gains = {name: metrics.auroc_gain(tested[name], tested[AGAIN], held_out.labels, args.seed)
             for name in (BOTH, FIRST)}
    return found, gains


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


# --- two-sample test ----------------------------------------------------------------------------


class Detective(nn.Module):
    """Small CNN that sees every pixel: images [B, 1, S, S] in [-1, 1] to logits [B, 2], real and
    not. What averaging 2 x 2 pixels takes away is a second channel, eight times as loud, since fine
    detail is faint and blur and noise live there."""

    def __init__(self):
        super().__init__()
        layers, ch = [], 2
        for width in (16, 32, 64, 64):
            layers += [nn.Conv2d(ch, width, 4, stride=2, padding=1),
                       nn.GroupNorm(8, width) if ch > 2 else nn.Identity(), nn.LeakyReLU(0.2)]
            ch = width
        self.layers = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                                    nn.Linear(ch, 2))

    def forward(self, x):
        x = metrics.even_part(x)
        return self.layers(torch.cat([x, 8 * metrics.fine_part(x)], 1))


def random_crop(x, rng):
    """A part of images [B, 1, S, S], with at most 64 pixels a side. Its place is a multiple of 8
    pixels, so that a lattice which a network's up-sampling leaves stays where it is."""
    size = min(64, x.shape[-1])
    row, column = (8 * torch.randint((x.shape[-1] - size) // 8 + 1, (2,), generator=rng)).tolist()
    return x[:, :, row:row + size, column:column + size]


class FullImages(NamedTuple):
    """Images as a file with 8 bits per pixel holds them, and their class indices."""

    x: torch.Tensor  # [N, 1, S, S] in [-1, 1]
    labels: np.ndarray  # [N]


def full_images(images, procs, vae=None):
    """FullImages of a data.ImageSet or Samples; with an autoencoder, what it makes of them."""
    parts = data.batches(images)
    if vae is not None:
        parts = decoded(vae, parts, procs)
    x = apply(lambda part: experiment.to_uint8(part).float() / 127.5 - 1, parts, procs)
    return FullImages(x, images.labels)


def halves(labels, seed):
    """Two random halves of the positions of `labels`, at most MOST_FOR_DETECTIVE each, with every
    class in both."""
    order = np.random.default_rng(seed).permutation(len(labels))[:2 * MOST_FOR_DETECTIVE]
    order = order[np.argsort(labels[order], kind="stable")]
    return order[::2], order[1::2]


def two_sample_tests(samples, train, held_out, vae, groups, args, procs):
    """Can a network tell samples from real images? AUROC on images that it was not trained on, with
    95 % interval, {group: {row: (value, low, high)}}; 0.5 is indistinguishable.

    A classifier two-sample test (Lopez-Paz & Oquab 2017). Rows: the samples; what the autoencoder
    makes of real images; and the baseline, real images in the place of samples. samples, train,
    held_out: data.ImageSet or Samples; groups: {name: class indices}.
    """
    def halved(images):
        both = halves(images.labels, args.seed)
        return [full_images(images.subset(half), procs) for half in both]

    known, others = halves(train.labels, args.seed)
    train = train.subset(np.concatenate([known, others]))
    held_out = held_out.subset(np.concatenate(halves(held_out.labels, args.seed)))
    real, unseen = full_images(train, procs), full_images(held_out, procs)
    fresh = train.subset(np.arange(len(known), len(train)))
    # What is trained on and tested on, beside how many of the real images it is trained with.
    trials = {"samples": (*halved(samples), len(train)), "baseline": (*halved(fresh), len(known))}
    if vae is not None:
        made = (full_images(images, procs, vae) for images in (train, held_out))
        trials["decoded"] = (*made, len(train))
    found = {name: {} for name in groups}
    for row, (to_train, to_test, num_real) in trials.items():
        labels = (torch.arange(num_real + len(to_train.x)) >= num_real).long()
        net = train_classifier(Detective, random_crop, torch.cat([real.x[:num_real], to_train.x]),
                               labels, args.seed, args.classifier_steps, procs,
                               f"real images and {row}")
        logits = apply(net, torch.cat([unseen.x, to_test.x]).split(data.BATCH), procs)
        truth = (torch.arange(len(logits)) >= len(unseen.x)).long()
        classes = np.concatenate([unseen.labels, to_test.labels])
        for name, indices in groups.items():
            own = torch.from_numpy(np.isin(classes, indices))
            made = int(truth[own].sum())
            if 0 < made < int(own.sum()):
                area = metrics.auroc(logits[own], truth[own])
                interval = metrics.auroc_interval(area, made, int(own.sum()) - made)
                found[name][row] = (area, *interval)
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
        above = copies["probability"] < metrics.BY_CHANCE
        found.append(verdict(
            "copies/share", copies["share"], above and copies["share"] > 0.2, above,
            "Share of samples as close to one training image as hardly any training image is to "
            f"another; by chance {copies['expected']:.3f}, and as much or more with a probability "
            f"of {copies['probability']:.2g}.",
            "Look at the pairs. Train for fewer steps or on more images; publish no copies of "
            "patients."))
    for space, groups in report["groups"].items():
        found += distance_verdicts(space, groups["all"])

    if "power" in report:
        found.append(power_verdict(report["power"]["all"]))
    if "two_sample" in report:
        rows = report["two_sample"]["all"]
        value, low, _ = rows["samples"]
        meaning = ("AUROC of a network that is to tell samples from held-out images by their "
                   f"pixels; of real images from held-out ones {rows['baseline'][0]:.2f}")
        if "decoded" in rows:
            meaning += f", of what the autoencoder makes of real ones {rows['decoded'][0]:.2f}"
        found.append(verdict(
            "two-sample", value, False, low > max(0.6, rows["baseline"][2]), f"{meaning}.",
            "Something gives the samples away: look at power and at the grid beside real films. As "
            "long as it sees through the autoencoder too, mend that first."))

    if "mirrored" in report:
        share, low, _ = report["mirrored"]["samples"]
        _, _, real_high = report["mirrored"]["held_out"]
        found.append(verdict(
            # Blur costs it some certainty; if it takes real images for mirrored it knows nothing.
            "mirrored", share, low > max(real_high, 0.5), low > max(real_high, 0.2),
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
    for name, (value, low, high) in report.get("gain", {}).items():
        meaning = "the interval holds 0, so they are of no proven use"
        if low > 0:
            meaning = "they are of use"
        elif high < 0:
            meaning = "they do harm"
        how = "before real images" if name == FIRST else "beside real images"
        found.append(verdict(
            f"gain, {how}", value, False, high < 0,
            f"AUROC gained by training on samples {how}, over repeats of these ({low:.3f} to "
            f"{high:.3f}): {meaning}.",
            "Do not train on them: look at class fidelity and at the distances."))
    return found


def power_verdict(rows):
    """Verdict on the octave of spatial frequency in which samples are least like real images.

    Real are held-out and training images: what lies between the two is no deviation.
    """
    def deviation(octave):
        value, training = rows["samples"][octave], rows["baseline"][octave]
        nearest_real = min(max(value, min(1.0, training)), max(1.0, training))
        ratio = max(value, 1e-6) / max(nearest_real, 1e-6)
        return math.inf if math.isnan(ratio) else abs(math.log(ratio))

    octave = max((name for name in rows["samples"] if name != "num"), key=deviation)
    value, off = rows["samples"][octave], deviation(octave)
    meaning = (f"Power of the samples at {octave} cycles per image, relative to held-out images; "
               "no other octave is further off.")
    advice = ("More than real images have is noise or ringing: train longer, raise "
              "--num_sampling_steps, lower --guidance_scale.")
    if value < 1:
        advice = ("Blurred. What the autoencoder takes away only a better one gives back: train it "
                  "longer, with its discriminator. Else train this model longer.")
        if "decoded" in rows:
            meaning += f" The autoencoder leaves {rows['decoded'][octave]:.2f} of it."
    return verdict("power", value, off > math.log(4), off > math.log(1.7), meaning, advice)


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
    print_table("looks; baseline: training images; decoded: held-out images through the "
                "autoencoder", report["looks"], LOOK_COLUMNS)
    octaves = [name for name in report["power"]["all"]["samples"] if name != "num"]
    print_table("power by cycles per image, relative to held-out images", report["power"],
                {name: (name, 8, 3) for name in octaves})
    for group, rows in report.get("two_sample", {}).items():
        for row, (value, low, high) in rows.items():
            what = f"two-sample test, {group}: {row}"
            print(f"{what:<58} {value:.3f} ({low:.3f} to {high:.3f})")
    if "copies" in report:
        copies = report["copies"]
        print(f"copies: {100 * copies['share']:.1f} % of samples are closer to one of "
              f"{copies['distinct']} distinct training images than these are to one another (by "
              f"chance {100 * copies['expected']:.1f} %; as many or more with probability "
              f"{copies['probability']:.2g})")
    for name, (value, low, high) in report.get("auroc", {}).items():
        note = "  TSTR" if name == TSTR else ""
        print(f"AUROC, trained on {name:<39} {value:.3f} ({low:.3f} to {high:.3f}){note}")


def report_to_wandb(ckpt, report, found, pairs):
    """The report, its verdicts and the picture of pairs on the W&B page of the checkpoint's run,
    where that was logged to W&B. found: metrics.Verdicts; pairs: path, None where there is none."""
    folder = experiment.run_folder(ckpt)
    try:
        meta = experiment.parse_json(folder / "run_meta.json")
        settings, wandb_id = argparse.Namespace(**meta["args"]), meta["wandb_id"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    session = None
    if wandb_id:
        session = experiment.start_wandb(settings, folder, wandb_id, None)
    if session is None:
        return
    import wandb
    rows = [[space, group, row, values["num"], *(values.get(name) for name in COLUMNS)]
            for space, groups in report["groups"].items() for group, rows in groups.items()
            for row, values in rows.items() if "num" in values]
    shown = {
        "step": report["step"],
        "evaluation/distances": wandb.Table(["features", "group", "row", "num", *COLUMNS], rows),
        "evaluation/verdicts": wandb.Table([*metrics.Verdict._fields], [[*v] for v in found])}
    if pairs:
        shown["evaluation/pairs"] = wandb.Image(
            str(pairs), caption="the ten samples closest to a training image, and that image")
    numbers = {f"evaluation/{v.metric}": float(v.value) for v in found}
    try:
        session.log(shown)
        session.summary.update(numbers | {
            f"evaluation/{name}": level
            for name, level in experiment.verdict_levels(found).items()})
        session.finish()
    except Exception as e:
        notice(f"W&B did not take the report ({experiment.first_line(e)})")


# --- the stage ----------------------------------------------------------------------------------


def main(argv=None):
    args = parse_settings(build_parser(), argv)
    procs = experiment.setup_processes(args)
    if procs.world_size > 1:
        fail("evaluate.py runs in one process: start it with python, not torchrun")
    if bool(args.ckpt) == bool(args.samples_dir):
        fail("what is to be measured? Give either --ckpt=runs/ldm_.../ckpts/best.pt or "
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
        sampling |= {"step": checkpoint["step"], "ckpt": args.ckpt,
                     "ckpt_sha256": experiment.sha256_file(args.ckpt)}
        folder = pathlib.Path(args.out_dir or experiment.run_folder(args.ckpt))
    else:
        class_names = data.scan(data.image_root(args), args.task, "train").class_names
        samples = read_samples(args.samples_dir, class_names, args.img_size)
        img_size = samples.rows.shape[-1]
        if args.ae_ckpt_path:
            vae, _, _ = experiment.load_autoencoder(args.ae_ckpt_path, procs)
        folder = pathlib.Path(args.out_dir or args.samples_dir)
    args.img_size = img_size
    if img_size < SMALLEST:
        fail(f"images of {img_size} x {img_size} pixels are too small for what is measured: it "
             f"takes {SMALLEST} at least")

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
    num_samples = {class_names[c]: int((samples.labels == c).sum())
                   for c in np.unique(samples.labels)}
    report = {"split": args.split, "seed": args.seed, **sampling, "num_samples": num_samples,
              "features": {}, "groups": {}}
    for space, (network, text) in networks.items():
        sets = [FeatureGroup(images.labels, apply(network, data.batches(images), procs))
                for images in (samples, pool, real)]
        report["features"][space] = text
        report["groups"][space] = {
            name: group_rows(*(group.of_classes(classes) for group in sets), args.seed)
            for name, classes in groups.items()}

    # --- looks and sharpness ---
    looked_at = {"samples": samples, "baseline": train, "held_out": real}
    parts = {row: data.batches(images) for row, images in looked_at.items()}
    if vae is not None:  # what it leaves of real images is about the most that samples can have
        looked_at["decoded"], parts["decoded"] = real, decoded(vae, data.batches(real), procs)
    seen = {row: (images.labels, apply(looks, parts[row], procs))
            for row, images in looked_at.items()}
    report["looks"] = {name: look_rows(seen, classes) for name, classes in groups.items()}
    octaves = [f"{low:g}-{high:g}" for low, high in metrics.octaves(img_size)]
    report["power"] = {name: power_rows(seen, classes, octaves)
                       for name, classes in groups.items()}

    if min(len(samples), len(train), len(real)) >= 4:
        report["two_sample"] = two_sample_tests(samples, train, real, vae, groups, args, procs)

    # --- copies of training images ---
    written = [folder / "evaluation.json"]
    try:
        known = data.cached_thumbnails(train, pathlib.Path(args.output_root, "cache"), procs)
        test = metrics.CopyTest(torch.from_numpy(known.rows(train.rows)))
        copies = test.search(apply(data.thumbnails, data.batches(samples), procs))
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
    if args.ckpt and args.wandb:
        report_to_wandb(args.ckpt, report, found, written[1] if len(written) > 1 else None)


if __name__ == "__main__":
    main()
