"""Second derivatives that PyTorch does not have, or has slowly; `asg` goes through them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from train.cpu.convolution import cheap_second_derivatives


@contextmanager
def second_derivatives(model: nn.Module) -> Iterator[None]:
    """Let what `model` computes meanwhile be differentiated twice: attention and Hardsigmoid too.

    PyTorch's fused attention has no second derivative, the one that is written out has; `hardsigmoid` has none.
    """
    with cheap_second_derivatives(model), sdpa_kernel(SDPBackend.MATH), _Hardsigmoid():
        yield


class _Hardsigmoid(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (_hardsigmoid if func is F.hardsigmoid else func)(*args, **(kwargs or {}))


def _hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """Return what `F.hardsigmoid` returns, computed as what it is."""
    value = F.relu6(input + 3) / 6
    return input.copy_(value) if inplace else value
