"""Anyone's float network becomes what `export` takes: quantized on real images, measured before and after."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from export.calibration import CalibrationResult, calibrate_network, spec_of
from export.layer_names import check_layers
from export.reference import reference_run
from export.sources.images import TEST_IMAGES, RealImages, real_images
from export.sources.onnx_file import OnnxClassifier, read_classifier, with_pixels
from export.sources.own_input import check_kept, class_names, labelled, network_input, onnx_input
from export.sources.torch_from_onnx import to_torch
from export.sources.torch_network import load_network
from runtime.errors import ModelError, OptionError
from runtime.manifest import INPUT_NAME
from train.choices import FLOAT_BITS
from train.input_spec import InputSpec
from train.model import Facts, QuantizedModel
from train.quantization.tracing import copied, cut_softmax, trace

# The file is verified on so many images, of large ones on fewer: 20 of 224 x 224, 69 million codes.
_VERIFIED_IMAGES, _VERIFIED_PIXELS = 256, 1 << 20
_BATCH = 32
COMPARED_IMAGES = 8
# Of the logits' norm about their mean, median: by so much two programs round floats otherwise.
LARGEST_DIFFERENCE = 1e-3


def quantized_model(
    network: nn.Module,
    input_spec: InputSpec,
    images: RealImages,
    classes: Sequence[str],
    *,
    bits: int = 8,
    target: str = "openvino",
    search: str = "best",
    equalizes: bool = True,
    corrects_biases: bool = True,
    learns_rounding: bool = True,
    arch: str = "own",
    status: Callable[[str], None] = lambda text: None,
) -> tuple[QuantizedModel, CalibrationResult | None]:
    """Return a float network quantized after training, ready for `export`, and what was done.

    Args:
        network: one image tensor [N, C, H, W] in, logits [N, K] out; it stays as it is.
        input_spec: how pixels become what it takes.
        images: to calibrate on and to verify with.
        classes: K names, in the order of the logits.
        bits: 2 to 8, or 32: not quantized, and nothing is done.
        target: engine whose fastest grids are chosen, one of export.choices.TARGETS.
        search: of alpha, one of train.choices.SEARCHES.
        equalizes: cross-layer equalization.
        corrects_biases: bias correction.
        learns_rounding: learned rounding of weights below 8 bits.
        arch: the network's name in the manifest.
        status: told what is being done, step by step.

    Raises:
        ModelError: the network cannot be traced or quantized.
    """
    found: CalibrationResult | None = None
    result: nn.Module
    if bits == FLOAT_BITS:
        shape = (input_spec.channels, *input_spec.size)
        result = trace(copied(network), shape, evaluated=True).eval()
        cut_softmax(result)  # the runtime computes probabilities from logits
    else:
        found = calibrate_network(
            network, input_spec, images.calibration, spec_of(bits, target),
            target=target, search=search, equalizes=equalizes, corrects_biases=corrects_biases,
            learns_rounding=learns_rounding, status=status,
        )  # fmt: skip
        result = found.network
    count = _verified_count(input_spec)
    labels = None if images.labels is None else images.labels[:count]
    facts = Facts(arch=arch, resize="crop")
    return QuantizedModel(
        result, input_spec, tuple(classes), images.test[:count], labels,
        images.calibration[:count], facts, found.floating if found is not None else None,
    ), found  # fmt: skip


def _verified_count(input_spec: InputSpec) -> int:
    height, width = input_spec.size
    return max(2, min(_VERIFIED_IMAGES, _VERIFIED_PIXELS // (height * width)))


def accuracy(network: nn.Module, input_spec: InputSpec, images: Tensor, labels: Tensor) -> float:
    """Return how many of the images uint8 [n, C, H, W] get their class, int64 [n], in percent."""
    with torch.no_grad():
        found = torch.cat([network(input_spec.normalize(part)).argmax(1) for part in images.split(_BATCH)])
    return 100 * (found == labels).double().mean().item()


def run(options: argparse.Namespace, status: Callable[[str], None]) -> tuple[QuantizedModel, str]:
    """Load, quantize and measure the network that a command line names, and print what came of it.

    Returns:
        it, and the layout of its image, "NCHW" or "NHWC".

    Raises:
        OptionError: --data is missing, or an option does not fit the network.
        FileError: a file of the network's, or an image, cannot be read.
        ModelError: the network cannot be quantized.
    """
    if options.data is None:
        raise OptionError(
            f"{options.checkpoint}: needs real images, to choose grids by and to verify with; "
            "give --data folder:PATH (labels are not needed) or a data set's name"
        )
    is_onnx = Path(options.checkpoint).suffix == ".onnx"
    found_onnx = read_classifier(options.checkpoint, options.size) if is_onnx else None
    layout = "NCHW"
    if found_onnx is not None:
        check_kept(options, found_onnx)
        layout = found_onnx.layout
        network, input_spec = from_onnx(options, found_onnx)
    else:
        network = load_network(options.checkpoint, options.state)
        input_spec = network_input(options, network)
    height, width = input_spec.size
    try:
        with torch.no_grad():
            shape = tuple(network(torch.zeros(1, input_spec.channels, height, width)).shape)
    except (RuntimeError, ValueError) as error:
        raise OptionError(
            f"{options.checkpoint}: does not run on an image of {height}x{width} "
            f"({str(error).splitlines()[0]}); give its size with --size"
        ) from None
    if len(shape) != 2:
        raise OptionError(f"{options.checkpoint}: gives {list(shape)} for one image, expected logits [1, K]")
    check_layers(network, (input_spec.channels, height, width), options.cams)

    def test_count(known: Sequence[str]) -> int:
        """Return how many images to read besides: to measure accuracy on, or to verify with."""
        if known and set(known) <= set(class_names(options.classes, known, shape[1])):
            return TEST_IMAGES
        return max(_verified_count(input_spec), COMPARED_IMAGES)

    status("reading images ...")
    images = real_images(options.data, options.data_root, input_spec, options.samples, test_count=test_count)
    if found_onnx is not None:
        check_the_same(options.checkpoint, found_onnx, network, input_spec, images.test)
    classes = class_names(options.classes, images.classes, shape[1])
    images = labelled(images, classes)
    bits = FLOAT_BITS if options.fp32 else options.bits
    model, found = quantized_model(
        network, input_spec, images, classes,
        bits=bits, target=options.target, search=options.search, equalizes=not options.no_equalize,
        corrects_biases=not options.no_bias_correction, learns_rounding=not options.no_learned_rounding,
        status=status,
        arch=Path(options.checkpoint).stem if is_onnx else options.checkpoint,
    )  # fmt: skip
    status("")
    mean, std = (" ".join(f"{v:.3g}" for v in values) for values in (input_spec.mean, input_spec.std))
    height, width = input_spec.size
    print(f"image: {height}x{width}, {input_spec.channels} channels; pixels from 0 to 1, mean {mean}, std {std}")
    if found is not None:
        print(f"calibrated: {found}")
    if images.labels is None:
        return model, layout
    status("measuring accuracy ...")
    measured = {"float": accuracy(network, input_spec, images.test, images.labels)}
    if found is not None:
        measured[f"calibrated, {bits} bit"] = accuracy(model.evaluated(), input_spec, images.test, images.labels)
    status("")
    figures = ", ".join(f"{name} {value:.2f} %" for name, value in measured.items())
    print(f"accuracy on {len(images.test):,} other images of {images.name}: {figures}")
    *_, reached = measured.values()
    return replace(model, facts=replace(model.facts, metrics={"test_accuracy": reached})), layout


def from_onnx(options: argparse.Namespace, found: OnnxClassifier) -> tuple[nn.Module, InputSpec]:
    """Return the float network of an ONNX file and how pixels become what it takes.

    Raises:
        OptionError: an option does not fit the file.
        ModelError: it is no network of PyTorch's operators.
    """
    path = Path(options.checkpoint)
    input_spec = onnx_input(options, found)
    if found.size is None:
        raise OptionError(f"{path}: leaves its image's size open, expected a fixed one; give it with --size")
    try:
        return to_torch(found), input_spec
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None


def difference_of(logits: np.ndarray, expected: np.ndarray) -> float:
    """Return how far logits [n, K] lie from those expected, as a share of their norm about their mean, median."""
    spread = np.linalg.norm(expected - expected.mean(1, keepdims=True), axis=1)
    return float(np.median(np.linalg.norm(logits - expected, axis=1) / np.maximum(spread, 1e-9)))


def check_the_same(
    path: str, found: OnnxClassifier, network: nn.Module, input_spec: InputSpec, images: Tensor
) -> None:
    """Raise ModelError unless the network read from a file gives the file's logits of the first images.

    Args:
        path: of the file, for the message.
        found: the file.
        network: as `from_onnx` made it.
        input_spec: likewise.
        images: uint8 [n, C, H, W].
    """
    images = images[:COMPARED_IMAGES]
    mean, std = (np.asarray(values, np.float64) for values in (input_spec.mean, input_spec.std))
    run_file, runner = reference_run(with_pixels(found, input_spec.size, mean, std))
    expected = run_file({INPUT_NAME: images.permute(0, 2, 3, 1).contiguous().numpy()})["logits"]
    with torch.no_grad():
        logits = network(input_spec.normalize(images)).numpy()
    difference = difference_of(logits, expected)
    if not difference <= LARGEST_DIFFERENCE:
        raise ModelError(
            f"{path}: as a PyTorch network its logits differ by {difference:.2g} of their size from the file's "
            f"({runner}), expected {LARGEST_DIFFERENCE} at most; leave --int8 out, and report the network"
        )


def inputs_of(options: argparse.Namespace) -> list[Path]:
    """Return the files that the command line names as inputs, so that none of them is overwritten."""
    return [Path(path) for path in (options.state, options.classes) if path]
