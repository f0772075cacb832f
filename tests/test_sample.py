"""Samplers against distributions whose denoiser E[x0 | x_t] is known, and the draw of whole batches."""
import argparse
import math
from types import SimpleNamespace

import pytest
import torch

import experiment
import model
import sample

NOISY = ("ancestral", "dpmpp_sde")  # draw fresh noise at every step
SCHEDULES = [(name, zero) for name in ("linear", "cosine", "flow") for zero in (True, False)]
CASES = [(sampler, *case) for sampler in sample.SAMPLERS for case in SCHEDULES
         if sampler != "euler" or case[0] == "flow"]


def float64(t):
    return torch.tensor(t, dtype=torch.float64)


def levels(schedule, t):
    """(alpha, sigma) at a float t, in float64."""
    return schedule.alpha(float64(t)), schedule.sigma(float64(t))


def quantiles(n):
    """A standard normal sample without luck: n equally likely quantiles."""
    return torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n)


def draw(sampler, schedule, denoise, steps, n=1000):
    """x0 of `n` independent pixels from quantiles; for samplers that draw noise from 20 n random numbers."""
    rng = torch.Generator().manual_seed(0)
    start = quantiles(n)
    if sampler in NOISY:
        start = torch.randn(20 * n, generator=rng, dtype=torch.float64)

    def noise():
        return torch.randn(start.shape, generator=rng, dtype=torch.float64)

    return sample.SAMPLERS[sampler](denoise, schedule, levels(schedule, 1.0)[1] * start, steps, noise)


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
        share = torch.softmax(WEIGHTS.log() - variance.log() / 2 - offset**2 / (2 * variance), dim=-1)
        return (share * (MEANS + alpha * STDS**2 / variance * offset)).sum(-1)
    return denoise


# --- what the samplers draw ---


@pytest.mark.parametrize("mean, std", [(0.7, 0.5), (-0.3, 1.5)])
@pytest.mark.parametrize("sampler, name, zero_terminal_snr", CASES)
def test_gaussian_is_recovered(sampler, name, zero_terminal_snr, mean, std):
    schedule = model.NoiseSchedule(name, zero_terminal_snr)
    x0 = draw(sampler, schedule, gaussian(schedule, mean, std), steps=200)
    # The start lacks the alpha(1) = 0.0066 of signal: 0.0066 mean / std. 20000 draws cost 0.7 % of std.
    assert abs(x0.mean().item() - mean) < (0.025 if sampler in NOISY else 0.007) * std
    assert x0.std().item() == pytest.approx(std, rel=0.05 if sampler in NOISY else 0.018)


@pytest.mark.parametrize("sampler, name, zero_terminal_snr", CASES)
def test_mixture_is_recovered(sampler, name, zero_terminal_snr):
    schedule = model.NoiseSchedule(name, zero_terminal_snr)
    x0 = draw(sampler, schedule, mixture(schedule), steps=200)
    left = x0 < 0.2
    assert left.double().mean().item() == pytest.approx(0.3, abs=0.012 if sampler in NOISY else 0.003)
    for mode, mean, std in ((x0[left], -1.0, 0.3), (x0[~left], 1.2, 0.2)):
        assert mode.mean().item() == pytest.approx(mean, abs=0.05 * std)
        assert mode.std().item() == pytest.approx(std, rel=0.09 if sampler in NOISY else 0.04)
    cdf = (WEIGHTS * torch.special.ndtr((x0.sort().values[:, None] - MEANS) / STDS)).sum(1)
    expected = (torch.arange(len(x0)) + 0.5) / len(x0)
    assert (cdf - expected).abs().max() < (0.025 if sampler in NOISY else 0.01)  # Kolmogorov's distance


