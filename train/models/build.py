"""A network by the name of its architecture: ours, torchvision's, or the user's."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from runtime.errors import ClearpactError, OptionError
from train.models.cnn2 import CNN2
from train.models.factory import find, is_factory
from train.models.resnet20 import ResNet20
from train.models.torchvision_models import of_torchvision
from train.models.vision_transformer import VisionTransformer

ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {
    "cnn2": CNN2,
    "resnet20": ResNet20,
    "resnet18": of_torchvision("resnet18", "conv1"),
    "mobilenet_v2": of_torchvision("mobilenet_v2", "features.0.0"),
    "deit_tiny": VisionTransformer,
}


def build(arch: str, **arguments: Any) -> nn.Module:
    """Return a freshly initialized network.

    Args:
        arch: one of ARCHITECTURES, or package.module:factory, a function that returns an nn.Module and that the
            user has named (`train.models.factory.allow`).
        arguments: channels, size and classes.

    Raises:
        OptionError: no such architecture, a factory that the user has not named, or one that makes something else.
    """
    if is_factory(arch):
        return _own_network(arch, arguments)
    if arch not in ARCHITECTURES:
        raise OptionError(
            f"architecture {arch!r}: expected one of {', '.join(ARCHITECTURES)}, or package.module:factory"
        )
    return ARCHITECTURES[arch](**arguments)


def _own_network(arch: str, arguments: dict[str, Any]) -> nn.Module:
    factory = find(arch, arguments)
    try:
        model = factory(**arguments)
    except ClearpactError:
        raise  # said in one line already
    except Exception as error:  # the user's code may raise anything
        raise OptionError(_failed(arch, error, f"called with {', '.join(arguments)}, it")) from error
    if not isinstance(model, nn.Module):
        raise OptionError(f"--arch {arch}: returned {type(model).__name__}, expected a torch.nn.Module")
    mode, images = model.training, torch.zeros(2, arguments["channels"], *arguments["size"])
    try:
        with torch.no_grad():
            logits = model.eval()(images)
    except Exception as error:
        raise OptionError(_failed(arch, error, f"of 2 images {list(images.shape)} its network")) from error
    if not isinstance(logits, Tensor) or logits.shape != (2, arguments["classes"]):
        found = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise OptionError(
            f"--arch {arch}: of 2 images {list(images.shape)} it returns {found}, expected logits "
            f"{[2, arguments['classes']]}"
        )
    return model.train(mode)


def _failed(arch: str, error: Exception, subject: str) -> str:
    """Return one line on an error of the user's own code, with the place that raised it."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    first_line = next(iter(str(error).strip().splitlines()), "")
    where = f"{Path(place.filename).name}:{place.lineno}"
    return f"--arch {arch}: {subject} raises {type(error).__name__} ({where}): {first_line}"
