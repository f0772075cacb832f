"""The diffusion process in one room: noise schedule, parametrisation and loss, samplers.

Time t runs from 0 (clean) to 1 (noise). x_t = alpha(t) x0 + sigma(t) eps, with x0 a latent of unit
variance. The network may put out eps, v, x0 or a velocity: only `Denoiser` knows, and samplers see
x0-hat alone. So a new parametrisation needs no new sampler, and a new sampler is twenty lines.
"""
import contextlib
import functools
import itertools
import math
from typing import NamedTuple

import torch
import torch.nn as nn

# --- noise schedule -----------------------------------------------------------------------------


class NoiseSchedule:
    """alpha(t) and sigma(t) on continuous t in [0, 1].

    name: 'linear' (variance preserving, beta from 0.1 to 20; Song et al. 2021, eq. 33), 'cosine'
    (alpha = cos(pi t / 2), that of Nichol & Dhariwal 2021 without its offset) or 'flow'
    (alpha = 1 - t, sigma = t; Lipman et al. 2023).
    zero_terminal_snr: t = 1 is pure noise (Lin et al. 2024, alg. 1 for 'linear'). Otherwise every
    schedule ends at the alpha(1) that 'linear' has by nature, exp(-5.025) = 0.0066.
    ValueError for an unknown name.
    """

    ALPHA_1 = math.exp(-0.25 * (20.0 - 0.1) - 0.5 * 0.1)

    def __init__(self, name, zero_terminal_snr):
        if name not in ("linear", "cosine", "flow"):
            raise ValueError(f"unknown noise schedule {name!r}: linear, cosine or flow")
        self.name = name
        self.zero_terminal_snr = zero_terminal_snr
        self.angle = 0.5 * math.pi if zero_terminal_snr else math.acos(self.ALPHA_1)  # of cosine

    def _one_minus_alpha(self, t):
        # 1 - alpha, not alpha: near t = 0 it is what sigma needs without cancellation.
        if self.name == "linear":
            scale = 1 - self.ALPHA_1 if self.zero_terminal_snr else 1.0
            return -torch.expm1(-0.25 * t**2 * (20.0 - 0.1) - 0.5 * t * 0.1) / scale
        return t * (1.0 if self.zero_terminal_snr else 1 - self.ALPHA_1)

    def alpha(self, t):
        """Weight of the image in x_t, for any shape of t."""
        if self.name == "cosine":  # as a sine, since cos(pi / 2) in floating point is not zero
            return torch.sin(0.5 * math.pi - self.angle * t)
        return 1 - self._one_minus_alpha(t)

    def sigma(self, t):
        """Standard deviation of the noise in x_t, for any shape of t."""
        if self.name == "cosine":  # not from alpha, whose rounding would leave sigma(1) below 1
            return torch.sin(self.angle * t)
        u = self._one_minus_alpha(t)
        if self.name == "flow":
            return u
        return torch.sqrt(u * (2 - u))  # 1 - alpha^2 = (1 - alpha)(1 + alpha)

    def levels(self, t):
        """(alpha, sigma) of t [B], each [B, 1, 1, 1]."""
        return self.alpha(t)[:, None, None, None], self.sigma(t)[:, None, None, None]

    def q_sample(self, x0, t, noise):
        """Draw x_t from q(x_t | x0). x0, noise [B, C, h, w], t [B]."""
        alpha, sigma = self.levels(t)
        return alpha * x0 + sigma * noise


# --- parametrisation and loss -------------------------------------------------------------------

# Where x0-hat of eps is held. Latents of 773 radiographs reach from -7.5 to 6.6 deviations.
EPS_BOUND = 8.0


