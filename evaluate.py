"""Are the generated radiographs any good, are they copies of patients, and are they of use?

    python evaluate.py --ckpt=runs/ldm_.../ckpts/best.pt --data_root=DATA --task=TB
    python evaluate.py --samples_dir=FOLDER --data_root=DATA --task=TB

Compares samples of a model, or a folder of images, with held-out images (--split=val): distances
between the distributions, sharpness, whether a network can tell the two apart (C2ST), copies of
training images, and whether a classifier trained on the samples works on real images (TSTR). Beside
every distance stands the real-data baseline, which as many training images score, and how far
chance moves the difference. A distance means something only together with its feature space and its
number of images.
"""
import argparse
import functools
import hashlib
import math
import pathlib
import statistics
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

import data
import diffusion
import sample
from lib import decode, dist, metrics, run, verdicts
from lib.args import (BooleanFlag, add_data_arguments, add_precision_arguments,
                      add_sampling_arguments, at_least, file_path, make_parser, parse_settings)
from lib.files import fail, first_line, make_folder, notice, read_json, write_atomic, write_json

SMALLEST = 16  # side in pixels of the smallest images that the classifiers accept
CLASSIFIER_SIZE = 64  # side in pixels of what the classifier sees
BASELINE_DRAWS = 8  # random choices of training images that the baseline averages over
BOOTSTRAPS = 50  # resamplings behind the standard deviation of a distance
FEWEST_FOR_MANIFOLDS = 100  # images; with 18 held-out ones uniform noise has a precision of 0.85
MOST_FOR_C2ST = 500  # images of each kind in each half
TRAININGS = 3  # of each classifier for AUROC; how much they differ is part of its interval
ON_SAMPLES = "real images, tested on samples"
ON_HELD_OUT = "real images, tested on held-out images"
TSTR = "samples, tested on held-out images"
BOTH = "both, tested on held-out images"
AGAIN = "real images and as many repeats, held-out images"
STATISTICS = ("black_fraction", "percentile_1", "detail")
OWN_PICTURES = ("grid.png", "evaluation_pairs.png")  # written beside samples


# --- arguments ----------------------------------------------------------------------------------


def build_parser():
    """Parser of this stage."""
    parser = make_parser(__doc__)
    add_data_arguments(parser, split="val", img_size=None)
    add_precision_arguments(parser)
    add_sampling_arguments(parser, tuple(diffusion.SAMPLERS), sampler="dpmpp_2m_sde",
                           num_sampling_steps=8, num_samples=64)
    add = parser.add_argument_group("evaluation").add_argument
    add("--samples_dir", type=file_path,
        help="measure this folder: the images in its manifest.json, else CLASS/*.png, CLASS_*.png")
    add("--features",
        help="comma list of classifier (trained on the training split), vae, or paths of "
        "TorchScript networks; None: classifier and vae, if available")
    add("--classifier_steps", type=at_least(1), default=600,
        help="training steps of each classifier, 32 images per step")
    add("--wandb", action=BooleanFlag, default=True,
        help="show the verdicts on the W&B page of the model's run, if it has one")
    return parser


# --- images -------------------------------------------------------------------------------------


class Samples:
    """Generated images, read like a data.ImageSet."""

    def __init__(self, rows, labels):
        """rows: uint16 [N, S, S], as from decode.read_square; labels [N]: class indices."""
        self.rows, self.labels = rows, labels

    def __len__(self):
        return len(self.rows)

    def images(self, indices):
        """float32 [B, 1, S, S] in [-1, 1]."""
        return data.to_float(self.rows[indices])

    def subset(self, indices):
        """The Samples at these indices."""
        return Samples(self.rows[indices], self.labels[indices])


class Labelled(NamedTuple):
    """Pixels, features or statistics of some images."""

    labels: np.ndarray  # [N] class indices
    values: torch.Tensor  # [N, ...] on the CPU

    def subset(self, indices):
        """The Labelled at these indices."""
        return Labelled(self.labels[indices], self.values[indices])

    def of_classes(self, classes):
        """The Labelled whose class index is among `classes`."""
        return self.subset(np.flatnonzero(np.isin(self.labels, classes)))

    def joined(self, other):
        """This and another one after it."""
        return Labelled(np.concatenate([self.labels, other.labels]),
                        torch.cat([self.values, other.values]))


class Sets(NamedTuple):
    """What is compared: data.ImageSet or Samples, or a Labelled of each."""

    samples: object
    train: object
    held_out: object


@torch.no_grad()
def measured(function, images, ctx, vae=None):
    """Labelled values of function(x [B, 1, S, S]) over a data.ImageSet or Samples; with vae, over
    its reconstructions of them."""
    parts = []
    for x in data.batches(images):
        x = x.to(ctx.device)
        if vae is not None:
            x = vae.decode(vae.encode(x).mean).clamp(-1, 1)
        parts.append(function(x).float().cpu())
    return Labelled(images.labels, torch.cat(parts))


