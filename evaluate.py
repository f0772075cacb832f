"""Are the generated radiographs any good, are they copies of patients, and are they of use?

    python evaluate.py --ckpt=runs/ldm_.../ckpts/best.pt --data_root=DATA --task=TB
    python evaluate.py --samples_dir=FOLDER --data_root=DATA --task=TB

Compares samples of a model, or a folder of images, with held-out images (--split=val). Each of
--parts is a function that returns its share of evaluation.json. Beside every distance stands the
real-data baseline, which as many training images score, and how far chance moves the difference.
"""
import argparse
import dataclasses
import functools
import hashlib
import json
import math
import pathlib
import time

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import diffusion
import memorisation
import model
import sample
from lib import decode, dist, metrics, run, verdicts
from lib.args import (add_data_arguments, add_precision_arguments, add_sampling_arguments, at_least,
                      file_path, list_items, make_parser, parse_settings)
from lib.files import fail, make_folder, notice, read_json, write_json
from lib.html import leaves, show

CLASSIFIER_SIZE = 48  # side in pixels of what the classifier sees: docs/log.md
DRAWS = 8  # random choices of images that a distance averages over
BOOTSTRAPS = 50  # resamplings behind the standard deviation of a distance
FEWEST = 3  # images of a class in each set
MOST_FOR_C2ST = 500  # images of each kind in each half
TRAININGS = 3  # of each classifier for AUROC; how much they differ is part of its interval
EVALUATIONS = 32  # of the model behind the denoising error of an image under a class
MOST_MEMBERS = 256  # training images whose loss is compared with that of held-out ones
HELD_OUT, SITE = "held-out images", "images of --test_root"
REAL, TSTR, BOTH, AGAIN = "real images", "samples", "both", "real images and as many repeats"
DENOISING = "denoising error"
ON_SAMPLES = f"{REAL}, tested on samples"
PLAIN = "shifted by up to 2 %, exposed otherwise"  # what has been done to a planted copy


def build_parser():
    """Parser of this stage."""
    parser = make_parser(__doc__)
    add_data_arguments(parser, split="val", img_size=None)
    add_precision_arguments(parser)
    add_sampling_arguments(parser, tuple(diffusion.SAMPLERS), num_samples=64)
    parser.set_defaults(sampler="dpmpp_2m_sde", num_sampling_steps=8)  # not 500, as in training
    add = parser.add_argument_group("evaluation").add_argument
    add("--samples_dir", type=file_path,
        help="measure the images CLASS/* and CLASS_NUMBER.* of this folder; the report goes into a "
        "new folder in --output_root")
    add("--parts", help=f"comma list of {', '.join(PARTS)}; None: all that can be measured")
    add("--test_root", type=file_path,
        help="data root of another site: classifiers are tested on its images, too")
    add("--features", choices=("classifier,vae", "classifier", "vae"), default="classifier,vae",
        help="feature spaces of the distances; classifier needs two classes, vae an autoencoder")
    add("--classifier_steps", type=at_least(1), default=600, help="of each, 32 images per step")
    return parser


# --- images -------------------------------------------------------------------------------------


@dataclasses.dataclass
class Labelled:
    """Pixels, features or statistics of some images; pixels are read like a data.ImageSet."""

    labels: np.ndarray  # [N] class indices
    values: torch.Tensor  # [N, ...] on the CPU; pixels: float32 [N, 1, S, S] in [-1, 1]

    def __len__(self):
        return len(self.labels)

    def images(self, indices):
        """Pixels [B, 1, S, S]."""
        return self.values[indices]

    def subset(self, indices):
        """The Labelled at these indices, or where this mask is true."""
        return Labelled(self.labels[indices], self.values[indices])

    def joined(self, other):
        """This and another one after it."""
        return Labelled(np.concatenate([self.labels, other.labels]),
                        torch.cat([self.values, other.values]))


@dataclasses.dataclass
class Sets:
    """What is compared."""

    samples: Labelled  # or None, if no part needs them
    train: data.ImageSet
    tests: dict  # {HELD_OUT or SITE: ImageSet that classifiers are tested on}
    classes: np.ndarray  # class indices of the samples: only these are compared
    vae: model.AutoencoderKL  # or None
    denoiser: diffusion.Denoiser  # or None, as its scale
    scale: float
    real_classifier: object  # train_classifier on the training images, called with a seed


