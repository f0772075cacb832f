"""Verdicts: what each metric means, and what to do about it."""
import math
from types import SimpleNamespace
from typing import NamedTuple

import torch

from lib.metrics import (LATTICE, MSE_MAX, MSE_MEAN, MSE_MIN, MSE_STD, POWER, RATIO,
                         REAL_ROUND_TRIP, ROUND_TRIP, TARGET_STD, Z_MAX, Z_MEAN, Z_MIN, Z_STD, psnr,
                         rows64)

LOSS, GRAD, BAD_STEPS = "train/loss", "train/grad_norm", "train/bad_steps"
VAL, VAL_TRAIN = "val/loss", "val/train_loss"
COPIES, COPIES_EXPECTED = "copies/share", "copies/expected"
COPIES_PROBABILITY, NOISE = "copies/probability", "posterior_noise_share"
PSNR, PSNR_LINEAR = "val/psnr", "val/psnr_linear"
DETAIL, FINEST, VAL_LATTICE = "val/detail", "val/power_finest", "val/lattice"
MEMORISED = "overfit/passed"
OVERFIT_PSNR = 25  # dB; different patients have at most 19.5, unrelated latents an MSE of 2


class Verdict(NamedTuple):
    """The judgement on one metric."""

    metric: str
    level: str  # ok, watch or bad
    value: str
    meaning: str
    advice: str


