"""Networks and averaged weights. Their numbers are compared with diffusers in test_interop.py, and
those of EMA in test_references.py."""
import copy

import pytest
import torch
import torch.nn as nn

import model


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=rng(seed), dtype=dtype)


def perturb(module, seed=0):
    """Random weights everywhere, also in the layers that start at zero."""
    with torch.no_grad():
        for i, p in enumerate(module.parameters()):
            p.add_(0.1 * randn(*p.shape, seed=1000 * seed + i))
    return module


# --- shared blocks ---


@pytest.mark.parametrize("block", [
    model.ResBlock(8, 8, 4, emb_dim=16), model.ResBlock(8, 8, 4), model.Attention(8, 4, 2)])
def test_residual_blocks_start_as_identity(block):
    x, emb = randn(2, 8, 4, 4), randn(2, 16, seed=1)
    args = (x, emb) if getattr(block, "emb", None) else (x,)
    assert torch.equal(block(*args), x)
    assert not torch.allclose(perturb(copy.deepcopy(block))(*args), x, atol=1e-2)


# --- autoencoder ---


@pytest.mark.parametrize("img_size, z_channels, ch_mults, patch_size, latent", [
    (16, 1, (1,), 1, (1, 16, 16)),
    (32, 4, (1, 2), 1, (4, 16, 16)),
    (48, 3, (1, 1, 2), 1, (3, 12, 12)),
    (64, 8, (1, 2, 2, 4), 1, (8, 8, 8)),
    (48, 3, (1, 2), 4, (3, 6, 6)),
])
def test_autoencoder_shapes(img_size, z_channels, ch_mults, patch_size, latent):
    vae = perturb(model.AutoencoderKL(img_size, z_channels, 8, ch_mults, 1, (), patch_size))
    x, noise = randn(2, 1, img_size, img_size), randn(2, *latent, seed=1)
    assert vae.latent_shape == latent
    with torch.no_grad():
        posterior = vae.encode(x)
        assert posterior.mean.shape == posterior.logvar.shape == (2, *latent)
        assert vae.decode(posterior.mean).shape == x.shape
        rec, again = vae(x, noise)
        assert torch.allclose(again.mean, posterior.mean, atol=1e-5)
        z = posterior.mean + torch.exp(posterior.logvar / 2) * noise
        assert torch.allclose(rec, vae.decode(z), atol=1e-4)
        assert not torch.allclose(rec, vae.decode(posterior.mean), atol=1e-3)


def test_the_linear_path_starts_alone_and_is_linear():
    """At first an image goes through two linear maps of its 4 x 4 squares and nothing else; when
    the networks have learned something, they add to it."""
    vae = model.AutoencoderKL(16, 3, 8, (1, 1), 1, patch_size=2, linear_path=True)
    x, y = randn(2, 2, 1, 16, 16)
    with torch.no_grad():
        posterior = vae.encode(x)
        squares = torch.nn.functional.unfold(x, 4, stride=4)  # [B, 16, 16 squares]
        weight = vae.linear_encoder.weight.flatten(1)
        expected = weight @ squares + vae.linear_encoder.bias[:, None]
        assert torch.allclose(posterior.mean.flatten(2), expected, atol=1e-5)
        assert posterior.logvar.eq(0).all()

        def through(images):
            return vae.decode(vae.encode(images).mean)
        assert torch.allclose(through(x) + through(y), through(x + y) + through(0 * x), atol=1e-5)
        before = through(x)
        for layer in (vae.encoder[-1], vae.decoder[-1]):
            nn.init.normal_(layer.weight)
        assert not torch.allclose(through(x), before, atol=0.1)
    loss = vae(x, randn(2, 3, 4, 4))[0].square().mean()
    loss.backward()
    assert vae.linear_encoder.weight.grad.norm() > 0 < vae.encoder[0].weight.grad.norm()


def test_a_pattern_is_taken_off_each_square_and_older_weights_have_none():
    vae = perturb(model.AutoencoderKL(16, 3, 8, (1, 1), 1, patch_size=2, linear_path=True))
    z, older = randn(2, 3, 4, 4), vae.state_dict()
    del older["linear_decoder.pattern"]
    with torch.no_grad():
        before = vae.decode(z)
        vae.linear_decoder.pattern.copy_(randn(4, 4))
        squares = (before - vae.decode(z)).unfold(2, 4, 4).unfold(3, 4, 4)
        assert torch.allclose(squares, vae.linear_decoder.pattern.expand_as(squares), atol=1e-5)
        vae.load_state_dict(older)
        assert torch.equal(vae.decode(z), before)