class Denoiser(nn.Module):
    """A network with its parametrisation: everything outside sees x0-hat only.

    unet: module (x_t [B, C, h, w], t [B], y [B]) -> [B, C, h, w], with a `null_class`.
    prediction: what its output means: 'eps' (Ho et al. 2020), 'v' = alpha eps - sigma x0 (Salimans
    & Ho 2022), 'x0', or 'flow' = eps - x0, the velocity of the straight path (Lipman et al. 2023).
    loss_weighting: 'uniform' = plain MSE on that output; 'min_snr' = min(SNR, 5) on x0 (Hang et al.
    2023). ValueError for unknown names, and for eps with zero terminal SNR.
    """

    def __init__(self, unet, schedule, prediction, loss_weighting="uniform"):
        super().__init__()
        if prediction not in ("eps", "v", "x0", "flow"):
            raise ValueError(f"unknown prediction {prediction!r}: eps, v, x0 or flow")
        if prediction == "eps" and schedule.zero_terminal_snr:
            raise ValueError("prediction eps says nothing about x0 where the signal is zero: use "
                             "--no-zero_terminal_snr with eps, or --prediction=v, x0 or flow")
        self.unet = unet
        self.schedule = schedule
        self.prediction = prediction
        self.loss_weighting = loss_weighting

    def x0_coefficients(self, t):
        """(a, b), each [B, 1, 1, 1], of x0-hat = a x_t + b output."""
        alpha, sigma = self.schedule.levels(t)
        if self.prediction == "eps":
            return 1 / alpha, -sigma / alpha
        if self.prediction == "v":
            power = alpha**2 + sigma**2  # 1 on variance-preserving schedules
            return alpha / power, -sigma / power
        if self.prediction == "flow":
            return 1 / (alpha + sigma), -sigma / (alpha + sigma)
        return torch.zeros_like(alpha), torch.ones_like(alpha)

    def target(self, x0, t, noise):
        """What the network should put out at (x0, t, noise): [B, C, h, w]."""
        if self.prediction == "eps":
            return noise
        if self.prediction == "v":
            alpha, sigma = self.schedule.levels(t)
            return alpha * noise - sigma * x0
        return noise - x0 if self.prediction == "flow" else x0

    def denoise(self, xt, t, y, guidance_scale=1.0):
        """x0-hat [B, C, h, w] of x_t at t [B] for classes y [B]. guidance_scale w: x0(null) +
        w (x0(y) - x0(null)), classifier-free guidance (Ho & Salimans 2022); 1 is the plain
        conditional model and costs one network evaluation instead of two."""
        a, b = self.x0_coefficients(t)
        if guidance_scale == 1.0:
            out = self.unet(xt, t, y)
        else:
            null = torch.full_like(y, self.unet.null_class)
            both = self.unet(torch.cat([xt, xt]), torch.cat([t, t]), torch.cat([y, null]))
            cond, uncond = both.chunk(2)
            out = uncond + guidance_scale * (cond - uncond)
        x0 = a * xt + b * out
        # eps near t = 1 multiplies the network's error by sigma / alpha, up to 152.
        return x0.clamp(-EPS_BOUND, EPS_BOUND) if self.prediction == "eps" else x0

    def forward(self, x0, t, noise, y, aug=None):
        """Training loss of each image, float32 [B]; aug: see model.UNet. It is `forward`, since
        that is what torch.compile and DDP wrap."""
        xt = self.schedule.q_sample(x0, t, noise)
        out = self.unet(xt, t, y) if aug is None else self.unet(xt, t, y, aug)
        error = out - self.target(x0, t, noise)
        loss = error.square().flatten(1).mean(1)
        if self.loss_weighting == "min_snr":
            snr = (self.schedule.alpha(t) / self.schedule.sigma(t)) ** 2
            _, b = self.x0_coefficients(t)
            loss = loss * snr.clamp(max=5.0) * b.flatten() ** 2  # an x0 error is b output errors
        return loss


# --- samplers -----------------------------------------------------------------------------------
# Each takes `steps` steps from x at t = start, which is sigma(1) noise at 1, down to t = 0, where x
# is x0-hat. denoise(x, t) gives x0-hat at a float t; noise() gives standard normal noise like x.


def with_levels(schedule, t):
    """[(t, alpha, sigma)] of times [N], as Python floats."""
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    return list(zip(t.tolist(), alpha.tolist(), sigma.tolist(), strict=True))


def time_grid(schedule, steps, start=1.0):
    """[(t, alpha, sigma)] at steps + 1 equal distances from start to 0."""
    return with_levels(schedule, torch.linspace(start, 0, steps + 1, dtype=torch.float64))


def lambda_grid(schedule, steps, start=1.0):
    """[(t, alpha, sigma)] of start, of steps - 1 times at equal distances in lambda = log(alpha /
    sigma), and of 0, for solvers that take their steps in lambda. The times are the middles of
    equal parts of -log(6 steps), or lambda(start), to log(6 steps), which grows as the ends of
    equal distances in t do."""
    def log_ratio(t):
        return torch.log(schedule.alpha(t) / schedule.sigma(t))

    first = torch.tensor([start], dtype=torch.float64)
    low = max(-math.log(6 * steps), log_ratio(first).item())
    high = max(math.log(6 * steps), low + 1)
    middles = (torch.arange(steps - 1, dtype=torch.float64) + 0.5) / max(1, steps - 1)
    wanted = low + (high - low) * middles
    below, above = torch.zeros_like(wanted), torch.ones_like(wanted)
    for _ in range(60):  # halves of where t must be: lambda falls as t grows
        middle = (below + above) / 2
        early = log_ratio(middle) > wanted
        below, above = torch.where(early, middle, below), torch.where(early, above, middle)
    return with_levels(schedule, torch.cat([first, below, 0 * first]))