def loss_trend(losses):
    """Trend of a loss: 'short' (under 20 entries), 'rising' (not finite, or the last tenth exceeds
    the tenth before by over 5 % and over 3 standard errors, as at most 0.6 % of noisy plateaus do),
    'flat' (the last tenth is at least 98 % of the first) or 'falling'."""
    history = torch.as_tensor(losses, dtype=torch.float64)
    if not history.isfinite().all():
        return "rising"
    tenth = len(history) // 10
    if tenth < 2:
        return "short"
    first, last = history[:tenth].mean().item(), history[-tenth:].mean().item()
    before = history[-2 * tenth:-tenth].mean().item()
    noise = (history[len(history) // 2:].diff().square().mean().item() / 2) ** 0.5
    if last - before > max(0.05 * abs(before), 3 * noise * (2 / tenth) ** 0.5):
        return "rising"
    return "flat" if last >= first - 0.02 * abs(first) else "falling"


def val_trend(val_losses, train_losses):
    """Trend of val/loss beside val/train_loss: 'short' (under 4 evaluations), 'falling' (one of the
    last three is the lowest), 'memorising' (their mean is over 2 % above the lowest, while
    val/train_loss kept falling), else 'level'. All use the same times and noises."""
    val, train = (torch.as_tensor(v, dtype=torch.float64) for v in (val_losses, train_losses))
    if len(val) < 4 or len(val) != len(train):
        return "short"
    best = int(val.argmin())
    if best >= len(val) - 3:
        return "falling"
    rose = val[-3:].mean() > 1.02 * val[best]
    return "memorising" if rose and train[-3:].mean() < train[best] else "level"


def less_guidance(guidance_scale):
    """What to do about too strong a guidance: without any (1), there is none to lower."""
    return "train longer" if guidance_scale == 1 else "lower --guidance_scale, then train longer"


def overfit_rules(v, c):
    """The part of `rules` about a model that should know its training images by heart."""
    return [
        (MEMORISED, "bad", not v and not c.nearest_mse <= c.mse_threshold,
         f"FAIL: over an MSE of {c.mse_threshold:.2g} to the nearest training latent.",
         "Train longer (--max_steps), with a lower --lr if train/loss jumps; if that does not "
         "help, run find_latent_scale.py again."),
        (MEMORISED, "bad", not v and not c.nearest_psnr >= OVERFIT_PSNR,
         f"FAIL: the latents are right, their images are not, under {OVERFIT_PSNR} dB.",
         "Train the autoencoder longer."),
        (MEMORISED, "bad", not v, "FAIL: under half of the images come back.",
         "Train longer, or draw more (--sample_batch_size)."),
    ]


def rules(v, c):
    """The table of verdicts, for a metric's value v in the context c of `health`: [(metric, level,
    whether it applies, meaning, advice)]. The first that applies counts; if none does, see OK."""
    return [
        ("*", "bad", not math.isfinite(v), "NaN or infinite: training or sampling has blown up.",
         "Resume from the last checkpoint with a lower --lr and --grad_clip; try --dtype fp32."),

        (LOSS, "bad", c.loss_trend == "rising", "Diverging: rising at the end, or not finite.",
         "Lower --lr (by 3 to 10 times), raise --warmup_steps, or lower --grad_clip."),
        (LOSS, "watch", c.loss_trend == "flat", "No lower than at the start: little was learned.",
         "Raise --lr if train/grad_norm is small and steady; check the images and scale factor."),
        (GRAD, "bad", v > 100, "The gradient is exploding.",
         "Lower --lr, raise --warmup_steps and --batch_per_device, keep --grad_clip at most 1.0."),
        (GRAD, "bad", v < 1e-6, "The gradient is vanishing: weights hardly change.",
         "Look for blank images or a latent scale factor of zero; raise --lr."),
        (BAD_STEPS, "bad" if c.diverged else "watch", c.diverged or v > 0,
         "Steps skipped since the last log line: their gradients were not finite.",
         "If it goes on, lower --lr and --grad_clip; try --dtype fp32; look for odd images."),
        (VAL, "bad", c.val_trend == "memorising",
         f"Memorising: val/loss was lowest in epoch {c.best_epoch}; val/train_loss still falls.",
         "Use ckpts/best.pt, of that epoch: later ones copy patients. More images, or --patience."),
        (VAL, "watch", c.val_trend == "level", f"Lowest in epoch {c.best_epoch}, and level since.",
         "Use ckpts/best.pt. Stop if val/loss does not start to fall again."),
        # Asked at every evaluation, so the 0.025 of evaluate.py would often be met by chance.
        (COPIES, "bad", c.probability < 0.001, "More copies than chance allows.",
         "Stop: it reproduces patients. Use an earlier ckpts/best.pt; check it with evaluate.py."),

        *[rule for level, factor in (("bad", 4), ("watch", 2)) for rule in (
            (POWER, level, v < 1 / factor, "Blurred: less power in an octave than real images.",
             "Train longer. If reconstructions are as soft, train the autoencoder longer."),
            (POWER, level, v > factor, "Mottle: more power in an octave than real images.",
             "Train longer, or raise --num_sampling_steps. In a short run, lower --ema_decay."))],
        *[(name, level, v > factor, "A lattice: dots or squares at equal distances.",
           "Look at reconstructions: train the autoencoder longer, or with a lower --disc_weight.")
          for name in (LATTICE, VAL_LATTICE) for level, factor in (("bad", 4), ("watch", 2))],
        *[(ROUND_TRIP, level, v > c.real_round_trip + margin, "Not latents of X-rays yet.",
           "Train longer or raise --lr, --num_sampling_steps. In a short run, lower --ema_decay.")
          for level, margin in (("bad", 0.012), ("watch", 0.004))],

        (MSE_MEAN, "bad", v < 0.01, "Collapse: the samples of a class are nearly identical.",
         f"Lower --lr, {c.less}; check that --prob_uncond is near 0.1 and not near 1."),
        *[(name, "watch", v < least, "The samples of a class are very similar.",
           f"See if the number grows over the next epochs; else {c.less}.")
          for name, least in ((MSE_MEAN, 0.1), (RATIO, 0.5))],
        (RATIO, "watch", v > 1.5, "Further apart than training images: noise, not diversity.",
         "Train longer or raise --num_sampling_steps. In a short run, lower --ema_decay."),
        *[(name, "bad", v < 1e-4, "Images are repeated among the samples of a class.",
           f"Check that samples start from different noise; lower --lr, {c.less}.")
          for name in (MSE_STD, MSE_MIN, MSE_MAX)],

        *[(PSNR, level, v < c.psnr_linear + margin, f"{word} than as many principal components.",
           "Train longer (--max_steps, --epochs), or raise --lr; keep --kl_weight small.")
          for level, margin, word in (("bad", 0, "Worse"), ("watch", 1, "Hardly better"))],
        *[rule for name, level, factor in (
            (DETAIL, "bad", 2), (DETAIL, "watch", 1.25),
            (FINEST, "bad", 4), (FINEST, "watch", 1.6)) for rule in (
                (name, level, v < 1 / factor, "Blurred: less fine detail than the images.",
                 "Train longer, with the discriminator from half of the run on (--disc_start)."),
                (name, level, v > factor, "Noise: more fine detail than the images.",
                 "Train longer, or lower --disc_weight."))],
        *[(NOISE, level, v > most, "Posterior noise makes up a good part of the variance.",
           "Train the autoencoder longer, or with a lower --kl_weight.")
          for level, most in (("bad", 0.5), ("watch", 0.2))],
        (Z_MEAN, "bad", abs(v - c.train_mean) > c.std, "Far from the training latents' mean.",
         f"If images are too dark or bright, try --zero_terminal_snr; else {c.less}."),
        (Z_STD, "bad", v < 0.5 * c.std or v > 2 * c.std, "Far off 1/latent_scale_factor.",
         f"Run find_latent_scale.py again. If the factor is right, {c.less}."),
        (Z_STD, "watch", v < 0.8 * c.std or v > 1.25 * c.std, "Off 1/latent_scale_factor.",
         f"Too large: {c.less}. Too small: train longer, more --num_sampling_steps."),
        *[rule for name in (Z_MIN, Z_MAX) for rule in (
            (name, "bad", abs(v) > 20 and not c.lowest <= v <= c.highest, "Beyond +-20: too far.",
             f"Raise --num_sampling_steps, {c.less}; else check the scale factor."),
            (name, "watch", v < c.lowest or v > c.highest, "Far outside the training range.",
             f"Early in training this passes by itself; later {c.less}."))],
        *overfit_rules(v, c),
    ]


OK = {  # in the order in which verdicts are printed: (meaning, target beside the value)
    LOSS: ("Falling, or too short to judge (under 20 log entries).", ""),
    GRAD: ("The gradient is neither exploding nor vanishing.", "1e-06 to 100"),
    BAD_STEPS: ("No step was skipped since the last log line.", ""),
    VAL: ("Falling, or too early to judge (under 4 evaluations).", ""),
    COPIES: ("No more copies of training images than chance allows.", "{expected:.2g} by chance"),
    POWER: ("As much power in every octave as real images.", "0.5 to 2"),
    LATTICE: ("No more of a lattice than in real images.", "under 2"),
    ROUND_TRIP: ("Decoded and encoded again, they move as little as real latents.",
                 "{real_round_trip:.2g} for real ones"),
    MSE_MEAN: ("The samples of a class differ from one another.", "over 0.1"),
    RATIO: ("Samples are about as diverse as training images.", "0.5 to 1.5"),
    **dict.fromkeys((MSE_STD, MSE_MIN, MSE_MAX), ("No image is repeated within a class.", "")),
    PSNR: ("Better than as many principal components.", "principal components: {psnr_linear:.1f}"),
    DETAIL: ("As much fine detail as the images.", "0.8 to 1.25"),
    FINEST: ("As much fine detail as the images.", "0.6 to 1.6"),
    VAL_LATTICE: ("No more of a lattice than in the images.", "under 2"),
    NOISE: ("The latents carry image content and hardly any noise.", "under 0.2"),
    Z_MEAN: ("Near the mean of the training latents, if that is known.",
             "{train_mean:.2g} +- {std:.2g}"),
    Z_STD: ("Near 1/latent_scale_factor.", "0.8 to 1.25 of {std:.3g}"),
    **dict.fromkeys((Z_MIN, Z_MAX), ("Near the range of the training latents, if that is known.",
                                     "{lowest:.3g} to {highest:.3g}")),
    MEMORISED: ("PASS: the samples are the training images.",
                "MSE {nearest_mse:.2g}, {nearest_psnr:.1f} dB, {coverage:.0%} found"),
}


def health(metrics, losses=(), train_stats=None, overfit=False, diverged=False,
           val_history=((), ()), best_epoch=0, guidance_scale=1.0):
    """One Verdict for each metric of OK in `metrics` (name -> number). losses: history of
    train/loss; val_history: those of val/loss, lowest in best_epoch, and val/train_loss before now;
    train_stats: mean, min and max of the unscaled training latents. overfit skips the diversity
    metrics. diverged: --max_bad_steps stopped the run; guidance_scale: of the samples."""
    val, val_train = ([*past, metrics.get(name, math.nan)]
                      for past, name in zip(val_history, (VAL, VAL_TRAIN), strict=True))
    mean, low, high = ((train_stats or {}).get(name, math.nan) for name in ("mean", "min", "max"))
    # Unknown numbers are NaN; those of other metrics go by the ends of their names.
    context = {name.split("/")[1]: metrics.get(name, math.nan) for name in (
        COPIES_EXPECTED, COPIES_PROBABILITY, PSNR_LINEAR, REAL_ROUND_TRIP, "overfit/nearest_mse",
        "overfit/mse_threshold", "overfit/nearest_psnr", "overfit/coverage")}
    context |= {"loss_trend": loss_trend(losses), "val_trend": val_trend(val, val_train),
                "best_epoch": best_epoch, "diverged": diverged, "train_mean": mean,
                "std": metrics.get(TARGET_STD, math.nan), "less": less_guidance(guidance_scale),
                "lowest": low - (high - low) / 2, "highest": high + (high - low) / 2}
    verdicts = []
    for name in (name for name in OK if name in metrics):
        one_pair = name == MSE_STD and metrics[name] == 0 < metrics.get(MSE_MIN, 0)
        if one_pair or overfit and name.startswith("sample_diversity/"):
            continue  # the std of a single pair is 0 and says nothing
        value, (meaning, target) = float(metrics[name]), OK[name]
        found = [(level, *words) for metric, level, applies, *words in
                 rules(value, SimpleNamespace(**context)) if applies and metric in ("*", name)]
        level, meaning, advice = [*found, ("ok", meaning, "")][0]
        target = target.format(**context)
        shown = f" ({target})" if target and "nan" not in target else ""
        verdicts.append(Verdict(name, level, f"{value:.4g}{shown}", meaning, advice))
    return verdicts


def sweep_objective(values, verdicts):
    """`values` with `sample_diversity/pairwise_mse_mean`, which a sweep maximises, set to -1 if the
    samples are noise or copies, which are diverse too: ratio_to_real over 1.5 or not finite, or a
    bad verdict on the round trip, the latents' std or copies. `..._raw` is the measured value."""
    too_far_apart = not values.get(RATIO, 1.0) <= 1.5
    bad = any(v.metric in (ROUND_TRIP, Z_STD, COPIES) and v.level == "bad" for v in verdicts)
    objective = -1.0 if too_far_apart or bad else values[MSE_MEAN]
    return values | {f"{MSE_MEAN}_raw": values[MSE_MEAN], MSE_MEAN: objective}


def overfit_verdict(z_samples, z_train, x_samples, x_train, mse_threshold=0.1):
    """Did the model memorise its K training items? dict of `overfit/*`, with the bool `passed`.

    z_samples [S, ...] and z_train [K, ...] are normalised latents, x_* [., 1, H, W] their images in
    [-1, 1]. The samples' median MSE and PSNR to the nearest training latent must reach
    mse_threshold and OVERFIT_PSNR. Coverage, the fraction of min(K, S) items nearest to some sample
    within mse_threshold, must be one half, and two items if S and K allow: one repeated image fails
    for K > 1.
    """
    z_samples, z_train = rows64(z_samples), rows64(z_train)
    # The faster way to compute distances is inexact near 0.
    distances = torch.cdist(z_samples, z_train, compute_mode="donot_use_mm_for_euclid_dist")
    mse, nearest = (distances.square() / z_train.shape[1]).min(1)  # [S], [S]
    match_psnr = psnr(x_samples.detach().cpu(), x_train.detach().cpu()[nearest])
    findable = min(len(z_train), len(z_samples))
    covered = len(nearest[mse <= mse_threshold].unique())
    median_mse, median_psnr = mse.quantile(0.5).item(), match_psnr.quantile(0.5).item()
    passed = (median_mse <= mse_threshold and median_psnr >= OVERFIT_PSNR
              and covered >= 0.5 * findable and covered >= min(2, findable))
    return {"overfit/nearest_mse": median_mse, "overfit/mse_threshold": mse_threshold,
            "overfit/nearest_psnr": median_psnr, "overfit/coverage": covered / findable,
            "overfit/passed": passed}


def format_verdicts(verdicts):
    """Aligned console table of verdicts, with the advice below each that is not ok."""
    width = max((len(v.metric) for v in verdicts), default=0)
    value_width = max((len(v.value) for v in verdicts), default=0)
    lines = []
    for v in verdicts:
        start = f"{v.level.upper():<5}  {v.metric:<{width}}  {v.value:<{value_width}}  "
        lines.append(start + v.meaning)
        if v.level != "ok":
            lines.append(" " * len(start) + v.advice)
    return "\n".join(lines)
