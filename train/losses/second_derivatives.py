"""Second derivatives that PyTorch does not have, or has slowly; `asg` goes through them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import nn
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
    """Computes Hardsigmoid as what it is, relu6(x + 3) / 6."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.hardsigmoid:
            return F.relu6((args[0] if args else kwargs["input"]) + 3) / 6
        return func(*args, **(kwargs or {}))