@torch.no_grad()
def measured(function, images, ctx, vae=None):
    """Labelled values of function(x [B, 1, S, S]) over images, or over their reconstructions."""
    parts = []
    for index in torch.arange(len(images)).split(64):
        x = images.images(index.numpy()).to(ctx.device)
        if vae is not None:
            x = vae.decode(vae.encode(x).mean).clamp(-1, 1)
        parts.append(function(x).float().cpu())
    return Labelled(images.labels, torch.cat(parts))


def as_saved(x):
    """Images [B, 1, S, S] in [-1, 1] with 8 bits per pixel, as in a file."""
    return run.to_uint8(x).float() / 127.5 - 1


def read_samples(folder, class_names, img_size):
    """Labelled pixels of the images CLASS/* and CLASS_NUMBER.* of a folder. img_size None: their
    own. Exits if there are none, or of several sizes, or one cannot be decoded."""
    folder, members = pathlib.Path(folder), []
    paths = [path for pattern in ("*", "*/*") for path in folder.glob(pattern)
             if path.suffix.lower() in decode.EXTENSIONS and path.name != "grid.png"]
    for path in paths:
        name = path.parent.name if path.parent != folder else path.stem.rpartition("_")[0]
        if name in class_names:
            members.append((class_names.index(name), path))
    if not members:
        fail(f"no images in {folder}: name them CLASS_NUMBER.png or put them into folders CLASS, "
             f"with the classes of the data: {', '.join(class_names)}")
    if len(members) < len(paths):
        notice(f"{folder}: {len(paths) - len(members)} images of no class of the data are left out")
    members.sort()
    rows = [data.read_image(path, img_size) for _, path in members]
    if len(sizes := sorted({row.shape[-1] for row in rows})) > 1:
        fail(f"{folder} holds images of {', '.join(map(str, sizes))} pixels: give --img_size")
    return Labelled(np.array([c for c, _ in members]), torch.cat(rows))


def as_many(labels, like, rng, replace=False):
    """Indices of a random choice from `labels` [N]: as many of each class as in `like`, or all."""
    chosen = [np.zeros(0, int)]
    for c in np.intersect1d(like, labels):
        members, count = np.flatnonzero(labels == c), (like == c).sum()
        chosen.append(rng.choice(members, count) if replace else rng.permutation(members)[:count])
    return np.concatenate(chosen)


def proportional(held_out, *others):
    """Labels in the class proportions of the labels `held_out`, the most that each of `others` has.
    Else another mixture of classes would count as a difference between images."""
    classes, counts = np.unique(held_out, return_counts=True)
    there = np.min([(labels[:, None] == classes).sum(0) for labels in others], 0)
    scale = (there / counts).min(initial=np.inf)
    return np.repeat(classes, np.maximum(1, scale * counts).astype(int))


# --- classifiers --------------------------------------------------------------------------------


def build_classifier(num_classes, in_channels=1):
    """Small CNN: images [B, in_channels, S, S] to logits [B, num_classes]; [:-1]: to features."""
    layers, ch = [], in_channels
    for width in (16, 32, 64, 64):
        layers += [nn.Conv2d(ch, width, 4, stride=2, padding=1),
                   nn.GroupNorm(8, width) if layers else nn.Identity(), nn.LeakyReLU(0.2)]
        ch = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(ch, num_classes))


def shrunk(x):
    """Images [N, 1, H, W] averaged down to the classifier's size, [N, 1, 48, 48]."""
    return F.interpolate(x, CLASSIFIER_SIZE, mode="area")


def with_fine_part(x):
    """Images [N, 1, H, W], and as a second channel their high-frequency residual, amplified
    eightfold: blur and noise live there, and it is faint."""
    fine = metrics.fine_part(x)
    return torch.cat([x[..., :fine.shape[2], :fine.shape[3]], 8 * fine], 1)


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


