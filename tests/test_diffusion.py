"""Noise schedules, parametrisations and samplers against closed forms and known distributions;
test_references.py compares them with diffusers."""
import math

import numpy as np
import pytest
import torch
import torch.nn as nn
from test_model import randn, tiny_unet

import diffusion

SCHEDULES = ("linear", "cosine", "flow")
PREDICTIONS = ("eps", "v", "x0", "flow")
ALPHA_1 = 0.0065715865  # exp(-5.025), where the linear schedule ends


# --- noise schedule ---


@pytest.mark.parametrize("zero_terminal_snr", [True, False])
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_schedule_ends_and_identity(name, zero_terminal_snr, dtype):
    schedule = diffusion.NoiseSchedule(name, zero_terminal_snr)
    t = torch.linspace(0, 1, 2001, dtype=dtype)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    assert alpha.dtype == sigma.dtype == dtype
    assert alpha[0] == 1 and sigma[0] == 0
    if zero_terminal_snr:
        assert alpha[-1] == 0 and sigma[-1] == 1
    else:
        assert alpha[-1].item() == pytest.approx(ALPHA_1, abs=1e-7)
    total = alpha + sigma if name == "flow" else alpha**2 + sigma**2
    atol = 3e-7 if dtype == torch.float32 else 1e-14
    assert torch.allclose(total, torch.ones((), dtype=dtype), atol=atol)
    if name == "flow" and zero_terminal_snr:
        assert torch.equal(sigma, t)
    if dtype == torch.float64:  # float32 repeats values where the slope is flat
        assert (alpha.diff() < 0).all() and (sigma.diff() > 0).all()


@pytest.mark.parametrize("zero_terminal_snr", [True, False])
@pytest.mark.parametrize("name", SCHEDULES)
def test_sigma_is_precise_where_there_is_little_noise(name, zero_terminal_snr):
    schedule = diffusion.NoiseSchedule(name, zero_terminal_snr)
    t = torch.logspace(-6, -1, 100)
    exact = schedule.sigma(t.double())
    assert ((schedule.sigma(t) - exact).abs() / exact).max() < 1e-5


# --- parametrisations ---


class Oracle(nn.Module):
    """A network that puts out what it is told to."""

    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, x, t, y):
        return self.output


def ideal_case(prediction, name, zero_terminal_snr):
    """(schedule, x0, t, eps, x_t, ideal output) in float64, for a Denoiser with `prediction`."""
    schedule = diffusion.NoiseSchedule(name, zero_terminal_snr)
    t = torch.tensor([0.0, 1e-3, 0.2, 0.5, 0.9, 1.0], dtype=torch.float64)
    alpha, sigma = (f(t).view(-1, 1, 1, 1) for f in (schedule.alpha, schedule.sigma))
    x0, eps = randn(6, 3, 4, 4, dtype=torch.float64), randn(6, 3, 4, 4, seed=1, dtype=torch.float64)
    output = {"eps": eps, "v": alpha * eps - sigma * x0, "x0": x0, "flow": eps - x0}[prediction]
    return schedule, x0, t, eps, alpha * x0 + sigma * eps, output


ALLOWED = [(p, s, z) for p in PREDICTIONS for s in SCHEDULES for z in (True, False)
           if not (p == "eps" and z)]


@pytest.mark.parametrize("prediction, name, zero_terminal_snr", ALLOWED)
def test_ideal_output_denoises_to_x0_and_costs_no_loss(prediction, name, zero_terminal_snr):
    schedule, x0, t, eps, xt, output = ideal_case(prediction, name, zero_terminal_snr)
    y = torch.zeros(6, dtype=torch.long)
    for weighting in ("uniform", "min_snr"):
        denoiser = diffusion.Denoiser(Oracle(output), schedule, prediction, weighting)
        assert torch.allclose(denoiser.denoise(xt, t, y), x0, atol=1e-10)
        loss = denoiser(x0, t, eps, y)
        assert loss.shape == (6,) and loss.abs().max() < 1e-20
        assert torch.allclose(schedule.q_sample(x0, t, eps), xt)


