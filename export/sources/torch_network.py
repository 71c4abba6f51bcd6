"""Anyone's float PyTorch network, by the function that makes it and a file of its parameters."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from runtime.errors import FileError, OptionError
from runtime.files import read_bytes
from train.models import factory
from train.state import load_state

# Under which training scripts keep the parameters in their files, and what wrappers put before every name.
_KEYS = ("state_dict", "model_state_dict", "model", "state", "net")
_PREFIXES = ("module.", "_orig_mod.", "model.")


def load_network(name: str, state: str | Path | None) -> nn.Module:
    """Return a network in evaluation mode.

    Args:
        name: package.module:factory, a function or class that takes no arguments; the user has named it, so it is
            imported and run.
        state: file of its state dict, written by torch.save, alone or under a usual key; nothing in it is run.
            None: the factory has loaded its parameters itself.

    Raises:
        OptionError: no such factory, or it makes no nn.Module.
        FileError: the file is missing, holds no parameters, or those of another network.
    """
    factory.allow(name)
    network = factory.find(name, {})()
    if not isinstance(network, nn.Module):
        raise OptionError(f"{name}: returned a {type(network).__name__}, expected an nn.Module")
    if state is not None:
        found = _without_prefix(_state_dict(Path(state)), network)
        # Files of before PyTorch 0.4.1 do not count batches, which evaluation does not read.
        counters = {k: v for k, v in network.state_dict().items() if k.endswith("num_batches_tracked")}
        load_state(network, counters | found, str(state))
    return network.eval()


def _state_dict(path: Path) -> dict[str, Tensor]:
    data = read_bytes(path)
    try:
        found: Any = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FileError(
            f"{path}: cannot be read as parameters alone ({reason}); save them with "
            "torch.save(network.state_dict(), PATH)"
        ) from None
    for key in _KEYS:
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
            break
    if not isinstance(found, dict) or not found or not all(isinstance(v, Tensor) for v in found.values()):
        raise FileError(f"{path}: holds no parameters by name; save torch.save(network.state_dict(), PATH)")
    return found


def _without_prefix(state: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Return the parameters by the network's own names, which a wrapper may have put its own before."""
    expected = network.state_dict().keys()
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in state) and not set(state) <= set(expected):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state