def train_classifier(images, vary, shape, seed, args, ctx, label):
    """Train build_classifier(*shape) on Labelled pixels, with classes balanced in each batch and
    images varied by vary(x, rng). label: what the images are, for the progress line."""
    torch.manual_seed(seed)
    net = build_classifier(*shape).to(ctx.device)
    rng = torch.Generator().manual_seed(seed)
    steps, labels = args.classifier_steps, torch.from_numpy(images.labels)
    members = [(labels == c).nonzero()[:, 0] for c in labels.unique()]
    count = 32 // len(members) or 1  # of each class
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=0.05, fused=True)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    progress = run.Progress(f"training a classifier on {label}", steps)
    for step in range(steps):
        index = torch.cat([m[torch.randint(len(m), (count,), generator=rng)] for m in members])
        logits = net(vary(images.values[index].to(ctx.device), rng))
        F.cross_entropy(logits, labels[index].to(ctx.device)).backward()
        optimizer.step()
        decay.step()
        optimizer.zero_grad()
        progress.update(step + 1)
    return net.eval().requires_grad_(False)


# --- parts of the report ------------------------------------------------------------------------


def distance(samples, pool, held_out, seed):
    """{"num": N, "fid", "baseline", "bootstrap_std"} of samples against held-out images, given a
    pool of training images; all are Labelled features. FID falls with the number of images, so
    `fid` and `baseline`, that of the pool, are of N images, as many of each class, averaged over
    DRAWS choices. `bootstrap_std`: of the difference of two such sets, over bootstraps of all."""
    like = proportional(held_out.labels, samples.labels, pool.labels)
    found = {"num": len(like)}
    for name, of in (("fid", samples), ("baseline", pool)):
        draws = [as_many(of.labels, like, np.random.default_rng([seed, i])) for i in range(DRAWS)]
        found[name] = float(np.mean([
            metrics.frechet_distance(of.values[draw], held_out.values) for draw in draws]))
    gaps = []
    for i in range(BOOTSTRAPS):
        rng = np.random.default_rng([seed, 1, i])
        real, one, other = (of.values[as_many(of.labels, labels, rng, replace=True)] for
                            of, labels in ((held_out, held_out.labels), (pool, like), (pool, like)))
        gaps.append(metrics.frechet_distance(one, real) - metrics.frechet_distance(other, real))
    return found | {"bootstrap_std": float(np.std(gaps, ddof=1))}


def measure_distances(sets, args, ctx):
    """{"groups": {space: {group: distance}}} of all classes together, and of each."""
    names, networks = sets.train.class_names, {}
    if "classifier" in args.features and len(np.unique(sets.train.labels)) > 1:
        to_features = sets.real_classifier(args.seed)[:-1]
        networks["classifier"] = lambda x: to_features(shrunk(x))
    if "vae" in args.features and sets.vae is not None:
        networks["vae"] = lambda x: F.adaptive_avg_pool2d(sets.vae.encode(x).mean, 4).flatten(1)
    if not networks:
        notice("no distances: classifier needs two classes, vae needs --ae_ckpt_path")
    like = np.repeat(sets.samples.labels, DRAWS)
    pool = sets.train.subset(as_many(sets.train.labels, like, np.random.default_rng(args.seed)))
    groups = {"all": sets.classes} | {names[c]: [c] for c in sets.classes}
    found = {}
    for space, network in networks.items():
        rows = [measured(network, of, ctx) for of in (sets.samples, pool, sets.tests[HELD_OUT])]
        found[space] = {group: distance(
            *(of.subset(np.isin(of.labels, classes)) for of in rows), args.seed)
            for group, classes in groups.items()}
    return {"groups": found}


def compared(images, sets):
    """The images of the compared classes."""
    return images.subset(np.isin(images.labels, sets.classes))


def in_proportion(sets):
    """Sets of the compared classes alone, with samples and training images in the proportions of
    the held-out ones."""
    held_out = compared(sets.tests[HELD_OUT], sets)
    samples, train = (of.subset(np.sort(as_many(
        of.labels, proportional(held_out.labels, of.labels), np.random.default_rng(0))))
        for of in (sets.samples, sets.train))
    return dataclasses.replace(sets, samples=samples, train=train, tests={HELD_OUT: held_out})


