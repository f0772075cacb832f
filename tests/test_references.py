"""Metrics, schedules, samplers and training draws against independent packages.

k-diffusion and clean-fid would replace torch by their dependencies: diffusers and scipy stand in.
"""
import math
import sys
import types
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_diffusion import gaussian, quantiles
from test_model import perturb, randn, tiny_unet

import diffusion
import model
import train_ldm
import train_vae
from lib import dist, metrics

linalg = pytest.importorskip("scipy.linalg")
stats = pytest.importorskip("scipy.stats")
skimage = pytest.importorskip("skimage.metrics")
sklearn = pytest.importorskip("sklearn.metrics")
proportion = pytest.importorskip("statsmodels.stats.proportion")
pytorch_msssim = pytest.importorskip("pytorch_msssim")
diffusers = pytest.importorskip("diffusers")
training_utils = pytest.importorskip("diffusers.training_utils")

PROCS = dist.DistContext(0, 1, torch.device("cpu"), torch.float32, "")


# --- reconstruction -----------------------------------------------------------------------------


def image_pair(height, width):
    """Three smooth images and their copies with ever more noise, [3, 1, H, W] in [-1, 1]."""
    coarse = torch.nn.functional.interpolate(randn(3, 1, 12, 12), (height, width), mode="bilinear")
    x = (0.4 * coarse - 0.2).clamp(-1, 1)
    noise = torch.tensor([0.01, 0.1, 0.4]).view(3, 1, 1, 1) * randn(*x.shape, seed=1)
    return x, (0.8 * x + 0.1 + noise).clamp(-1, 1)


def test_psnr_and_ssim_are_those_of_skimage():
    x, y = image_pair(64, 45)
    for i in range(3):
        a, b = x[i, 0].double().numpy() + 1, y[i, 0].double().numpy() + 1
        expected = skimage.peak_signal_noise_ratio(a, b, data_range=2)
        assert metrics.psnr(x, y)[i].item() == pytest.approx(expected, abs=1e-5)
        # It pads, but averages where no window reaches the padding.
        expected = skimage.structural_similarity(
            a, b, data_range=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
        assert metrics.ssim(x, y)[i].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("height, width, scales", [(176, 192, 5), (168, 184, 4)])
def test_ms_ssim_is_that_of_pytorch_msssim(height, width, scales):
    """On sides that stay even: it pads odd ones, where we leave the last row out."""
    x, y = image_pair(height, width)
    weights = np.array([0.0448, 0.2856, 0.3001, 0.2363, 0.1333])[:scales]
    expected = pytorch_msssim.ms_ssim(x.double() + 1, y.double() + 1, data_range=2,
                                      size_average=False, weights=list(weights / weights.sum()))
    assert expected.max() - expected.min() > 0.1
    assert np.allclose(metrics.ms_ssim(x, y), expected, rtol=0, atol=1e-5)


def vgg16(pretrained):
    """torchvision's VGG-16 (Simonyan & Zisserman 2015, configuration D) with weights made here."""
    assert pretrained
    torch.manual_seed(0)
    layers, ch = [], 3
    for width in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0):
        if width == 0:
            layers += [torch.nn.MaxPool2d(2, 2)]
        else:
            layers += [torch.nn.Conv2d(ch, width, 3, padding=1), torch.nn.ReLU(inplace=True)]
            ch = width
    return SimpleNamespace(features=torch.nn.Sequential(*layers))