def q_posterior(x, x0, now, later):
    """Mean and standard deviation of q(x_s | x_t, x0-hat) from level (t, alpha, sigma) `now` to
    `later`: DDPM (Ho et al. 2020, eq. 6-7; for any alpha and sigma Kingma et al. 2021, A.4)."""
    (_, alpha_t, sigma_t), (_, alpha_s, sigma_s) = now, later
    alpha_ts = alpha_t / alpha_s
    var_ts = sigma_t**2 - alpha_ts**2 * sigma_s**2
    mean = (alpha_ts * sigma_s**2 * x + alpha_s * var_ts * x0) / sigma_t**2
    return mean, math.sqrt(var_ts) * sigma_s / sigma_t


def ancestral(denoise, schedule, x, steps, noise, start=1.0):
    """Draws each x_s from q(x_s | x_t, x0-hat), see `q_posterior`."""
    for now, later in itertools.pairwise(time_grid(schedule, steps, start)):
        mean, std = q_posterior(x, denoise(x, now[0]), now, later)
        x = mean + std * noise()
    return x


def ddim(denoise, schedule, x, steps, noise, start=1.0):
    """Deterministic DDIM (Song et al. 2021, eq. 12 with eta = 0); on schedule 'flow' these are the
    Euler steps of flow matching."""
    for (t, alpha_t, sigma_t), (_, alpha_s, sigma_s) in itertools.pairwise(
            time_grid(schedule, steps, start)):
        x0 = denoise(x, t)
        eps = (x - alpha_t * x0) / sigma_t
        x = alpha_s * x0 + sigma_s * eps
    return x


def dpmpp_2m(denoise, schedule, x, steps, noise, start=1.0, sde=False):
    """DPM-Solver++ 2M (Lu et al. 2022, alg. 2), deterministic. sde: SDE-DPM-Solver++ 2M of the same
    paper, which is `ancestral` of second order."""
    x0_before = h_before = dt_before = None
    for (t, alpha_t, sigma_t), (s, alpha_s, sigma_s) in itertools.pairwise(
            lambda_grid(schedule, steps, start)):
        x0, dt, h = denoise(x, t), t - s, math.inf  # h: the step in lambda
        if alpha_t > 0 and sigma_s > 0:
            h = math.log(alpha_s * sigma_t / (alpha_t * sigma_s))
        direction = x0
        if x0_before is not None:
            # x0-hat in the middle of the step, on the line through the last two over lambda; over
            # t where a step in lambda is infinite, as the first and the last are.
            last, now = (dt_before, dt) if math.inf in (h, h_before) else (h_before, h)
            direction = x0 + now / (2 * last) * (x0 - x0_before)
        decay = math.exp(-h)
        kept = decay if sde else 1.0  # fraction of x_t's noise that is kept; the rest is drawn anew
        x = sigma_s / sigma_t * kept * x + alpha_s * (1 - decay * kept) * direction
        if sde:
            x = x + sigma_s * math.sqrt(1 - kept**2) * noise()
        x0_before, h_before, dt_before = x0, h, dt
    return x


SAMPLERS = {"ancestral": ancestral, "ddim": ddim, "dpmpp_2m": dpmpp_2m,
            "dpmpp_2m_sde": functools.partial(dpmpp_2m, sde=True)}


def conditional(denoiser, y, guidance_scale, guidance_interval, autocast, tick):
    """denoise(x, t) for samplers, of classes y [B]. guidance_interval (low, high): guidance is on
    for t between them only (Kynkaanniemi et al. 2024). autocast(): context of each network
    evaluation; tick(): called before each."""
    low, high = guidance_interval

    def denoise(x, t):
        tick()
        t_batch = torch.full((len(x),), t, device=x.device)
        with autocast():
            return denoiser.denoise(x, t_batch, y, guidance_scale if low <= t <= high else 1.0)
    return denoise


