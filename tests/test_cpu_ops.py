"""lib/cpu_ops.py: its operations against PyTorch's own, and what `install` changes in a network."""
import argparse
import itertools
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

import model
from lib import cpu_ops, dist

CL = torch.channels_last


@pytest.fixture(params=["eager", pytest.param("compiled", marks=pytest.mark.slow)])
def each_way(request, monkeypatch):
    """Once without compiling, once compiled, which takes a minute."""
    if request.param == "compiled" and not cpu_ops.can_compile():
        pytest.skip("no C++ compiler")
    monkeypatch.setattr(cpu_ops, "can_compile", lambda: True)
    with torch.compiler.set_stance("force_eager" if request.param == "eager" else "default"):
        yield


def random_images(*shape):
    """Images [B, C, H, W] in which each channel has a mean and a spread of its own."""
    x = torch.randn(shape) * torch.linspace(0.2, 3, shape[1])[:, None, None]
    x = x + torch.linspace(-2, 2, shape[1])[:, None, None]
    return x.contiguous(memory_format=CL).requires_grad_()


def values_and_gradients(function, inputs, upstream):
    """Output of a function of `inputs`, and the gradients of all inputs for that of its output."""
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, upstream.to(out.dtype))]


# --- operations ---------------------------------------------------------------------------------


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("batch, groups", [(3, 4), (1, 12)])
def test_group_norm_equals_pytorchs(each_way, silu, batch, groups):
    torch.manual_seed(0)
    x = random_images(batch, 12, 6, 5)
    scale = (1 + 0.5 * torch.randn(batch, 12)).requires_grad_()
    shift = torch.randn(batch, 12).requires_grad_()

    def reference(x, scale, shift):
        h = F.group_norm(x, groups, eps=1e-3) * scale[:, :, None, None] + shift[:, :, None, None]
        return F.silu(h) if silu else h

    def ours(x, scale, shift):
        return cpu_ops.NormFunction.apply(x, scale, shift, groups, 1e-3, silu)
    upstream = torch.randn(batch, 12, 6, 5)
    wide = [tensor.detach().double().requires_grad_() for tensor in (x, scale, shift)]
    got = values_and_gradients(ours, (x, scale, shift), upstream)
    for a, b in zip(got, values_and_gradients(reference, wide, upstream), strict=True):
        assert torch.allclose(a.double(), b, rtol=1e-4, atol=1e-4 * b.abs().max().item())
    assert got[0].is_contiguous(memory_format=CL) and got[1].is_contiguous(memory_format=CL)


@pytest.mark.parametrize("batch, height, width", [(2, 4, 4), (1, 1, 3), (3, 5, 2)])
def test_convolution_equals_pytorchs(batch, height, width):
    torch.manual_seed(0)
    x = random_images(batch, 6, height, width)
    weight = torch.randn(8, 6, 3, 3).contiguous(memory_format=CL).requires_grad_()
    inputs = (x, weight, torch.randn(8).requires_grad_())
    upstream = torch.randn(batch, 8, height, width).contiguous(memory_format=CL)
    got = values_and_gradients(cpu_ops.conv3x3, inputs, upstream)
    wanted = values_and_gradients(lambda *a: F.conv2d(*a, padding=1), inputs, upstream)
    for a, b in zip(got, wanted, strict=True):
        assert torch.allclose(a, b, atol=1e-4)
    assert got[0].is_contiguous(memory_format=CL) and got[2].is_contiguous(memory_format=CL)


@pytest.mark.slow
def test_without_a_compiler_bf16_gives_the_same(tmp_path):
    code = """
import torch, model
from lib import cpu_ops
norm = model.GroupNorm(32, 8)
cpu_ops.install(norm)
x = torch.randn(2, 32, 128, 128).to(torch.bfloat16, memory_format=torch.channels_last)
wanted = torch.nn.functional.silu(torch.nn.GroupNorm.forward(norm, x.float()))
assert (norm(x, silu=True) - wanted).abs().max() < 0.05 and not cpu_ops.can_compile()
"""
    env = {"CXX": f"{tmp_path}/c++", "TORCHINDUCTOR_CACHE_DIR": f"{tmp_path}/cache"}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True,
                          text=True, check=True)
    assert done.stdout.count("torch.compile does not work") == 1


# --- networks -----------------------------------------------------------------------------------


def networks():
    """[(network, function of its first input, shape of that)], with no weight at zero."""
    unet = model.UNet((4, 8, 8), 2, 32, (1, 2, 4), 1, (4,))
    vae = model.AutoencoderKL(16, 4, 32, (1, 2), 1, attn_res=(8,))
    disc = model.PatchDiscriminator(16, 2)
    t, y = torch.tensor([0.2, 0.9]), torch.tensor([0, 2])
    for net in (unet, vae, disc):
        for weight in net.parameters():
            torch.nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
    return [(unet, lambda x: unet(x, t, y), (2, 4, 8, 8)),
            (vae, lambda x: vae(x, torch.ones(2, *vae.latent_shape))[0], (2, 1, 16, 16)),
            (disc, disc, (2, 1, 64, 64))]