def draw_samples(ldm, args, ctx):
    """Samples of a sample.TrainedModel with 8 bits per pixel, as sample.py saves them."""
    requests = [(c, i) for c in ldm.classes for i in range(args.num_samples)]
    rows = []
    for _, _, x in sample.sample_batches(
            ldm.denoiser, ldm.vae, ldm.checkpoint["latent_scale_factor"], requests,
            ldm.checkpoint["class_names"], args, ctx, args.batch_size,
            f"sampling ({args.sampler})"):
        rows.append(run.to_uint8(x)[:, 0].numpy().astype(np.uint16) * 257)
    return Samples(np.concatenate(rows), np.array([c for c, _ in requests]))


def listed_samples(folder):
    """{path: class name} of the images in sample.py's manifest.json; exits if some are missing."""
    path = folder / "manifest.json"
    manifest = read_json(path, "manifest of samples")
    try:
        # The bare name: a stranger's manifest must not lead out of the folder.
        listed = {folder / pathlib.Path(i["file"]).name: i["class"] for i in manifest["images"]}
    except (KeyError, TypeError):
        fail(f"{path} was not written by sample.py: move it away to measure all images beside it")
    missing = [image for image in listed if not image.exists()]
    if missing:
        fail(f"{len(missing)} of the {len(listed)} images in {path} are missing "
             f"({missing[0].name}): sampling was interrupted, run the sample.py command again")
    return listed


def read_samples(folder, class_names, img_size):
    """Samples in a folder of images; img_size None: that of the first. Exits if there are none or
    one cannot be decoded; notices name classes without images and count images left out."""
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        fail(f"--samples_dir={folder} does not exist")

    def class_of(path):
        if path.parent != folder:
            return data.class_name(path.parent.name)
        fits = [c for c in class_names if data.class_name(path.name).startswith(f"{c}_")]
        return max(fits, key=len, default=None)  # one class name may begin another

    found = {path: class_of(path) for path in [*folder.iterdir(), *folder.glob("*/*")]
             if path.suffix.lower() in decode.EXTENSIONS and path.name not in OWN_PICTURES}
    if (folder / "manifest.json").exists():
        found = dict.fromkeys(found) | listed_samples(folder)
    members = sorted((class_names.index(name), path) for path, name in found.items()
                     if name in class_names)
    if not members:
        fail(f"no images in {folder}: name them CLASS_*.png or put them into folders CLASS, with "
             f"the classes of the data: {', '.join(class_names)}")
    if len(members) < len(found):
        notice(f"{folder}: {len(found) - len(members)} images were left out, being of no class of "
               "the data or not in the manifest")
    labels = np.array([c for c, _ in members])
    for c in np.setdiff1d(np.arange(len(class_names)), labels):
        notice(f"{folder}: no samples of class {class_names[c]}")
    try:
        if img_size is None:
            with Image.open(members[0][1]) as image:
                img_size = min(image.size)
        rows = np.stack([decode.read_square(path, img_size) for _, path in members])
    except (OSError, ValueError) as e:
        fail(f"cannot decode an image in {folder}: {e}")
    return Samples(rows, labels)


# --- image statistics ---------------------------------------------------------------------------


