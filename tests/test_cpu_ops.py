"""lib/cpu_ops.py: the operations against PyTorch's own, and where networks use them."""
import copy
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

import model
from lib import cpu_ops, dist

CL = torch.channels_last


def random_images(*shape, dtype=torch.float32):
    """Images of which each channel has a mean and a spread of its own."""
    x = torch.randn(shape) * torch.linspace(0.2, 3, shape[1])[:, None, None]
    x = x + torch.linspace(-2, 2, shape[1])[:, None, None]
    return x.to(dtype).contiguous(memory_format=CL).requires_grad_()


def values_and_gradients(function, inputs, upstream):
    """What function gives for inputs, and the gradients of all inputs for that of its output."""
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, upstream.to(out.dtype))]


@pytest.fixture(params=["compiled", "as it stands"])
def each_way(request, monkeypatch):
    """Once with loops over memory as they are where there is a compiler, once as where there is
    none."""
    if request.param == "as it stands":
        monkeypatch.setattr(cpu_ops, "can_compile", lambda: False)
    elif not cpu_ops.can_compile():
        pytest.skip("no C++ compiler")


@pytest.mark.parametrize("batch, groups, silu, shared", [
    (3, 4, True, False), (3, 4, False, True), (1, 12, True, True)])
def test_group_norm_is_the_one_of_pytorch(shared, silu, batch, groups, each_way):
    torch.manual_seed(0)
    x = random_images(batch, 12, 6, 5)
    scale = (1 + 0.5 * torch.randn(1 if shared else batch, 12)).requires_grad_()
    shift = torch.randn(1 if shared else batch, 12).requires_grad_()

    def reference(x, scale, shift):
        h = F.group_norm(x, groups, eps=1e-3) * scale[:, :, None, None] + shift[:, :, None, None]
        return F.silu(h) if silu else h

    def own(x, scale, shift):
        scale, shift = scale.expand(batch, -1), shift.expand(batch, -1)
        return cpu_ops.NormFunction.apply(x, scale, shift, groups, 1e-3, silu)
    upstream = torch.randn(batch, 12, 6, 5)
    wide = [tensor.detach().double().requires_grad_() for tensor in (x, scale, shift)]
    got = values_and_gradients(own, (x, scale, shift), upstream)
    for a, b in zip(got, values_and_gradients(reference, wide, upstream), strict=True):
        assert torch.allclose(a.double(), b, rtol=1e-4, atol=1e-4 * b.abs().max().item())
    assert got[0].is_contiguous(memory_format=CL) and got[1].is_contiguous(memory_format=CL)


@pytest.mark.parametrize("batch, height, width", [(2, 4, 4), (1, 1, 3), (3, 5, 2)])
def test_the_convolution_is_the_one_of_pytorch(batch, height, width, each_way):
    torch.manual_seed(0)
    x = random_images(batch, 6, height, width)
    weight = torch.randn(8, 6, 3, 3).contiguous(memory_format=CL).requires_grad_()
    bias = torch.randn(8).requires_grad_()
    upstream = torch.randn(batch, 8, height, width).contiguous(memory_format=CL)
    inputs = (x, weight, bias)
    got = values_and_gradients(cpu_ops.ConvFunction.apply, inputs, upstream)
    wanted = values_and_gradients(lambda *a: F.conv2d(*a, padding=1), inputs, upstream)
    for a, b in zip(got, wanted, strict=True):
        assert torch.allclose(a, b, atol=1e-4)
    assert got[0].is_contiguous(memory_format=CL) and got[2].is_contiguous(memory_format=CL)


def test_they_are_for_bf16_in_channels_last():
    x = torch.randn(2, 8, 4, 4)
    assert cpu_ops.usable(x.bfloat16().contiguous(memory_format=CL))
    assert not cpu_ops.usable(x.contiguous(memory_format=CL))
    assert not cpu_ops.usable(x.bfloat16())


def test_install_keeps_weights_names_copies_and_float32():
    torch.manual_seed(0)
    for plain, call, shape in networks(installed=False):
        x, state = torch.randn(shape), plain.state_dict()
        before = call(x)
        cpu_ops.install(plain)
        assert list(plain.state_dict()) == list(state)
        assert torch.equal(call(x), before)  # float32 takes PyTorch's way
        twin = copy.deepcopy(plain)
        assert [type(m) for m in twin.modules()] == [type(m) for m in plain.modules()]
        kinds = {type(m).__name__ for m in twin.modules()}
        assert "GroupNorm" not in kinds and "FastGroupNorm" in kinds


def test_large_maps_are_normed_here_given_a_compiler(monkeypatch):
    def usable(side, trained):
        x = torch.zeros(1, 64, side, side, dtype=torch.bfloat16).contiguous(memory_format=CL)
        return cpu_ops.group_norm_usable(x.requires_grad_(trained))
    monkeypatch.setattr(cpu_ops, "can_compile", lambda: True)
    assert usable(64, True) and not usable(32, True)
    assert usable(128, False) and not usable(64, False)
    monkeypatch.setattr(cpu_ops, "can_compile", lambda: False)
    assert not usable(128, True)