def measure_power(sets, args, ctx):
    """{"power": {row: {"num": N, octave: mean power relative to held-out images}}}. `decoded`,
    their reconstructions, have about as much as samples can."""
    sets = in_proportion(sets)
    held_out = sets.tests[HELD_OUT]
    images = {"samples": sets.samples, "baseline": sets.train, "held_out": held_out}
    found = {row: measured(metrics.octave_power, of, ctx) for row, of in images.items()}
    if sets.vae is not None:
        found["decoded"] = measured(metrics.octave_power, held_out, ctx, sets.vae)
    octaves = [f"{low:g}-{high:g}" for low, high in metrics.octaves(args.img_size)]
    unit = found["held_out"].values.mean(0).clamp_min(1e-12)
    return {"power": {row: {"num": len(of), **dict(zip(
        octaves, (of.values.mean(0) / unit).tolist(), strict=True))} for row, of in found.items()}}


def halves(images, seed):
    """Two random halves of images, at most MOST_FOR_C2ST each, both with every class."""
    order = np.random.default_rng(seed).permutation(len(images))[:2 * MOST_FOR_C2ST]
    order = order[np.argsort(images.labels[order], kind="stable")]
    return images.subset(order[::2]), images.subset(order[1::2])


def c2st(sets, args, ctx):
    """{"c2st_by_size": {row: {size: (AUROC, low, high)}}}: classifier two-sample test (Lopez-Paz &
    Oquab 2017), at 95 % confidence. Can a network tell the samples, or real images in their place
    (baseline), or reconstructions (decoded), from unseen real images?"""
    def pixels(images, vae=None):
        return [measured(as_saved, half, ctx, vae) for half in halves(images, args.seed)]

    def trial(row, size, real, to_train, to_test):
        real, to_train, to_test, others = (
            Labelled(of.labels, F.interpolate(of.values, size, mode="area"))
            for of in (real, to_train, to_test, unseen))
        both, tested = real.joined(to_train), others.joined(to_test)
        both.labels = (np.arange(len(both)) >= len(real)).astype(np.int64)
        net = train_classifier(both, lambda x, rng: with_fine_part(random_crop(x, rng)), (2, 2),
                               args.seed, args, ctx, f"real images and {row} of {size} px")
        truth = torch.arange(len(tested)) >= len(others)
        logits = measured(lambda x: net(with_fine_part(x)), tested, ctx).values
        return metrics.auroc_interval(metrics.auroc(logits, truth), truth)

    sets = in_proportion(sets)
    first, second = pixels(sets.train)
    real, unseen = first.joined(second), Labelled.joined(*pixels(sets.tests[HELD_OUT]))
    rows = {"samples": (real, *pixels(sets.samples)),
            "baseline": (first, *halves(second, args.seed))}
    if sets.vae is not None:
        decoded = [Labelled.joined(*pixels(of, sets.vae))
                   for of in (sets.train, sets.tests[HELD_OUT])]
        rows["decoded"] = (real, *decoded)
    side = args.img_size
    smaller = [2**k for k in range(4, side.bit_length()) if 2**k < side]
    return {"c2st_by_size": {row: {
        str(size): trial(row, size, *of)
        for size in [*(smaller if row != "baseline" else ()), side]} for row, of in rows.items()}}


def find_copies(sets, args, ctx):
    """{"copies": result of metrics.CopyTest and its power}, and a picture of the ten samples that
    are closest to a training image."""
    cached = data.cached_thumbnails(sets.train, pathlib.Path(args.output_root, "cache"), ctx)
    test = metrics.CopyTest(torch.from_numpy(cached.rows(sets.train.rows)))
    found = test.search(measured(data.thumbnails, sets.samples, ctx).values)
    ratio = found.pop("ratio")
    closest = ratio.argsort()[:10].numpy()
    originals = found.pop("nearest").numpy()[closest]
    run.save_grid(args.out_dir / "evaluation_pairs.png",
                  [sets.samples.images(closest), sets.train.images(originals)],
                  ["the ten samples closest to a training image", "that training image"])
    planted = {change: test.search(data.thumbnails(x))["ratio"] < test.threshold
               for change, x in planted_copies(sets, args, ctx).items()}
    cases = [(share, PLAIN) for share in (0.02, 0.05, 0.1)]
    cases += [(0.05, change) for change in planted if change != PLAIN]
    return {"copies": found | {"power": {
        f"{100 * share:g} %, {change}": test.power(
            ratio < test.threshold, planted[change], share, args.seed)
        for share, change in cases}}}


