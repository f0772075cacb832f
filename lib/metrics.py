"""Metrics: reconstruction, sharpness, diversity, distributions, copies, AUROC.

All but `psnr`, `ssim` and `ms_ssim` run in float64 on the CPU: not every accelerator has float64.
"""
import functools
import math

import numpy as np
import torch
import torch.nn.functional as F

# --- reconstruction and sharpness ---------------------------------------------------------------

WINDOW, WINDOW_SIGMA = 11, 1.5  # pixels; Wang et al. 2004, section III-C
C1, C2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2  # (K * L)^2 of the same paper for data range L = 2
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang et al. 2003, 3.2, finest first


def psnr(x, y):
    """Peak signal-to-noise ratio of images [B, 1, H, W] in [-1, 1]: [B], in dB; at most 106 dB, as
    an infinity would swallow every average."""
    mse = (x.float() - y.float()).square().flatten(1).mean(1)
    return 10 * torch.log10(4 / mse.clamp_min(1e-10))


def blur(x):
    """Separable Gaussian filter of x [B, 1, H, W], unpadded; the window shrinks on small images. No
    convolution: GPUs round those to TF32 and autocast to bf16, which ruins the difference
    E[x^2] - E[x]^2 that SSIM is made of."""
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
    return [v.flatten(1).mean(1) for v in (luminance * contrast_structure, contrast_structure)]


def ssim(x, y):
    """Structural similarity (Wang et al. 2004, eq. 13) of images [B, 1, H, W] in [-1, 1]: [B], at
    most 1. Shifted to [0, 2], which gives the same result as storing them as 0..255."""
    return ssim_terms(x.float() + 1, y.float() + 1)[0]


