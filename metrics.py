"""What is measured about a run, and what the numbers mean.

Reconstruction, diversity, latent statistics, distances between distributions, and the table of
verdicts. Only `psnr`, `ssim` and `ms_ssim` run inside a training step; the rest runs once per
evaluation, in float64 on the CPU, because not every accelerator has float64.
"""
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

# --- reconstruction -----------------------------------------------------------------------------

WINDOW, WINDOW_SIGMA = 11, 1.5  # pixels; Wang et al. 2004, section III-C
C1, C2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2  # (K * L)^2 of the same paper for data range L = 2
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang et al. 2003, 3.2, finest first


def psnr(x, y):
    """Peak signal-to-noise ratio of images [B, 1, H, W] in [-1, 1] (peak-to-peak 2): [B], in dB.

    The mean squared error is at least 1e-10, so equal images score 106 dB and not an infinity that
    would swallow every average it enters.
    """
    mse = (x.float() - y.float()).square().flatten(1).mean(1)
    return 10 * torch.log10(4 / mse.clamp_min(1e-10))


def blur(x):
    """Separable Gaussian filter of x [B, 1, H, W] without padding; small images shrink the window.

    A sum of shifted views and not a convolution: a GPU's convolutions round to TF32 (10-bit
    mantissa), which spoils the difference E[x^2] - E[x]^2 that SSIM lives on. The compiler fuses
    such a sum, and autocast leaves it in float32.
    """
    size = min(WINDOW, *x.shape[2:])
    centre = (size - 1) / 2
    weights = [math.exp(-((k - centre) / WINDOW_SIGMA) ** 2 / 2) for k in range(size)]
    total = sum(weights)
    for dim in (2, 3):
        length = x.shape[dim] - size + 1
        x = sum(x.narrow(dim, k, length) * (w / total) for k, w in enumerate(weights))
    return x


def ssim_terms(x, y):
    """Mean SSIM and mean contrast-structure factor, [B] each, of images [B, 1, H, W] in [0, 2]."""
    mean_x, mean_y, xx, yy, xy = blur(torch.cat([x, y, x * x, y * y, x * y])).chunk(5)
    var_sum = xx - mean_x.square() + yy - mean_y.square()
    covariance = xy - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + C1) / (mean_x.square() + mean_y.square() + C1)
    contrast_structure = (2 * covariance + C2) / (var_sum + C2)
    full = luminance * contrast_structure
    return full.flatten(1).mean(1), contrast_structure.flatten(1).mean(1)


def ssim(x, y):
    """Structural similarity (Wang et al. 2004, eq. 13) of images [B, 1, H, W] in [-1, 1]: [B].

    At most 1; float32 also under autocast. The luminance term expects intensities from zero
    upwards, so the images are shifted to [0, 2]; the result is that of the same images stored as
    0..255.
    """
    return ssim_terms(x.float() + 1, y.float() + 1)[0]


