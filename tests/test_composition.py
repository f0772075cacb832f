"""Rules of composition with exact x0-hat of mixtures of Gaussians in two dimensions: what each
draws, against the distribution that it is named by."""
import functools
import math

import pytest
import torch
from test_diffusion import float64, levels

import diffusion

SCHEDULES = ("flow", "cosine")


class Mixture:
    """Sum of weights w_i N(means_i, std_i^2 I) in two dimensions."""

    def __init__(self, *components):
        self.weights, means, stds = zip(*components)
        self.weights, self.means, self.stds = map(float64, (self.weights, means, stds))

    def log_parts(self, x, alpha, sigma):
        """log of each component's density at x_t [N, 2] and its variance: [N, K], [K]."""
        variance = alpha**2 * self.stds**2 + sigma**2
        square = (x[:, None] - alpha * self.means).square().sum(-1)
        return self.weights.log() - variance.log() - square / (2 * variance), variance

    def log_density(self, x, alpha=1.0, sigma=0.0):
        """Log density of x_t [N, 2] up to a constant: [N]."""
        return self.log_parts(x, alpha, sigma)[0].logsumexp(1)

    def x0_hat(self, schedule, x, t):
        """E[x0 | x_t]."""
        alpha, sigma = levels(schedule, t)
        logs, variance = self.log_parts(x, alpha, sigma)
        moved = (alpha * self.stds**2 / variance)[:, None] * (x[:, None] - alpha * self.means)
        return (logs.softmax(1)[:, :, None] * (self.means + moved)).sum(1)


def setting(name, *mixtures, n=4000):
    """(x0_hats, schedule, start [n, 2], noise) of mixtures on the schedule of this name."""
    schedule = diffusion.NoiseSchedule(name, zero_terminal_snr=True)
    rng = torch.Generator().manual_seed(0)
    noise = functools.partial(torch.randn, n, 2, generator=rng, dtype=torch.float64)
    return (lambda x, t: [m.x0_hat(schedule, x, t) for m in mixtures]), schedule, noise(), noise


def error(p, n=4000):
    """Four standard deviations of a share of n."""
    return 4 * math.sqrt(p * (1 - p) / n)


LEFT = Mixture((1.0, (-2.0, 0.0), 0.3))
RIGHT = Mixture((0.5, (2.0, 1.0), 0.3), (0.5, (2.0, -1.0), 0.3))
NEAR = (Mixture((1.0, (-0.4, 0.0), 0.8)),
        Mixture((0.6, (0.5, 0.3), 0.7), (0.4, (0.2, -0.6), 0.9)))


@pytest.mark.parametrize("name", SCHEDULES)
def test_or_draws_each_as_often_as_its_weight_says(name):
    x, said = diffusion.either(*setting(name, LEFT, RIGHT)[:3], 200, setting(name)[3], (3, 1))
    left = x[:, 0] < 0
    assert left.double().mean().item() == pytest.approx(0.75, abs=error(0.75))
    assert (said["log_ratio"] > 0).eq(left).all()
    assert x[left].std(0).tolist() == pytest.approx([0.3, 0.3], rel=0.07)
    x0_hats, schedule, start, noise = setting(name, LEFT, RIGHT)
    mean = diffusion.ancestral(lambda x, t: sum(x0_hats(x, t)) / 2, schedule, start, 200, noise)
    assert abs((mean[:, 0] < 0).double().mean().item() - 0.75) > error(0.75)  # fixed k = 1/2


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_log_ratio_is_that_of_the_densities(name):
    x0_hats, schedule, start, noise = setting(name, *NEAR)
    x, said = diffusion.either(x0_hats, schedule, start, 500, noise, (1, 1))
    exact = NEAR[0].log_density(x) - NEAR[1].log_density(x)
    centred = exact - exact.mean()
    slope = (centred * said["log_ratio"]).sum() / centred.square().sum()
    assert slope.item() == pytest.approx(1, abs=0.05)
    assert (said["log_ratio"] - exact).mean().abs() < 0.05


@pytest.mark.parametrize("name", SCHEDULES)
def test_and_draws_where_both_are_equal(name):
    x, _ = diffusion.both(*setting(name, *NEAR)[:3], 500, setting(name)[3], (1, 1))
    log_ratio = NEAR[0].log_density(x) - NEAR[1].log_density(x)
    assert log_ratio.square().mean().sqrt() < 0.15
    ancestral = diffusion.ancestral(functools.partial(NEAR[0].x0_hat, setting(name)[1]),
                                    *setting(name)[1:3], 500, setting(name)[3])
    apart = NEAR[0].log_density(ancestral) - NEAR[1].log_density(ancestral)
    assert apart.square().mean().sqrt() > 0.6


@pytest.mark.parametrize("name", SCHEDULES)
def test_product_of_gaussians_is_theirs_where_and_collapses(name):
    pair = Mixture((1.0, (-1.0, 0.0), 1.0)), Mixture((1.0, (1.0, 0.0), 1.0))
    x, said = diffusion.product(*setting(name, *pair)[:3], 500, setting(name)[3], (1, 1))
    ess = said["effective_sample_size"].item()
    assert 8 < ess <= 4000
    bound = 2 * math.sqrt(0.5 / ess)  # the error that the docstring states
    assert x.mean(0).abs().max() < bound
    assert x.var(0).tolist() == pytest.approx([0.5, 0.5], abs=0.5 * math.sqrt(2 / ess))
    x, _ = diffusion.both(*setting(name, *pair)[:3], 500, setting(name)[3], (1, 1))
    assert x[:, 0].std() < 0.1
    x, said = diffusion.product(*setting(name, *pair, n=1)[:3], 1, setting(name, n=1)[3], (1, 1))
    assert x.isfinite().all() and said["effective_sample_size"] == 1