@torch.no_grad()
def sample(denoiser, y, noise, sampler, steps, guidance_scale, guidance_interval,
           autocast=contextlib.nullcontext, tick=lambda: None):
    """Normalised latents [B, C, h, w] of classes y [B]. noise(): standard normal noise [B, C, h, w]
    on y's device, new at each call. Other arguments as of `conditional`."""
    denoise = conditional(denoiser, y, guidance_scale, guidance_interval, autocast, tick)
    start = noise() * denoiser.schedule.sigma(torch.ones(1)).item()
    return SAMPLERS[sampler](denoise, denoiser.schedule, start, steps, noise)


# --- editing ------------------------------------------------------------------------------------


def invert(denoise, schedule, x0, steps, start):
    """x at t = start from which `ddim` comes back to x0 (Song et al. 2021, section 4.3), [B, ...]:
    holds what the image itself has for noise, in place of noise drawn anew."""
    x = x0
    for (_, alpha_t, sigma_t), (s, alpha_s, sigma_s) in itertools.pairwise(
            time_grid(schedule, steps, start)[::-1]):
        eps = (x - alpha_s * denoise(x, s)) / sigma_s  # at the later time: at t = 0 there is none
        x = alpha_s / alpha_t * (x - sigma_t * eps) + sigma_s * eps
    return x


@torch.no_grad()
def edit(denoiser, x0, own, strength, y, noise, sampler, steps, guidance_scale, guidance_interval,
         autocast=contextlib.nullcontext, tick=lambda: None):
    """Normalised latent x0 [1, C, h, w] of class `own`, noised to t = strength and denoised as each
    of the classes y [B] (SDEdit, Meng et al. 2022); by deterministic samplers with its own noise,
    see `invert`. Strength 0 returns x0. Other arguments as of `sample`."""
    x0 = x0.expand(len(y), -1, -1, -1)
    if strength == 0:
        return x0
    own_hat, x0_hat = (  # progress counts the way back alone, as many evaluations as of `sample`
        conditional(denoiser, of, guidance_scale, guidance_interval, autocast, count)
        for of, count in ((torch.full_like(y, own), lambda: None), (y, tick)))
    x = denoiser.schedule.q_sample(x0, torch.full((len(y),), strength, device=y.device), noise())
    if sampler in ("ddim", "dpmpp_2m"):
        x = invert(own_hat, denoiser.schedule, x0, steps, strength)
    return SAMPLERS[sampler](x0_hat, denoiser.schedule, x, steps, noise, strength)


# --- composition --------------------------------------------------------------------------------
# Several conditions in one image; each rule is named by what it draws from. x0_hats(x, t): x0-hat
# of each condition at a float t. The rules for two conditions take small steps of `ancestral`.


def add(x0_hats, weights):
    """denoise(x, t), for any sampler, of p_base prod (p_i / p_base)^w_i: each finding added to the
    base. x0_hats gives pairs, of a condition and of its base. Right if each finding changes other
    parts of the base (projective composition, Bradley et al. 2025), or, with the null class as the
    base, if findings are independent in the training set (Liu et al. 2022)."""
    def denoise(x, t):
        pairs = x0_hats(x, t)
        added = [w * (x0 - base) for w, (x0, base) in zip(weights, pairs, strict=True)]
        return pairs[0][1] + sum(added)
    return denoise


def per_image(x):
    """Sum over all but the first dimension of x, which is kept: [B, 1, ...]."""
    return x.sum(tuple(range(1, x.ndim)), keepdim=True)


def either(x0_hats, schedule, x, steps, noise, weights):
    """Draws from w1 p1 + w2 p2: SuperDiff's OR (Skreta et al. 2025, 2412.17762). Returns (x0,
    {log_ratio: log p1 / p2 of each image [B]})."""
    log_ratio = torch.zeros_like(per_image(x))
    odds = math.log(weights[0] / weights[1])
    for now, later in itertools.pairwise(time_grid(schedule, steps)):
        (mean_1, std), (mean_2, _) = (q_posterior(x, x0, now, later) for x0 in x0_hats(x, now[0]))
        difference = mean_1 - mean_2
        x = mean_2 + torch.sigmoid(log_ratio + odds) * difference + std * noise()
        if std > 0:  # the last step draws nothing, so it says nothing about where x came from
            log_ratio += per_image(difference * (2 * x - mean_1 - mean_2)) / (2 * std**2)
    return x, {"log_ratio": log_ratio.flatten()}


