"""Parameters from a file into a network: what does not fit is told in one line, by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from runtime.errors import ModelError

# What DataParallel and DistributedDataParallel, and torch.compile, put before every name.
_WRAPPERS = ("module.", "_orig_mod.")


def without_wrappers(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state whose names have lost the prefixes that wrappers of networks add, where all have them."""
    found = dict(state)
    while found and (prefix := next((w for w in _WRAPPERS if all(k.startswith(w) for k in found)), None)):
        found = {key.removeprefix(prefix): value for key, value in found.items()}
    return found


def load_state(model: nn.Module, state: Mapping[str, Any], origin: str) -> None:
    """Load parameters and buffers into a network, all of them or none.

    Args:
        model: whose parameters and buffers are set.
        state: tensors by name, as `Module.state_dict` gives them; prefixes of wrappers are taken off.
        origin: of the state, for messages.

    Raises:
        ModelError: a tensor is missing, has another shape, is unknown, or holds a value that is not a number.
    """
    found, expected = without_wrappers(state), model.state_dict()
    network = type(model).__name__
    remedy = f"expected the state of {network}; check the architecture, its classes and its channels"
    for name, tensor in expected.items():
        if not isinstance(tensor, Tensor):
            continue
        if name not in found:
            raise ModelError(f"{origin}: holds no {name!r}, {remedy}")
        given = found[name]
        if not isinstance(given, Tensor):
            raise ModelError(
                f"{origin}: {name!r} is a {type(given).__name__}, expected a tensor; check the architecture"
            )
        if given.shape != tensor.shape:
            shapes = f"{list(given.shape)}, expected {list(tensor.shape)}"
            raise ModelError(f"{origin}: {name!r} has shape {shapes}; check the architecture and its classes")
    unknown = [name for name in found if name not in expected]
    if unknown:
        others = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
        raise ModelError(f"{origin}: {unknown[0]!r}{others} is unknown, {remedy}")
    check_numbers(found, origin)
    model.load_state_dict(found)


def check_numbers(state: Mapping[str, Any], origin: str) -> None:
    """Refuse a state with values that are not numbers.

    Raises:
        ModelError: a tensor holds NaN or infinity.
    """
    for name, tensor in state.items():
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            value = "NaN" if bool(torch.isnan(tensor).any()) else "infinity"
            count = int((~torch.isfinite(tensor)).sum())
            raise ModelError(
                f"{origin}: {name!r} holds {value} ({count} of {tensor.numel()} values), expected numbers; "
                "its training has diverged: take an earlier checkpoint"
            )
