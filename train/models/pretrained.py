"""Parameters that torchvision trained on ImageNet, made for another image format and other classes."""

from __future__ import annotations

import pickle
import sys
import urllib.error
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from runtime.errors import FileError, OptionError
from train.input_spec import InputSpec


class _Ends(NamedTuple):
    """Names of what an image format and classes change: first convolution, its BatchNorm, last layer."""

    stem: str
    norm: str
    head: str


_ENDS = {
    "resnet18": _Ends("conv1", "bn1", "fc"),
    "mobilenet_v2": _Ends("features.0.0", "features.0.1", "classifier.1"),
}


def pretrained_state(arch: str, input_spec: InputSpec) -> dict[str, Tensor]:
    """Return the parameters and buffers of a pretrained network but for its last layer's.

    They are torchvision's; downloaded once, they are read from torch.hub's folder. The first convolution and its
    BatchNorm are changed so that the network sees in our normalization what it was trained to see in its own: away
    from the image's border, where padding with zeros means another colour, the same; of gray images, what it sees
    when all three channels hold them.

    Args:
        arch: one of train.models.build.ARCHITECTURES that torchvision has parameters of.
        input_spec: of the images to come.

    Raises:
        OptionError: there are no parameters of that architecture.
        FileError: they cannot be downloaded, or the file is damaged.
    """
    if arch not in _ENDS:
        raise OptionError(f"--pretrained: nobody has trained {arch} for us, expected one of {', '.join(_ENDS)}")
    from torchvision.models import get_model_weights

    weights = get_model_weights(arch).DEFAULT
    state = _read(arch, weights)
    ends, theirs = _ENDS[arch], weights.transforms()
    # theirs = scale * ours + shift, in each channel
    std = torch.tensor(theirs.std)
    scale = torch.tensor(input_spec.std) / std
    shift = (torch.tensor(input_spec.mean) - torch.tensor(theirs.mean)) / std
    kernel = state[f"{ends.stem}.weight"]
    state[f"{ends.norm}.running_mean"] = state[f"{ends.norm}.running_mean"] - (kernel.sum((2, 3)) * shift).sum(1)
    kernel = kernel * scale.reshape(-1, 1, 1)
    state[f"{ends.stem}.weight"] = kernel.sum(1, keepdim=True) if input_spec.channels == 1 else kernel
    return {name: value for name, value in state.items() if not name.startswith(f"{ends.head}.")}


def _read(arch: str, weights: Any) -> dict[str, Tensor]:
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    file = folder / Path(weights.url).name
    try:
        state: dict[str, Tensor] = weights.get_state_dict(
            progress=sys.stderr.isatty(), check_hash=True, weights_only=True
        )
    except (urllib.error.URLError, ConnectionError, TimeoutError) as error:
        reason = getattr(error, "reason", error)
        raise FileError(
            f"--pretrained: cannot download {weights.url} ({reason}); fetch it elsewhere into {folder}, or train "
            f"{arch} without --pretrained"
        ) from None
    except (RuntimeError, EOFError, KeyError, pickle.UnpicklingError, zipfile.BadZipFile):
        raise FileError(
            f"--pretrained: {file} is damaged or holds code; delete it to have it fetched again"
        ) from None
    return dict(state)
