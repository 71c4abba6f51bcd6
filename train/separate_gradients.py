"""A value with two gradients, each of which is computed only where somebody asks for it.

The backward of an autograd function computes the gradients of all its inputs, even if `torch.autograd.grad` asks
for one: saliency asks for that of the image, not for those of the parameters. So two functions make the value, one
for each gradient. The first returns the value, the second a stand-in of its shape; joined, they get one gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def stand_in(value: Tensor) -> Tensor:
    """Return a tensor of the shape and dtype of `value` that holds one number of memory."""
    return value.new_zeros(()).expand_as(value)


def joined(value: Tensor, other: Tensor) -> Tensor:
    """Return `value`, in the same memory; its gradient, of the same shape, goes to `value` and to `other`."""
    found: Tensor = _Join.apply(value, other)
    return found


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, other: Tensor) -> Tensor:
        return value.detach()  # no view: what comes next may write into it

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor]:
        return grad_outputs[0], grad_outputs[0]