@pytest.mark.parametrize("sampler, name, zero_terminal_snr", CASES)
def test_known_image_keeps_the_marginals_at_every_step(sampler, name, zero_terminal_snr):
    """With x0 known, x_t must be alpha x0 + sigma noise exactly, however few steps there are."""
    schedule, x0, seen = model.NoiseSchedule(name, zero_terminal_snr), 0.8, []

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
            # The start lacks alpha(1) x0, and that fades as sigma^2(t) alpha(1) / alpha(t) or faster.
            assert x.mean().item() == pytest.approx((alpha * x0).item(), abs=0.007 + 0.012 * sigma.item())
            assert x.std().item() == pytest.approx(sigma.item(), rel=0.015)
        else:
            assert torch.allclose(x, alpha * x0 + sigma * (start - alpha_1 / sigma_1 * x0), atol=1e-12)


@pytest.mark.parametrize("sampler", sample.SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_step_is_one_evaluation_at_equal_distances_from_t_1(sampler, steps):
    schedule, seen = model.NoiseSchedule("flow", True), []

    def denoise(x, t):
        seen.append(t)
        return gaussian(schedule, 0.7, 0.5)(x, t)

    x0 = draw(sampler, schedule, denoise, steps)
    assert seen == pytest.approx([1 - i / steps for i in range(steps)])
    assert x0.isfinite().all()


@pytest.mark.parametrize("sampler, name, zero_terminal_snr", CASES)
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_very_few_steps_stay_near_the_data(sampler, name, zero_terminal_snr, steps):
    schedule = model.NoiseSchedule(name, zero_terminal_snr)
    x0 = draw(sampler, schedule, mixture(schedule), steps)
    assert x0.isfinite().all() and x0.abs().max() < 3
    if steps == 1:  # one evaluation at pure noise knows the mean only
        assert torch.allclose(x0, (WEIGHTS * MEANS).sum(), atol=0.1)


# --- convergence ---


def gaussian_error(sampler, schedule, steps, mean=-0.3, std=1.5):
    """Mean distance to the exact end of the probability flow from the same noise, affine for a Gaussian."""
    (alpha_1, sigma_1), noise = levels(schedule, 1.0), quantiles(100)
    exact = mean + std * (sigma_1 * noise - alpha_1 * mean) / (alpha_1**2 * std**2 + sigma_1**2).sqrt()
    return (draw(sampler, schedule, gaussian(schedule, mean, std), steps, n=100) - exact).abs().mean().item()


@pytest.mark.parametrize("name, zero_terminal_snr", SCHEDULES)
def test_ddim_and_dpmpp_converge_to_the_same_image(name, zero_terminal_snr):
    schedule = model.NoiseSchedule(name, zero_terminal_snr)
    gaps = []
    for steps in (20, 100, 500):
        ddim, dpmpp = (draw(s, schedule, mixture(schedule), steps, n=200) for s in ("ddim", "dpmpp"))
        gaps.append((ddim - dpmpp).abs().mean().item())
    assert gaps[1] < gaps[0] / 2 and gaps[2] < gaps[1] / 3 and gaps[2] < 0.003
    assert gaussian_error("dpmpp", schedule, 20) < gaussian_error("ddim", schedule, 20) / 3


@pytest.mark.parametrize("name, zero_terminal_snr", SCHEDULES)
def test_order_of_convergence(name, zero_terminal_snr):
    schedule = model.NoiseSchedule(name, zero_terminal_snr)

    def order(sampler, few, many):
        gain = gaussian_error(sampler, schedule, few) / gaussian_error(sampler, schedule, many)
        return math.log(gain, many / few)

    assert 0.93 < order("ddim", 40, 320) < 1.05
    # Equal steps in t are unbounded in log SNR at both ends, which costs a factor log(steps). On 'linear'
    # sigma is sqrt(t / 10) near 0: its last step is of first order, which shows beyond 300 steps only.
    assert 1.6 < order("dpmpp", 40, 160 if name == "linear" else 320) < 2.2


@pytest.mark.parametrize("name, zero_terminal_snr", SCHEDULES)
def test_second_order_of_the_stochastic_sampler(name, zero_terminal_snr):
    """Its spread is nearer to the truth than ancestral's, which is too narrow at first order."""
    schedule = model.NoiseSchedule(name, zero_terminal_snr)
    ancestral, dpmpp_sde = (draw(s, schedule, gaussian(schedule, 0.7, 0.5), 40, n=5000).std().item() / 0.5 - 1
                            for s in ("ancestral", "dpmpp_sde"))
    assert ancestral < -0.06 and abs(dpmpp_sde) < 0.5 * abs(ancestral)


@pytest.mark.parametrize("zero_terminal_snr", [True, False])
def test_euler_is_ddim_on_the_straight_path(zero_terminal_snr):
    schedule = model.NoiseSchedule("flow", zero_terminal_snr)
    euler, ddim = (draw(s, schedule, mixture(schedule), 10) for s in ("euler", "ddim"))
    assert torch.allclose(euler, ddim, atol=1e-10)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_euler_refuses_curved_schedules(name):
    schedule = model.NoiseSchedule(name, True)
    with pytest.raises(ValueError, match=f"flow, not {name}"):
        draw("euler", schedule, mixture(schedule), 10)


@pytest.mark.parametrize("sampler", sample.SAMPLERS)
def test_only_ancestral_draws_noise_on_the_way(sampler):
    schedule, x = model.NoiseSchedule("flow", True), quantiles(50)
    rng = torch.Generator().manual_seed(0)
    one, other = (sample.SAMPLERS[sampler](mixture(schedule), schedule, x, 10, lambda: torch.randn(
        50, generator=rng, dtype=torch.float64)) for _ in range(2))
    assert torch.equal(one, other) == (sampler not in NOISY)


# --- whole samples ---

CLASSES = ["normal", "tb", "covid"]
LATENT = (2, 8, 8)
PROCS = experiment.Processes(0, 1, torch.device("cpu"), torch.float32, False)


@pytest.fixture(scope="module")
def denoiser():
    unet = model.UNet(LATENT, len(CLASSES), 16, (1, 2), 1, (4,)).eval()
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in unet.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=rng))
    return model.Denoiser(unet, model.NoiseSchedule("flow", True), "flow")


