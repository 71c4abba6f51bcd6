"""Convolution whose second derivative is cheap on the CPU: losses on the input gradient go through it.

PyTorch computes it by convolutions whose kernel is a whole gradient, on transposed copies: 44 ms for 256 images of
16 x 32 x 32 and two threads. Here it is one convolution and one gradient of a weight, 15 ms.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from train.separate_gradients import joined, stand_in

# Stride, padding, dilation, whether transposed, output padding and groups, as PyTorch's operators take them.
Settings = tuple[list[int], list[int], list[int], bool, list[int], int]


@contextmanager
def cheap_second_derivatives(model: nn.Module) -> Iterator[None]:
    """Let the convolutions that `model` computes meanwhile have second derivatives that are cheap on the CPU.

    Values and first gradients stay PyTorch's, bit for bit. A weight's gradient cannot be differentiated again.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d) and _is_pytorchs(layer)]
    for layer in layers:
        padding = [int(rows) for rows in layer.padding]
        settings = (list(layer.stride), padding, list(layer.dilation), False, [0, 0], layer.groups)
        layer._conv_forward = partial(_convolution, settings)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer._conv_forward


def _is_pytorchs(layer: nn.Conv2d) -> bool:
    """Return whether a layer computes as nn.Conv2d does, with zeros of a given number around its images."""
    own = vars(layer).get("_conv_forward", type(layer)._conv_forward)
    return own is nn.Conv2d._conv_forward and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)


def _convolution(settings: Settings, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the convolution [N, O, H', W'] of x [N, C, H, W] by a weight [O, C / groups, h, w]."""
    if x.device.type != "cpu" or x.ndim != 4:
        stride, padding, dilation, _, _, groups = settings
        return torch.conv2d(x, weight, bias, stride, padding, dilation, groups)
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    y: Tensor = _OfInput.apply(x, (weight, bias), settings)
    return joined(y, _OfParameters.apply(weight, bias, x.detach(), y.detach(), settings))


class _OfInput(torch.autograd.Function):
    """The value, with the gradient of x alone: autograd does not see the parameters in their tuple."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, parameters: tuple[Tensor, Tensor | None], settings: Settings) -> Tensor:
        weight, bias = parameters
        ctx.save_for_backward(x)
        ctx.weight, ctx.settings = weight, settings
        return torch.convolution(x, weight, bias, *settings)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        return _InputGradient.apply(grad_outputs[0], ctx.weight, x.detach(), ctx.settings), None, None


class _OfParameters(torch.autograd.Function):
    """A stand-in for y, with the gradients of weight and bias."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, bias: Tensor | None, x: Tensor, y: Tensor, settings: Settings) -> Tensor:
        ctx.save_for_backward(weight, x)
        ctx.has_bias, ctx.settings = bias is not None, settings
        return stand_in(y)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        weight, x = ctx.saved_tensors
        of_weight, of_bias = _gradients(grad_outputs[0], x, weight, ctx.settings, [False, True, ctx.has_bias])[1:]
        return of_weight, of_bias, None, None, None


class _InputGradient(torch.autograd.Function):
    """The gradient of x for the upstream gradient g: linear in g and in the weight, and differentiable in both."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, weight: Tensor, x: Tensor, settings: Settings) -> Tensor:
        ctx.save_for_backward(g, weight)
        ctx.settings = settings
        return _gradients(g, x, weight, settings, [True, False, False])[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        v, (g, weight) = grad_outputs[0], ctx.saved_tensors
        wants_g, wants_weight, _, _ = ctx.needs_input_grad
        of_g = torch.convolution(v, weight, None, *ctx.settings) if wants_g else None
        of_weight = _gradients(g, v, weight, ctx.settings, [False, True, False])[1] if wants_weight else None
        return of_g, of_weight, None, None


def _gradients(g: Tensor, x: Tensor, weight: Tensor, settings: Settings, wanted: list[bool]) -> tuple[Tensor, ...]:
    """Return the gradients of x, weight and bias, each where it is wanted."""
    bias_sizes = [weight.shape[0]] if wanted[2] else None
    found: tuple[Tensor, ...] = torch.ops.aten.convolution_backward(g, x, weight, bias_sizes, *settings, wanted)
    return found
