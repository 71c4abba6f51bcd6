"""What the command line says of a network of anyone's: its image, and the names of its classes."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from export.sources.images import RealImages
from export.sources.onnx_file import OnnxClassifier
from runtime.errors import FileError, OptionError
from runtime.files import read_bytes
from train.data.names import is_folder
from train.input_spec import InputSpec

# What torchvision's networks expect of RGB; pixels from 0 to 1 of grey.
_USUAL = {3: ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), 1: ((0.0,), (1.0,))}
_SIDES = {"digits": 8, "mnist": 28, "fashion-mnist": 28, "cifar10": 32, "cifar100": 32}
_PHOTO_SIDE = 224


def onnx_input(options: argparse.Namespace, found: OnnxClassifier) -> InputSpec:
    """Return how pixels become what an ONNX file takes, as the options tell it.

    Raises:
        OptionError: they do not fit the file, or no image can be normalized by them.
    """
    size = options.size or found.size
    if size is None or (found.size is not None and size != found.size):
        given = f"--size {size[0]}x{size[1]}" if size else "the file leaves its image's size open"
        wanted = f"expected {found.size[0]}x{found.size[1]}" if found.size else "give it with --size"
        raise OptionError(f"{options.checkpoint}: {given}, {wanted}")
    if found.integers is not None:
        if options.mean or options.std:
            raise OptionError(f"{options.checkpoint}: takes pixels as integers; drop --mean and --std")
        return InputSpec(
            size, found.channels, (found.integers.mean,) * found.channels, (found.integers.std,) * found.channels
        )
    mean, std = (0.0,) * found.channels, (1.0 / options.pixels,) * found.channels
    return InputSpec(size, found.channels, *_normalization(options, mean, std))


def check_kept(options: argparse.Namespace, found: OnnxClassifier) -> None:
    """Raise OptionError where --keep-input is asked for and the file takes no image of floats."""
    if options.keep_input and found.integers is not None:
        raise OptionError(
            f"--keep-input: {options.checkpoint} takes integers, expected an image of floats; drop it"
        )


def network_input(options: argparse.Namespace, network: nn.Module) -> InputSpec:
    """Return how pixels become what a PyTorch network takes, as the options tell it, or as most networks take it.

    Raises:
        OptionError: --mean or --std are no numbers for its channels.
    """
    kernels = [p for p in network.parameters() if p.ndim == 4]
    channels = 1 if kernels and kernels[0].shape[1] == 1 else 3
    side = _PHOTO_SIDE if is_folder(options.data) else _SIDES[options.data]
    return InputSpec(options.size or (side, side), channels, *_normalization(options, *_USUAL[channels]))


def _normalization(
    options: argparse.Namespace, mean: tuple[float, ...], std: tuple[float, ...]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return --mean and --std, one number a channel, or what is given here where they are not."""
    mean = values_of("--mean", options.mean, len(mean)) or mean
    std = values_of("--std", options.std, len(std)) or std
    if not all(math.isfinite(value) for value in mean):
        raise OptionError(f"--mean {' '.join(map(str, mean))}: expected finite numbers")
    if not all(0 < value < math.inf for value in std):
        raise OptionError(f"--std {' '.join(map(str, std))}: expected numbers above 0")
    return mean, std


def values_of(option: str, given: Sequence[float] | None, channels: int) -> tuple[float, ...]:
    """Return one number a channel of an option that takes one or as many; none where it is not given."""
    if not given:
        return ()
    if len(given) not in (1, channels):
        wanted = f"1 or {channels}, one a channel" if channels > 1 else "one"
        raise OptionError(f"{option}: {len(given)} numbers, expected {wanted}")
    return tuple(given) * (channels // len(given))


def class_names(path: str | None, known: Sequence[str], count: int) -> tuple[str, ...]:
    """Return the names in a file, one a line, or those known, if they are as many as the logits; else numbers."""
    if path is not None:
        text = read_bytes(path).decode(errors="replace")
        names = tuple(line.strip() for line in text.splitlines() if line.strip())
        if len(names) != count:
            raise FileError(f"{path}: {len(names)} names, expected {count}, one a line, as the logits are")
        return names
    return tuple(known) if len(known) == count else tuple(map(str, range(count)))


def labelled(images: RealImages, classes: Sequence[str]) -> RealImages:
    """Return the images with labels in the order of the classes; without where they are of other classes."""
    if images.labels is None or not set(images.classes) <= set(classes):
        return replace(images, labels=None)
    order = torch.tensor([classes.index(name) for name in images.classes])
    return replace(images, labels=order[images.labels])