def test_x0_of_eps_is_bounded_where_the_error_is_multiplied():
    schedule = diffusion.NoiseSchedule("linear", False)
    output, xt = (randn(1000, 1, 1, 1, seed=seed) for seed in (0, 1))
    denoiser = diffusion.Denoiser(Oracle(output), schedule, "eps")
    y = torch.zeros(1000, dtype=torch.long)
    x0 = denoiser.denoise(xt, torch.ones(1000), y)
    assert x0.abs().max() == diffusion.EPS_BOUND and (x0.abs() < diffusion.EPS_BOUND).any()
    a, b = denoiser.x0_coefficients(torch.ones(1000))
    assert b.abs().max() > 100 and torch.equal(x0, (a * xt + b * output).clamp(-8, 8))


@pytest.mark.parametrize("prediction, name, zero_terminal_snr", ALLOWED)
def test_loss_weights(monkeypatch, prediction, name, zero_terminal_snr):
    monkeypatch.setattr(diffusion, "EPS_BOUND", math.inf)
    schedule, x0, t, eps, xt, output = ideal_case(prediction, name, zero_terminal_snr)
    y = torch.zeros(6, dtype=torch.long)
    wrong = output + randn(6, 3, 4, 4, seed=2, dtype=torch.float64)
    mse = (wrong - output).square().mean((1, 2, 3))
    plain = diffusion.Denoiser(Oracle(wrong), schedule, prediction, "uniform")
    assert torch.allclose(plain(x0, t, eps, y), mse)

    snr = (schedule.alpha(t) / schedule.sigma(t)) ** 2
    capped = snr.clamp(max=5)
    loss = diffusion.Denoiser(Oracle(wrong), schedule, prediction, "min_snr")(x0, t, eps, y)
    x0_error = (plain.denoise(xt, t, y) - x0).square().mean((1, 2, 3))
    assert torch.allclose(loss, capped * x0_error)
    if prediction == "eps":  # Hang et al. 2023, section 3.4: min(SNR, 5) / SNR
        assert torch.allclose(loss[1:], (capped / snr * mse)[1:])  # SNR is infinite at t = 0


@pytest.mark.parametrize("name, zero_terminal_snr, prediction, message", [
    ("sigmoid", True, "v", "'sigmoid'.*linear, cosine or flow"),
    ("cosine", True, "epsilon", "'epsilon'.*eps, v, x0 or flow"),
    *((name, True, "eps", "eps.*no-zero_terminal_snr") for name in SCHEDULES)])
def test_bad_settings_are_refused(name, zero_terminal_snr, prediction, message):
    with pytest.raises(ValueError, match=message):
        schedule = diffusion.NoiseSchedule(name, zero_terminal_snr)
        diffusion.Denoiser(tiny_unet(), schedule, prediction)


# --- classifier-free guidance ---


@torch.no_grad()
def test_scale_one_costs_one_network_evaluation():
    unet = tiny_unet(seed=1)
    sizes = []
    unet.register_forward_hook(lambda m, args, out: sizes.append(len(args[0])))
    denoiser = diffusion.Denoiser(unet, diffusion.NoiseSchedule("cosine", True), "v")
    for w in (1.0, 4.0):
        denoiser.denoise(randn(3, 4, 8, 8), torch.full((3,), 0.5), torch.tensor([0, 1, 1]), w)
    assert sizes == [3, 6]


# --- samplers ---

NOISY = ("ancestral", "dpmpp_2m_sde")  # draw fresh noise at every step
ENDS = [(name, zero) for name in SCHEDULES for zero in (True, False)]
CASES = [(sampler, *case) for sampler in diffusion.SAMPLERS for case in ENDS]


def float64(t):
    return torch.tensor(t, dtype=torch.float64)


def levels(schedule, t):
    """(alpha, sigma) at a float t, in float64."""
    return schedule.alpha(float64(t)), schedule.sigma(float64(t))


def quantiles(n):
    """A standard normal sample without luck: n equally likely quantiles."""
    return torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n)