def latents(denoiser, samples, sampler="ancestral", seed=0, class_names=CLASSES, steps=4, scale=3.0,
            progress=None, interval=(0.0, 1.0)):
    args = SimpleNamespace(seed=seed, sampler=sampler, num_sampling_steps=steps, guidance_scale=scale,
                           guidance_interval=interval)
    return sample.sample_latents(denoiser, LATENT, samples, class_names, args, PROCS, progress)


def test_guidance_is_on_inside_its_interval_only(denoiser, monkeypatch):
    seen, original = [], denoiser.denoise
    monkeypatch.setattr(denoiser, "denoise", lambda x, t, y, w: (seen.append((t[0].item(), w)), original(x, t, y, w))[1])
    guided = latents(denoiser, [(0, 0)], "ddim", interval=(0.25, 0.75))
    assert seen == [(1.0, 1.0), (0.75, 3.0), (0.5, 3.0), (0.25, 3.0)]
    plain, full = latents(denoiser, [(0, 0)], "ddim", scale=1.0), latents(denoiser, [(0, 0)], "ddim")
    assert not torch.allclose(guided, plain) and not torch.allclose(guided, full)
    assert torch.equal(latents(denoiser, [(0, 0)], "ddim", interval=(0.3, 0.4)), plain)


@pytest.mark.parametrize("text", ["0.2", "0.8,0.2", "-1,1", "0,2", "a,b", "0,0.5,1"])
def test_an_interval_is_two_numbers_in_order(text):
    with pytest.raises(argparse.ArgumentTypeError):
        experiment.interval(text)