def gaussian(mean, stds):
    """E[x0 | x_t] as a function of (schedule, x, t) of N(mean, diag(stds^2)) in two dimensions."""
    mean, variance = float64(mean), float64(stds)**2

    def x0_hat(schedule, x, t):
        alpha, sigma = levels(schedule, t)
        return mean + alpha * variance / (alpha**2 * variance + sigma**2) * (x - alpha * mean)
    return x0_hat


def added(name, conditions, base, weights, sampler, n=4000):
    """Samples [n, 2] of `add` of x0-hat functions, each to the same base."""
    _, schedule, start, noise = setting(name, n=n)
    denoise = diffusion.add(lambda x, t: [(c(schedule, x, t), base(schedule, x, t))
                                          for c in conditions], weights)
    return diffusion.SAMPLERS[sampler](denoise, schedule, start, 200, noise)


@pytest.mark.parametrize("sampler", diffusion.SAMPLERS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_add_joins_findings_that_change_other_coordinates(name, sampler):
    """Base N((0, 0), (0.3, 0.5)); one finding moves and widens x, another y, a third moves x."""
    base = gaussian((0, 0), (0.3, 0.5))
    first, second = gaussian((2, 0), (0.6, 0.5)), gaussian((0, -1), (0.3, 0.2))
    x = added(name, [first, second], base, (1, 1), sampler)
    assert x.mean(0).tolist() == pytest.approx([2, -1], abs=0.05)
    assert x.std(0).tolist() == pytest.approx([0.6, 0.2], rel=0.07)
    third = gaussian((0.5, 0), (0.3, 0.5))
    x = added(name, [third, second, third], base, (1, 1, 1), sampler)
    assert x.mean(0).tolist() == pytest.approx([1, -1], abs=0.05)
    x = added(name, [third, second], base, (2, 0), sampler)
    assert x.mean(0).tolist() == pytest.approx([1, 0], abs=0.05)


def findings(joint):
    """x0-hats of each finding and of all images: finding i moves coordinate i from 0 to 2. joint:
    {(a, b): share} of images with and without each."""
    def mixture(keep):
        kept = [(share, (2.0 * a, 2.0 * b), 0.3) for (a, b), share in joint.items() if keep(a, b)]
        parts = Mixture(*kept)
        return lambda schedule, x, t: parts.x0_hat(schedule, x, t)
    return [mixture(lambda a, b: a), mixture(lambda a, b: b)], mixture(lambda a, b: True)


def test_add_to_null_is_right_for_independent_findings_only():
    """Exclusive classes, added to their null class, end half-way between: neither has the other."""
    share = {(a, b): (0.4 if a else 0.6) * (0.3 if b else 0.7) for a in (0, 1) for b in (0, 1)}
    conditions, null = findings(share)
    x = added("cosine", conditions, null, (1, 1), "ancestral")
    assert x.mean(0).tolist() == pytest.approx([2, 2], abs=0.05)
    assert x.std(0).tolist() == pytest.approx([0.3, 0.3], rel=0.07)
    conditions, null = findings({(0, 0): 0.4, (1, 0): 0.3, (0, 1): 0.3})
    x = added("cosine", conditions, null, (1, 1), "ancestral")
    assert (x.mean(0) < 1.5).all()
    normal = Mixture((1.0, (0.0, 0.0), 0.3)).x0_hat
    x = added("cosine", conditions, normal, (1, 1), "ancestral")
    assert x.mean(0).tolist() == pytest.approx([2, 2], abs=0.05)


# --- editing ---


@pytest.mark.parametrize("sampler", ("ddim", "dpmpp_2m"))
@pytest.mark.parametrize("name", SCHEDULES)
def test_an_edit_keeps_what_the_classes_share(name, sampler):
    """From N((0, 0), (1, 0.5)) to N((3, 0), (0.5, 0.5)): the flow maps x to 3 + x / 2 and leaves y
    alone; to its own class nothing changes."""
    x0_hats = [gaussian((0, 0), (1, 0.5)), gaussian((3, 0), (0.5, 0.5))]
    schedule = diffusion.NoiseSchedule(name, zero_terminal_snr=True)
    own, other = (functools.partial(x0_hat, schedule) for x0_hat in x0_hats)
    x0 = float64([[-1.0, 0.4], [0.0, -0.6], [1.5, 0.1]])
    start = diffusion.invert(own, schedule, x0, 400, 1.0)
    back, moved = (diffusion.SAMPLERS[sampler](f, schedule, start, 400, None) for f in (own, other))
    assert (back - x0).abs().max() < 0.03
    assert (moved[:, 0] - (3 + x0[:, 0] / 2)).abs().max() < 0.03
    assert (moved[:, 1] - x0[:, 1]).abs().max() < 0.03


@pytest.mark.parametrize("sampler", diffusion.SAMPLERS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_sampler_that_starts_between_draws_the_same(name, sampler):
    """From exact x_t of N(0.5, 0.3^2) at t = 0.4; and at a very low start nothing breaks."""
    _, schedule, start, noise = setting(name)
    x0_hat = functools.partial(gaussian((0.5, 0.5), (0.3, 0.3)), schedule)
    for t in (0.4, 0.01):
        alpha, sigma = levels(schedule, t)
        x = alpha * 0.5 + (alpha**2 * 0.3**2 + sigma**2).sqrt() * start
        x = diffusion.SAMPLERS[sampler](x0_hat, schedule, x, 40, noise, t)
        assert x.mean(0).tolist() == pytest.approx([0.5, 0.5], abs=0.02)
        assert x.std(0).tolist() == pytest.approx([0.3, 0.3], rel=0.06)
