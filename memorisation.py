"""How much of its training images does a diffusion model know by heart, while it trains?

Two answers at every evaluation of train_ldm.py: the loss on validation images beside that on
training images, and copies of training images among the samples.
"""
import math
from typing import NamedTuple

import numpy as np
import torch

import data
import model
from lib import metrics
from lib.files import notice

PAIRS = 512  # of an image and a time, whose mean loss val/loss is
WINDOW = 8  # evaluations whose samples are searched for copies together
MOST_SEARCHED = 1000  # training images that samples are compared with
# Passes over the training images after which no model of 25 to 667 of them gave any back; the first
# copies came after 169 to 426 (docs/log.md, "the law of copying").
SAFE_PASSES = 120


@torch.no_grad()
def fixed_inputs(latents, index, scale, args, ctx):
    """(x0, t, noise, y) of the images `index` of a data.LatentSet, as Denoiser.forward takes them:
    about PAIRS, the same at each evaluation, with times spread evenly over 0 to 1."""
    posterior = latents.posterior(index)
    places = torch.arange(len(index)).repeat(max(1, PAIRS // len(index)))
    rng = ctx.generator(args.seed, "validation")
    t = (torch.randperm(len(places), generator=rng) + 0.5) / len(places)
    noise = torch.randn(2, len(places), *posterior[0].shape[1:], generator=rng).to(ctx.device)
    places = places.to(ctx.device)
    x0 = model.Posterior(*(part[places] for part in posterior)).sample(noise[0]) * scale
    y = torch.from_numpy(latents.images.labels[index]).to(ctx.device)
    return x0, t.to(ctx.device), noise[1], y[places]


@torch.no_grad()
def losses(denoiser, inputs, ctx):
    """Loss [B] of inputs as Denoiser.forward takes them."""
    # A network compiled for sampling would be compiled again for each size of these.
    stance = "force_eager" if ctx.compile else "default"
    with ctx.autocast(), torch.compiler.set_stance(stance):
        return denoiser(*inputs)


def mean_loss(denoiser, inputs, ctx):
    """Mean of the losses of fixed_inputs, the same on all ranks."""
    sums = torch.zeros(2, dtype=torch.float64)
    for part in torch.arange(ctx.rank, len(inputs[0]), ctx.world_size).split(64):
        part = part.to(ctx.device)
        loss = losses(denoiser, [values[part] for values in inputs], ctx)
        sums += torch.tensor([loss.double().sum().item(), len(part)])
    ctx.average(sums)
    return (sums[0] / sums[1]).item()


class Best(NamedTuple):
    """The evaluation with the lowest val/loss so far, whose averaged weights are ckpts/best.pt."""

    loss: float = math.inf
    step: int = 0
    epoch: int = 0
    since: int = 0  # evaluations that came after it


class MemorisationMonitor:
    """Measures what a model knows of its training images only; nothing in overfit modes, where
    memorising is the goal. best: Best so far; recent: thumbnails [N, 1024] of the last evaluations'
    samples. Both are part of a checkpoint."""

    def __init__(self, latents, vae, vae_sha256, scale, cache, args, ctx):
        """latents: data.LatentSet of the training images; cache: folder of the caches."""
        self.ctx, self.num_val = ctx, 0
        self.val = self.train = self.copy_test = None
        self.best, self.recent = Best(), torch.zeros(0, data.THUMBNAIL_SIZE**2)
        self.val_data = None  # ImageSet.summary of the validation images
        if args.overfit_k:
            return
        images = latents.images
        some = images.rows[data.spread(len(images), MOST_SEARCHED)]
        thumbnails = data.cached_thumbnails(images, cache, ctx).rows(some)
        self.copy_test = metrics.CopyTest(torch.from_numpy(thumbnails))
        val = data.open_images(args, ctx, "val", optional=True, train=images)
        if val is None:
            return
        self.num_val, self.val_data = len(val), val.summary
        val_latents = data.LatentSet(val, vae, vae_sha256, cache, ctx, args.cache_latents)
        index = data.spread(len(val), PAIRS)
        matched = []  # as many training images, with the same classes
        for c, count in zip(*np.unique(val.labels[index], return_counts=True), strict=True):
            members = np.flatnonzero(images.labels == c)
            matched.append(members[data.spread(len(members), count)])
        self.val = fixed_inputs(val_latents, index, scale, args, ctx)
        self.train = fixed_inputs(latents, np.concatenate(matched), scale, args, ctx)

    def state(self):
        """What belongs in a checkpoint."""
        return {"best": self.best._asdict(), "recent": self.recent, "val_data": self.val_data}

    def load(self, checkpoint):
        """Go on from a checkpoint. Losses on other validation images cannot be compared."""
        self.recent = checkpoint["recent"]
        if checkpoint.get("val_data", self.val_data) == self.val_data:
            self.best = Best(**checkpoint["best"])
        else:
            notice("the validation images have changed: best.pt is chosen anew")

    def measure(self, denoiser, x, step, epoch):
        """Metrics val/* and copies/* of an evaluation with samples x [N, 1, S, S]; updates `best`.
        All ranks must call it."""
        if self.copy_test is None:
            return {}
        values = self.copies(x)
        if self.val is not None:
            values |= {"val/loss": mean_loss(denoiser, self.val, self.ctx),
                       "val/train_loss": mean_loss(denoiser, self.train, self.ctx)}
            later = self.best._replace(since=self.best.since + 1)
            better = values["val/loss"] < self.best.loss
            self.best = Best(values["val/loss"], step, epoch) if better else later
        return values

    def copies(self, x):
        """Metrics copies/* once the samples x [N, 1, S, S] have joined the recent ones."""
        rows = data.thumbnails(x)
        self.recent = torch.cat([self.recent, rows])[-WINDOW * len(rows):]
        found = self.copy_test.search(self.recent)
        return {f"copies/{name}": found[name] for name in ("share", "expected", "probability")}