def draw(sampler, schedule, denoise, steps, n=1000):
    """x0 of `n` independent pixels that start from quantiles.

    For samplers that draw noise: of 20 n pixels that start from random numbers.
    """
    rng = torch.Generator().manual_seed(0)
    start = quantiles(n)
    if sampler in NOISY:
        start = torch.randn(20 * n, generator=rng, dtype=torch.float64)

    def noise():
        return torch.randn(start.shape, generator=rng, dtype=torch.float64)

    noisiest = levels(schedule, 1.0)[1] * start
    return diffusion.SAMPLERS[sampler](denoise, schedule, noisiest, steps, noise)


# --- exact denoisers ---


def gaussian(schedule, mean, std):
    """E[x0 | x_t] for x0 ~ N(mean, std^2)."""
    def denoise(x, t):
        alpha, sigma = levels(schedule, t)
        return mean + alpha * std**2 / (alpha**2 * std**2 + sigma**2) * (x - alpha * mean)
    return denoise


WEIGHTS, MEANS, STDS = float64([0.3, 0.7]), float64([-1.0, 1.2]), float64([0.3, 0.2])


def mixture(schedule):
    """E[x0 | x_t] for x0 ~ 0.3 N(-1, 0.3^2) + 0.7 N(1.2, 0.2^2)."""
    def denoise(x, t):
        alpha, sigma = levels(schedule, t)
        variance = alpha**2 * STDS**2 + sigma**2
        offset = x[..., None] - alpha * MEANS
        logits = WEIGHTS.log() - variance.log() / 2 - offset**2 / (2 * variance)
        fraction = torch.softmax(logits, dim=-1)
        return (fraction * (MEANS + alpha * STDS**2 / variance * offset)).sum(-1)
    return denoise


# --- what the samplers draw ---


@pytest.mark.parametrize("sampler, name, zero_terminal_snr", CASES)
def test_mixture_is_recovered(sampler, name, zero_terminal_snr):
    schedule = diffusion.NoiseSchedule(name, zero_terminal_snr)
    x0 = draw(sampler, schedule, mixture(schedule), steps=200)
    left = x0 < 0.2
    tolerance = 0.012 if sampler in NOISY else 0.003
    assert left.double().mean().item() == pytest.approx(0.3, abs=tolerance)
    for mode, mean, std in ((x0[left], -1.0, 0.3), (x0[~left], 1.2, 0.2)):
        assert mode.mean().item() == pytest.approx(mean, abs=0.05 * std)
        assert mode.std().item() == pytest.approx(std, rel=0.09 if sampler in NOISY else 0.04)
    cdf = (WEIGHTS * torch.special.ndtr((x0.sort().values[:, None] - MEANS) / STDS)).sum(1)
    expected = (torch.arange(len(x0)) + 0.5) / len(x0)
    distance = (cdf - expected).abs().max()  # Kolmogorov's
    assert distance < (0.025 if sampler in NOISY else 0.01)


@pytest.mark.parametrize("sampler, name, zero_terminal_snr", CASES)
def test_known_image_keeps_the_marginals_at_every_step(sampler, name, zero_terminal_snr):
    """With x0 known, x_t must be alpha x0 + sigma noise exactly, however few steps there are."""
    schedule, x0, seen = diffusion.NoiseSchedule(name, zero_terminal_snr), 0.8, []

    def denoise(x, t):
        seen.append((t, x))
        return torch.full_like(x, x0)

    out = draw(sampler, schedule, denoise, steps=5, n=4000)
    assert torch.allclose(out, torch.full_like(out, x0), atol=1e-12)
    alpha_1, sigma_1 = levels(schedule, 1.0)
    start = seen[0][1] / sigma_1
    for t, x in seen:
        alpha, sigma = levels(schedule, t)
        if sampler in NOISY:
            # The start lacks alpha(1) x0; that fades as sigma^2(t) alpha(1) / alpha(t) or faster.
            tolerance = 0.007 + 0.012 * sigma.item()
            assert x.mean().item() == pytest.approx((alpha * x0).item(), abs=tolerance)
            assert x.std().item() == pytest.approx(sigma.item(), rel=0.015)
        else:
            expected = alpha * x0 + sigma * (start - alpha_1 / sigma_1 * x0)
            assert torch.allclose(x, expected, atol=1e-12)


