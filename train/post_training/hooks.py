"""A network run on batches while somebody looks at its layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


def run_with_hooks(model: nn.Module, batches: Sequence[Tensor], hooks: dict[Any, Callable[..., Any]]) -> None:
    """Run the batches through the model, each module of `hooks` with its forward hook."""
    handles = [module.register_forward_hook(hook) for module, hook in hooks.items()]
    try:
        for batch in batches:
            model(batch)
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def forwards(replaced: Mapping[Any, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Let modules compute something else for a block; a hook would throw away what they have computed."""
    try:
        for module, forward in replaced.items():
            vars(module)["forward"] = forward
        yield
    finally:
        for module in replaced:
            vars(module).pop("forward", None)