def both(x0_hats, schedule, x, steps, noise, weights):
    """Draws where p1 = p2, which is narrower than their product: SuperDiff's AND, whose noise is
    perpendicular to what the two disagree on, so that log p1 / p2 stays 0. Returns (x0, {})."""
    for now, later in itertools.pairwise(time_grid(schedule, steps)):
        (mean_1, std), (mean_2, _) = (q_posterior(x, x0, now, later) for x0 in x0_hats(x, now[0]))
        difference, z = mean_1 - mean_2, noise()
        along = per_image(difference * z) / per_image(difference**2).clamp_min(1e-30)
        x = (mean_1 + mean_2) / 2 + std * (z - along * difference)
    return x, {}


def product(x0_hats, schedule, x, steps, noise, weights):
    """Draws from p1 p2, normalised: the sum of both scores with Feynman-Kac weights, d log w = g^2
    s1 . s2 dt, and resampling (Skreta et al. 2025, PMLR 267:55906). The images [B] are one
    population. Returns (x0, {effective_sample_size: 1 to B, counted by the starts that images come
    from, so that the error of an average is at most about std / sqrt of it})."""
    first, *grid = time_grid(schedule, steps)
    _, alpha, sigma = grid[0]
    x = alpha * sum(x0_hats(x, first[0])) / 2 + sigma * math.sqrt(0.5) * x  # two noises multiplied
    origin = torch.arange(len(x), device=x.device)
    for (t, alpha_t, sigma_t), (_, alpha_s, sigma_s) in itertools.pairwise(grid):
        x0_1, x0_2 = x0_hats(x, t)
        middle, half = (x0_1 + x0_2) / 2, (x0_1 - x0_2) / 2
        before = per_image((x - alpha_t * middle)**2) / sigma_t**2
        # The exact step for constant x0-hats. q: noise to signal at s over that at t.
        q = sigma_s * alpha_t / (alpha_s * sigma_t)
        x = (alpha_s * (1 - q**4) * middle + q**3 * sigma_s / sigma_t * x
             + sigma_s * math.sqrt((1 - q**6) / 3) * noise())
        if sigma_s > 0:
            after = per_image((x - alpha_s * middle)**2) / sigma_s**2
            signal = (alpha_s / sigma_s)**2 - (alpha_t / sigma_t)**2
            log_w = -(before + after) * math.log(q) - signal * per_image(half**2)
            # Systematic resampling: as many copies of each image as its weight says, rounded.
            ends = log_w.flatten().double().softmax(0).cumsum(0)
            uniform = torch.special.ndtr(noise().flatten()[0]).to(ends)
            points = (torch.arange(len(x), device=x.device) + uniform) / len(x)
            chosen = torch.searchsorted(ends, points).clamp(max=len(x) - 1)
            x, origin = x[chosen], origin[chosen]
    return x, {"effective_sample_size": len(x)**2 / origin.bincount().square().sum()}


RULES = {"or": either, "and": both, "product": product}


class Composition(NamedTuple):
    """Two or more conditions in one image."""

    rule: str  # a name in RULES, or add
    denoisers: list
    conditions: list  # [(number of the denoiser, class)]
    bases: list  # for add: what each condition is added to, likewise
    weights: tuple
    said: list  # what the rule says of each batch that was drawn


@torch.no_grad()
def compose(composition, y, noise, sampler, steps, guidance_scale, guidance_interval,
            autocast=contextlib.nullcontext, tick=lambda: None):
    """Normalised latents [B, C, h, w] of a Composition, which then has another entry in `said`.
    Arguments as of `sample`, but only `add` takes any sampler, and classes and guidance are those
    of the composition."""
    rule, denoisers, conditions, bases, weights, said = composition
    wanted = [*dict.fromkeys([*conditions, *bases])]

    def x0_hats(x, t):
        tick()
        found = {}
        for m, denoiser in enumerate(denoisers):  # one evaluation for each model
            classes = [c for k, c in wanted if k == m]
            y = torch.tensor(classes, device=x.device).repeat_interleave(len(x))
            with autocast():
                x0 = denoiser.denoise(x.repeat(len(classes), 1, 1, 1),
                                      torch.full((len(y),), t, device=x.device), y)
            found.update(zip([(m, c) for c in classes], x0.chunk(len(classes)), strict=True))
        if rule == "add":
            return [(found[c], found[base]) for c, base in zip(conditions, bases, strict=True)]
        return [found[condition] for condition in conditions]

    schedule = denoisers[0].schedule
    start = noise() * schedule.sigma(torch.ones(1)).item()
    if rule == "add":
        return SAMPLERS[sampler](add(x0_hats, weights), schedule, start, steps, noise)
    z, words = RULES[rule](x0_hats, schedule, start, steps, noise, weights)
    said.append(words)
    return z