def planted_copies(sets, args, ctx):
    """{what has been done to them: images [N, 1, S, S]}: training images as the autoencoder, if
    there is one, gives them back, each changed in one way."""
    pool = compared(sets.train, sets)
    x = measured(as_saved, pool.subset(data.spread(len(pool), MOST_MEMBERS)), ctx, sets.vae).values
    rng = ctx.generator(args.seed, "planted")
    other = sets.samples.images(torch.randint(len(sets.samples), (len(x),), generator=rng))
    up_to = torch.rand(len(x), data.AUG_DIM, generator=rng) * 2 - 1
    by = {  # in units of data.AUG_RANGES: shifts, zoom, angle, contrast, brightness
        PLAIN: up_to * torch.tensor([0.38, 0.38, 0, 0, 1, 1]),
        "exposed otherwise": up_to * torch.tensor([0, 0, 0, 0, 1, 1]),
        "zoomed by 5 %": up_to.sign() * torch.tensor([0, 0, 0.625, 0, 0, 0]),
        "rotated by 3 degrees": up_to.sign() * torch.tensor([0, 0, 0, 0.58, 0, 0])}
    found = {"mirrored": x.flip(3), "blended half and half with a sample": (x + other) / 2}
    return found | {name: data.augment(x, labels) for name, labels in by.items()}


def tstr(sets, args, ctx):
    """TSTR, train on synthetic and test on real (Esteban et al. 2017), at 95 % confidence:
    {"auroc": {"trained on, tested on": (AUROC, low, high)}, "gain": {tested on: (gain, low,
    high)}}; {} without samples of all classes. The gain is what samples beside real images add to
    as many repeats of these. The intervals of several gains hold together (Bonferroni)."""
    shape = (len(sets.train.class_names),)
    if not 1 < len(sets.classes) == shape[0]:
        return {}
    tests = {where: measured(shrunk, images, ctx)
             for where, images in {**sets.tests, "samples": sets.samples}.items()}
    samples, train = tests["samples"], measured(shrunk, sets.train, ctx)
    repeats = np.concatenate([
        np.resize(np.flatnonzero(train.labels == c), (samples.labels == c).sum())
        for c in np.unique(samples.labels)])
    trained_on = {TSTR: samples, BOTH: train.joined(samples),
                  AGAIN: train.joined(train.subset(repeats))}
    logits = {(REAL, "samples"): []} | {
        (name, where): [] for where in sets.tests for name in (REAL, *trained_on)}
    for seed in range(args.seed, args.seed + TRAININGS):
        nets = {name: train_classifier(of, augment, shape, seed, args, ctx, name)
                for name, of in trained_on.items()}
        nets[REAL] = sets.real_classifier(seed)
        for (name, where), found in logits.items():
            found.append(measured(nets[name], tests[where], ctx).values)
    truth = {where: torch.from_numpy(of.labels) for where, of in tests.items()}
    gains = {where: metrics.auroc_gain(logits[BOTH, where], logits[AGAIN, where], truth[where],
                                       args.seed, len(sets.tests)) for where in sets.tests}
    return {"gain": gains, "auroc": {
        f"{name}, tested on {where}": metrics.mean_auroc(found, truth[where])
        for (name, where), found in logits.items()}}


def denoising_errors(images, conditions, sets, args, ctx, label):
    """Loss of the model on each of N images under classes `conditions` [N, K] at EVALUATIONS times,
    spread evenly, and noises, the same for all images and classes: float32 [N, K, EVALUATIONS]."""
    t = (torch.arange(EVALUATIONS, device=ctx.device) + 0.5) / EVALUATIONS
    rng = ctx.generator(args.seed, "denoising errors")
    noise = torch.randn(EVALUATIONS, *sets.vae.latent_shape, generator=rng).to(ctx.device)
    latents = measured(lambda x: sets.vae.encode(x).mean * sets.scale, images, ctx).values
    errors = torch.zeros(*conditions.shape, EVALUATIONS)
    progress = run.Progress(label, conditions.size)
    for i, (n, k) in enumerate(np.ndindex(conditions.shape)):
        x0, y = latents[n].to(ctx.device).expand_as(noise), int(conditions[n, k])
        y = torch.full((EVALUATIONS,), y, device=ctx.device)
        errors[n, k] = memorisation.losses(sets.denoiser, (x0, t, noise, y), ctx)
        progress.update(i + 1)
    return errors