def test_the_perceptual_term_is_that_of_the_lpips_package(monkeypatch):
    """Its real code on a network made on the spot; torchvision is only where it would come from."""
    for name in ("torchvision", "torchvision.models"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["torchvision"].models = sys.modules["torchvision.models"]
    sys.modules["torchvision.models"].vgg16 = vgg16
    pytest.importorskip("lpips")
    perceptual = train_vae.load_lpips(PROCS.device)
    assert not any(p.requires_grad for p in perceptual.parameters())

    def first_step(weight):
        """(train/rec, gradient norm, reconstruction) of a first step."""
        args = train_vae.parse_args([
            "--img_size=32", "--z_channels=2", "--base_ch=8", "--ch_mults=1,2",
            "--num_res_blocks=1", "--disc_weight=0", f"--perceptual_weight={weight}"])
        models = train_vae.build_models(args, PROCS)
        noise, _ = PROCS.global_noise(len(x), models.vae.latent_shape, args.seed, "vae", 0)
        rec = models.vae(x, noise)[0].detach()
        fns = train_vae.wrap(models, args, PROCS)
        losses, _ = train_vae.train_step(models, *fns, perceptual, x, 0, args, PROCS)
        return losses[1].item(), losses[5].item(), rec

    x = image_pair(32, 32)[0]
    plain, plain_norm, rec = first_step(0)
    rec_loss, grad_norm, _ = first_step(3)
    # The package's own answer for RGB images in [-1, 1] (Zhang et al. 2018, eq. 1).
    expected = perceptual(rec.expand(-1, 3, -1, -1), x.expand(-1, 3, -1, -1)).mean()
    assert rec_loss - plain == pytest.approx(3 * expected.item(), rel=1e-3)
    assert expected > 0.001 and abs(grad_norm / plain_norm - 1) > 0.01


# --- distributions ------------------------------------------------------------------------------


def feature_pair(n, m, dim):
    """Correlated features of which the second set is shifted and wider."""
    a, b = (randn(rows, dim, seed=seed, dtype=torch.float64) for rows, seed in ((n, 1), (m, 2)))
    mix = randn(dim, dim, seed=3, dtype=torch.float64) / math.sqrt(dim)
    return a @ mix, 1.3 * b @ (mix + 0.3 * torch.eye(dim)) + 0.2


@pytest.mark.parametrize("n, m, dim, rel", [
    (300, 200, 32, 1e-9), (40, 300, 64, 1e-6), (30, 25, 64, 1e-6)])
def test_frechet_distance_has_the_matrix_root_of_scipy(n, m, dim, rel):
    """Also with covariances of rank 39, 29 and 24 in 64 dimensions."""
    a, b = feature_pair(n, m, dim)
    s1, s2 = np.cov(a.numpy(), rowvar=False), np.cov(b.numpy(), rowvar=False)
    means = ((a.mean(0) - b.mean(0)) ** 2).sum().item()
    expected = means + np.trace(s1 + s2 - 2 * linalg.sqrtm(s1 @ s2).real)
    assert metrics.frechet_distance(a, b) == pytest.approx(expected, rel=rel)


# --- classification -----------------------------------------------------------------------------


@pytest.mark.parametrize("shares", [[0.5, 0.5], [0.6, 0.3, 0.1]])
def test_auroc_is_that_of_sklearn(shares):
    """One against the rest; scores with ties that sum to one, so that own minus others is own."""
    rng, k = np.random.default_rng(0), len(shares)
    labels = rng.choice(k, size=150, p=shares)
    votes = np.stack([rng.multinomial(8, (0.25 + 0.25 * np.eye(k)[label]) / (0.25 * k + 0.25))
                      for label in labels]) / 8
    theirs = votes[:, 1] if k == 2 else votes
    expected = sklearn.roc_auc_score(labels, theirs, multi_class="ovr", average="macro")
    ours = metrics.auroc(torch.from_numpy(votes), torch.from_numpy(labels))
    assert 0.6 < expected < 0.9 and ours == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("count, total", [(0, 7), (1, 7), (3, 20), (50, 200), (10, 10)])
def test_binomial_interval_is_that_of_statsmodels(count, total):
    expected = proportion.proportion_confint(
        count, total, alpha=2 * stats.norm.sf(1.96), method="wilson")
    assert metrics.binomial_interval(count, total) == pytest.approx(expected, abs=1e-12)


# --- noise schedules ----------------------------------------------------------------------------


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_linear_schedule_is_the_limit_of_many_betas(zero_terminal_snr):
    """alpha and sigma approach those of DDPM's betas as 1 / steps, zero terminal SNR as well."""
    schedule, gaps = diffusion.NoiseSchedule("linear", zero_terminal_snr), []
    for steps in (1000, 10000):
        theirs = diffusers.DDIMScheduler(
            num_train_timesteps=steps, beta_start=0.1 / steps, beta_end=20 / steps,
            rescale_betas_zero_snr=zero_terminal_snr)
        alpha_bar = theirs.alphas_cumprod.double()
        t = torch.arange(1, steps + 1, dtype=torch.float64) / steps
        gap_alpha = (schedule.alpha(t) - alpha_bar.sqrt()).abs().max()
        gap_sigma = (schedule.sigma(t) - (1 - alpha_bar).sqrt()).abs().max()
        gaps.append(max(gap_alpha, gap_sigma).item())
    assert gaps[1] < 1e-3 and gaps[1] < gaps[0] / 5


def test_cosine_schedule_is_that_of_diffusers_without_the_offset():
    steps, offset = 1000, 0.008
    theirs = diffusers.DDPMScheduler(num_train_timesteps=steps, beta_schedule="squaredcos_cap_v2")
    t = torch.arange(steps, dtype=torch.float64) / steps  # the last beta is capped
    schedule = diffusion.NoiseSchedule("cosine", True)
    ours = schedule.alpha((t + offset) / (1 + offset))
    alpha_bar = torch.cat([torch.ones(1), theirs.alphas_cumprod[:-1]])
    assert torch.allclose((ours / ours[0]).square(), alpha_bar.double(), atol=1e-5)


# --- samplers -----------------------------------------------------------------------------------

VP, FLOW = [("linear", False), ("cosine", False)], [("flow", False)]
TERMINAL = [("linear", True), ("cosine", True)]
# DDIM and DDPM of diffusers take sigma to be sqrt(1 - alpha^2); its DPM-Solver++ also knows the
# straight path. Where lambda is infinite it is of first order: there ours has no twin.
TWINS = [(sampler, kind, how, *schedule) for sampler, kind, how, schedules in (
    ("ddim", diffusers.DDIMScheduler, {"clip_sample": False}, VP + TERMINAL),
    ("ancestral", diffusers.DDPMScheduler, {"clip_sample": False}, VP + TERMINAL),
    ("dpmpp_2m", diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++"},
     VP + FLOW),
    ("dpmpp_2m_sde", diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"},
     VP + FLOW)) for schedule in schedules]


def on_our_grid(kind, schedule, steps, **how):
    """(scheduler of diffusers that takes our `steps` on `schedule`, t at the start of each)."""
    theirs = kind(num_train_timesteps=steps, **how)
    theirs.set_timesteps(steps)
    grid = diffusion.time_grid(schedule, steps)
    if kind is diffusers.DPMSolverMultistepScheduler:
        grid = diffusion.lambda_grid(schedule, steps)
    t, alpha, sigma = torch.tensor(grid, dtype=torch.float64).T
    if kind in (diffusers.DDIMScheduler, diffusers.DDPMScheduler):
        theirs.alphas_cumprod = alpha[:-1].flip(0) ** 2
    else:
        theirs.set_begin_index(0)
        theirs.sigmas = sigma if schedule.name == "flow" else sigma / alpha
    return theirs, t[:-1].tolist()


@pytest.mark.parametrize("sampler, kind, how, name, zero_terminal_snr", TWINS)
def test_samplers_take_the_steps_of_diffusers(sampler, kind, how, name, zero_terminal_snr):
    schedule = diffusion.NoiseSchedule(name, zero_terminal_snr)
    if name == "flow":
        how = how | {"use_flow_sigmas": True}
    theirs, times = on_our_grid(kind, schedule, 12, prediction_type="sample", **how)
    rounds = kind is diffusers.DPMSolverMultistepScheduler  # x to float32, and draws such noise
    denoise, start = gaussian(schedule, 0.7, 0.5), quantiles(50)[:, None]
    their_rng, our_rng = (torch.Generator().manual_seed(0) for _ in range(2))
    x, before = start, []
    for t, timestep in zip(times, theirs.timesteps, strict=True):
        before.append(x)
        x = theirs.step(denoise(x, t), timestep, x, generator=their_rng).prev_sample

    def noise():
        dtype = torch.float32 if rounds else torch.float64
        return torch.randn(50, 1, generator=our_rng, dtype=dtype).double()

    seen = []

    def watched(x, t):
        seen.append(x)
        return denoise(x, t)

    ours = diffusion.SAMPLERS[sampler](watched, schedule, start, 12, noise)
    # The last step of DPM-Solver++ there is of first order, ours is not.
    pairs = list(zip(seen, before, strict=True)) + ([] if rounds else [(ours, x)])
    for mine, other in pairs:
        assert torch.allclose(mine, other, rtol=0, atol=1e-6 if rounds else 1e-12)


@pytest.mark.parametrize("prediction, theirs, name, zero_terminal_snr", [
    ("eps", "epsilon", "linear", False), ("v", "v_prediction", "linear", True),
    ("x0", "sample", "cosine", True), ("flow", None, "flow", True)])
@torch.no_grad()
def test_guided_samples_are_those_of_diffusers(prediction, theirs, name, zero_terminal_snr):
    """The network's raw output goes to DDIM, or for 'flow' to the Euler steps of flow matching."""
    unet, y, start = tiny_unet(seed=1), torch.tensor([0, 1]), randn(2, 4, 8, 8)
    schedule = diffusion.NoiseSchedule(name, zero_terminal_snr)
    kind, how, bounded = diffusers.FlowMatchEulerDiscreteScheduler, {}, {}
    if theirs:
        bounded = {"use_clipped_model_output": True}
        kind, how = diffusers.DDIMScheduler, {
            "prediction_type": theirs, "clip_sample": prediction == "eps",
            "clip_sample_range": diffusion.EPS_BOUND}
    scheduler, times = on_our_grid(kind, schedule, 4, **how)
    x = start * schedule.sigma(torch.ones(1))
    for t, timestep in zip(times, scheduler.timesteps, strict=True):
        t = torch.full((2,), t)
        null, own = unet(x, t, torch.full_like(y, 2)), unet(x, t, y)
        x = scheduler.step(null + 3 * (own - null), timestep, x, **bounded).prev_sample
    denoiser = diffusion.Denoiser(unet, schedule, prediction)
    ours = diffusion.sample(denoiser, y, lambda: start, "ddim", 4, 3.0, (0.0, 1.0))
    assert (ours - x).abs().max() < 1e-4 * x.abs().max()


# --- training -----------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.9, 0.9999])
def test_ema_is_that_of_diffusers(decay):
    module = torch.nn.Linear(3, 2).double()
    ours, theirs = model.EMA(module, decay), training_utils.EMAModel(module.parameters(), decay)
    theirs.optimization_step = 1  # its first update only copies the weights; ours is its second
    for step in range(1, 121):
        perturb(module, seed=step)
        ours.update(module, step)
        theirs.step(module.parameters())
    for p, q in zip(ours.module.parameters(), theirs.shadow_params, strict=True):
        assert torch.allclose(p, q, rtol=0, atol=1e-12)


@pytest.fixture(scope="module")
def drawn():
    """What 3000 training steps draw, of two processes: each [step, place in the global batch]."""
    args = SimpleNamespace(seed=0, batch_per_device=2, grad_accum=2, prob_uncond=0.1)
    steps = []
    for step in range(3000):
        ranks = [train_ldm.draw_inputs((1, 1, 1), step, args, PROCS._replace(rank=r, world_size=2))
                 for r in range(2)]
        steps.append([torch.cat(parts).flatten().double() for parts in zip(*ranks, strict=True)])
    return [torch.stack(parts).numpy() for parts in zip(*steps, strict=True)]


def test_drawn_times_are_uniform_and_even_in_every_step(drawn):
    _, _, t, dropped = drawn
    assert t.shape == (3000, 8) and t.min() >= 0 and t.max() < 1
    assert np.allclose(np.diff(np.sort(t)), 1 / 8, atol=1e-6)
    for times in (*t.T, t[dropped == 1]):  # at every place, and where labels are dropped
        assert stats.kstest(times, "uniform").pvalue > 0.01


def test_labels_are_dropped_as_often_as_asked(drawn):
    dropped = drawn[3]
    assert stats.binomtest(int(dropped.sum()), dropped.size, 0.1).pvalue > 0.01
    counts = dropped.sum(0)
    assert stats.chi2_contingency([counts, 3000 - counts]).pvalue > 0.01


def test_both_noises_are_normal_and_independent(drawn):
    posterior, noise, _, _ = (part.ravel() for part in drawn)
    assert min(stats.kstest(part, "norm").pvalue for part in (posterior, noise)) > 0.01
    assert stats.pearsonr(posterior, noise).pvalue > 0.01