@pytest.mark.parametrize("sampler, name, zero_terminal_snr", CASES)
@pytest.mark.parametrize("steps", [1, 2, 5, 100])
def test_a_step_is_one_evaluation_at_equal_distances(sampler, name, zero_terminal_snr, steps):
    """In t or, for samplers whose steps are in lambda = log(alpha / sigma), in lambda."""
    schedule, seen = diffusion.NoiseSchedule(name, zero_terminal_snr), []

    def denoise(x, t):
        seen.append(t)
        return 0 * x

    draw(sampler, schedule, denoise, steps, n=2)
    assert len(seen) == steps and seen[0] == 1
    if sampler in ("ancestral", "ddim"):
        assert seen == pytest.approx([1 - i / steps for i in range(steps)])
        return
    lambdas = [math.log(alpha / sigma) for alpha, sigma in (levels(schedule, t) for t in seen[1:])]
    high = math.log(6 * steps)  # the times are the middles of equal parts
    low = max(-high, math.log(ALPHA_1)) if (name, zero_terminal_snr) == ("linear", False) else -high
    middles = [low + (high - low) * (i + 0.5) / (steps - 1) for i in range(steps - 1)]
    if zero_terminal_snr:
        assert lambdas == pytest.approx(middles)
    elif steps > 2:
        assert np.diff(lambdas) == pytest.approx(np.diff(lambdas)[0], rel=1e-6)


@pytest.mark.parametrize("sampler, name, zero_terminal_snr", CASES)
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_very_few_steps_stay_near_the_data(sampler, name, zero_terminal_snr, steps):
    schedule = diffusion.NoiseSchedule(name, zero_terminal_snr)
    x0 = draw(sampler, schedule, mixture(schedule), steps)
    assert x0.isfinite().all() and x0.abs().max() < 3
    if steps == 1:  # one evaluation at pure noise knows the mean only
        assert torch.allclose(x0, (WEIGHTS * MEANS).sum(), atol=0.1)


# --- convergence ---


def gaussian_error(sampler, schedule, steps, mean=-0.3, std=1.5):
    """Mean distance to the exact end of the probability flow from the same noise.

    The flow is affine for a Gaussian.
    """
    (alpha_1, sigma_1), noise = levels(schedule, 1.0), quantiles(100)
    std_1 = (alpha_1**2 * std**2 + sigma_1**2).sqrt()
    exact = mean + std * (sigma_1 * noise - alpha_1 * mean) / std_1
    x0 = draw(sampler, schedule, gaussian(schedule, mean, std), steps, n=100)
    return (x0 - exact).abs().mean().item()


@pytest.mark.parametrize("name, zero_terminal_snr", ENDS)
def test_order_of_convergence(name, zero_terminal_snr):
    schedule = diffusion.NoiseSchedule(name, zero_terminal_snr)

    def order(sampler, few, many):
        gain = gaussian_error(sampler, schedule, few) / gaussian_error(sampler, schedule, many)
        return math.log(gain, many / few)

    assert 0.93 < order("ddim", 40, 320) < 1.05
    # Equal steps in t are unbounded in log SNR at both ends, which costs a factor log(steps). On
    # 'linear' sigma is sqrt(t / 10) near 0: its last step is of first order, which shows beyond
    # 300 steps only.
    assert 1.6 < order("dpmpp_2m", 40, 160 if name == "linear" else 320) < 2.2


@pytest.mark.parametrize("name, zero_terminal_snr", ENDS)
def test_eight_steps_keep_what_is_narrow(name, zero_terminal_snr):
    """Equal steps in t are too long near t = 0, where what is narrow is decided: they lose 25 to 60
    % of this standard deviation."""
    schedule = diffusion.NoiseSchedule(name, zero_terminal_snr)
    x0 = draw("dpmpp_2m_sde", schedule, gaussian(schedule, 0.0, 0.2), 8, n=5000)
    assert x0.std().item() == pytest.approx(0.2, rel=0.1)
    ddim, dpmpp = (gaussian_error(sampler, schedule, 8, 0.7, 0.5)
                   for sampler in ("ddim", "dpmpp_2m"))
    assert dpmpp < ddim / 6