def diffusion_classifier(sets, args, ctx):
    """{"diffusion_classifier": {judge, tested on: (AUROC, low, high)}}: the model itself as a
    classifier, by its denoising error under each class (Li et al. 2023), beside classifiers trained
    on real images, at 95 % confidence; empty without several classes."""
    found = {}
    for where, images in sets.tests.items() if len(sets.classes) > 1 else ():
        images = compared(images, sets)
        truth = torch.from_numpy(np.searchsorted(sets.classes, images.labels))
        errors = denoising_errors(images, np.tile(sets.classes, (len(images), 1)), sets, args, ctx,
                                  f"denoising {where}")
        errors -= errors.mean(1, keepdim=True)
        errors /= errors.std((0, 1)).clamp_min(1e-12)  # each time counts alike
        area = metrics.auroc(-errors.mean(2), truth)
        x = measured(shrunk, images, ctx)
        logits = [measured(sets.real_classifier(seed), x, ctx).values[:, sets.classes]
                  for seed in range(args.seed, args.seed + TRAININGS)]
        found |= {f"{DENOISING}, tested on {where}": metrics.auroc_interval(area, truth),
                  f"{REAL}, tested on {where}": metrics.mean_auroc(logits, truth)}
    return {"diffusion_classifier": found}


def membership(sets, args, ctx):
    """{"membership": {"loss", "control": (AUROC, low, high)}}: does the model's loss tell training
    images from held-out ones? The control is the autoencoder's error, which tells them apart as far
    as the two splits differ, or as it has learnt them by heart itself."""
    def reconstruction(x):
        return (sets.vae.decode(sets.vae.encode(x).mean) - x).square().mean((1, 2, 3))

    held_out = compared(sets.tests[HELD_OUT], sets)
    like, rng = proportional(held_out.labels, sets.train.labels), np.random.default_rng(args.seed)
    chosen = rng.permutation(as_many(sets.train.labels, like, rng))[:MOST_MEMBERS]
    groups = (held_out, sets.train.subset(chosen))
    truth = torch.arange(len(held_out) + len(chosen)) >= len(held_out)
    losses = [denoising_errors(of, of.labels[:, None], sets, args, ctx, f"loss of {len(of)} images")
              for of in groups]
    errors = [measured(reconstruction, of, ctx).values for of in groups]
    found = {}
    for name, parts in {"loss": losses, "control": errors}.items():
        own = torch.cat(parts).view(len(truth), -1).mean(1, keepdim=True)
        area = metrics.auroc(own * torch.tensor([1, -1]), truth)
        found[name] = metrics.auroc_interval(area, truth)
    return {"membership": found}


PARTS = {"distances": measure_distances, "power": measure_power, "c2st": c2st,
         "copies": find_copies, "tstr": tstr, "classifier": diffusion_classifier,
         "membership": membership}
OF_THE_MODEL = ("classifier", "membership")  # they take a model, and no samples


# --- verdicts -----------------------------------------------------------------------------------


def verdict(metric, value, target, bad, watch, meaning, advice):
    """verdicts.Verdict whose level follows from two conditions; NaN is bad."""
    level = "bad" if bad or math.isnan(value) else "watch" if watch else "ok"
    return verdicts.Verdict(metric, level, f"{value:.3f} ({target})", meaning, advice)


