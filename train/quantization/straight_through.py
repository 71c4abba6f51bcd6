"""The gradients of fake quantization: rounding hands them straight through, a clip gates them.

Each is an autograd function behind a plain one; `train.quantization.quantizers` has the modules that use them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from train.separate_gradients import joined, stand_in


class _StraightThrough(torch.autograd.Function):
    """Return `value`, bit for bit, and hand the gradient to `x` (x + (value - x).detach() would round)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return grad_outputs[0], None


def straight_through(x: Tensor, value: Tensor) -> Tensor:
    """Return `value` with the gradient of the identity in `x` (same shape)."""
    out: Tensor = _StraightThrough.apply(x, value.detach())
    return out


class _AtLeast(torch.autograd.Function):
    """Clamp from below; below the floor only a step that leads back up gets its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, floor: Tensor) -> Tensor:
        ctx.save_for_backward(x >= floor)
        return torch.maximum(x, floor)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (grad,) = grad_outputs
        (above,) = ctx.saved_tensors
        return torch.where(above, grad, grad.clamp_max(0)), None


def at_least(x: Tensor, floor: Tensor) -> Tensor:
    """Return max(x, floor), float32, same shape; what is below the floor can be learned up, not further down."""
    out: Tensor = _AtLeast.apply(x, floor.detach())
    return out


def round_in_place(ratio: Tensor, qmin: int, qmax: int) -> Tensor:
    """Replace x / scale by its codes, as floats; in place, since what a pass costs is the memory it touches."""
    return ratio.clamp_(qmin, qmax).round_()


class _RoundToGrid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, qmin: int, qmax: int) -> Tensor:
        return round_in_place(x / scale, qmin, qmax).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        return grad_outputs[0], None, None, None


def round_to_grid(x: Tensor, scale: Tensor, qmin: int, qmax: int) -> Tensor:
    """Return scale * codes, codes in qmin..qmax, and the identity's gradient, inside that range and outside."""
    y: Tensor = _RoundToGrid.apply(x, scale, qmin, qmax)
    return y


# How far below zero, in steps, the gate of an unsigned activation opens. Sums of codes are often exactly 0, which
# float32 gives as a little more or less: the gate opens at 0 however the sum was rounded. (Of the codes at ties
# that networks fresh from `quantize` rounded the other way, the farthest was at 5e-5 of a step.)
BELOW_ZERO_STEPS = 2.0**-10


def _clip_bounds(qmax: int, dtype: torch.dtype) -> tuple[float, float]:
    """Return two neighbouring floats: the smallest that alpha / scale can be rounded to, and the one below it.

    By Python's numbers alone: a tensor's `.item()` would break a compiled network in two at each activation.
    """
    least = qmax * (1 - 2 * torch.finfo(torch.float32).eps)
    power = 2.0 ** math.floor(math.log2(least))
    step = torch.finfo(dtype).eps * power
    clip = round(least / step) * step
    return clip - (step if clip > power else step / 2), clip


class _ClipToGrid(torch.autograd.Function):
    """Clip to [lower, alpha] and round to the grid; the paper's straight-through gradient of x, alpha being given.

    What is kept for the gradient, and returned beside the value, is x in steps of the grid: there the clip lies at
    qmax, a constant, so that one pass gates the gradient and no device has to tell the host its alpha. An x within
    a rounding error of alpha counts as clipped.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Tensor, qmin: int, qmax: int) -> tuple[Tensor, Tensor]:
        scale = alpha / qmax
        ratio = x / scale
        ctx.save_for_backward(ratio)
        ctx.mark_non_differentiable(ratio)
        ctx.set_materialize_grads(False)  # zeros for the gradient of ratio would be one more pass
        ctx.qmin, ctx.qmax = qmin, qmax
        return ratio.clamp(qmin, qmax).round_().mul_(scale), ratio

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        (ratio,) = ctx.saved_tensors
        _, clip = _clip_bounds(ctx.qmax, ratio.dtype)
        least = _clip_bounds(-ctx.qmin, ratio.dtype)[1] if ctx.qmin else BELOW_ZERO_STEPS
        # Differentiable in the gradient, so that losses on the saliency itself can go through it twice.
        return torch.ops.aten.hardtanh_backward(grad_outputs[0], ratio, -least, clip), None, None, None


class _ClippedByAlpha(torch.autograd.Function):
    """Alpha's part in the value: its gradient is the paper's, its own value is never looked at."""

    @staticmethod
    def forward(ctx: Any, alpha: Tensor, ratio: Tensor, qmin: int, qmax: int) -> Tensor:
        ctx.save_for_backward(ratio)
        ctx.qmin, ctx.qmax, ctx.dtype = qmin, qmax, alpha.dtype
        return stand_in(ratio)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,), (ratio,) = grad_outputs, ctx.saved_tensors
        below_clip, _ = _clip_bounds(ctx.qmax, ratio.dtype)
        grad_alpha = torch.ops.aten.threshold_backward(grad, ratio, below_clip).sum(dtype=ctx.dtype)
        if ctx.qmin:
            below_least, _ = _clip_bounds(-ctx.qmin, ratio.dtype)
            below = torch.ops.aten.threshold_backward(grad, -ratio, below_least)
            grad_alpha = grad_alpha + ctx.qmin / ctx.qmax * below.sum(dtype=ctx.dtype)
        return grad_alpha, None, None, None


def clip_to_grid(x: Tensor, alpha: Tensor, qmin: int, qmax: int) -> Tensor:
    """Return x clipped to [alpha * qmin / qmax, alpha] and rounded to the grid, with the gradients of x and alpha.

    Choi et al. 2018, equations 1 and 2. Saliency asks for the gradient of x alone; alpha's would cost it as many
    passes over the activation again.
    """
    y, ratio = _ClipToGrid.apply(x, alpha.detach(), qmin, qmax)
    return joined(y, _ClippedByAlpha.apply(alpha, ratio, qmin, qmax))


class _LSQ(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, qmax: int) -> Tensor:
        ctx.save_for_backward(weight, scale)
        ctx.qmax = qmax
        return round_in_place(weight / scale, -qmax, qmax).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        (grad,) = grad_outputs
        weight, scale = ctx.saved_tensors
        ratio = weight / scale
        inside = ratio.abs() < ctx.qmax
        step = torch.where(inside, torch.round(ratio) - ratio, ratio.sign() * ctx.qmax)
        per_channel = weight[0].numel()
        grad_scale = (grad * step).flatten(1).sum(1).reshape(scale.shape) / math.sqrt(per_channel * ctx.qmax)
        return grad * inside, grad_scale, None


def learned_step(weight: Tensor, scale: Tensor, qmax: int) -> Tensor:
    """Return scale * codes of a weight, with LSQ's gradients of both (Esser et al. 2020, equations 1 to 3).

    Args:
        weight: float [O, ...].
        scale: a positive step of each output channel, of a shape that spreads over the weight's, [O, 1, ...].
        qmax: codes are -qmax..qmax; the step's gradient is divided by sqrt(weights of a channel * qmax), their
            section 2.2.
    """
    quantized: Tensor = _LSQ.apply(weight, scale, qmax)
    return quantized
