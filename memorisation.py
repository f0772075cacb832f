"""How much of its training images does a diffusion model know by heart, while it trains?

Two answers, at every evaluation of train_ldm.py: the loss on validation images beside that on
training images, and copies of training images among the samples.
"""
import math
from typing import NamedTuple

import numpy as np
import torch

import data
import experiment
import metrics
import model

PAIRS = 512  # of an image and a time, which val/loss is the mean of
WINDOW = 8  # evaluations whose samples are searched for copies together
MOST_SEARCHED = 1000  # training images among which they are looked for


class FixedInputs(NamedTuple):
    """Inputs of Denoiser.forward that are the same at each evaluation, so that their loss changes
    with the weights alone."""

    x0: torch.Tensor  # [N, C, h, w]
    t: torch.Tensor  # [N]
    noise: torch.Tensor  # [N, C, h, w]
    y: torch.Tensor  # [N]


@torch.no_grad()
def fixed_inputs(latents, index, scale, args, procs):
    """FixedInputs of the images `index` of a data.LatentSet: about PAIRS, their times evenly spread
    from 0 to 1, all from args.seed alone."""
    parts = [latents.posterior(index[i:i + 64]) for i in range(0, len(index), 64)]
    posterior = [torch.cat(part) for part in zip(*parts, strict=True)]
    places = torch.arange(len(index)).repeat(max(1, PAIRS // len(index)))
    rng = experiment.generator("cpu", args.seed, "validation")
    t = (torch.randperm(len(places), generator=rng) + 0.5) / len(places)
    noise = torch.randn(2, len(places), *posterior[0].shape[1:], generator=rng).to(procs.device)
    places = places.to(procs.device)
    x0 = model.Posterior(*(part[places] for part in posterior)).sample(noise[0]) * scale
    y = torch.from_numpy(latents.images.labels[index]).to(procs.device)
    return FixedInputs(x0, t.to(procs.device), noise[1], y[places])


@torch.no_grad()
def mean_loss(denoiser, inputs, procs):
    """Loss of FixedInputs, the same on all ranks."""
    sums = torch.zeros(2, dtype=torch.float64)
    for part in torch.arange(procs.rank, len(inputs.t), procs.world_size).split(64):
        part = part.to(procs.device)
        # What is compiled for sampling would be compiled again for each of these sizes.
        stance = "force_eager" if procs.compile else "default"
        with procs.autocast(), torch.compiler.set_stance(stance):
            loss = denoiser(*(values[part] for values in inputs))
        sums += torch.tensor([loss.double().sum().item(), len(part)])
    experiment.average(procs, sums)
    return (sums[0] / sums[1]).item()


class Best(NamedTuple):
    """The evaluation with the lowest val/loss so far, whose averaged weights are ckpts/best.pt."""

    loss: float = math.inf
    step: int = 0
    epoch: int = 0
    since: int = 0  # evaluations that came after it

    def after(self, val_loss, step, epoch):
        """Best once an evaluation has found this val/loss."""
        if val_loss < self.loss:
            return Best(val_loss, step, epoch)
        return self._replace(since=self.since + 1)


class Watch:
    """What a model knows of its training images alone: their loss beside that of validation images,
    and copies of them among the samples of the last evaluations. In overfit modes, where that is
    the goal, nothing is measured.

    best: Best so far; recent: thumbnails [N, 1024] of those samples. Both are part of a checkpoint.
    """

    def __init__(self, latents, vae, vae_sha256, scale, folder, args, procs):
        """latents: data.LatentSet of the training images; folder: of the caches."""
        self.procs, self.num_val, self.val, self.train = procs, 0, None, None
        self.best, self.recent = Best(), torch.zeros(0, data.THUMBNAIL_SIZE**2)
        self.images, self.copy_test, self.off = latents.images, None, args.overfit_k > 0
        if self.off:
            return
        self.thumbnails = data.cached_thumbnails(self.images, folder, procs)
        if args.split == "val":
            return  # it was trained on
        val = data.open_images(args, procs, "val", optional=True, train=self.images,
                               pixels=not args.cache_latents)
        if val is None:
            return
        self.num_val = len(val)
        of_val = data.LatentSet(val, vae, vae_sha256, folder, procs, args.cache_latents)
        index = np.linspace(0, len(val) - 1, min(len(val), PAIRS)).astype(int)
        likewise = []  # as many training images, with the same classes
        for c, count in zip(*np.unique(val.labels[index], return_counts=True), strict=True):
            members = np.flatnonzero(self.images.labels == c)
            spread = np.linspace(0, len(members) - 1, min(count, len(members)))
            likewise.append(members[spread.astype(int)])
        self.val = fixed_inputs(of_val, index, scale, args, procs)
        self.train = fixed_inputs(latents, np.concatenate(likewise), scale, args, procs)

    def state(self):
        """What belongs into a checkpoint."""
        return {"best": self.best._asdict(), "recent": self.recent}

    def load(self, checkpoint):
        """Go on from where a checkpoint was."""
        self.best, self.recent = Best(**checkpoint["best"]), checkpoint["recent"]

    def measure(self, denoiser, x, step, epoch):
        """Metrics of an evaluation with samples x [N, 1, S, S], which `best` takes part in. All
        ranks must call it."""
        if self.off:
            return {}
        found = self.losses(denoiser) | self.copies(x)
        if metrics.VAL in found:
            self.best = self.best.after(found[metrics.VAL], step, epoch)
        return found

    def losses(self, denoiser):
        """{val/loss, val/train_loss}, nothing without validation images. All ranks must call it."""
        if self.val is None:
            return {}
        return {metrics.VAL: mean_loss(denoiser, self.val, self.procs),
                metrics.VAL_TRAIN: mean_loss(denoiser, self.train, self.procs)}

    def copies(self, x):
        """{copies/...} once the samples x [N, 1, S, S] of an evaluation have joined the recent
        ones; nothing for a handful of training images, or none at all."""
        rows = data.thumbnails(x)
        self.recent = torch.cat([self.recent, rows])[-WINDOW * len(rows):]
        if self.copy_test is None:
            some = np.linspace(0, len(self.images) - 1, min(len(self.images), MOST_SEARCHED))
            rows = self.images.rows[some.astype(int)]
            train = torch.zeros(len(rows), data.THUMBNAIL_SIZE**2)
            # In small parts: what a map of a file has touched counts as memory while it lives.
            for i in range(0, len(rows), 64):
                train[i:i + 64] = torch.from_numpy(self.thumbnails.rows(rows[i:i + 64]))
            try:
                self.copy_test = metrics.CopyTest(train)
            except ValueError:  # too few images
                return {}
        found = self.copy_test.search(self.recent)
        return {metrics.COPIES: found["share"], metrics.COPIES_EXPECTED: found["expected"],
                metrics.COPIES_PROBABILITY: found["probability"]}