def image_statistics(x):
    """Statistics of images [B, 1, S, S], [B, 3 + octaves]: fraction of pixels under 5 % grey, 1st
    percentile of grey, metrics.detail, metrics.octave_power."""
    grey = (x.flatten(1) + 1) / 2
    black = (grey < 0.05).float().mean(1)
    percentile = grey.kthvalue(max(1, grey.shape[1] // 100), dim=1).values
    columns = torch.stack([black, percentile, metrics.detail(x)], 1)
    return torch.cat([columns.double().cpu(), metrics.octave_power(x)], 1)


def measure_statistics(sets, vae, ctx):
    """{row: Labelled image_statistics} of the sets, and with vae of reconstructed held-out images,
    which have about as much detail as samples can."""
    rows = {"samples": sets.samples, "baseline": sets.train, "held_out": sets.held_out}
    found = {row: measured(image_statistics, images, ctx) for row, images in rows.items()}
    if vae is not None:
        found["decoded"] = measured(image_statistics, sets.held_out, ctx, vae)
    return found


def table_of_means(measurements, groups, columns, names, relative=False):
    """{group: {row: {"num": N, name: mean}}} of {row: Labelled [N, D]}; columns: a slice of D, with
    these names. relative: to the row held_out, which is then left out."""
    table = {}
    for group, classes in groups.items():
        values = {row: images.of_classes(classes).values[:, columns]
                  for row, images in measurements.items()}
        unit = values.pop("held_out").mean(0).clamp_min(1e-12) if relative else 1
        table[group] = {}
        for row, x in values.items():
            means = zip(names, (x.mean(0) / unit).tolist(), strict=True)
            table[group][row] = {"num": len(x), **dict(means)}
    return table


# --- classifiers --------------------------------------------------------------------------------


class Classifier(nn.Module):
    """Small CNN: images [B, 1, S, S] in [-1, 1] to logits [B, num_classes], via 64 features."""

    def __init__(self, num_classes, in_channels=1):
        super().__init__()
        layers, ch = [], in_channels
        for width in (16, 32, 64, 64):
            layers += [nn.Conv2d(ch, width, 4, stride=2, padding=1),
                       nn.GroupNorm(8, width) if layers else nn.Identity(), nn.LeakyReLU(0.2)]
            ch = width
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(ch, num_classes)

    def features(self, x):
        """[B, 64]."""
        return self.body(shrunk(x))

    def forward(self, x):
        return self.head(self.features(x))


class C2STClassifier(Classifier):
    """Real or generated? Sees every pixel, and as a second channel the high-frequency residual,
    amplified eightfold: blur and noise live there, and it is faint."""

    def __init__(self):
        super().__init__(num_classes=2, in_channels=2)

    def features(self, x):
        """[B, 64]."""
        x = metrics.even_part(x)
        return self.body(torch.cat([x, 8 * metrics.fine_part(x)], 1))


def shrunk(x):
    """Images [N, 1, H, W] averaged down to the classifier's size, [N, 1, 64, 64]."""
    return F.interpolate(x, CLASSIFIER_SIZE, mode="area")


def augment(x, rng):
    """Images [B, 1, S, S], each with a random shift, zoom, rotation and exposure; no flips."""
    labels = torch.rand(len(x), data.AUG_DIM, generator=rng) * 2 - 1
    return data.augment(x, labels.to(x.device))


def random_crop(x, rng):
    """Crop of images [B, 1, S, S], at most 64 pixels a side. Its position is a multiple of 8
    pixels, which keeps the phase of a lattice that a network's up-sampling leaves."""
    size = min(64, x.shape[-1])
    row, column = (8 * torch.randint((x.shape[-1] - size) // 8 + 1, (2,), generator=rng)).tolist()
    return x[:, :, row:row + size, column:column + size]


def train_classifier(build, vary, images, seed, args, ctx, label):
    """Train the network that build() makes on Labelled pixels, with classes balanced in each batch
    and images varied by vary(x, rng). label: what the images are, for the progress line."""
    torch.manual_seed(seed)
    net = build().to(ctx.device).train().requires_grad_(True)
    rng = torch.Generator().manual_seed(seed)
    steps, labels = args.classifier_steps, torch.from_numpy(images.labels)
    members = [(labels == c).nonzero()[:, 0] for c in labels.unique()]
    count = 32 // len(members) or 1  # of each class
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=0.05, fused=True)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    progress = run.Progress(ctx, f"training a classifier on {label}", steps)
    for step in range(steps):
        index = torch.cat([m[torch.randint(len(m), (count,), generator=rng)] for m in members])
        logits = net(vary(images.values[index].to(ctx.device), rng))
        F.cross_entropy(logits, labels[index].to(ctx.device)).backward()
        optimizer.step()
        decay.step()
        optimizer.zero_grad()
        progress.update(step + 1)
    progress.clear()
    return net.eval().requires_grad_(False)


@torch.no_grad()
def scores(net, x, ctx):
    """Logits [N, K] of a classifier for pixels [N, 1, S, S], on the CPU."""
    return torch.cat([net(part.to(ctx.device)).cpu() for part in x.split(data.BATCH)])


def real_classifier(images_key, views, num_classes, seed, args, ctx):
    """Classifier trained on the real training images, whose Labelled `views` are shrunk pixels; its
    weights are cached by images_key."""
    settings = (images_key, views.labels.tolist(), seed, args.classifier_steps)
    key = hashlib.sha256(f"classifier 3 {settings}".encode()).hexdigest()
    path = pathlib.Path(args.output_root, "cache", f"classifier_{key[:16]}.pt")
    build = functools.partial(Classifier, num_classes)
    if path.exists():
        try:
            net = build()
            net.load_state_dict(run.load_archive(path))
            return net.to(ctx.device).eval().requires_grad_(False)
        except Exception as e:  # whatever a damaged file raises
            notice(f"{path} is damaged ({first_line(e)}): training the classifier again")
    net = train_classifier(build, augment, views, seed, args, ctx, "real images")
    make_folder(path.parent)
    write_atomic(path, lambda f: torch.save(net.state_dict(), f))
    return net


def tstr(views, train_key, num_classes, args, ctx):
    """TSTR, train on synthetic and test on real (Esteban et al. 2017): {trained on, tested on:
    (AUROC, low, high)}, and {BOTH: (gain, low, high)}, at 95 % confidence.

    views: Sets of Labelled shrunk pixels. The gain is what samples beside the real images add to
    AGAIN, which has as many repeats of real images instead, so that more images or more training
    alone do not count. Each AUROC is the mean of TRAININGS trainings.
    """
    samples, train, held_out = views
    repeats = np.concatenate([
        np.resize(np.flatnonzero(train.labels == c), (samples.labels == c).sum())
        for c in np.unique(samples.labels)])
    trained_on = {TSTR: samples, BOTH: train.joined(samples),
                  AGAIN: train.joined(train.subset(repeats))}
    results = {name: [] for name in (ON_SAMPLES, ON_HELD_OUT, TSTR, BOTH, AGAIN)}
    for seed in range(args.seed, args.seed + TRAININGS):
        judge = real_classifier(train_key, train, num_classes, seed, args, ctx)
        results[ON_SAMPLES].append(scores(judge, samples.values, ctx))
        results[ON_HELD_OUT].append(scores(judge, held_out.values, ctx))
        for name, images in trained_on.items():
            net = train_classifier(functools.partial(Classifier, num_classes), augment, images,
                                   seed, args, ctx, name.split(",")[0])
            results[name].append(scores(net, held_out.values, ctx))
    truth = {name: held_out for name in results} | {ON_SAMPLES: samples}
    aurocs = {name: metrics.mean_auroc(of_trainings, torch.from_numpy(truth[name].labels))
              for name, of_trainings in results.items()}
    gain = metrics.auroc_gain(results[BOTH], results[AGAIN], torch.from_numpy(held_out.labels),
                              args.seed)
    return aurocs, {BOTH: gain}


# --- C2ST ---------------------------------------------------------------------------------------


def halves(labels, seed):
    """Indices of two random halves of `labels`, at most MOST_FOR_C2ST each, both with every class.
    """
    order = np.random.default_rng(seed).permutation(len(labels))[:2 * MOST_FOR_C2ST]
    order = order[np.argsort(labels[order], kind="stable")]
    return order[::2], order[1::2]


def pixels_8_bit(images, ctx, vae=None):
    """Labelled pixels [N, 1, S, S] in [-1, 1], rounded as in a file."""
    return measured(lambda x: run.to_uint8(x).float() / 127.5 - 1, images, ctx, vae)


def c2st(sets, vae, groups, args, ctx):
    """Classifier two-sample test (Lopez-Paz & Oquab 2017): can a network tell generated from real
    images? {group: {row: (AUROC, low, high)}} on unseen images, at 95 % confidence; 0.5: it cannot.

    Rows: the samples; the baseline, real images in place of samples; decoded, the autoencoder's
    reconstructions of real images. groups: {name: class indices}.
    """
    def two_halves(images):
        return [pixels_8_bit(images.subset(half), ctx)
                for half in halves(images.labels, args.seed)]

    first, second = halves(sets.train.labels, args.seed)
    train = sets.train.subset(np.concatenate([first, second]))
    held_out = sets.held_out.subset(np.concatenate(halves(sets.held_out.labels, args.seed)))
    real, unseen = pixels_8_bit(train, ctx), pixels_8_bit(held_out, ctx)
    found = {name: {} for name in groups}

    def trial(row, real, to_train, to_test):
        both = real.joined(to_train)
        generated = (np.arange(len(both.labels)) >= len(real.labels)).astype(np.int64)
        net = train_classifier(C2STClassifier, random_crop, both._replace(labels=generated),
                               args.seed, args, ctx, f"real images and {row}")
        tested = unseen.joined(to_test)
        logits = scores(net, tested.values, ctx)
        truth = (torch.arange(len(logits)) >= len(unseen.labels)).long()
        for name, classes in groups.items():
            members = torch.from_numpy(np.isin(tested.labels, classes))
            total, positives = int(members.sum()), int(truth[members].sum())
            if 0 < positives < total:
                area = metrics.auroc(logits[members], truth[members])
                interval = metrics.auroc_interval(area, positives, total - positives)
                found[name][row] = (area, *interval)

    trial("samples", real, *two_halves(sets.samples))
    fresh = train.subset(np.arange(len(first), len(train)))
    trial("baseline", real.subset(np.arange(len(first))), *two_halves(fresh))
    if vae is not None:
        trial("decoded", real, *(pixels_8_bit(images, ctx, vae) for images in (train, held_out)))
    return found


# --- feature spaces -----------------------------------------------------------------------------


class FeatureSpace(NamedTuple):
    """A space in which distributions are compared."""

    network: Callable  # images [B, 1, H, W] in [-1, 1] to features [B, D]
    text: str


def feature_spaces(names, vae, classifier, ctx):
    """{name: FeatureSpace} of a comma list; None: classifier and vae, whichever is not None."""
    available = {}
    if classifier is not None:
        available["classifier"] = FeatureSpace(
            classifier.features, "classifier trained on the real training split, 64 features")
    if vae is not None:
        available["vae"] = FeatureSpace(
            lambda x: F.adaptive_avg_pool2d(vae.encode(x).mean, 4).flatten(1),
            "autoencoder means on a 4x4 grid")
    found = available
    if names is not None:
        found = {name: available.get(name) or torchscript_space(name, ctx)
                 for name in map(str.strip, names.split(","))}
    if not found:
        fail("no features to compare by: give --ae_ckpt_path, or --features")
    return found


def torchscript_space(path, ctx):
    """FeatureSpace of a TorchScript file, which is given images [B, 3, H, W] in 0 to 255, as the
    usual Inception file expects."""
    if not pathlib.Path(path).is_file():
        fail(f"--features={path} is not available: give a TorchScript file, vae (needs --ckpt or "
             "--ae_ckpt_path) or classifier (needs two classes)")
    try:
        net = torch.jit.load(path, map_location=ctx.device).eval()
    except RuntimeError as e:
        fail(f"{path} is not a TorchScript file: {first_line(e)}")
    options = {}
    if "return_features" in {a.name for a in net.forward.schema.arguments}:
        options["return_features"] = True  # otherwise the usual Inception file gives class scores

    def features(x):
        out = net(((x + 1) * 127.5).expand(-1, 3, -1, -1), **options)
        if out.ndim != 2 or len(out) != len(x):
            fail(f"{path} maps images [B, 3, H, W] to {[*out.shape]}, not to features [B, D]: give "
                 "another --features")
        return out
    return FeatureSpace(features, f"TorchScript {pathlib.Path(path).name}")


# --- distributions ------------------------------------------------------------------------------


def as_many(labels, like, seed):
    """Indices of a random choice from `labels`, with as many of each class as in `like`, or all."""
    rng = np.random.default_rng(seed)
    return np.concatenate([
        rng.permutation(np.flatnonzero(labels == c))[:(like == c).sum()] for c in np.unique(like)])


def distances(features, held_out):
    """{name: number} of features [N, D] against those of held-out images [M, D]; empty if N or M is
    under 2, and without the manifold metrics if under FEWEST_FOR_MANIFOLDS."""
    fewest = min(len(features), len(held_out))
    if fewest < 2:
        return {}
    found = {"fid": metrics.frechet_distance(features, held_out),
             "kid": metrics.kernel_distance(features, held_out)}
    if fewest >= FEWEST_FOR_MANIFOLDS:
        found |= metrics.manifold_metrics(features, held_out)
    return found


def bootstrap_std(samples, pool, held_out, seed):
    """{name: standard deviation} of the difference in FID, and in KID, between two random sets of
    training images with as many of each class as the samples, over bootstraps of both sets and of
    the held-out images. All are Labelled features."""
    def redrawn(features, like):
        """Features [N, D], drawn with replacement, as many of each class as in `like`."""
        index = [rng.choice(np.flatnonzero(features.labels == c), (like == c).sum())
                 for c in np.intersect1d(like, features.labels)]
        return features.values[np.concatenate(index)]

    gaps = {"fid": [], "kid": []}
    for i in range(BOOTSTRAPS):
        rng = np.random.default_rng([seed, 1, i])
        real = redrawn(held_out, held_out.labels)
        one, other = redrawn(pool, samples.labels), redrawn(pool, samples.labels)
        for name, distance in (("fid", metrics.frechet_distance), ("kid", metrics.kernel_distance)):
            gaps[name].append(distance(one, real) - distance(other, real))
    return {name: float(np.std(values, ddof=1)) for name, values in gaps.items()}


def group_rows(samples, pool, held_out, seed):
    """{row: {name: number}} of samples against held-out images, given a pool of training images;
    all are Labelled features. Rows without distances are left out.

    FID falls with the number of images, so `baseline` takes as many images from the pool as there
    are samples, averaged over BASELINE_DRAWS random choices.
    """
    chosen = [as_many(pool.labels, samples.labels, [seed, i]) for i in range(BASELINE_DRAWS)]
    draws = [distances(pool.values[index], held_out.values) for index in chosen]
    ours = distances(samples.values, held_out.values)
    rows = {"samples": {"num": len(samples.labels), **ours}}
    if draws[0]:
        rows["baseline"] = {"num": len(chosen[0]), **{
            name: statistics.mean(draw[name] for draw in draws) for name in draws[0]}}
    if draws[0] and ours:
        rows["bootstrap_std"] = bootstrap_std(samples, pool, held_out, seed)
    return rows


def distances_by_space(sets, spaces, groups, args, ctx):
    """{space: {group: group_rows}}; spaces: {name: FeatureSpace}, groups: {name: class indices}."""
    like = np.repeat(sets.samples.labels, BASELINE_DRAWS)
    pool = sets.train.subset(as_many(sets.train.labels, like, args.seed))
    found = {}
    for name, space in spaces.items():
        features = [measured(space.network, images, ctx)
                    for images in (sets.samples, pool, sets.held_out)]
        found[name] = {group: group_rows(*(part.of_classes(classes) for part in features),
                                         args.seed)
                       for group, classes in groups.items()}
    return found


def group_classes(labels, class_names):
    """{name: class indices} of `all` and of each class with two images in every set of `labels`
    ({set: class indices [N]}, the samples' first), and whether AUROC is possible, which takes two
    classes with images in every set. Notices say what is left out."""
    counts = {what: np.bincount(of, minlength=len(class_names)) for what, of in labels.items()}
    groups = {"all": np.arange(len(class_names))}
    lacking = [] if len(class_names) > 1 else ["there is only one class"]
    for what, count in counts.items():
        if count.sum() < 2:
            notice(f"under two images in {what}: no FID, KID, precision, recall")
        lacking += [f"no image of class {class_names[c]} in {what}"
                    for c in np.flatnonzero(count == 0)]
    for c in np.flatnonzero(next(iter(counts.values()))):
        few = [what for what, count in counts.items() if count[c] < 2]
        if few:
            notice(f"class {class_names[c]} has under two images in {' and '.join(few)}: no "
                   "distances of its own")
        else:
            groups[class_names[c]] = [c]
    if lacking:
        notice(f"{'; '.join(lacking)}: no AUROC")
    return groups, not lacking


# --- report -------------------------------------------------------------------------------------


def verdict(metric, value, bad, watch, meaning, advice):
    """verdicts.Verdict whose level follows from two conditions; NaN is bad."""
    level = "bad" if bad or math.isnan(value) else "watch" if watch else "ok"
    return verdicts.Verdict(metric, level, f"{value:.3f}", meaning, advice)


def judge(report):
    """verdicts.Verdicts on what nobody should overlook in a report."""
    found = []
    if "copies" in report:
        copies = report["copies"]
        above = copies["probability"] < metrics.BY_CHANCE
        found.append(verdict(
            "copies/share", copies["share"], above and copies["share"] > 0.2, above,
            "Share of samples closer to one training image than training images are to one "
            f"another; {copies['expected']:.3f} by chance, this many or more with probability "
            f"{copies['probability']:.2g}.",
            "Look at the pairs. Train for fewer steps or on more images; do not publish copies of "
            "patients."))
    for space, groups in report["groups"].items():
        found += distance_verdicts(space, groups["all"])
    if "power" in report:
        found.append(power_verdict(report["power"]["all"]))
    if "c2st" in report:
        rows = report["c2st"]["all"]
        value, low, _ = rows["samples"]
        others = "; ".join(f"{row} {area:.2f}" for row, (area, _, _) in rows.items()
                           if row != "samples")
        found.append(verdict(
            "two-sample", value, False, low > max(0.6, rows["baseline"][2]),
            f"AUROC of a network that tells samples from held-out images by their pixels; {others}"
            " (real images; reconstructions of them).",
            "Something gives the samples away: look at power, and at the grid beside real images. "
            "If decoded is as high, improve the autoencoder first."))
    if "auroc" in report:
        value, low, high = report["auroc"][ON_SAMPLES]
        real_value, _, real_high = report["auroc"][ON_HELD_OUT]
        caricature = low > real_high
        advice = "Below 0.5 the labels are swapped. Near it: train longer, raise --guidance_scale."
        if caricature:
            advice = "Clearer cases than real ones are caricatures: lower --guidance_scale."
        found.append(verdict(
            "class fidelity", value, high < 0.5, low <= 0.5 or caricature,
            "AUROC on samples of a classifier trained on real images; on held-out images "
            f"{real_value:.2f}.", advice))
    if "gain" in report:
        value, low, high = report["gain"][BOTH]
        benefit = "useful" if low > 0 else "harmful" if high < 0 else "of no proven use"
        found.append(verdict(
            "gain, beside real images", value, False, high < 0,
            "AUROC gained by training on real images and samples instead of repeated real images "
            f"({low:.3f} to {high:.3f}): {benefit}.",
            "Do not train on them: look at class fidelity and at the distances."))
    return found


def power_verdict(rows):
    """Verdict on the octave in which samples are least like real images; values between held-out
    and training images count as real."""
    def deviation(octave):
        value, training = rows["samples"][octave], rows["baseline"][octave]
        nearest_real = min(max(value, min(1.0, training)), max(1.0, training))
        ratio = max(value, 1e-6) / max(nearest_real, 1e-6)
        return math.inf if math.isnan(ratio) else abs(math.log(ratio))

    octave = max((name for name in rows["samples"] if name != "num"), key=deviation)
    value, off = rows["samples"][octave], deviation(octave)
    meaning = (f"Power of the samples at {octave} cycles per image relative to held-out images; "
               "other octaves are closer.")
    advice = ("More than real images have is noise or ringing: train longer, raise "
              "--num_sampling_steps, lower --guidance_scale.")
    if value < 1:
        advice = ("Blurred. If the autoencoder removes it, train that longer and with its "
                  "discriminator; otherwise train this model longer.")
        if "decoded" in rows:
            meaning += f" The autoencoder leaves {rows['decoded'][octave]:.2f}."
    return verdict("power", value, off > math.log(4), off > math.log(1.7), meaning, advice)


def distance_verdicts(space, rows):
    """Verdicts on the distances in one feature space."""
    samples, baseline, found = rows["samples"], rows.get("baseline", {}), []
    for name in ("fid", "kid"):
        chance = rows.get("bootstrap_std", {}).get(name, 0.0)
        if name not in samples or chance < 1e-9:  # one training image, or all the same
            continue
        excess = (samples[name] - baseline[name]) / chance
        found.append(verdict(
            f"{name} ({space})", samples[name], not excess < 10, not excess < 3,
            f"{name.upper()} to held-out images, {excess:.1f} standard deviations above the "
            f"baseline's {baseline[name]:.3f}.",
            "Samples are not distributed like real images: compare the image statistics, look at "
            "the grid; lower --guidance_scale, train longer."))
    low_recall = "Samples leave much out: lower --guidance_scale, then train longer."
    for name, meaning, advice in (
            ("precision", "Fraction of samples among the held-out images",
             "Samples do not look real: train longer; check the autoencoder's reconstructions."),
            ("recall", "Fraction of held-out images among the samples", low_recall),
            ("coverage", "Fraction of held-out images with a sample nearby", low_recall)):
        if name in samples and name in baseline:
            value, real = samples[name], baseline[name]
            found.append(verdict(f"{name} ({space})", value, not value >= 0.2 * real,
                                 not value >= 0.6 * real,
                                 f"{meaning}; {real:.2f} for the baseline.", advice))
    return found


def print_table(title, groups):
    """Print {group: {row: {name: number}}} under a title."""
    table = [(group, row, values) for group, rows in groups.items()
             for row, values in rows.items()]
    columns = dict.fromkeys(name for _, _, values in table for name in values if name != "num")
    print(title)
    print(f"{'':<12} {'':<13} {'N':>4}" + "".join(f" {name:>14}" for name in columns))
    for group, row, values in table:
        cells = (f"{values[name]:.4g}" if name in values else "" for name in columns)
        print(f"{group:<12} {row:<13} {values.get('num', ''):>4}"
              + "".join(f" {cell:>14}" for cell in cells))


def print_report(report):
    """Print the numbers of a report."""
    print(f"distances to held-out images (split {report['split']}); baseline: as many training "
          "images as samples; bootstrap_std: of the difference between two such sets")
    for space, groups in report["groups"].items():
        print_table(f"features: {report['features'][space]}", groups)
    print_table("image statistics; baseline: training images; decoded: held-out images through the "
                "autoencoder", report["image_stats"])
    print_table("power by cycles per image, relative to held-out images", report["power"])
    intervals = {f"C2ST, {group}: {row}": v for group, rows in report.get("c2st", {}).items()
                 for row, v in rows.items()}
    intervals |= {f"AUROC, trained on {name}": v for name, v in report.get("auroc", {}).items()}
    for name, (value, low, high) in intervals.items():
        print(f"{name:<66} {value:.3f} ({low:.3f} to {high:.3f})")


def report_to_wandb(ckpt, report, found, pairs):
    """Numbers and levels of the verdicts, and the picture at path `pairs`, on the W&B page of the
    checkpoint's run, if it has one."""
    folder = run.run_folder(ckpt)
    meta = read_json(folder / "run_meta.json")
    if not meta.get("wandb_id"):
        return
    settings = argparse.Namespace(**meta["args"])
    tracker = run.Tracker(run.start_wandb(settings, folder, meta["wandb_id"], None))
    summary = {f"evaluation/{v.metric}": float(v.value) for v in found}
    summary |= {f"evaluation/{name}": level for name, level in verdicts.levels(found).items()}

    def log(session):
        if "copies" in report:
            import wandb
            session.log({"step": report["step"], "evaluation/pairs": wandb.Image(
                str(pairs), caption="the ten samples closest to a training image, and that image")})
        session.summary.update(summary)
    tracker.attempt(log)
    tracker.finish()


# --- the stage ----------------------------------------------------------------------------------


def find_copies(sets, pairs, args, ctx):
    """dict of metrics.CopyTest, and a picture of the closest pairs at path `pairs`; {} if there are
    too few training images, with a notice."""
    cached = data.cached_thumbnails(sets.train, pathlib.Path(args.output_root, "cache"), ctx)
    try:
        test = metrics.CopyTest(torch.from_numpy(cached.rows(sets.train.rows)))
    except ValueError as e:
        notice(e)
        return {}
    found = test.search(measured(data.thumbnails, sets.samples, ctx).values)
    closest = found.pop("ratio").argsort()[:10]
    originals = found.pop("nearest")[closest]
    run.save_grid(
        pairs, [sets.samples.images(closest.numpy()), sets.train.images(originals.numpy())],
        ["the ten samples closest to a training image", "that training image"])
    return {**found, "pixels": data.THUMBNAIL_SIZE}


def main(argv=None):
    args = parse_settings(build_parser(), argv)
    ctx = dist.setup(args)
    if ctx.world_size > 1:
        fail("evaluate.py runs in one process: start it with python, not torchrun")
    if bool(args.ckpt) == bool(args.samples_dir):
        fail("give either --ckpt=runs/ldm_.../ckpts/best.pt or --samples_dir=FOLDER to measure")
    if not args.ckpt and not args.data_root and not args.img_size:
        fail("without --data_root the samples are compared with the phantom set: give --img_size")

    # --- what is measured: a model, or a folder of images ---
    vae, sampling = None, {}
    if args.ckpt:
        ldm = sample.prepare_sampling(args, ctx)
        vae, checkpoint = ldm.vae, ldm.checkpoint
        data.adopt_settings(args, checkpoint["args"], f"the model {args.ckpt}")
        class_names, img_size = checkpoint["class_names"], args.img_size
        sampling = {name: getattr(args, name) for name in sample.SAMPLING_SETTINGS}
        sampling |= {"step": checkpoint["step"], "ckpt": args.ckpt,
                     "ckpt_sha256": checkpoint["sha256"]}
        sample_labels = np.repeat(ldm.classes, args.num_samples)
        folder = pathlib.Path(args.out_dir or run.run_folder(args.ckpt))
    else:
        class_names = data.scan(data.image_root(args), args.task, "train").class_names
        samples = read_samples(args.samples_dir, class_names, args.img_size)
        img_size, sample_labels = samples.rows.shape[-1], samples.labels
        if args.ae_ckpt_path:
            vae, _, _ = sample.load_autoencoder(args.ae_ckpt_path, ctx)
        folder = pathlib.Path(args.out_dir or args.samples_dir)
    args.img_size = img_size
    if img_size < SMALLEST:
        fail(f"images of {img_size} x {img_size} pixels are too small: the classifiers need at "
             f"least {SMALLEST}")

    # --- real images of that size: before sampling, so that mistakes show at once ---
    train = data.open_images(args, ctx, "train", class_names=class_names)
    held_out = train  # --split=train
    if args.split != "train":
        held_out = data.open_images(args, ctx, args.split, train=train)
    if not np.isin(train.labels, sample_labels).any():
        fail("no training image is of the samples' classes: there is nothing to compare with")
    groups, auroc_possible = group_classes(
        {"the samples": sample_labels, "split train": train.labels,
         f"split {args.split}": held_out.labels}, class_names)
    if args.split == "train":
        notice("--split=train: the model was trained on these images, so distances to them flatter "
               "it")
    if min(len(held_out), len(sample_labels)) < FEWEST_FOR_MANIFOLDS:
        notice(f"under {FEWEST_FOR_MANIFOLDS} samples or images in split {args.split}: too few for "
               "precision, recall, density and coverage")
    make_folder(folder)
    train_views, classifier = measured(shrunk, train, ctx), None
    if len(np.unique(train.labels)) > 1:
        classifier = real_classifier(train.key, train_views, len(class_names), args.seed, args,
                                     ctx)
    spaces = feature_spaces(args.features, vae, classifier, ctx)

    # --- the parts of the report, each of them one call ---
    if args.ckpt:
        samples = draw_samples(ldm, args, ctx)
    sets = Sets(samples, train, held_out)
    num_samples = {class_names[c]: int((samples.labels == c).sum())
                   for c in np.unique(samples.labels)}
    report = {"split": args.split, "seed": args.seed, **sampling, "num_samples": num_samples,
              "features": {name: space.text for name, space in spaces.items()}}
    report["groups"] = distances_by_space(sets, spaces, groups, args, ctx)
    statistics_of = measure_statistics(sets, vae, ctx)
    report["image_stats"] = table_of_means(statistics_of, groups, slice(0, 3), STATISTICS)
    octaves = [f"{low:g}-{high:g}" for low, high in metrics.octaves(img_size)]
    report["power"] = table_of_means(statistics_of, groups, slice(3, None), octaves, relative=True)
    if min(len(images) for images in sets) >= 4:
        report["c2st"] = c2st(sets, vae, groups, args, ctx)
    pairs = folder / "evaluation_pairs.png"
    if copies := find_copies(sets, pairs, args, ctx):
        report["copies"] = copies
    if auroc_possible:
        views = Sets(measured(shrunk, samples, ctx), train_views,
                     measured(shrunk, held_out, ctx))
        report["auroc"], report["gain"] = tstr(views, train.key, len(class_names), args, ctx)

    found = judge(report)
    path = folder / "evaluation.json"
    write_json(path, {**report, "verdicts": [v._asdict() for v in found]})
    print_report(report)
    print(verdicts.format_verdicts(found))
    print(f"written: {path}" + (f", {pairs}" if "copies" in report else ""))
    if args.ckpt and args.wandb:
        report_to_wandb(args.ckpt, report, found, pairs)


if __name__ == "__main__":
    main()
