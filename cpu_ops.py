"""Group norm and 3x3 convolution in bf16 and channels_last, for CPUs with bf16 units (Intel AMX).

There oneDNN's convolutions are faster in channels_last than in the plain layout, but PyTorch's
group norm takes it all back: its backward pass is up to forty times as slow. And oneDNN's
convolutions of small maps with many channels spend their time on rearranging weights. Both are
written here in plain operations on rows of pixels, with a backward pass by hand; model.py uses them
where `usable` says so. What they gain: docs/benchmarks.md.
"""
import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


def usable(x):
    """Whether x [B, C, H, W] is what this file is for. A compiled network does without: its kernels
    are the compiler's."""
    return (x.device.type == "cpu" and x.dtype == torch.bfloat16
            and x.is_contiguous(memory_format=torch.channels_last)
            and not torch.compiler.is_compiling())


def as_rows(x):
    """[B, C, H, W] as rows of pixels, [B, HW, C]: a view in channels_last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def as_images(rows, height, width):
    """Inverse of as_rows."""
    return rows.unflatten(1, (height, width)).permute(0, 3, 1, 2)


# --- group norm ---------------------------------------------------------------------------------


SMALL = 2**17  # elements of x below which PyTorch's group norm with a copy on each side is faster


class GroupNorm(torch.autograd.Function):
    """scale * x_hat + shift, and SiLU behind it where told: x [B, C, H, W] to [B, C, H, W].

    x_hat is x normalised by group (Wu & He 2018, equation 1); scale and shift are float32 and
    [B, C], or [1, C] where all images share them.
    """

    @staticmethod
    def forward(ctx, x, scale, shift, groups, eps, silu):
        B, C, H, W = x.shape
        rows = as_rows(x)
        if H * W >= 1024:  # where PyTorch's forward pass is fast in channels_last too
            shared = len(scale) == 1
            # Its mean and standard deviation are float32 only where its weights are.
            affine = (scale[0], shift[0]) if shared else (scale.new_ones(C), scale.new_zeros(C))
            h, mean, inv_std = torch.native_group_norm(x, *affine, B, C, H * W, groups, eps)
            h, mean, inv_std = as_rows(h), mean[:, :, None], inv_std[:, :, None]
            if not shared:
                h = torch.addcmul(shift[:, None].to(h.dtype), h, scale[:, None].to(h.dtype))
        else:
            wide = rows.float()  # a variance is the small difference of two large numbers
            moments = torch.stack([wide.mean(1), wide.square().mean(1)])
            moments = moments.unflatten(2, (groups, -1)).mean(3, keepdim=True)
            mean, square = moments  # each [B, groups, 1]
            inv_std = ((square - mean.square()).clamp(min=0) + eps).rsqrt()
            gain = scale.unflatten(1, (groups, -1)) * inv_std
            offset = shift - (mean * gain).flatten(1)
            h = torch.addcmul(offset[:, None], wide, gain.flatten(1)[:, None]).to(x.dtype)
        ctx.save_for_backward(rows, h if silu else None, scale, mean, inv_std)
        return as_images(F.silu(h) if silu else h, H, W)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        rows, h, scale, mean, inv_std = ctx.saved_tensors  # the last two [B, groups, 1]
        B, C, H, W = grad.shape
        grad = as_rows(grad)
        if h is not None:
            grad = torch.ops.aten.silu_backward(grad, h)
        by_group = (mean.shape[1], C // mean.shape[1])
        scale_of = scale.unflatten(1, by_group)
        grad_shift = grad.sum(1).float().unflatten(1, by_group)
        products = (grad * rows).sum(1).float().unflatten(1, by_group)
        grad_scale = inv_std * (products - mean * grad_shift)  # [B, groups, C / groups]
        # x_hat changes neither with a constant added to a group nor with a factor on it, so what
        # the gradient has of either is taken out: gain * grad + slope * x + constant.
        surplus = (torch.stack([grad_scale, grad_shift]) * scale_of).mean(3, keepdim=True)
        surplus = surplus * inv_std / -(H * W)
        slope = surplus[0] * inv_std
        constant = surplus[1] - mean * slope
        factors = torch.stack(torch.broadcast_tensors(scale_of * inv_std, slope, constant))
        gain, slope, constant = factors.to(rows.dtype).view(3, B, 1, C)
        grad_x = torch.addcmul(torch.addcmul(constant, rows, slope), grad, gain)
        if len(scale) == 1:
            grad_scale, grad_shift = grad_scale.sum(0, True), grad_shift.sum(0, True)
        return (as_images(grad_x, H, W), grad_scale.flatten(1), grad_shift.flatten(1),
                None, None, None)


# --- 3x3 convolution ----------------------------------------------------------------------------


def conv3x3_usable(x, weight):
    """Whether Conv3x3 is faster than oneDNN's convolution: a thousand weights for each pixel."""
    B, _, H, W = x.shape
    return usable(x) and weight.numel() > 1000 * B * H * W


class Conv3x3(torch.autograd.Function):
    """3x3 convolution with padding 1 as one matrix product: x [B, in, H, W], weight
    [out, in, 3, 3] in channels_last and bias [out], all bf16, to [B, out, H, W]."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        B, C, H, W = x.shape
        padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
        # The nine neighbours of each pixel side by side: [BHW, 9 in].
        columns = torch.cat([padded[:, i:i + H, j:j + W] for i in range(3) for j in range(3)], 3)
        columns = columns.view(B * H * W, 9 * C)
        matrix = weight.permute(0, 2, 3, 1).flatten(1)  # [out, 9 in]
        ctx.save_for_backward(columns, matrix)
        return as_images(torch.addmm(bias, columns, matrix.t()).view(B, H * W, -1), H, W)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        columns, matrix = ctx.saved_tensors
        B, out, H, W = grad.shape
        grad = as_rows(grad).flatten(0, 1)  # [BHW, out]
        grad_weight = (grad.t().contiguous() @ columns).view(out, 3, 3, -1).permute(0, 3, 1, 2)
        neighbours = (grad @ matrix).view(B, H, W, 3, 3, -1)
        grad_x = neighbours.new_zeros(B, H + 2, W + 2, neighbours.shape[-1])
        for i in range(3):
            for j in range(3):
                grad_x[:, i:i + H, j:j + W] += neighbours[:, :, :, i, j]
        return grad_x[:, 1:-1, 1:-1].permute(0, 3, 1, 2), grad_weight, grad.sum(0)