def test_networks_put_out_float32_under_bf16_autocast():
    vae = perturb(model.AutoencoderKL(8, 2, 8, (1, 1), 1))
    unet = perturb(model.UNet((2, 4, 4), 2, 8, (1,), 1, ()))
    disc = model.PatchDiscriminator(base_ch=8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        posterior = vae.encode(randn(1, 1, 8, 8))
        outs = [*posterior, vae.decode(posterior.mean), disc(randn(1, 1, 32, 32)),
                unet(posterior.mean, torch.tensor([0.5]), torch.tensor([0]))]
    assert {out.dtype for out in outs} == {torch.float32}


def test_extreme_log_variances_stay_finite():
    vae = model.AutoencoderKL(8, 1, 8, (1, 1), 1)
    for bias in (-1e4, 1e4):
        nn.init.constant_(vae.encoder[-1].bias, bias)
        posterior = vae.encode(randn(1, 1, 8, 8))
        assert posterior.logvar.unique().tolist() == [-30.0 if bias < 0 else 20.0]
        assert posterior.sample(randn(1, 1, 4, 4)).isfinite().all()
        assert posterior.kl().isfinite().all()


def test_kl_is_that_of_torch():
    mean, logvar = randn(3, 2, 4, 4), randn(3, 2, 4, 4, seed=1)
    q = torch.distributions.Normal(mean, (logvar / 2).exp())
    standard = torch.distributions.Normal(0.0, 1.0)
    expected = torch.distributions.kl_divergence(q, standard).sum((1, 2, 3))
    assert torch.allclose(model.Posterior(mean, logvar).kl(), expected, rtol=1e-4)


# --- discriminator ---


@pytest.mark.parametrize("height, width, num_layers", [
    (64, 64, 3), (32, 48, 3), (128, 24, 3), (64, 12, 2)])
def test_discriminator_gives_one_logit_a_patch(height, width, num_layers):
    disc = model.PatchDiscriminator(8, num_layers)
    down, smallest = 2**num_layers, 3 * 2**num_layers
    logits = disc(randn(2, 1, height, width))
    assert logits.shape == (2, 1, height // down - 2, width // down - 2)
    assert disc(randn(1, 1, smallest, smallest)).shape == (1, 1, 1, 1)


@pytest.mark.parametrize("num_layers, patch", [(2, 34), (3, 70)])
def test_a_logit_of_the_discriminator_sees_its_patch(num_layers, patch):
    disc = model.PatchDiscriminator(8, num_layers).requires_grad_(False)
    for layer in disc.modules():
        if isinstance(layer, nn.GroupNorm):
            layer.forward = lambda x: x  # it sees the whole image
    x = randn(1, 1, 96, 96).requires_grad_(True)
    logits = disc(x)
    logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2].backward()
    seen = x.grad[0, 0].abs().amax(0).nonzero()
    assert seen.max() - seen.min() + 1 == patch


def test_discriminator_scores_an_image_without_its_batch():
    disc = model.PatchDiscriminator(base_ch=8).train()
    x = randn(3, 1, 32, 32)
    assert torch.allclose(disc(x)[:1], disc(x[:1]), atol=1e-5)


# --- UNet ---


@pytest.mark.parametrize("latent_shape, ch_mults, attn_res", [
    ((1, 6, 6), (1,), ()), ((4, 8, 8), (1, 2), (4,)), ((3, 16, 16), (1, 2, 2), (16, 8)),
    ((2, 4, 4), (1, 1, 1), (1,))])
def test_unet_keeps_the_shape_of_its_latents(latent_shape, ch_mults, attn_res):
    unet = perturb(model.UNet(latent_shape, 2, 8, ch_mults, num_res_blocks=1, attn_res=attn_res))
    x, t, y = randn(2, *latent_shape), torch.tensor([0.1, 0.9]), torch.tensor([0, 2])
    with torch.no_grad():
        assert unet(x, t, y).shape == x.shape


def tiny_unet(num_classes=2, channels=4, seed=None):
    unet = model.UNet((channels, 8, 8), num_classes, 16, (1, 2), 1, (4,)).eval()
    return unet if seed is None else perturb(unet, seed)


def test_unet_starts_at_zero():
    out = tiny_unet()(randn(2, 4, 8, 8), torch.tensor([0.1, 0.9]), torch.tensor([0, 1]))
    assert torch.equal(out, torch.zeros(2, 4, 8, 8))


def test_gradients_reach_every_unet_weight():
    unet, x = tiny_unet(seed=1), randn(1, 4, 8, 8)
    unet(x, torch.tensor([0.5]), torch.tensor([0])).square().sum().backward()
    unreached = [name for name, p in unet.named_parameters()
                 if p.grad is None or p.grad.norm() == 0]
    assert unreached == []


# --- EMA ---


def test_ema_is_a_frozen_copy_that_leaves_its_source_alone():
    module = tiny_unet(seed=1).train()
    ema = model.EMA(module, 0.9)
    before = copy.deepcopy(module.state_dict())
    perturb(ema.module, seed=2)
    ema.update(module, 1)
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())
    assert module.training and all(p.requires_grad for p in module.parameters())
    assert not ema.module.training and not any(p.requires_grad for p in ema.module.parameters())
    for averaged in (module, model.AutoencoderKL(8, 1, 8, (1,), 1)):
        assert not list(averaged.buffers())  # which the update would leave behind