def ms_ssim(x, y):
    """Multi-scale SSIM (Wang et al. 2003, eq. 7) of images [B, 1, H, W] in [-1, 1]: [B], in (0, 1].
    Up to five scales, as long as the smallest side has 11 pixels, with weights that sum to one."""
    side = min(x.shape[2:])
    scales = sum(side // 2**k >= WINDOW for k in range(len(SCALE_WEIGHTS))) or 1
    weights = [w / sum(SCALE_WEIGHTS[:scales]) for w in SCALE_WEIGHTS[:scales]]
    x, y = x.float() + 1, y.float() + 1
    result = 1.0
    for k, weight in enumerate(weights):
        if k > 0:
            x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
        term = ssim_terms(x, y)[0 if k == scales - 1 else 1]  # luminance at the coarsest only
        # A fractional power of a negative number is NaN, and its slope at zero is infinite.
        result = result * term.clamp_min(1e-4) ** weight
    return result


def fine_part(x):
    """High-frequency residual of x [B, 1, H, W]: x, without the last row or column of an odd side,
    minus its 2x2 average."""
    x = x[..., :x.shape[2] // 2 * 2, :x.shape[3] // 2 * 2]
    return x - F.interpolate(F.avg_pool2d(x, 2), scale_factor=2)


def detail(x):
    """Root mean square of the fine part of images [B, 1, H, W] in [-1, 1], on a 0-to-1 grey scale:
    [B]. Blurred images have little."""
    return fine_part(x.float()).square().flatten(1).mean(1).sqrt() / 2


def octaves(side):
    """[(low, high)] in cycles per image of `side` pixels, contiguous, coarsest first, at least two:
    from 2 cycles or slightly more up to the Nyquist limit, side / 2."""
    ends = [side / 8, side / 4, side / 2]
    while ends[0] >= 4:
        ends.insert(0, ends[0] / 2)
    return [*zip(ends[:-1], ends[1:], strict=True)]


def spectrum(x):
    """|DFT|^2 of square images [B, 1, S, S], mean removed, under a Hann window, without which
    borders look like fine detail: float64 [B, S, S]."""
    window = torch.hann_window(x.shape[-1], periodic=False, dtype=torch.float64)
    grey = x.detach().cpu().double()[:, 0]
    grey = (grey - grey.mean((1, 2), keepdim=True)) * window[:, None] * window
    return torch.fft.fft2(grey).abs().square()


def octave_power(x):
    """Power of square images [B, 1, S, S] in each of octaves(S): float64 [B, octaves]."""
    side, power = x.shape[-1], spectrum(x)
    cycles = torch.fft.fftfreq(side, dtype=torch.float64) * side
    radius = (cycles[:, None].square() + cycles.square()).sqrt()
    return torch.stack([power[:, (radius >= low) & (radius < high)].sum(1)
                        for low, high in octaves(side)], 1)


def lattice(x):
    """Power of square images [B, 1, S, S] at the frequencies of lattices with 2, 4 or 8 pixels
    between their dots, over the power around these frequencies: float64 [B]. Of 300 radiographs
    and phantoms at 64 to 256 px 0.5 to 1.4, mean 0.9 to 1; dots of 4 % grey make it 4 to 900."""
    power = F.pad(spectrum(x)[:, None], (4, 4, 4, 4), mode="circular")  # the DFT is periodic
    around = F.avg_pool2d(power, 9, 1)[:, 0] * 81
    peak = F.avg_pool2d(power[..., 3:-3, 3:-3], 3, 1)[:, 0] * 9  # as wide as the window makes it
    places = torch.arange(x.shape[-1] // 8, x.shape[-1], x.shape[-1] // 8)
    return (8 * peak / (around - peak))[:, places[:, None], places].mean((1, 2))


def patch_moments(x, side):
    """Second moments of the patches of images x [B, 1, S, S], each with a 1 appended: float64
    [side^2 + 1, side^2 + 1], summed over patches."""
    patches = F.unfold(x.cpu().double(), side, stride=side).transpose(1, 2).flatten(0, 1)
    rows = F.pad(patches, (0, 1), value=1.0)
    return rows.T @ rows


def linear_psnr(moments, components):
    """PSNR in dB of what the best linear code makes of patches with these patch_moments: so many
    principal components for each. An autoencoder of as many channels should be above it."""
    moments = moments / moments[-1, -1]
    mean = moments[-1, :-1]
    variances = torch.linalg.eigvalsh(moments[:-1, :-1] - mean[:, None] * mean)  # ascending
    mse = variances[:-components].sum() / len(mean)
    return 10 * math.log10(4 / max(mse.item(), 1e-10))


# --- diversity and latent statistics ------------------------------------------------------------

MSE_MEAN, MSE_STD = "sample_diversity/pairwise_mse_mean", "sample_diversity/pairwise_mse_std"
MSE_MIN, MSE_MAX = "sample_diversity/pairwise_mse_min", "sample_diversity/pairwise_mse_max"
RATIO = "sample_diversity/ratio_to_real"
Z_MEAN, Z_STD = "final_latent_stats/mean", "final_latent_stats/std"
Z_MIN, Z_MAX = "final_latent_stats/min", "final_latent_stats/max"
TARGET_STD = "final_latent_stats/target_std"
POWER, LATTICE = "sample_quality/power", "sample_quality/lattice"
ROUND_TRIP, REAL_ROUND_TRIP = "sample_quality/round_trip", "sample_quality/real_round_trip"


def rows64(x):
    """x [N, ...] as a float64 matrix [N, D] on the CPU."""
    return x.detach().cpu().double().reshape(len(x), -1)


def pairwise_mse(z):
    """Mean squared error of all N (N - 1) / 2 pairs in z [N >= 2, ...]: dict of mean, std (0 for a
    single pair), min and max. Independent Gaussian latents of variance s^2 have a mean of 2 s^2."""
    rows = rows64(z)
    mse = F.pdist(rows).square() / rows.shape[1]
    return {"mean": mse.mean().item(), "std": mse.std(correction=0).item(),
            "min": mse.min().item(), "max": mse.max().item()}


def sample_diversity(z, labels, class_names, real_pairwise_mse_mean):
    """Pairwise MSE of normalised latents z [N, ...] within each class, labels [N] into class_names:
    `sample_diversity/<class>/pairwise_mse_*` of classes with two or more samples, their averages
    `sample_diversity/pairwise_mse_*`, and the ratio of the mean to that of training latents, unless
    this is None or 0 (one training image)."""
    labels = torch.as_tensor(labels, device=z.device)
    members = {name: z[labels == index] for index, name in enumerate(class_names)}
    stats = {name: pairwise_mse(x) for name, x in members.items() if len(x) > 1}
    result = {}
    for key in ("mean", "std", "min", "max") if stats else ():
        of_classes = {name: of[key] for name, of in stats.items()}
        result |= {f"{name}/pairwise_mse_{key}": value for name, value in of_classes.items()}
        result[f"pairwise_mse_{key}"] = sum(of_classes.values()) / len(stats)
    if real_pairwise_mse_mean:
        result["real_pairwise_mse_mean"] = float(real_pairwise_mse_mean)
        if stats:
            result["ratio_to_real"] = result["pairwise_mse_mean"] / float(real_pairwise_mse_mean)
    return {f"sample_diversity/{name}": value for name, value in result.items()}


def latent_stats(z_unscaled, latent_scale_factor):
    """Statistics of the unscaled latents [N, ...] that go into the decoder, and the training
    latents' standard deviation in these units, `target_std` = 1 / latent_scale_factor."""
    z = rows64(z_unscaled)
    return {Z_MEAN: z.mean().item(), Z_STD: z.std(correction=0).item(),
            Z_MIN: z.min().item(), Z_MAX: z.max().item(),
            TARGET_STD: 1 / float(latent_scale_factor)}


# --- distributions ------------------------------------------------------------------------------


def frechet_distance(a, b):
    """FID: Frechet distance of Gaussians fitted to features a [N, D] and b [M, D], N, M >= 2.

    Heusel et al. 2017, eq. 6: |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)). With S1 = A^T A and
    S2 = B^T B, the trace of the root is the sum of the singular values of A B^T. Biased upwards for
    few samples: compare only values from equal N and M. NaN if a feature is not finite.
    """
    a, b = rows64(a), rows64(b)
    if not (a.isfinite().all() and b.isfinite().all()):
        return math.nan
    # R of the QR decomposition: R^T R is the covariance, and R has at most D rows.
    factor_a, factor_b = (torch.linalg.qr((x - x.mean(0)) / math.sqrt(len(x) - 1), mode="r").R
                          for x in (a, b))
    root = torch.linalg.svdvals(factor_a @ factor_b.T).sum()
    distance = ((a.mean(0) - b.mean(0)).square().sum() + factor_a.square().sum()
                + factor_b.square().sum() - 2 * root)
    return max(distance.item(), 0.0)


# --- copies -------------------------------------------------------------------------------------

REPEATED = 0.97  # correlation of thumbnails above which two training images are the same film
Z_95 = 1.96  # standard errors on either side of what is 95 % certain
BY_CHANCE = 0.025  # copies less probable than this are not put down to chance


def binomial_interval(count, total):
    """95 % confidence interval (low, high) of the fraction count / total (Wilson 1927)."""
    fraction, widen = count / total, Z_95 * Z_95 / total
    centre = (fraction + widen / 2) / (1 + widen)
    half = Z_95 / (1 + widen) * math.sqrt(fraction * (1 - fraction) / total + widen / (4 * total))
    return max(0.0, centre - half), min(1.0, centre + half)


@functools.cache
def beta_binomial_tail(count, total, a, b):
    """P(X >= count) of X ~ BetaBinomial(total, a, b) with whole a and b."""
    ways = sum(math.comb(x + a - 1, x) * math.comb(total - x + b - 1, total - x)
               for x in range(count, total + 1))
    return ways / math.comb(total + a + b - 1, total)


def closeness(rows, others, within=False):
    """(ratio [N], nearest [N]) of unit-length rows [N, D] among others [M, D]: the distance to the
    nearest, over that to the fifth nearest, or to the last of fewer. within: rows are the others,
    without themselves."""
    ratios, nearest = [], []
    neighbours = max(1, min(5, len(others) - 1))
    for start in range(0, len(rows), 256):
        squares = (2 - 2 * rows[start:start + 256] @ others.T).clamp_min(0)
        if within:
            squares.diagonal(start).fill_(math.inf)
        values, index = squares.topk(neighbours, 1, largest=False)
        ratios.append((values[:, 0] / values[:, -1].clamp_min(1e-12)).sqrt())
        nearest.append(index[:, 0])
    return torch.cat(ratios), torch.cat(nearest)


class CopyTest:
    """Are more samples close to one training image than chance allows?

    Closeness is a ratio (see `closeness`; after Carlini et al. 2023, section 4.2), so a blurred
    sample, which is close to everything, is not a copy. The threshold is the k-th smallest ratio of
    the M distinct training images, each among the others, with k = max(1, floor(alpha (M + 1))). If
    N samples are no closer to these than they are to one another, the number below the threshold is
    BetaBinomial(N, k, M + 1 - k); nearly: 1 to 9 % of fresh sets have a probability under 0.025.
    """

    def __init__(self, train, alpha=0.01):
        """train [M, D]: unit-length rows, as from data.thumbnails."""
        repeats = []
        for start in range(0, len(train), 256):
            same = train[start:start + 256] @ train[:start + 256].T > REPEATED
            repeats.append(same.tril(start - 1).any(1))  # of the earlier rows
        self.index = (~torch.cat(repeats)).nonzero()[:, 0]
        self.others = train[self.index]
        reference, _ = closeness(self.others, self.others, within=True)
        self.rank = max(1, int(alpha * (len(self.others) + 1)))
        self.threshold = reference.kthvalue(self.rank).values

    def search(self, samples):
        """dict for samples [N, D]: share of copies and that expected, probability of as many by
        chance, distinct (M), and per sample its ratio and nearest (training image index)."""
        ratio, nearest = closeness(samples, self.others)
        count = int((ratio < self.threshold).sum())
        return {"share": count / len(samples), "expected": self.rank / (len(self.others) + 1),
                "probability": self.probability(count, len(samples)),
                "distinct": len(self.others), "ratio": ratio, "nearest": self.index[nearest]}

    def probability(self, count, total):
        """Of at least `count` copies among `total` samples by chance."""
        return beta_binomial_tail(count, total, self.rank, len(self.others) + 1 - self.rank)

    def power(self, samples, planted, share, seed, draws=100):
        """Fraction of draws in which more copies than chance allows are found once this share of
        the samples is replaced by planted copies; bool [N] and [P]: which count as copies."""
        rng, num = np.random.default_rng(seed), round(share * len(samples))
        counts = [int(rng.permutation(samples)[num:].sum() + rng.choice(planted, num).sum())
                  for _ in range(draws)]
        return sum(self.probability(n, len(samples)) < BY_CHANCE for n in counts) / draws


# --- classification -----------------------------------------------------------------------------


def auroc(scores, labels):
    """Area under the ROC curve of scores [N, K] for labels [N], averaged over classes: how often a
    member scores above a non-member (Mann & Whitney's U), ties counting half. NaN if a class has no
    members or nothing but members."""
    areas = []
    for c in range(scores.shape[1]):
        # Relative to the other columns: with two classes, their difference is what decides.
        own = scores[:, c].double()
        score = own - (scores.sum(1).double() - own) / (scores.shape[1] - 1)
        gap = score[labels == c][:, None] - score[labels != c][None]
        areas.append(((gap.sign() + 1) / 2).mean().item())
    return sum(areas) / len(areas)


def auroc_interval(area, labels):
    """(area, low, high) of an AUROC on images with labels [N], at 95 % confidence, valid down to
    ten images per class: all areas within Z_95 standard errors of the measured one, with the
    variance of Hanley & McNeil 1982 and both class sizes, that of the smallest class and of all
    others, replaced by their mean (Newcombe 2006, method 5)."""
    fewest = min(int((labels == c).sum()) for c in labels.unique())
    true = torch.linspace(0, 1, 1_000_001, dtype=torch.float64)
    q = (1 - true) / (2 - true) + true / (1 + true)
    size = len(labels) / 2
    variance = true * (1 - true) * (1 + (size - 1) * q) / (fewest * (len(labels) - fewest))
    inside = true[~((area - true).abs() > Z_95 * variance.sqrt())]  # all of them if area is NaN
    return area, min(area, inside[0].item()), max(area, inside[-1].item())


def mean_auroc(of_trainings, labels):
    """(mean AUROC, low, high) of three trainings of a classifier, at 95 % confidence, given the
    scores [N, K] of each on the same images with labels [N]. Covers the choice of images
    (auroc_interval) and the training seed (Student's t)."""
    areas = torch.tensor([auroc(scores, labels) for scores in of_trainings], dtype=torch.float64)
    mean = areas.mean().item()
    training = 4.30 * areas.std().item() / math.sqrt(len(areas))
    _, low, high = auroc_interval(mean, labels)
    return (mean, max(0.0, mean - math.hypot(mean - low, training)),
            min(1.0, mean + math.hypot(high - mean, training)))


def auroc_gain(with_samples, without, labels, seed=0, gains_in_all=1, resamples=1000):
    """(gain, low, high): mean AUROC of some trainings minus that of others, given the scores [N, K]
    of each on the same images with labels [N]. Bootstrap interval (Efron & Tibshirani 1993) over
    trainings and, paired, over images within each class; at 95 % for all of `gains_in_all`."""
    rng = torch.Generator().manual_seed(seed)
    members = [(labels == c).nonzero()[:, 0] for c in labels.unique()]

    def mean_area(trainings, index=slice(None)):
        return sum(auroc(scores[index], labels[index]) for scores in trainings) / len(trainings)

    gains = []
    for _ in range(resamples):
        index = torch.cat([m[torch.randint(len(m), (len(m),), generator=rng)] for m in members])
        one, other = ([of[i] for i in torch.randint(len(of), (len(of),), generator=rng).tolist()]
                      for of in (with_samples, without))
        gains.append(mean_area(one, index) - mean_area(other, index))
    ends = torch.tensor([0.025 / gains_in_all, 1 - 0.025 / gains_in_all]).double()
    low, high = torch.tensor(gains, dtype=torch.float64).quantile(ends).tolist()
    return mean_area(with_samples) - mean_area(without), low, high