@pytest.mark.parametrize("missing", [{"CXX": "{}/c++", "TORCHINDUCTOR_CACHE_DIR": "{}/cache"},
                                     {"TORCH_COMPILE_DISABLE": "1"}],
                         ids=["compiler", "wish"])
def test_results_are_the_same_without_a_compiler(missing, tmp_path):
    code = """
import torch, model
from lib import cpu_ops
norm = model.norm(32, 8)
cpu_ops.install(norm)
x = torch.randn(2, 32, 128, 128).to(torch.bfloat16, memory_format=torch.channels_last)
with torch.autocast("cpu", torch.bfloat16), torch.compiler.set_stance("force_eager"):
    h = norm(x, silu=True)
wanted = torch.nn.functional.silu(torch.nn.GroupNorm.forward(norm, x.float()))
assert x.numel() >= 4 * cpu_ops.SMALL and (h - wanted).abs().max() < 0.05
assert not cpu_ops.can_compile()
"""
    env = os.environ | {name: value.format(tmp_path) for name, value in missing.items()}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True,
                          text=True, check=True)
    assert done.stderr.count("torch.compile does not work") == ("TORCH_COMPILE" not in str(missing))


def test_programs_start_without_the_compiler():
    code = "import sys, train_ldm; assert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_small_maps_with_many_weights_are_products():
    def usable(channels, side):
        x = torch.zeros(1, channels, side, side, dtype=torch.bfloat16)
        weight = torch.zeros(channels, channels, 3, 3, device="meta")
        return cpu_ops.conv3x3_usable(x.contiguous(memory_format=CL), weight)
    assert usable(64, 4) and not usable(64, 8) and not usable(32, 4) and usable(512, 32)


def networks(installed=True):
    """[(network, call, shape of x)] with weights that are nowhere zero."""
    unet = model.UNet((4, 8, 8), 2, 32, (1, 2, 4), 1, (4,))
    vae = model.AutoencoderKL(16, 4, 32, (1, 2), 1, attn_res=(8,))
    disc = model.PatchDiscriminator(16, 2)
    t, y = torch.tensor([0.2, 0.9]), torch.tensor([0, 2])
    for net in (unet, vae, disc):
        for weight in net.parameters():
            torch.nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
        if installed:
            cpu_ops.install(net)
    return [(unet, lambda x: unet(x, t, y), (2, 4, 8, 8)),
            (vae, lambda x: vae(x, torch.ones(2, *vae.latent_shape))[0], (2, 1, 16, 16)),
            (disc, disc, (2, 1, 64, 64))]


def nodes(output):
    """Names of all that the gradient of a tensor goes through."""
    todo, seen = [output.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [following for following, _ in node.next_functions]
    return [node.name() for node in seen]


@pytest.mark.parametrize("small", [True, False])
def test_networks_agree_in_bf16_and_float32(small, monkeypatch):
    """And the norms of small maps are PyTorch's."""
    if not small:
        monkeypatch.setattr(cpu_ops, "group_norm_usable", cpu_ops.usable)
    torch.manual_seed(0)
    for net, call, shape in networks():
        x, weights = torch.randn(shape), list(net.parameters())
        results = []
        for bf16 in (False, True):
            layout = CL if bf16 else torch.contiguous_format
            net.to(memory_format=layout)
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                out = call(x.contiguous(memory_format=layout))
            loss = (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum()
            results.append([out.detach(), *torch.autograd.grad(loss, weights, retain_graph=True)])
        exact, rounded = (torch.cat([v.flatten() for v in values[1:]]) for values in results)
        assert (results[0][0] - results[1][0]).norm() < 0.03 * results[0][0].norm()
        assert (exact - rounded).norm() < 0.05 * exact.norm()
        names = nodes(out)
        norms = sum(isinstance(m, torch.nn.GroupNorm) for m in net.modules())
        native = sum("NativeGroupNorm" in name for name in names)
        ours = names.count("NormFunctionBackward")
        assert norms and (ours, native) == ((0, norms) if small else (norms, 0))


@pytest.mark.parametrize("side", [4, 128])  # either side of SMALL
def test_group_norm_keeps_the_layout(side):
    x = torch.randn(2, 32, side, side).bfloat16().contiguous(memory_format=CL)
    norm = model.norm(32, 8)
    cpu_ops.install(norm)
    with torch.autocast("cpu", torch.bfloat16):
        h = norm(x, silu=True)
    assert h.is_contiguous(memory_format=CL) and h.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype, compiled, layout", [
    (torch.bfloat16, False, CL), (torch.bfloat16, True, torch.contiguous_format),
    (torch.float32, False, torch.contiguous_format)])
def test_the_layout_on_a_cpu_follows_the_precision(dtype, compiled, layout):
    ctx = dist.DistContext(0, 1, torch.device("cpu"), dtype, compiled)
    assert ctx.memory_format == layout