@pytest.mark.parametrize("sampler", sample.SAMPLERS)
def test_a_sample_does_not_depend_on_its_batch(denoiser, sampler):
    samples = [(0, 0), (1, 0), (0, 1), (2, 7)]
    together = latents(denoiser, samples, sampler)
    assert together.shape == (4, *LATENT)
    shuffled = latents(denoiser, [samples[i] for i in (2, 0, 3, 1)], sampler)
    assert torch.allclose(shuffled, together[[2, 0, 3, 1]], atol=1e-4)
    for i, one in enumerate(samples):
        assert torch.allclose(latents(denoiser, [one], sampler), together[i:i + 1], atol=1e-4)


@pytest.mark.parametrize("sampler", ["ancestral", "dpmpp_sde", "ddim"])
def test_a_sample_depends_on_seed_class_name_and_number(denoiser, sampler):
    base = latents(denoiser, [(0, 0)], sampler)
    assert torch.equal(base, latents(denoiser, [(0, 0)], sampler))
    others = {
        "seed": latents(denoiser, [(0, 0)], sampler, seed=1),
        "number": latents(denoiser, [(0, 1)], sampler),
        "class": latents(denoiser, [(1, 0)], sampler),
        "class name": latents(denoiser, [(0, 0)], sampler, class_names=["healthy", "tb", "covid"]),
    }
    for other in others.values():
        assert (other - base).abs().mean() > 0.1
    # A class that is added to the data before this one shifts its index; the noise goes with the name.
    torch.testing.assert_close(
        latents(denoiser, [(1, 0)], sampler, class_names=["other", "normal"], scale=0.0),
        latents(denoiser, [(0, 0)], sampler, class_names=["normal", "other"], scale=0.0), atol=1e-4, rtol=0)


@torch.no_grad()
def test_a_sample_is_guided_ddim_from_the_noise_of_its_own_key(denoiser):
    rng = experiment.generator("cpu", 5, "sample", "tb", 3)
    x = torch.randn(LATENT, generator=rng)[None]
    for i in range(4):
        t, s = 1 - i / 4, 1 - (i + 1) / 4
        x0 = denoiser.denoise(x, torch.tensor([t]), torch.tensor([1]), 3.0)
        x = (1 - s) * x0 + s * (x - (1 - t) * x0) / t
    assert torch.allclose(latents(denoiser, [(1, 3)], "ddim", seed=5), x, atol=1e-4)


def test_ancestral_noise_differs_between_samples_and_steps():
    """A network of zeros predicts flow = 0: x0-hat = x_t, so the result is a sum of all the noises drawn."""
    zero = model.Denoiser(model.UNet(LATENT, 3, 8, (1,), 1, ()), model.NoiseSchedule("flow", True), "flow")
    x = latents(zero, [(0, i) for i in range(40)], scale=1.0, steps=2).flatten(1)
    assert (torch.corrcoef(x) - torch.eye(40)).abs().max() < 0.45  # 128 values each: 5 standard errors
    # x_1 = n1; x_1/2 = n1 / 2 + n2 / 2, then x0-hat = x_1/2.
    assert x.std().item() == pytest.approx(math.sqrt(0.5), rel=0.05)


def test_progress_counts_network_evaluations(denoiser):
    calls = []
    latents(denoiser, [(0, 0), (1, 0)], steps=4, progress=lambda: calls.append(1))
    assert len(calls) == 4


@torch.no_grad()
def test_decode_latents_divides_by_the_scale():
    torch.manual_seed(0)
    vae = model.AutoencoderKL(16, 2, 8, (1, 2), 1).eval()
    z = torch.randn(5, 2, 8, 8)
    x = sample.decode_latents(vae, z, 0.25, PROCS, batch_size=2)
    assert x.shape == (5, 1, 16, 16)
    assert torch.allclose(x, vae.decode(4 * z).clamp(-1, 1), atol=1e-5)
    assert not torch.allclose(x, sample.decode_latents(vae, z, 1.0, PROCS), atol=0.05)
    vae.decoder[-1].bias += 100
    assert torch.equal(sample.decode_latents(vae, z, 1.0, PROCS), torch.ones(5, 1, 16, 16))
