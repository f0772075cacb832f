"""What makes bf16 fast on CPUs with bf16 units (Intel AMX): forward passes for channels_last.

There oneDNN's convolutions are faster in channels_last, but the backward pass of PyTorch's group
norm is up to forty times as slow, and convolutions of small maps with many channels spend their
time rearranging weights. Both are written here on rows of channels: docs/benchmarks.md.
"""
import functools
import math

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

import model
from lib.files import first_line, notice


def usable(x):
    """Whether x [B, C, H, W] is what this file is for: bf16 in channels_last, as under autocast."""
    return x.dtype == torch.bfloat16 and x.is_contiguous(memory_format=torch.channels_last)


def as_rows(x):
    """[B, C, H, W] as rows of channels, [B, HW, C]: a view in channels_last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def as_images(rows, height, width):
    """Inverse of as_rows."""
    return rows.unflatten(1, (height, width)).permute(0, 3, 1, 2)


@functools.cache
def can_compile():
    """Whether torch.compile works, for which it needs a C++ compiler and a place for its files."""
    notice("compiling for bf16, once per start: up to two minutes")
    try:
        torch.compile(torch.neg)(torch.zeros(8))
        return True
    except torch._dynamo.exc.TorchDynamoException as e:
        notice(f"torch.compile does not work, so bf16 is slower: {first_line(e)}")
        return False


def fused(function):
    """The function as one loop over memory, which takes the time, in place of one per operation.
    Compiled for all shapes when it is first called, a second or two each; kept on disk."""
    # Only when it is needed: PyTorch's compiler takes a second to import.
    compiled = functools.cache(lambda: torch.compile(function, dynamic=True, recompile_limit=64))

    def run(*args):
        # Tensors with and without a gradient would be compiled apart.
        return compiled()(*(a.detach() if isinstance(a, torch.Tensor) else a for a in args))
    return run


# --- group norm ---------------------------------------------------------------------------------

compile_norms = True  # dist.setup decides: compiling takes longer than it gains in a short run


def group_norm_usable(x):
    """Whether NormFunction is faster: on large maps, larger ones if no backward pass follows."""
    large = x.numel() >= (2**18 if x.requires_grad else 2**20)
    return compile_norms and large and usable(x) and can_compile()


@fused
def normalisation(rows, scale, shift, groups, eps):
    """(gain, offset) [B, C] of the map that normalises by group and then scales and shifts;
    (mean, 1 / standard deviation) [B, groups, 1]."""
    x = rows.float()
    moments = torch.stack([x.mean(1), x.square().mean(1)]).unflatten(2, (groups, -1))
    mean, square = moments.mean(3, keepdim=True)
    inv_std = ((square - mean.square()).clamp(min=0) + eps).rsqrt()
    gain = scale.unflatten(1, (groups, -1)) * inv_std
    return gain.flatten(1), shift - (mean * gain).flatten(1), mean, inv_std


@fused
def affine(rows, gain, offset, silu):
    """(h = gain * x + offset, None), or with silu (SiLU of h, SiLU's derivative at h)."""
    h = torch.addcmul(offset[:, None], rows.float(), gain[:, None])
    if not silu:
        return h.to(rows.dtype), None
    s = h.sigmoid()
    return (h * s).to(rows.dtype), (s * (1 + h * (1 - s))).to(rows.dtype)


@fused
def grad_normalisation(grad, derivative, rows, scale, mean, inv_std):
    """Gradients [B, C] of scale and shift, and the factors [3, B, C] of x's in grad_affine."""
    grad = grad.float() * (1.0 if derivative is None else derivative.float())
    by_group = (mean.shape[1], -1)
    scale = scale.unflatten(1, by_group)
    grad_shift = grad.sum(1).unflatten(1, by_group)
    products = (grad * rows.float()).sum(1).unflatten(1, by_group)
    grad_scale = inv_std * (products - mean * grad_shift)
    # x_hat changes neither with a constant added to a group nor with a factor on it, so what the
    # gradient has of either is taken out.
    surplus = (torch.stack([grad_scale, grad_shift]) * scale).mean(3, keepdim=True)
    surplus = surplus * inv_std / -rows.shape[1]
    slope = surplus[0] * inv_std
    constant = surplus[1] - mean * slope
    factors = torch.broadcast_tensors(scale * inv_std, slope, constant)
    return grad_scale.flatten(1), grad_shift.flatten(1), torch.stack(factors).flatten(2)


@fused
def grad_affine(grad, derivative, rows, factors):
    """gain * gradient + slope * x + constant, with (gain, slope, constant) = factors."""
    gain, slope, constant = factors[:, :, None]
    grad = grad.float() * (1.0 if derivative is None else derivative.float())
    return (grad * gain + rows.float() * slope + constant).to(rows.dtype)


class NormFunction(torch.autograd.Function):
    """scale * x_hat + shift and perhaps SiLU; x_hat is x [B, C, H, W] normalised by group (Wu & He
    2018, equation 1), scale and shift are float32 [B, C]."""

    @staticmethod
    def forward(ctx, x, scale, shift, groups, eps, silu):
        rows, scale, shift = as_rows(x), scale.contiguous(), shift.contiguous()
        gain, offset, mean, inv_std = normalisation(rows, scale, shift, groups, eps)
        h, derivative = affine(rows, gain, offset, silu)
        ctx.save_for_backward(derivative, rows, scale, mean, inv_std)
        return as_images(h, *x.shape[2:])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        derivative, rows, scale, mean, inv_std = ctx.saved_tensors
        grad_rows = as_rows(grad).contiguous()
        grad_scale, grad_shift, factors = grad_normalisation(
            grad_rows, derivative, rows, scale, mean, inv_std)
        grad_x = grad_affine(grad_rows, derivative, rows, factors)
        return as_images(grad_x, *grad.shape[2:]), grad_scale, grad_shift, None, None, None


# --- 3x3 convolution ----------------------------------------------------------------------------

WEIGHTS_PER_PIXEL = 1000  # above it conv3x3 is faster than oneDNN


def conv3x3(x, weight, bias):
    """3x3 convolution with padding 1 as one matrix product: x [B, in, H, W], weight
    [out, in, 3, 3] and bias [out], all bf16, to [B, out, H, W]."""
    B, C, H, W = x.shape
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
    neighbours = [padded[:, i:i + H, j:j + W] for i in range(3) for j in range(3)]
    columns = torch.stack(neighbours, 3).view(B, H * W, 9 * C)
    matrix = weight.permute(0, 2, 3, 1).flatten(1)  # [out, 9 in]
    return as_images(F.linear(columns, matrix, bias), H, W)


# --- layers -------------------------------------------------------------------------------------


class FastGroupNorm(model.GroupNorm):
    """model.GroupNorm by NormFunction, or by PyTorch's with a copy on each side."""

    def forward(self, x, scale_shift=None, silu=False):
        if group_norm_usable(x):
            scale, shift = self.weight.expand(len(x), -1), self.bias.expand(len(x), -1)
            if scale_shift is not None:
                s, t = scale_shift.float().chunk(2, dim=1)
                scale, shift = scale * (1 + s), shift * (1 + s) + t
            return NormFunction.apply(x, scale, shift, self.num_groups, self.eps, silu)
        if usable(x):
            h = super().forward(x.contiguous(), scale_shift, silu)
            return h.contiguous(memory_format=torch.channels_last)
        return super().forward(x, scale_shift, silu)


class FastConv2d(torch.nn.Conv2d):
    """3x3 convolutions as one matrix product for small maps with many channels."""

    def forward(self, x):
        same_size = self.kernel_size == (3, 3) and self.stride == self.padding == (1, 1)
        pixels = x.numel() // x.shape[1]
        if usable(x) and same_size and self.weight.numel() > WEIGHTS_PER_PIXEL * pixels:
            return conv3x3(x, self.weight.to(x.dtype), self.bias.to(x.dtype))
        return super().forward(x)


class FastAttention(model.Attention):
    """Plain products in training: PyTorch's backward pass is so slow here that both passes together
    take twice as long."""

    def attend(self, q, k, v):
        if q.requires_grad and q.dtype == torch.bfloat16 and q.shape[2] <= 256:
            return ((q / math.sqrt(q.shape[3])) @ k.transpose(2, 3)).softmax(3) @ v
        return super().attend(q, k, v)


class FastUpsample(model.Upsample):
    """The two operations it stands for: transposed convolutions are slow here."""

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0)) if usable(x) else super().forward(x)


FAST = {model.GroupNorm: FastGroupNorm, model.Attention: FastAttention,
        model.Upsample: FastUpsample, torch.nn.Conv2d: FastConv2d}


def install(network):
    """Give the layers of a network of model.py the forward passes above; weights and their names
    stay. For uncompiled networks on CPUs: a compiler makes kernels of its own."""
    for layer in network.modules():
        layer.__class__ = FAST.get(type(layer), type(layer))
