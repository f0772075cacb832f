"""Whole samples: the noise of their own key, guidance, batches, decoding."""
import math
from types import SimpleNamespace

import pytest
import torch

import diffusion
import model
import sample
from lib import dist

CLASSES = ["normal", "tb", "covid"]
LATENT = (2, 8, 8)
PROCS = dist.DistContext(0, 1, torch.device("cpu"), torch.float32, "")


@pytest.fixture(scope="module")
def denoiser():
    unet = model.UNet(LATENT, len(CLASSES), 16, (1, 2), 1, (4,)).eval()
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in unet.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=rng))
    return diffusion.Denoiser(unet, diffusion.NoiseSchedule("flow", True), "flow")


def latents(denoiser, samples, sampler="ancestral", seed=0, class_names=CLASSES, steps=4, scale=3.0,
            progress=lambda: None, interval=(0.0, 1.0), ctx=PROCS):
    args = SimpleNamespace(
        seed=seed, sampler=sampler, num_sampling_steps=steps, guidance_scale=scale,
        guidance_interval=interval)
    return sample.sample_latents(
        denoiser, LATENT, samples, class_names, args, ctx, progress)


@pytest.mark.parametrize("sampler", diffusion.SAMPLERS)
def test_a_sample_does_not_depend_on_its_batch(denoiser, sampler):
    samples = [(0, 0), (1, 0), (0, 1), (2, 7)]
    calls = []
    together = latents(denoiser, samples, sampler, progress=lambda: calls.append(1))
    assert len(calls) == 4  # one per network evaluation
    assert together.shape == (4, *LATENT)
    shuffled = latents(denoiser, [samples[i] for i in (2, 0, 3, 1)], sampler)
    assert torch.allclose(shuffled, together[[2, 0, 3, 1]], atol=1e-4)
    for i, one in enumerate(samples):
        assert torch.allclose(latents(denoiser, [one], sampler), together[i:i + 1], atol=1e-4)


@pytest.mark.parametrize("sampler", ["ancestral", "ddim"])
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
    # A class that is added before this one shifts its index; the noise goes with the name.
    torch.testing.assert_close(
        latents(denoiser, [(1, 0)], sampler, class_names=["other", "normal"], scale=0.0),
        latents(denoiser, [(0, 0)], sampler, class_names=["normal", "other"], scale=0.0),
        atol=1e-4, rtol=0)


@torch.no_grad()
def test_a_sample_is_guided_ddim_from_the_noise_of_its_own_key(denoiser):
    rng = PROCS.generator(5, "sample", "tb", 3)
    x = torch.randn(LATENT, generator=rng)[None]
    for i in range(4):
        t, s = 1 - i / 4, 1 - (i + 1) / 4
        x0 = denoiser.denoise(x, torch.tensor([t]), torch.tensor([1]), 3.0)
        x = (1 - s) * x0 + s * (x - (1 - t) * x0) / t
    assert torch.allclose(latents(denoiser, [(1, 3)], "ddim", seed=5), x, atol=1e-4)


def test_ancestral_noise_differs_between_samples_and_steps():
    """A network of zeros predicts flow = 0: x0-hat = x_t, so the result is a sum of all noises."""
    unet = model.UNet(LATENT, 3, 8, (1,), 1, ())
    zero = diffusion.Denoiser(unet, diffusion.NoiseSchedule("flow", True), "flow")
    x = latents(zero, [(0, i) for i in range(40)], scale=1.0, steps=2).flatten(1)
    correlation = torch.corrcoef(x)
    assert (correlation - torch.eye(40)).abs().max() < 0.45  # 128 values each: 5 standard errors
    # x_1 = n1; x_1/2 = n1 / 2 + n2 / 2, then x0-hat = x_1/2.
    assert x.std().item() == pytest.approx(math.sqrt(0.5), rel=0.05)


def test_a_last_batch_is_filled_up_if_the_network_is_compiled(denoiser):
    vae, seen = model.AutoencoderKL(16, 2, 8, (1, 2), 1).eval(), []
    sizes = denoiser.unet.register_forward_hook(lambda unet, inputs, out: seen.append(len(out)))
    wanted = [(i % 3, i) for i in range(7)]
    args = SimpleNamespace(seed=0, sampler="dpmpp_2m_sde", num_sampling_steps=2, guidance_scale=1.0,
                           guidance_interval=(0.0, 1.0))
    drawn = {}
    for compiled in ("", "default"):
        ctx = PROCS._replace(compile=compiled)
        parts = list(sample.sample_batches(denoiser, vae, 1.0, wanted, CLASSES, args, ctx, 4,
                                               lambda done: None))
        assert [part for batch, _, _ in parts for part in batch] == wanted
        assert [len(x) for _, _, x in parts] == [4, 3]
        drawn[compiled] = torch.cat([z for _, z, _ in parts])
    sizes.remove()
    assert seen == [4, 4, 3, 3] + [4, 4, 4, 4]
    torch.testing.assert_close(*drawn.values(), atol=1e-4, rtol=1e-4)


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


def test_quality_is_the_furthest_octave_and_what_does_not_come_back():
    """The autoencoder here gives every latent back that has an image: those within [-1, 1]."""
    def encode(x):
        return SimpleNamespace(mean=torch.nn.functional.avg_pool2d(x, 4))

    vae = SimpleNamespace(encode=encode, decode=lambda z: z.repeat_interleave(4, 2)
                          .repeat_interleave(4, 3))
    ctx = dist.DistContext(0, 1, torch.device("cpu"), torch.float32, "")
    z = torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 4 - 2
    x = vae.decode(z)
    decoded = sample.decode_latents(vae, z, 0.5, ctx)  # unscaled they reach -4 to 4
    real = sample.appearance(x, z, decoded, 0.5, vae, ctx)
    assert real["round_trip"] == pytest.approx((z - z.clamp(-0.5, 0.5)).square().mean().item())
    assert sample.appearance(x, z / 4, x / 2, 0.5, vae, ctx)["round_trip"] < 1e-12
    real["octave_power"][1] *= 9
    labels = [0, 1] * 10
    values = sample.sample_metrics(2 * x, 4 * z, labels, CLASSES, 0.5, vae, ctx, real)
    assert values["sample_quality/power"] == pytest.approx(4)  # log 4 is further than log 4 / 9
    assert values["sample_quality/round_trip"] == pytest.approx((3 * z).square().mean().item())
    assert values["sample_quality/real_round_trip"] == real["round_trip"]
    without = sample.sample_metrics(None, 4 * z, labels, CLASSES, 0.5, vae, ctx, {"mean": 0.0})
    assert without == {k: v for k, v in values.items() if not k.startswith("sample_quality/")}