def ms_ssim(x, y):
    """Multi-scale SSIM (Wang et al. 2003, eq. 7) of images [B, 1, H, W] in [-1, 1]: [B], in (0, 1].

    Uses up to five scales, as many as leave the smallest side at least 11 pixels, with their
    weights renormalised to sum to one; with a single scale it is `ssim`. Float32 also under
    autocast.
    """
    side = min(x.shape[2:])
    scales = sum(side // 2**k >= WINDOW for k in range(len(SCALE_WEIGHTS))) or 1
    weights = [w / sum(SCALE_WEIGHTS[:scales]) for w in SCALE_WEIGHTS[:scales]]
    x, y = x.float() + 1, y.float() + 1
    result = 1.0
    for k, weight in enumerate(weights):
        if k > 0:
            x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
        full, contrast_structure = ssim_terms(x, y)
        term = full if k == scales - 1 else contrast_structure
        # A fractional power of a negative number is NaN, and its slope at zero is infinite.
        result = result * term.clamp_min(1e-4) ** weight
    return result


# --- sharpness ----------------------------------------------------------------------------------


def fine_part(x):
    """What averaging 2 x 2 pixels takes away from images [B, 1, H, W] with even sides: as many."""
    return x - F.interpolate(F.avg_pool2d(x, 2), scale_factor=2)


def even_part(x):
    """Images [B, 1, H, W] without the last row and column of an odd side."""
    return x[..., :x.shape[2] // 2 * 2, :x.shape[3] // 2 * 2]


def detail(x):
    """Root mean square of the fine part of images [B, 1, H, W] in [-1, 1], which blurred images
    lack, with grey from 0 to 1: [B]."""
    return fine_part(even_part(x).float()).square().flatten(1).mean(1).sqrt() / 2


def octaves(side):
    """[(low, high)] in cycles per image of `side` pixels, coarsest first, at least two: each begins
    where the one before ends, from 2 cycles or a little more up to side / 2, the finest there is.
    """
    found = [(side / 8, side / 4), (side / 4, side / 2)]
    while found[0][0] >= 4:
        low, high = found[0]
        found.insert(0, (low / 2, high / 2))
    return found


def octave_power(x):
    """Power of square images [B, 1, S, S] in each of octaves(S): float64 [B, octaves].

    Sum over the frequencies of the octave, of every direction, of |DFT|^2, after the mean is taken
    away and a Hann window put on: without it the edges of an image look like fine detail.
    """
    side = x.shape[-1]
    window = torch.hann_window(side, periodic=False, dtype=torch.float64)
    grey = x.detach().cpu().double()[:, 0]
    grey = (grey - grey.mean((1, 2), keepdim=True)) * window[:, None] * window
    power = torch.fft.fft2(grey).abs().square()
    cycles = torch.fft.fftfreq(side, dtype=torch.float64) * side
    radius = (cycles[:, None].square() + cycles.square()).sqrt()
    return torch.stack([power[:, (radius >= low) & (radius < high)].sum(1)
                        for low, high in octaves(side)], 1)


# --- diversity and latent statistics ------------------------------------------------------------

MSE_MEAN, MSE_STD = "sample_diversity/pairwise_mse_mean", "sample_diversity/pairwise_mse_std"
MSE_MIN, MSE_MAX = "sample_diversity/pairwise_mse_min", "sample_diversity/pairwise_mse_max"
RATIO = "sample_diversity/ratio_to_real"
Z_MEAN, Z_STD = "final_latent_stats/mean", "final_latent_stats/std"
Z_MIN, Z_MAX = "final_latent_stats/min", "final_latent_stats/max"
TARGET_STD = "final_latent_stats/target_std"


def rows64(x):
    """x [N, ...] as a float64 matrix [N, D] on the CPU."""
    return x.detach().cpu().double().reshape(len(x), -1)


def pairwise_mse(z):
    """Mean squared error of all N (N - 1) / 2 pairs in z [N, ...]: dict of mean, std, min and max.

    The standard deviation is the population's, so a single pair has 0. For independent Gaussian
    latents of variance s^2 the mean is 2 s^2. NaN in z gives NaN. Holds one float64 per pair.
    ValueError if N < 2.
    """
    if len(z) < 2:
        raise ValueError(f"pairwise_mse needs at least 2 samples, got {len(z)}")
    rows = rows64(z)
    mse = F.pdist(rows).square() / rows.shape[1]
    return {"mean": mse.mean().item(), "std": mse.std(correction=0).item(),
            "min": mse.min().item(), "max": mse.max().item()}


def sample_diversity(z, labels, class_names, real_pairwise_mse_mean):
    """Pairwise MSE within each class of generated latents, and compared with the training latents.

    z [N, ...] are normalised latents, labels [N] index class_names.
    `sample_diversity/pairwise_mse_*` is the average over the classes with two or more samples,
    `sample_diversity/<class>/pairwise_mse_*` is one class, and `sample_diversity/num_pairs` the
    number of pairs in the largest. real_pairwise_mse_mean is the same mean over training latents;
    if it is None or 0 (one training image), it and the ratio are left out.
    """
    labels = torch.as_tensor(labels, device=z.device)
    result, per_class, num_pairs = {}, [], 0
    for index, name in enumerate(class_names):
        members = z[labels == index]
        if len(members) < 2:
            continue
        stats = pairwise_mse(members)
        per_class.append(stats)
        num_pairs = max(num_pairs, len(members) * (len(members) - 1) // 2)
        for key, value in stats.items():
            result[f"sample_diversity/{name}/pairwise_mse_{key}"] = value
    result["sample_diversity/num_pairs"] = num_pairs
    if per_class:
        for key in per_class[0]:
            average = sum(stats[key] for stats in per_class) / len(per_class)
            result[f"sample_diversity/pairwise_mse_{key}"] = average
    if real_pairwise_mse_mean:
        real = float(real_pairwise_mse_mean)
        result["sample_diversity/real_pairwise_mse_mean"] = real
        if per_class:
            result[RATIO] = result[MSE_MEAN] / real
    return result


def latent_stats(z_unscaled, latent_scale_factor):
    """Statistics over all elements of the unscaled latents [N, ...] that go into the decoder.

    `target_std` = 1 / latent_scale_factor is the standard deviation of training latents in the same
    units.
    """
    z = rows64(z_unscaled)
    return {Z_MEAN: z.mean().item(), Z_STD: z.std(correction=0).item(),
            Z_MIN: z.min().item(), Z_MAX: z.max().item(),
            TARGET_STD: 1 / float(latent_scale_factor)}


# --- distributions ------------------------------------------------------------------------------


def two_feature_sets(a, b, least=2):
    """Both as float64 matrices; ValueError unless they are [N, D] and [M, D] with N, M >= least."""
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < least:
        raise ValueError(f"features must be [N >= {least}, D] and [M >= {least}, D], "
                         f"got {[*a.shape]} and {[*b.shape]}")
    return rows64(a), rows64(b)


def frechet_distance(a, b):
    """FID: Frechet distance of Gaussians fitted to features a [N, D] and b [M, D].

    Heusel et al. 2017, eq. 6: |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) with unbiased
    covariances, rank-deficient ones too. S1 S2 has the eigenvalues of the symmetric
    S1^(1/2) S2 S1^(1/2), so no general matrix root is needed; with fewer samples than D they are
    the squared singular values of the centred a b^T / sqrt((N - 1) (M - 1)), a smaller matrix.
    Biased upwards for few samples: compare only values from equal N and M. NaN if a feature is not
    finite.
    """
    a, b = two_feature_sets(a, b)
    if not (a.isfinite().all() and b.isfinite().all()):
        return math.nan
    dim = a.shape[1]
    if min(len(a), len(b)) < dim:
        centred_a = (a - a.mean(0)) / math.sqrt(len(a) - 1)
        centred_b = (b - b.mean(0)) / math.sqrt(len(b) - 1)
        distance = ((a.mean(0) - b.mean(0)).square().sum() + centred_a.square().sum()
                    + centred_b.square().sum()
                    - 2 * torch.linalg.svdvals(centred_a @ centred_b.T).sum())
        return max(distance.item(), 0.0)
    s1 = torch.cov(a.T).reshape(dim, dim)  # torch.cov drops D = 1
    s2 = torch.cov(b.T).reshape(dim, dim)
    values, vectors = torch.linalg.eigh(s1)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    # Rounding can leave some eigenvalues below zero.
    product = torch.linalg.eigvalsh(root @ s2 @ root).clamp_min(0)
    means = (a.mean(0) - b.mean(0)).square().sum()
    distance = means + s1.trace() + s2.trace() - 2 * product.sqrt().sum()
    return max(distance.item(), 0.0)


def kernel_distance(a, b):
    """KID: kernel distance of features a [N, D] and b [M, D] (Binkowski et al. 2018, section 4).

    Unbiased squared MMD (Gretton et al. 2012, eq. 3) with the kernel (a.b / D + 1)^3 over all
    samples. Its expectation does not depend on the sample size and is 0 for equal distributions, so
    single values can be slightly negative.
    """
    a, b = two_feature_sets(a, b)
    n, m, dim = len(a), len(b), a.shape[1]
    aa = (a @ a.T / dim + 1) ** 3
    bb = (b @ b.T / dim + 1) ** 3
    ab = (a @ b.T / dim + 1) ** 3
    within_a = (aa.sum() - aa.trace()) / (n * (n - 1))
    within_b = (bb.sum() - bb.trace()) / (m * (m - 1))
    return (within_a + within_b - 2 * ab.mean()).item()


def manifold_metrics(samples, real, k=5):
    """dict of precision, recall, density and coverage of features [N, D] against real ones [M, D].

    Around every point a ball reaches to its k-th nearest neighbour in its own set. Precision:
    fraction of samples inside any real ball; recall: fraction of real points inside any sample's
    ball (Kynkaanniemi et al. 2019, eq. 1-2). Density: real balls around a sample, over k; coverage:
    fraction of real balls with a sample inside (Naeem et al. 2020, eq. 4-5). k is lowered where a
    set has fewer points. ValueError unless both sets have at least 2; NaN if a feature is not
    finite.
    """
    samples, real = two_feature_sets(samples, real)
    if not (samples.isfinite().all() and real.isfinite().all()):
        return dict.fromkeys(("precision", "recall", "density", "coverage"), math.nan)
    k = min(k, len(samples) - 1, len(real) - 1)

    def radii(x):
        # The nearest of all is the point itself.
        return torch.cdist(x, x).kthvalue(k + 1, dim=1).values

    distance = torch.cdist(samples, real)  # [N, M]
    in_real = distance <= radii(real)[None]
    in_samples = distance <= radii(samples)[:, None]
    return {"precision": in_real.any(1).double().mean().item(),
            "recall": in_samples.any(0).double().mean().item(),
            "density": in_real.double().sum(1).mean().item() / k,
            "coverage": in_real.any(0).double().mean().item()}


# --- memorisation and classification ------------------------------------------------------------


def binomial_interval(count, total, z=1.96):
    """(low, high) of the fraction count / total at 95 % confidence (Wilson 1927)."""
    if total == 0:
        return 0.0, 1.0
    fraction, widen = count / total, z * z / total
    centre = (fraction + widen / 2) / (1 + widen)
    half = z / (1 + widen) * math.sqrt(fraction * (1 - fraction) / total + widen / (4 * total))
    low = 0.0 if count == 0 else centre - half
    high = 1.0 if count == total else centre + half
    return low, high


def beta_binomial_tail(count, total, a, b):
    """P(X >= count) of X ~ BetaBinomial(total, a, b)."""
    def log_beta(p, q):
        return math.lgamma(p) + math.lgamma(q) - math.lgamma(p + q)

    def log_probability(x):
        ways = -math.log(total + 1) - log_beta(x + 1, total - x + 1)
        return ways + log_beta(x + a, total - x + b) - log_beta(a, b)

    return min(1.0, math.fsum(math.exp(log_probability(x)) for x in range(count, total + 1)))


REPEATED = 0.97  # correlation of thumbnails from which two training images are one film


def distinct_rows(rows, most=REPEATED):
    """Positions of rows [N, D] of length 1 whose product with no earlier one is above `most`."""
    keep = []
    for start in range(0, len(rows), 256):
        block = rows[start:start + 256]
        own = torch.arange(start, start + len(block))
        same = block @ rows[:start + len(block)].T > most
        before = torch.arange(same.shape[1])[None] < own[:, None]
        keep.append(own[~(same & before).any(1)])
    return torch.cat(keep)


def closeness(rows, others, own=None):
    """(ratio [N], nearest [N]) of rows [N, D] of length 1 among others [M >= 6, D]: the distance to
    the nearest over that to the fifth nearest. own [N]: the position in others that is the row
    itself, which does not count."""
    ratios, nearest = [], []
    for start in range(0, len(rows), 256):
        squares = (2 - 2 * rows[start:start + 256] @ others.T).clamp_min(0)
        if own is not None:
            squares[torch.arange(len(squares)), own[start:start + 256]] = math.inf
        values, index = squares.topk(5, 1, largest=False)
        ratios.append((values[:, 0] / values[:, -1].clamp_min(1e-12)).sqrt())
        nearest.append(index[:, 0])
    return torch.cat(ratios), torch.cat(nearest)


BY_CHANCE = 0.025  # probability under which so many copies are no longer put down to chance


class CopyTest:
    """Are more samples close to one training image than chance allows?

    Closeness is a ratio (see `closeness`; after Carlini et al. 2023, section 4.2), so that a
    blurred sample, which is close to everything, does not count as a copy. Its threshold is the
    k-th smallest ratio of the M distinct training images, each among the others, with
    k = alpha (M + 1) rounded down, at least 1. Of N samples that know the training images no
    better than these know one another, the number below it is BetaBinomial(N, k, M + 1 - k), for
    the threshold is an order statistic of M draws. (Nearly: the closest training images are each
    other's neighbours, so that 1 to 6 % of simulated fresh sets, not 2.5 %, have a probability
    under 0.025, and 6 to 9 % with under 50 training images.) No held-out image is needed, so none
    that repeats a training image can spoil it.
    """

    def __init__(self, train, alpha=0.01):
        """train [M, D]: rows of length 1, as data.thumbnails makes them. ValueError where fewer
        than 6 of them are distinct."""
        self.index = distinct_rows(train)
        if len(self.index) < 6:
            raise ValueError(f"{len(self.index)} distinct training images are too few to search "
                             "for copies")
        self.others = train if len(self.index) == len(train) else train[self.index]
        reference, _ = closeness(self.others, self.others, torch.arange(len(self.others)))
        self.rank = max(1, int(alpha * (len(self.others) + 1)))
        self.threshold = reference.kthvalue(self.rank).values

    def search(self, samples):
        """Of samples [N, D], dict with share, expected (of that distribution), probability (of as
        many or more by chance), distinct (M), and for each sample ratio and nearest (index of the
        training image)."""
        ratio, nearest = closeness(samples, self.others)
        count = int((ratio < self.threshold).sum())
        rank, total = self.rank, len(self.others) + 1
        return {"share": count / len(samples), "expected": rank / total,
                "probability": beta_binomial_tail(count, len(samples), rank, total - rank),
                "distinct": len(self.others), "ratio": ratio, "nearest": self.index[nearest]}


def auroc(scores, labels):
    """Area under the ROC curve of scores [N, K] for labels [N]: one against the rest, averaged.

    Mann & Whitney's U: how often a member scores above a non-member, ties counting half. NaN where
    a class has no member or all.
    """
    areas = []
    for c in range(scores.shape[1]):
        # With two classes the difference is what decides; with more, each column against the rest.
        own = scores[:, c].double()
        score = own - (scores.sum(1).double() - own) / (scores.shape[1] - 1)
        gap = score[labels == c][:, None] - score[labels != c][None]
        wins = (gap > 0).double() + 0.5 * (gap == 0).double()
        areas.append(wins.mean().item() if gap.numel() else math.nan)
    return sum(areas) / len(areas)


def auroc_interval(area, positives, negatives, z=1.96):
    """(low, high) of an AUROC at 95 % confidence, which also covers with ten images a class.

    Newcombe 2006 (method 5): the areas A for which the one found is within z standard errors, by
    the variance of Hanley & McNeil 1982 at A with both sizes replaced by their mean.
    """
    size = (positives + negatives) / 2

    def too_far(true):
        q = (1 - true) / (2 - true) + true / (1 + true)
        variance = true * (1 - true) * (1 + (size - 1) * q) / (positives * negatives)
        return abs(area - true) > z * math.sqrt(variance)

    ends = []
    for outside in (0.0, 1.0):
        inside = area
        for _ in range(40):
            middle = (outside + inside) / 2
            if too_far(middle):
                outside = middle
            else:
                inside = middle
        ends.append(inside)
    return tuple(ends)


def mean_auroc(of_trainings, labels):
    """(AUROC, low, high) at 95 % confidence of classifiers that differ in their training's seed;
    scores [N, K] of each, at least 2, on the same images with labels [N].

    The interval is that of the choice of images (auroc_interval) and that of the trainings
    (Student's t) together.
    """
    areas = torch.tensor([auroc(scores, labels) for scores in of_trainings], dtype=torch.float64)
    mean, count = areas.mean().item(), len(areas)
    if math.isnan(mean):
        return math.nan, math.nan, math.nan
    t_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}.get(count, 2.6)
    training = t_95 * areas.std().item() / math.sqrt(count)
    positives = min(int((labels == c).sum()) for c in labels.unique())
    low, high = auroc_interval(mean, positives, len(labels) - positives)
    return (mean, max(0.0, mean - math.hypot(mean - low, training)),
            min(1.0, mean + math.hypot(high - mean, training)))


def auroc_gain(with_samples, without, labels, seed=0, resamples=1000):
    """(gain, low, high): mean AUROC of some trainings above that of others, on the same images with
    labels [N]; scores [N, K] of each training.

    95 % bootstrap (Efron & Tibshirani 1993) of images, within each class, and of trainings. Paired:
    the same images for both.
    """
    rng = torch.Generator().manual_seed(seed)
    members = [(labels == c).nonzero()[:, 0] for c in labels.unique()]
    gains = []
    for _ in range(resamples):
        index = torch.cat([m[torch.randint(len(m), (len(m),), generator=rng)] for m in members])
        areas = []
        for trainings in (with_samples, without):
            chosen = torch.randint(len(trainings), (len(trainings),), generator=rng).tolist()
            areas.append(sum(auroc(trainings[i][index], labels[index]) for i in chosen)
                         / len(chosen))
        gains.append(areas[0] - areas[1])
    ends = torch.tensor([0.025, 0.975]).double()
    low, high = torch.tensor(gains, dtype=torch.float64).quantile(ends).tolist()
    means = [sum(auroc(scores, labels) for scores in trainings) / len(trainings)
             for trainings in (with_samples, without)]
    return means[0] - means[1], low, high


# --- verdicts -----------------------------------------------------------------------------------


class Verdict(NamedTuple):
    """What one number means, and what to do about it."""

    metric: str
    level: str  # ok, watch or bad
    value: str
    meaning: str
    advice: str


class Context(NamedTuple):
    """What a rule may compare a value with; an unknown number is NaN."""

    trend: str  # of the loss: see loss_trend
    val_trend: str  # of val/loss: see val_trend
    best_epoch: int  # where it was lowest
    copies_probability: float  # of as many copies by chance
    target_std: float
    train_mean: float
    train_min: float
    train_max: float
    diverged: bool


class Rule(NamedTuple):
    """A row of TABLE."""

    metric: str  # '*': every one
    level: str
    applies: Callable  # (value, Context) -> bool
    meaning: str
    advice: str


def loss_trend(losses):
    """The course of a logged loss: 'not finite', 'short', 'rising', 'flat' or 'falling'.

    Short: under 20 entries. Rising: the mean of the last tenth is above that of the tenth before
    by more than 5 % and by more than 3 standard errors. The noise, taken as independent, comes from
    the differences of neighbours in the last half: a slow trend hardly touches them, and a tenth
    may have only two entries. Two standard errors would call 2 to 4 % of noisy plateaus rising, and
    a run asks many times; three call at most 0.6 %. Flat: the last tenth is at least 98 % of the
    first.
    """
    history = torch.as_tensor(losses, dtype=torch.float64)
    if not history.isfinite().all():
        return "not finite"
    tenth = len(history) // 10
    if tenth < 2:
        return "short"
    first = history[:tenth].mean().item()
    before = history[-2 * tenth:-tenth].mean().item()
    last = history[-tenth:].mean().item()
    noise = (history[len(history) // 2:].diff().square().mean().item() / 2) ** 0.5
    if last - before > max(0.05 * abs(before), 3 * noise * (2 / tenth) ** 0.5):
        return "rising"
    return "flat" if last >= first - 0.02 * abs(first) else "falling"


def val_trend(val_losses, train_losses):
    """The course of val/loss beside val/train_loss, both by evaluation: 'short', 'memorising',
    'level' or 'falling'.

    Times and noises are the same at each evaluation, so hardly any of their change is chance.
    Short: under 4. Falling: one of the last three is the lowest. Memorising: else, and their mean
    is above the lowest by more than 2 %, while val/train_loss has gone on falling.
    """
    val, train = (torch.as_tensor(v, dtype=torch.float64) for v in (val_losses, train_losses))
    if len(val) < 4 or len(val) != len(train):
        return "short"
    best = int(val.argmin())
    if best >= len(val) - 3:
        return "falling"
    rose = val[-3:].mean() > 1.02 * val[best]
    return "memorising" if rose and train[-3:].mean() < train[best] else "level"


def outside(value, context):
    """How far a latent value lies beyond those of the training latents, in units of their range;
    negative inside."""
    middle = (context.train_max + context.train_min) / 2
    return abs(value - middle) / (context.train_max - context.train_min) - 0.5


def always(value, context):
    """The rule of last resort for a metric."""
    return True


LOSS, GRAD, BAD_STEPS = "train/loss", "train/grad_norm", "train/bad_steps"
VAL, VAL_TRAIN = "val/loss", "val/train_loss"
COPIES, COPIES_EXPECTED = "copies/share", "copies/expected"
COPIES_PROBABILITY = "copies/probability"
NOISE = "posterior_noise_share"
NO_REFERENCE = "Finite, but there are no training latents to compare it with."

# The first rule that matches a metric is its verdict.
TABLE = [
    Rule("*", "bad", lambda v, c: not math.isfinite(v),
         "The value is NaN or infinite: training or sampling has blown up.",
         "Resume from the last checkpoint with a lower --lr and --grad_clip; try --dtype fp32."),

    Rule(LOSS, "bad", lambda v, c: c.trend == "not finite",
         "No step between two log lines had a finite gradient: all were skipped.",
         "The weights are good: resume with a lower --lr and --grad_clip; try --dtype fp32."),
    Rule(LOSS, "bad", lambda v, c: c.trend == "rising",
         "The loss rose over the last tenth of the run: training is diverging.",
         "Lower --lr (by 3 to 10 times), raise --warmup_steps, or lower --grad_clip."),
    Rule(LOSS, "watch", lambda v, c: c.trend == "flat",
         "The loss is no lower than at the start: the model has learned little since then.",
         "Raise --lr if train/grad_norm is small and steady; check images and scale factor."),
    Rule(LOSS, "ok", lambda v, c: c.trend == "short",
         "Finite. Fewer than 20 log entries are too few to judge a trend.", ""),
    Rule(LOSS, "ok", always, "The loss is lower than at the start and not rising.", ""),

    Rule(GRAD, "bad", lambda v, c: v > 100,
         "The gradient is exploding.",
         "Lower --lr, raise --warmup_steps and --batch_per_device, keep --grad_clip at most 1.0."),
    Rule(GRAD, "bad", lambda v, c: v < 1e-6,
         "The gradient is vanishing: the weights hardly change.",
         "Look for blank images and for a latent scale factor of zero; raise --lr."),
    Rule(GRAD, "ok", always, "The gradient is neither exploding nor vanishing.", ""),

    Rule(BAD_STEPS, "bad", lambda v, c: c.diverged,
         "Too many steps in a row had no finite gradient. Stopped; the weights are good.",
         "Resume with a lower --lr and --grad_clip; try --dtype fp32, look for odd images."),
    Rule(BAD_STEPS, "watch", lambda v, c: v > 0,
         "This many steps since the last log line had no finite gradient and were skipped.",
         "If they keep coming: lower --lr and --grad_clip, try --dtype fp32, look for odd images."),
    Rule(BAD_STEPS, "ok", always, "No step had to be skipped since the last log line.", ""),

    Rule(VAL, "bad", lambda v, c: c.val_trend == "memorising",
         "Memorising: val/loss was lowest in epoch {best_epoch} and rises since, while the loss on "
         "training images falls.",
         "Use ckpts/best.pt, which is of that epoch. Longer training makes copies of patients: get "
         "more images, or give --patience to stop in time."),
    Rule(VAL, "watch", lambda v, c: c.val_trend == "level",
         "val/loss was lowest in epoch {best_epoch}: what the model learns since is of its "
         "training images alone.",
         "Use ckpts/best.pt. If it does not fall again, stop."),
    Rule(VAL, "ok", lambda v, c: c.val_trend == "short",
         "Finite. Fewer than 4 evaluations are too few to judge a trend.", ""),
    Rule(VAL, "ok", always, "The loss on validation images is still falling.", ""),

    # An evaluation in training asks every time, so that evaluate.py's 0.025 would often be chance.
    Rule(COPIES, "bad", lambda v, c: c.copies_probability < 0.001,
         "More samples of the last evaluations repeat a training image than chance allows.",
         "Stop: the model draws patients from memory. Use an earlier ckpts/best.pt, and check it "
         "with evaluate.py."),
    Rule(COPIES, "ok", always, "No more samples repeat a training image than by chance.", ""),

    Rule(MSE_MEAN, "bad", lambda v, c: v < 0.01,
         "Collapse: the samples of a class are all but the same image.",
         "Lower --guidance_scale and --lr; check that --prob_uncond is near 0.1 and not near 1."),
    Rule(MSE_MEAN, "watch", lambda v, c: v < 0.1,
         "The samples of a class are very much alike.",
         "Lower --guidance_scale and see whether the number grows over the next epochs."),
    Rule(MSE_MEAN, "ok", always, "The samples of a class differ from one another.", ""),

    Rule(RATIO, "watch", lambda v, c: v < 0.5,
         "The samples are less diverse than the training images.",
         "Lower --guidance_scale towards 1, or train longer (--epochs)."),
    Rule(RATIO, "watch", lambda v, c: v > 1.5,
         "The samples lie further apart than the training images: that is noise, not diversity.",
         "Train longer or raise --num_sampling_steps. In a short run, lower --ema_decay."),
    Rule(RATIO, "ok", always, "The samples are about as diverse as the training images.", ""),

    Rule(MSE_STD, "bad", lambda v, c: v < 1e-4,
         "All pairs of samples are equally far apart: most likely one image is repeated.",
         "Look at the sample grid. If the samples are alike, lower --guidance_scale and --lr."),
    Rule(MSE_STD, "ok", always, "Some pairs are closer than others, as with real images.", ""),
    Rule(MSE_MIN, "bad", lambda v, c: v < 1e-4,
         "At least two samples of a class are the same image.",
         "Check that samples start from different noise (--seed), then lower --guidance_scale."),
    Rule(MSE_MIN, "ok", always, "No two samples of a class are the same image.", ""),
    Rule(MSE_MAX, "bad", lambda v, c: v < 1e-4,
         "Even the two most different samples of a class are the same image: complete collapse.",
         "Lower --lr and --guidance_scale and train again from an earlier checkpoint."),
    Rule(MSE_MAX, "ok", always, "The most different samples of a class do differ.", ""),

    Rule(NOISE, "bad", lambda v, c: v > 0.5,
         "The latents are mostly noise: more than half of their variance is the posterior's.",
         "Train the autoencoder again with a lower --kl_weight."),
    Rule(NOISE, "watch", lambda v, c: v > 0.2,
         "A good part of the latents' variance is the posterior's noise.",
         "Lower --kl_weight, or train the autoencoder longer."),
    Rule(NOISE, "ok", always, "The latents carry images, hardly any noise.", ""),

    Rule(Z_MEAN, "ok", lambda v, c: math.isnan(c.train_mean + c.target_std), NO_REFERENCE, ""),
    Rule(Z_MEAN, "bad", lambda v, c: abs(v - c.train_mean) > c.target_std,
         "The mean of the latents is over one standard deviation from the training latents'.",
         "Lower --guidance_scale. If images are too dark or bright, try --zero_terminal_snr."),
    Rule(Z_MEAN, "ok", always, "The mean of the latents is near that of the training latents.", ""),

    Rule(Z_STD, "ok", lambda v, c: math.isnan(c.target_std), NO_REFERENCE, ""),
    Rule(Z_STD, "bad", lambda v, c: not 0.5 * c.target_std <= v <= 2 * c.target_std,
         "The latents' standard deviation is under half or over twice 1/latent_scale_factor.",
         "Run find_latent_scale.py again. If the factor is right, lower --guidance_scale."),
    Rule(Z_STD, "watch", lambda v, c: not 0.8 * c.target_std <= v <= 1.25 * c.target_std,
         "The latents' standard deviation is noticeably off 1/latent_scale_factor.",
         "Too large: lower --guidance_scale. Too small: train longer, raise --num_sampling_steps."),
    Rule(Z_STD, "ok", always, "The latents' standard deviation is near 1/latent_scale_factor.", ""),
]

for name in (Z_MIN, Z_MAX):
    TABLE += [
        Rule(name, "bad", lambda v, c: abs(v) > 20 and not outside(v, c) <= 0.5,
             "A latent value lies beyond +-20, far from anything the decoder was trained on.",
             "Lower --guidance_scale or raise --num_sampling_steps. If that does not help, run "
             "find_latent_scale.py again and check the scale factor."),
        Rule(name, "ok", lambda v, c: math.isnan(c.train_max - c.train_min), NO_REFERENCE, ""),
        Rule(name, "watch", lambda v, c: outside(v, c) > 0.5,
             "A latent value lies more than half the training range outside that range.",
             "Lower --guidance_scale; early in training this passes by itself."),
        Rule(name, "ok", always, "Inside the range of the training latents, or near it.", "")]


def health(metrics, losses=(), train_stats=None, overfit=False, diverged=False,
           val_history=((), ()), best_epoch=0):
    """One Verdict for each metric that TABLE and `metrics` (name -> number) have, in TABLE's order.

    losses is the logged history of train/loss, val_history those of val/loss and val/train_loss
    before now; val/loss was lowest in best_epoch. train_stats holds the mean, min and max of the
    unscaled training latents. overfit leaves the diversity verdicts out, because there low
    diversity is the goal. diverged: the run was stopped by --max_bad_steps.
    """
    stats = train_stats or {}
    val, val_train = ([*past, metrics.get(name, math.nan)]
                      for past, name in zip(val_history, (VAL, VAL_TRAIN), strict=True))
    context = Context(
        trend=loss_trend(losses), val_trend=val_trend(val, val_train),
        best_epoch=best_epoch, copies_probability=metrics.get(COPIES_PROBABILITY, math.nan),
        target_std=metrics.get(TARGET_STD, math.nan),
        train_mean=stats.get("mean", math.nan), train_min=stats.get("min", math.nan),
        train_max=stats.get("max", math.nan), diverged=diverged)
    verdicts = []
    for name in dict.fromkeys(rule.metric for rule in TABLE if rule.metric != "*"):
        if name not in metrics:
            continue
        if overfit and name.startswith("sample_diversity/"):
            continue
        if name == MSE_STD and metrics.get("sample_diversity/num_pairs") == 1:
            continue  # the standard deviation of a single pair is 0 and says nothing
        value = float(metrics[name])
        rule = next(rule for rule in TABLE
                    if rule.metric in ("*", name) and rule.applies(value, context))
        meaning = rule.meaning.format(**context._asdict())
        verdicts.append(Verdict(name, rule.level, f"{value:.4g}", meaning, rule.advice))
    return verdicts


def sweep_objective(values, verdicts):
    """`values`, with -1 as `sample_diversity/pairwise_mse_mean` where the samples are noise or
    copies.

    A sweep maximises that metric, and noise is diverse too, as are the training images: where
    ratio_to_real is over 1.5 or not finite, or the verdict on the latents' standard deviation or on
    copies is bad, it must not win. The measured value stays beside it as
    `sample_diversity/pairwise_mse_mean_raw`.
    """
    too_far_apart = not values.get(RATIO, 1.0) <= 1.5
    bad = any(v.metric in (Z_STD, COPIES) and v.level == "bad" for v in verdicts)
    measured = values[MSE_MEAN]
    objective = -1.0 if too_far_apart or bad else measured
    return values | {f"{MSE_MEAN}_raw": measured, MSE_MEAN: objective}


def overfit_verdict(z_samples, z_train, x_samples, x_train, mse_threshold=0.1, psnr_threshold=25.0):
    """Did the model memorise its K training items? Dict of `overfit/*`, with the bool `passed`.

    z_samples [S, ...] and z_train [K, ...] are normalised latents; x_samples [S, 1, H, W] and
    x_train [K, 1, H, W] are what the decoder makes of them, in [-1, 1]. Each sample is matched with
    its nearest training latent. The medians over samples of the latent MSE and of the PSNR between
    the two decoded images must reach the thresholds.

    Coverage is the fraction of min(K, S) training items that some sample within mse_threshold is
    nearest to. It must be at least one half, and at least two items where two can be found, so that
    one repeated image fails for every K > 1. Some items are missed by chance: 8 fair draws from
    K = 8 cover 66 % on average.

    Thresholds: unrelated latents of unit variance have MSE 2. Different patients at 128 pixels (106
    adults of one site, all 5565 pairs) have 11.4 dB on average and 19.5 dB at most, so 25 dB is not
    another patient, while a copy with noise of 5 % of the grey range still reaches 26 dB.
    """
    z_samples, z_train = rows64(z_samples), rows64(z_train)
    # The other way to compute distances is not exact near 0.
    distances = torch.cdist(z_samples, z_train, compute_mode="donot_use_mm_for_euclid_dist")
    mse, nearest = (distances.square() / z_train.shape[1]).min(1)  # [S], [S]
    match_psnr = psnr(x_samples.detach().cpu(), x_train.detach().cpu()[nearest])
    findable = min(len(z_train), len(z_samples))
    covered = len(nearest[mse <= mse_threshold].unique())
    result = {
        "overfit/nearest_mse": mse.quantile(0.5).item(),
        "overfit/nearest_psnr": match_psnr.quantile(0.5).item(),
        "overfit/coverage": covered / findable, "overfit/mse_threshold": mse_threshold,
        "overfit/psnr_threshold": psnr_threshold, "overfit/coverage_threshold": 0.5}
    result["overfit/passed"] = (
        result["overfit/nearest_mse"] <= mse_threshold
        and result["overfit/nearest_psnr"] >= psnr_threshold
        and result["overfit/coverage"] >= result["overfit/coverage_threshold"]
        and covered >= min(2, findable))
    return result


def format_verdicts(verdicts):
    """The verdicts as an aligned console table, with the advice under each that is watch or bad."""
    width = max((len(v.metric) for v in verdicts), default=0)
    value_width = max((len(v.value) for v in verdicts), default=0)
    lines = []
    for v in verdicts:
        lines.append(f"{v.level.upper():<5}  {v.metric:<{width}}  {v.value:>{value_width}}  "
                     f"{v.meaning}")
        if v.level != "ok":
            lines.append(" " * (width + value_width + 11) + v.advice)
    return "\n".join(lines)


def format_training(values):
    """One line of what a log step measured: {'train/loss': ..., ...}."""
    names = [n for n in ("loss", "rec", "kl", "grad_norm") if f"train/{n}" in values]
    text = " ".join(f"{n} {values[f'train/{n}']:.4g}" for n in names)
    text += f" {values['train/images_per_second']:.1f} images/s"
    if values["train/bad_steps"]:
        text += f", {values['train/bad_steps']:.0f} non-finite steps skipped"
    return text


def format_overfit(values):
    """One line PASS or FAIL from what overfit_verdict returned."""
    v = {k.removeprefix("overfit/"): x for k, x in values.items()}
    return (f"{'PASS' if v['passed'] else 'FAIL'}: nearest training latent at MSE "
            f"{v['nearest_mse']:.4f} (at most {v['mse_threshold']:.4f}), decoded PSNR "
            f"{v['nearest_psnr']:.1f} dB (at least {v['psnr_threshold']:g}), "
            f"{100 * v['coverage']:.0f} % of the images found (at least "
            f"{100 * v['coverage_threshold']:.0f} %)")