def output_and_gradients(net, call, x, bf16):
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        out = call(x.contiguous(memory_format=CL) if bf16 else x)
    loss = (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum()
    grads = torch.autograd.grad(loss, list(net.parameters()))
    return out.detach(), torch.cat([grad.flatten() for grad in grads])


@pytest.mark.parametrize("everywhere", [True, False])
def test_bf16_equals_plain_float32_within_rounding(each_way, everywhere, monkeypatch):
    torch.manual_seed(0)
    if everywhere:  # also on maps too small for it to gain
        monkeypatch.setattr(cpu_ops, "group_norm_usable", cpu_ops.usable)
        monkeypatch.setattr(cpu_ops, "WEIGHTS_PER_PIXEL", 0)
    for net, call, shape in networks():
        x = torch.randn(shape)
        out, grads = output_and_gradients(net, call, x, bf16=False)
        cpu_ops.install(net.to(memory_format=CL))
        fast_out, fast_grads = output_and_gradients(net, call, x, bf16=True)
        assert (fast_out - out).norm() < 0.03 * out.norm()
        assert (fast_grads - grads).norm() < 0.05 * grads.norm()


def test_install_changes_neither_float32_nor_names_of_weights():
    for net, call, shape in networks():
        x, names = torch.randn(shape), net.state_dict().keys()
        before = output_and_gradients(net, call, x, bf16=False)
        cpu_ops.install(net)
        for a, b in zip(before, output_and_gradients(net, call, x, bf16=False), strict=True):
            assert torch.equal(a, b)
        assert net.state_dict().keys() == names


def test_copies_stay_fast():
    unet = networks()[0][0]
    cpu_ops.install(unet)
    types = {type(layer) for layer in model.EMA(unet, 0.9).module.modules()}
    assert {cpu_ops.FastGroupNorm, cpu_ops.FastConv2d, cpu_ops.FastAttention,
            cpu_ops.FastUpsample} <= types
    assert not {model.GroupNorm, model.Attention, model.Upsample} & types


@pytest.mark.parametrize("dtype, compiled, layout", [
    (torch.bfloat16, "", CL), (torch.bfloat16, "default", torch.contiguous_format),
    (torch.float32, "", torch.contiguous_format)])
def test_only_uncompiled_bf16_is_placed_for_speed(dtype, compiled, layout):
    ctx = dist.DistContext(0, 1, torch.device("cpu"), dtype, compiled)
    placed = ctx.place(torch.nn.Sequential(model.GroupNorm(8, 2)))
    assert ctx.memory_format == layout
    assert (type(placed[0]) is cpu_ops.FastGroupNorm) == (layout == CL)


@pytest.mark.parametrize("gain, dtype", [(0.003, "fp32"), (0.53, "fp32"), (1.0, "fp32"),
                                         (2.0, "bf16"), (8.0, "bf16")])
def test_auto_takes_what_multiplies_faster(monkeypatch, capsys, gain, dtype):
    monkeypatch.setattr(dist, "bf16_gain", lambda: gain)
    args = argparse.Namespace(device="cpu", dtype="auto")
    expected = {"bf16": torch.bfloat16, "fp32": torch.float32}
    assert dist.setup(args).dtype == expected[dtype]
    assert args.dtype == dtype  # stored with a run, which so keeps it
    assert capsys.readouterr().out.count(f"--dtype={dtype}, since bf16") == 1
    other = {"bf16": "fp32", "fp32": "bf16"}[dtype]  # a user's choice wins, and nothing is said
    assert dist.setup(argparse.Namespace(device="cpu", dtype=other)).dtype == expected[other]
    assert not capsys.readouterr().out and dist.bf16_gain() > 0


def test_a_first_product_that_loads_kernels_is_not_timed(monkeypatch):
    """Else the first start after a boot may take the slower precision, and the run keeps it."""
    clock = [0.0]

    class Matrix:
        def __init__(self, seconds):
            self.costs = itertools.chain([1.0], itertools.repeat(seconds))

        def __matmul__(self, other):
            clock[0] += next(self.costs)

    matrices = iter([Matrix(0.002), Matrix(0.001)])
    monkeypatch.setattr(dist.torch, "ones", lambda *args, **settings: next(matrices))
    monkeypatch.setattr(dist.time, "perf_counter", lambda: clock[0])
    assert dist.bf16_gain() == pytest.approx(2)


@pytest.mark.parametrize("steps, compiles", [
    ({}, False), ({"max_steps": 100}, False), ({"max_steps": dist.LONG_RUN}, True),
    ({"max_steps": None}, True)])
def test_norms_are_compiled_in_long_runs_alone(monkeypatch, steps, compiles):
    monkeypatch.setattr(cpu_ops, "can_compile", lambda: True)
    monkeypatch.setattr(cpu_ops, "compile_norms", True)  # and put back
    x = torch.zeros(1, 64, 64, 64, dtype=torch.bfloat16).contiguous(memory_format=CL)
    x = x.requires_grad_()
    for choice, expected in (("auto", compiles), ("norms", True), ("off", False)):
        args = argparse.Namespace(device="cpu", dtype="bf16", compile=choice, **steps)
        assert dist.setup(args).compile == ""
        assert cpu_ops.group_norm_usable(x) == expected
    for choice, mode in (("on", "default"), ("graphs", "reduce-overhead")):
        assert dist.setup(argparse.Namespace(device="cpu", compile=choice)).compile == mode
