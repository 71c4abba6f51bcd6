"""A float network that the command line names, with the images to quantize it by and to measure it on."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from export.image_size import size_of
from runtime.errors import OptionError
from train.data.names import is_folder

if TYPE_CHECKING:
    from torch import nn

    from export.sources.images import RealImages
    from train.input_spec import InputSpec


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
    parser.add_argument("network", metavar="SOURCE", help="float: module:factory, or a .onnx file")
    parser.add_argument("--state", metavar="FILE", help="its state dict")
    parser.add_argument("--data", required=True, metavar="NAME", help="folder:PATH or a data set's name")
    parser.add_argument("--data-root", default="data", help="folder of the data sets' files (default: data)")
    parser.add_argument("--size", type=size_of, metavar="PIXELS", help="side, or HxW (default: the data's)")
    parser.add_argument("--mean", type=float, nargs="+", help="of pixels from 0 to 1 (default: export.onnx's)")
    parser.add_argument("--std", type=float, nargs="+", help="likewise")
    parser.add_argument("--pixels", type=int, choices=(1, 255), default=1,
                        help="of a .onnx file: it takes pixels from 0 to 1, or to 255 (default: 1)")  # fmt: skip
    parser.add_argument("--samples", type=int, default=samples, help="that calibrate (default: %(default)d)")
    parser.add_argument("--images", type=int, default=images, help="other images, at most (default: %(default)d)")


def load(options: argparse.Namespace) -> FloatNetwork:
    """Return the network and the images that the options of `add_options` name.

    Raises:
        OptionError, FileError, ModelError: as `python -m export.onnx` does.
    """
    import torch

    from export.own_network import from_onnx
    from export.sources.images import real_images
    from export.sources.onnx_file import read_classifier
    from export.sources.own_input import class_names, labelled, network_input
    from export.sources.torch_network import load_network
    from train.data import datasets

    if options.images < 1:
        raise OptionError(f"--images {options.images}: expected a whole number from 1")
    options = argparse.Namespace(**vars(options), checkpoint=options.network)
    if Path(options.network).suffix == ".onnx":
        network, spec = from_onnx(options, read_classifier(options.network, options.size))
    else:
        network = load_network(options.network, options.state)
        spec = network_input(options, network)
    images = real_images(options.data, options.data_root, spec, options.samples)
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
