"""A float network that the command line names, with the images to quantize it by and to measure it on."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from export import image_options
from runtime import command
from runtime.errors import OptionError
from train.choices import FLOAT_BITS
from train.data.names import is_folder
from train.models import factory

if TYPE_CHECKING:
    from torch import nn

    from export.sources.images import RealImages
    from train.input_spec import InputSpec

_NOT_OF_CHECKPOINTS = ("state", "size", "mean", "std")


@dataclass(frozen=True)
class FloatNetwork:
    """What `load` found.

    Args:
        network: float, in evaluation mode.
        input_spec: how pixels become what it takes.
        images: to calibrate on, and others; with labels where they name the network's classes.
        classes: names, in the order of the logits.
    """

    network: nn.Module
    input_spec: InputSpec
    images: RealImages
    classes: tuple[str, ...]


def add_options(parser: argparse.ArgumentParser, *, samples: int, images: int) -> None:
    """Add the network and its images to a command.

    Args:
        parser: of the command.
        samples: images that calibrate, by default.
        images: others, at most, by default.
    """
    parser.add_argument("network", metavar="SOURCE", help="float: module:factory, a .onnx file, or a ckpt.pt")
    factory.add_option(parser)
    parser.add_argument("--state", metavar="FILE", help="its state dict")
    parser.add_argument("--data", required=True, metavar="NAME", help="folder:PATH or a data set's name")
    parser.add_argument("--data-root", default="data", help="folder of the data sets' files (default: data)")
    image_options.add_options(parser)
    parser.add_argument("--samples", type=int, default=samples, help="that calibrate (default: %(default)d)")
    parser.add_argument("--images", type=int, default=images, help="other images, at most (default: %(default)d)")


def load(options: argparse.Namespace) -> FloatNetwork:
    """Return the network and the images that the options of `add_options` name.

    Raises:
        OptionError, FileError, ModelError: as `python -m export.onnx` does.
    """
    factory.allow(*options.arch)
    command.check_counts(options, images=1)
    if factory.is_factory(options.network) or Path(options.network).suffix == ".onnx":
        return _own(options)
    return _of_checkpoint(options)


def _own(options: argparse.Namespace) -> FloatNetwork:
    import torch

    from export.own_network import COMPARED_IMAGES, check_the_same, from_onnx
    from export.sources.images import real_images
    from export.sources.onnx_file import read_classifier
    from export.sources.own_input import class_names, labelled, network_input
    from export.sources.torch_network import load_network
    from train.data import datasets

    options = argparse.Namespace(**vars(options), checkpoint=options.network)
    file = read_classifier(options.network, options.size) if Path(options.network).suffix == ".onnx" else None
    if file is not None:
        network, spec = from_onnx(options, file)
    else:
        network = load_network(options.network, options.state)
        spec = network_input(options, network)
    images = real_images(
        options.data,
        options.data_root,
        spec,
        options.samples,
        test_count=lambda classes: max(options.images, COMPARED_IMAGES),
    )
    if file is not None:
        check_the_same(options.network, file, network, spec, images.test)
    if not is_folder(options.data):  # whose test split is read in part
        whole = datasets.load(options.data, options.data_root)
        pixels = whole.test_images
        if isinstance(pixels, torch.Tensor) and pixels.shape[1:] == images.test.shape[1:]:
            images = replace(images, test=pixels, labels=whole.test_labels)
    with torch.no_grad():
        count = network(spec.normalize(images.test[:1])).shape[1]
    classes = class_names(None, images.classes, count)
    images = labelled(images, classes)
    labels = None if images.labels is None else images.labels[: options.images]
    return FloatNetwork(network, spec, replace(images, test=images.test[: options.images], labels=labels), classes)


def _of_checkpoint(options: argparse.Namespace) -> FloatNetwork:
    """Return a float checkpoint's network, with images of its own split."""
    from export.calibration import load_images, training_sample
    from export.sources.images import RealImages
    from train import checkpoint as checkpoints

    path = Path(options.network)
    for name in _NOT_OF_CHECKPOINTS:
        if getattr(options, name) is not None:
            raise OptionError(f"--{name}: is not for a checkpoint, which {path} is; drop it")
    checkpoint = checkpoints.load(path)
    network = checkpoint.network()
    if checkpoint.quant.bits != FLOAT_BITS:
        raise OptionError(
            f"{path}: was trained with {checkpoint.quant.bits} bits, expected a float network (--bits 32)"
        )
    data = load_images(checkpoint, path, options.data, options.data_root)
    images = RealImages(
        data.name, training_sample(data, options.samples),
        data.test_images[: options.images], data.test_labels[: options.images], checkpoint.classes,
    )  # fmt: skip
    return FloatNetwork(network, checkpoint.input, images, checkpoint.classes)