def judge(report):
    """Yield verdicts.Verdicts on what nobody should overlook in a report."""
    less = verdicts.less_guidance(report.get("guidance_scale", 1.0))
    if copies := report.get("copies"):
        likely = copies["probability"] >= metrics.BY_CHANCE
        yield verdict(
            "copies/share", copies["share"], f"{copies['expected']:.3f} by chance",
            not likely and copies["share"] > 0.2, not likely, "Share of samples closer to a "
            "training image than these are to one another; probability of as many by chance: "
            f"{copies['probability']:.2g}.",
            "Look at the pairs. Train less or on more images; do not publish copies of patients.")
        found = copies["power"][f"5 %, {PLAIN}"]
        yield verdict(
            "copies/power", found, "over 0.5", False, found < 0.5, "The search would have found "
            f"5 % copies in {100 * found:.0f} % of cases.",
            "Too few images to say: raise --num_samples, or add training images.")
    for space, groups in report.get("groups", {}).items():
        fid, baseline, std = (groups["all"][n] for n in ("fid", "baseline", "bootstrap_std"))
        excess = (fid - baseline) / max(std, 1e-9)
        yield verdict(
            f"fid ({space})", fid, f"baseline {baseline:.3f}", not excess < 10, not excess < 3,
            f"FID to held-out images, {excess:.1f} standard deviations above baseline.",
            f"Look at power and at the grid; {less}.")
    if "power" in report:
        ratios = [value for name, value in report["power"]["samples"].items() if name != "num"]
        furthest = max(ratios, key=lambda ratio: abs(math.log(max(ratio, 1e-6))))
        yield from verdicts.health({metrics.POWER: furthest})
    if sizes := report.get("c2st_by_size"):
        *_, baseline = sizes["baseline"].values()
        *_, (value, low, _) = sizes["samples"].values()  # at full size
        rows = "; ".join(f"{row} " + ", ".join(f"{area:.2f}" for area, _, _ in of.values())
                         for row, of in sizes.items())
        yield verdict(
            "two-sample", value, f"baseline {baseline[0]:.2f}", False,
            value > 0.9 or low > max(0.6, baseline[0]),
            "AUROC of a network that tells samples (or real images, or their reconstructions) from "
            f"held-out images by their pixels, at {', '.join(sizes['samples'])} px: {rows}.",
            "Look at power and at the grid. If decoded is as high, improve the autoencoder first.")
    if "auroc" in report:
        value, low, high = report["auroc"][ON_SAMPLES]
        real_value, _, real_high = report["auroc"][f"{REAL}, tested on {HELD_OUT}"]
        advice = "Below 0.5 the labels are swapped. Near it: train longer, raise --guidance_scale."
        if low > real_high:
            advice = f"Clearer cases than real ones are caricatures: {less}."
        yield verdict(
            "class fidelity", value, f"real images {real_value:.2f}", high < 0.5,
            low <= 0.5 or low > real_high,
            "AUROC on samples of a classifier trained on real images.", advice)
    for where, (value, low, high) in report.get("gain", {}).items():
        benefit = "useful" if low > 0 else "harmful" if high < 0 else "of no proven use"
        yield verdict(
            f"gain, {where}", value, f"{low:.3f} to {high:.3f}", False, high < 0,
            "AUROC gained by training on real images and samples instead of repeated real images: "
            f"{benefit}.", "Do not train on them: look at class fidelity and at the distances.")
    if areas := report.get("diffusion_classifier"):
        value, low, high = areas[f"{DENOISING}, tested on {HELD_OUT}"]
        real_value, _, _ = areas[f"{REAL}, tested on {HELD_OUT}"]
        yield verdict(
            "diffusion classifier", value, f"CNN {real_value:.2f}", high < 0.5, low <= 0.5,
            f"AUROC ({low:.2f} to {high:.2f}) on held-out images of the model's own error under "
            "each class: its labels, judged by no other network.",
            "Below 0.5 the labels are swapped. Near it they are not used: train longer.")
    if areas := report.get("membership"):
        value, low, high = areas["loss"]
        _, _, most = areas["control"]
        yield verdict(
            "membership", value, f"at most {most:.2f}, of the control", low > most, False,
            f"AUROC ({low:.2f} to {high:.2f}) of telling training images from held-out ones by the "
            "model's loss.", "It knows patients by heart: take best.pt, or train for fewer passes. "
            "Do not publish this checkpoint.")


# --- the stage ----------------------------------------------------------------------------------


