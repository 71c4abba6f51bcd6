"""Layers that PyTorch computes slowly on the CPU, written so that a training step spends its time in convolutions.

In the MNIST network, batch 128, one core, pooling and dropout took 15 of the 93 ms of a plain step, here 6.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from train.cpu.batch_norm import BatchNorm2d


def use_fast_layers(model: nn.Module) -> None:
    """Replace, in place, every layer of `model` for which this module has a faster equal; parameters stay."""
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.MaxPool2d and not layer.return_indices:
                setattr(parent, name, _MaxPool2d(layer).train(layer.training))
            elif type(layer) is nn.BatchNorm2d and layer.affine and layer.track_running_stats:
                setattr(parent, name, BatchNorm2d(layer))
            elif type(layer) is nn.Dropout and (256 * layer.p).is_integer() and layer.p < 1:
                setattr(parent, name, _Dropout(layer.p).train(layer.training))


class _PoolChannelsLast(torch.autograd.Function):
    """Maximum, its position and its gradient as PyTorch defines them; only the order of the loops differs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, settings: tuple[Any, ...]) -> Tensor:
        fast = x.contiguous(memory_format=torch.channels_last)
        values, indices = torch.ops.aten.max_pool2d_with_indices(fast, *settings)
        ctx.save_for_backward(x, indices.contiguous())
        ctx.settings = settings
        return values.contiguous()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        x, indices = ctx.saved_tensors
        return torch.ops.aten.max_pool2d_with_indices_backward(grad_outputs[0], x, *ctx.settings, indices), None


class _MaxPool2d(nn.Module):
    """nn.MaxPool2d, whose kernel is vectorized over channels, but not over rows and columns."""

    def __init__(self, layer: nn.MaxPool2d) -> None:
        super().__init__()
        sizes = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
        self.settings = (*(_pair(size) for size in sizes), layer.ceil_mode)

    def forward(self, x: Tensor) -> Tensor:
        """Return the maxima [N, C, H', W'] of [N, C, H, W]."""
        y: Tensor = _PoolChannelsLast.apply(x, self.settings)
        return y


class _Dropout(nn.Module):
    """nn.Dropout for shares of 1 / 256: one random byte decides on an activation, where PyTorch draws a double."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Return x, in training with a random share p of it zero and the rest divided by 1 - p."""
        if not self.training:
            return x
        words = torch.empty((x.numel() + 7) // 8, dtype=torch.int64).random_(-(2**63), None)
        kept = words.view(torch.uint8)[: x.numel()].ge(int(256 * self.p)).view_as(x)
        return x * kept.to(x.dtype).div_(1 - self.p)


def _pair(size: Any) -> list[int]:
    return [size, size] if isinstance(size, int) else list(size)