def main(argv=None):
    args = parse_settings(build_parser(), argv)
    ctx = dist.setup(args)
    if ctx.world_size > 1:
        fail("evaluate.py runs in one process: start it with python, not torchrun")
    if bool(args.ckpt) == bool(args.samples_dir):
        fail("give either --ckpt=runs/ldm_.../ckpts/best.pt or --samples_dir=FOLDER to measure")
    if not args.ckpt and not args.data_root and not args.img_size:
        fail("without --data_root the samples are compared with the phantom set: give --img_size")

    known = [name for name in PARTS if args.ckpt or name not in OF_THE_MODEL]
    parts = list_items(args.parts) if args.parts else known
    if unknown := [name for name in parts if name not in known]:
        fail(f"no part {', '.join(unknown)}: --parts takes {', '.join(known)}")

    # --- what is measured: a model, or a folder of images ---
    report = {name: getattr(args, name) for name in (
        "split", "seed", "test_root", "features", "classifier_steps")}
    denoiser = samples = scale = None
    if args.ckpt:
        denoiser, vae, checkpoint, requests = sample.prepare_sampling(args, ctx)
        data.adopt_settings(args, checkpoint["args"], f"the model {args.ckpt}")
        class_names, labels = checkpoint["class_names"], np.array([c for c, _ in requests])
        scale = checkpoint["latent_scale_factor"]
        report |= {name: getattr(args, name) for name in sample.SAMPLING_SETTINGS}
        report |= {"step": checkpoint["step"], "ckpt": args.ckpt,
                   "ckpt_sha256": checkpoint["sha256"], "vae_sha256": checkpoint["vae_sha256"]}
    else:
        class_names = data.scan(data.image_root(args), args.task, "train").class_names
        samples = read_samples(args.samples_dir, class_names, args.img_size)
        args.img_size, labels = samples.values.shape[-1], samples.labels
        vae, _, report["vae_sha256"] = (sample.load_autoencoder(args.ae_ckpt_path, ctx)
                                        if args.ae_ckpt_path else (None, None, None))
        digest = hashlib.sha256(samples.values.numpy().tobytes()).hexdigest()
        report |= {"samples_dir": args.samples_dir, "samples_sha256": digest}

    # --- real images of that size: before sampling, so that mistakes show at once ---
    train = data.open_images(args, ctx, "train", class_names=class_names)
    report["data"] = train.summary
    if args.ckpt:
        meta = read_json(run.run_folder(args.ckpt) / "run_meta.json")
        data.notice_changes(meta.get("data"), train, "the model was trained")
    tests = {HELD_OUT: train if args.split == "train" else data.open_images(
        args, ctx, args.split, train=train)}
    if args.test_root:
        elsewhere = argparse.Namespace(**vars(args) | {"data_root": args.test_root})
        tests[SITE] = data.open_images(elsewhere, ctx, args.split, train=train)
    report["test_data"] = {where: images.summary for where, images in tests.items()}
    classes = np.unique(labels)
    few = [class_names[c] for c in classes if min((of == c).sum() for of in (
        labels, train.labels, *(images.labels for images in tests.values()))) < FEWEST]
    if few:
        fail(f"under {FEWEST} samples, or images to train and to test on, of class "
             f"{', '.join(few)}: raise --num_samples, add images, or leave it out of --classes")

    @functools.cache
    def real_classifier(seed):
        return train_classifier(measured(shrunk, train, ctx), augment, (len(class_names),), seed,
                                args, ctx, "real images")

    # --- the parts of the report ---
    args.out_dir = make_folder(args.out_dir or (run.run_folder(args.ckpt) if args.ckpt else
                               run.new_folder(args.output_root, f"evaluation_{args.task.lower()}")))
    report["num_samples"] = {class_names[c]: int((labels == c).sum()) for c in np.unique(labels)}
    path = args.out_dir / "evaluation.json"
    settings, before = json.loads(json.dumps(report)), read_json(path)
    changed = [name for name, value in settings.items() if before.get(name) != value]
    if args.parts and before and changed:
        fail(f"{path} has parts of other settings ({', '.join(changed)}), which would be lost: "
             "give another --out_dir, or leave --parts out")
    report = report if changed else before | report
    if args.ckpt and not set(parts) <= {*OF_THE_MODEL}:
        batches = sample.sample_batches(denoiser, vae, scale, requests, class_names, args, ctx,
                                        args.batch_size, f"sampling ({args.sampler})")
        samples = Labelled(labels, torch.cat([as_saved(x) for _, _, x in batches]))
    sets = Sets(samples, train, tests, classes, vae, denoiser, scale, real_classifier)
    for name in parts:
        start = time.perf_counter()
        report |= PARTS[name](sets, args, ctx)
        print(f"{name}: {time.perf_counter() - start:.0f} s")

    found = [*judge(report)]
    for name, value in leaves({k: v for k, v in report.items() if k != "verdicts"}):
        print(f"{name:<56} {show(value)}")
    print(verdicts.format_verdicts(found))
    write_json(path, {**report, "verdicts": [v._asdict() for v in found]})
    print(f"written: {path}")


if __name__ == "__main__":
    main()
