"""Post-training quantization: a float checkpoint becomes a quantized one without being trained again.

Weights are equalized across layers, scales and alphas searched on real training images, the rounding of weights
below 8 bits learned (Nagel et al. 2020), and biases corrected (Nagel et al. 2019). The result is an ordinary
quantized checkpoint. Training with the quantizers on (`python -m train --bits 8`) is what this is to be compared
with: `report` puts the accuracies side by side.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from runtime import command
from runtime.errors import OptionError
from train import checkpoint as checkpoints
from train import loop
from train.checkpoint import Checkpoint
from train.choices import FLOAT_BITS
from train.data import datasets
from train.data.images import ImageData
from train.input_spec import InputSpec
from train.post_training.bias import correct_biases
from train.post_training.clipping import search_alphas, to_compare
from train.post_training.constant_channels import silence_constant_channels
from train.post_training.equalization import equalize
from train.post_training.rounding import learn_rounding
from train.post_training.weight_scales import search_weight_scales
from train.quantization.quantize import quantize
from train.quantization.quantizers import INPUT_QMAX, INPUT_QMIN
from train.quantization.spec import QuantSpec
from train.quantization.tracing import copied, cut_softmax, trace
from train.resuming import reading_of

# Pixels of a batch: at 224 x 224, batches of 64 spend most of their time waiting for memory.
_BATCH_PIXELS = 64 * 32 * 32
_SMALLEST_BATCH = 4


@dataclass(frozen=True)
class CalibrationResult:
    """A network that was quantized without training, and what was done to it.

    Args:
        network: quantized, in evaluation mode.
        floating: the float network as a graph of the same layers, without a softmax at its end.
        samples: real images that were looked at.
        equalized: pairs of layers.
        errors: mean squared error of the logits by candidate of the alpha search, the chosen one first.
        uncorrected: layers without bias or BatchNorm; None where biases were left as they are.
        rounded: layers whose rounding was learned.
    """

    network: nn.Module
    floating: nn.Module
    samples: int
    equalized: int
    errors: dict[str, float]
    uncorrected: list[str] | None
    rounded: int

    def __str__(self) -> str:
        chosen, error = next(iter(self.errors.items()))
        biases = "biases as they were"
        if self.uncorrected is not None:
            biases = "biases corrected" + (f" but for {', '.join(self.uncorrected)}" if self.uncorrected else "")
        return (
            f"{self.samples} training images; {self.equalized} pairs of layers equalized; alpha by {chosen} "
            f"(mean squared error of the logits {error:.3g}); "
            + (f"rounding of {self.rounded} layers learned; " if self.rounded else "")
            + biases
        )


@dataclass(frozen=True)
class CalibratedCheckpoint(CalibrationResult):
    """A checkpoint that was quantized without training.

    Args:
        checkpoint: quantized; its history is empty.
    """

    checkpoint: Checkpoint


def calibrate_network(
    network: nn.Module,
    input_spec: InputSpec,
    images: Tensor,
    quant: QuantSpec | None = None,
    *,
    target: str = "openvino",
    search: str = "best",
    equalizes: bool = True,
    corrects_biases: bool = True,
    learns_rounding: bool = True,
    status: Callable[[str], None] = lambda text: None,
) -> CalibrationResult:
    """Quantize anyone's float network on real images; the network itself stays as it is.

    Args:
        network: float, one image tensor [N, C, H, W] in, logits [N, K] out.
        input_spec: how pixels become what it takes.
        images: uint8 [n, C, H, W], without labels; a few hundred are enough.
        quant: bits; None: 8.
        target: engine whose grid of the image is chosen, see `input_grid`.
        search: of the alphas, one of train.choices.SEARCHES.
        equalizes: cross-layer equalization (section 4.1).
        corrects_biases: bias correction (section 4.2).
        learns_rounding: learned rounding of weights below 8 bits (Nagel et al. 2020).
        status: told what is being done, step by step.

    Raises:
        ModelError: the network cannot be quantized.
        OptionError: no image.
    """
    if not len(images):
        raise OptionError("calibration: no image, expected a few hundred real ones")
    batch = max(_SMALLEST_BATCH, _BATCH_PIXELS // (input_spec.size[0] * input_spec.size[1]))
    batches = [input_spec.normalize(part) for part in images.split(batch)]
    shape = (input_spec.channels, *input_spec.size)
    # What the network does in training only, such as dropping whole blocks, is no matter here.
    floating = trace(copied(network), shape, evaluated=True).eval()
    cut_softmax(floating)
    equalized = 0
    if equalizes:
        status("equalizing ...")
        equalized = equalize(floating)
    scale, codes = input_grid(input_spec, target)
    quantized = quantize(floating, quant or QuantSpec(), input_scale=scale, input_codes=codes).eval()
    search_weight_scales(quantized)
    status("searching alphas ...")
    with torch.no_grad():
        logits = [floating(batch) for batch in to_compare(batches)]
    errors = search_alphas(quantized, batches, logits, search)
    assert isinstance(quantized, torch.fx.GraphModule)
    rounded = 0
    if learns_rounding:
        status("")
        rounded = learn_rounding(
            quantized, floating, batches, progress=functools.partial(command.progress, label="rounding, layers")
        )
    if rounded:  # what the weights round otherwise, the activations are clipped otherwise
        status("searching alphas again ...")
        errors = search_alphas(quantized, batches, logits, search)
    silence_constant_channels(quantized, shape)
    uncorrected = None
    if corrects_biases:
        status("correcting biases ...")
        uncorrected = correct_biases(quantized, floating, batches)
    status("")
    return CalibrationResult(quantized, floating, len(images), equalized, errors, uncorrected, rounded)


def calibrate(
    checkpoint: Checkpoint,
    images: Tensor,
    quant: QuantSpec | None = None,
    *,
    search: str = "best",
    equalizes: bool = True,
    corrects_biases: bool = True,
    learns_rounding: bool = True,
    status: Callable[[str], None] = lambda text: None,
) -> CalibratedCheckpoint:
    """Quantize a float checkpoint on real images, uint8 [n, C, H, W] of the training split.

    The other arguments are those of `calibrate_network`.

    Raises:
        OptionError: the checkpoint is quantized already.
        ModelError: the network cannot be quantized.
    """
    if checkpoint.quant.bits != FLOAT_BITS:
        raise OptionError(
            f"--calibrate of a network trained with {checkpoint.quant.bits} bits: expected a float one "
            "(--bits 32); export this one without --calibrate"
        )
    quant = quant or QuantSpec()
    found = calibrate_network(
        checkpoint.network(), checkpoint.input, images, quant,
        search=search, equalizes=equalizes, corrects_biases=corrects_biases, learns_rounding=learns_rounding,
        status=status,
    )  # fmt: skip
    calibrated = replace(
        checkpoint, quant=quant, state_dict=found.network.state_dict(), optimizer={}, guidance={}, history=[]
    )
    return CalibratedCheckpoint(**vars(found), checkpoint=calibrated)


def spec_of(bits: int, target: str = "openvino") -> QuantSpec:
    """Return the grids of a network that is not trained on them: the fastest that its target computes exactly.

    With few bits, the largest weight alone must not set the step of all: scales are those of the least squared
    error, and searched.

    Args:
        bits: 2 to 8.
        target: one of export.choices.TARGETS. Unsigned codes reach 255 except on TensorRT, whose codes are
            int8; on ONNX Runtime what is added has codes of its own.
    """
    quantizer = "absmax" if bits == 8 else "lsq"
    return QuantSpec(bits, quantizer, full_range=target != "tensorrt", quantize_adds=target == "ort")


def input_grid(input_spec: InputSpec, target: str) -> tuple[float, tuple[int, int]]:
    """Return the step, and the smallest and largest code, of the image of a network that is not trained on them.

    The pixels themselves are its codes where the engine computes that exactly and as fast: nothing of the image is
    rounded, and ONNX Runtime, whose zero points are free, leaves out the normalization.

    Args:
        input_spec: how pixels become what the network takes.
        target: one of export.choices.TARGETS.
    """
    codes = input_spec.pixel_codes
    if codes is not None and (target == "ort" or (target == "openvino" and codes[0] == 0)):
        return input_spec.pixel_scale, codes
    return input_spec.grid_scale, (INPUT_QMIN, INPUT_QMAX)


def training_sample(images: ImageData, count: int, seed: int = 0) -> Tensor:
    """Return `count` training images uint8 [n, C, H, W], or all there are, drawn without regard to class.

    Raises:
        OptionError: `count` is below 1.
    """
    if count < 1:
        raise OptionError(f"--samples {count}: expected a whole number from 1")
    order = torch.randperm(len(images.train_images), generator=torch.Generator().manual_seed(seed))
    return images.train_images[order[:count]]


def accuracy(checkpoint: Checkpoint, images: ImageData) -> float:
    """Return the accuracy of a checkpoint on the test split, in percent."""
    return loop.evaluate(checkpoint, checkpoint.network(), images.test_images, images.test_labels)


def load_images(checkpoint: Checkpoint, path: Path, name: str | None, root: str) -> ImageData:
    """Return the images a checkpoint was trained on, of a folder with the run's own split.

    Args:
        checkpoint: whose recipe says how they are read.
        path: of the checkpoint; split.json lies beside it.
        name: of the data set, where it is another than the recipe's or its folder has moved.
        root: folder of the data sets' files.

    Raises:
        FileError: they are not there, or another split than in training.
        OptionError: they do not fit the network.
    """
    recipe = checkpoint.recipe
    reading = reading_of(recipe, path.parent if name in (None, recipe.data) else None)
    images = datasets.load(name or recipe.data, root, replace(reading, workers=None))
    if recipe.split and (images.split is None or images.split.digest != recipe.split):
        raise OptionError(f"--data {name}: {images.name}, expected the images of training, {recipe.data_name}")
    expected = (checkpoint.input.channels, *checkpoint.input.size)
    if tuple(images.train_images.shape[1:]) != expected or images.classes != checkpoint.classes:
        raise OptionError(
            f"--data {name or recipe.data}: images {list(images.train_images.shape[1:])} of {len(images.classes)} "
            f"classes, expected {list(expected)} and the checkpoint's classes; name the data it was trained on"
        )
    return images


def run(options: argparse.Namespace, checkpoint: Checkpoint, status: Callable[[str], None]) -> Checkpoint:
    """Calibrate as the command line says, print what came of it, and return the quantized checkpoint."""
    images = load_images(checkpoint, Path(options.checkpoint), options.data, options.data_root)
    found = calibrate(
        checkpoint,
        training_sample(images, options.samples),
        spec_of(options.bits, options.target),
        search=options.search,
        equalizes=not options.no_equalize,
        corrects_biases=not options.no_bias_correction,
        learns_rounding=not options.no_learned_rounding,
        status=status,
    )
    trained = checkpoints.load(options.qat) if options.qat else None
    status("measuring accuracy ...")
    reached = accuracy(found.checkpoint, images)
    measured = {"float": accuracy(checkpoint, images), f"calibrated, {options.bits} bit": reached}
    if trained is not None:
        measured[f"trained, {trained.quant.bits} bit"] = accuracy(trained, images)
    status("")
    print(f"calibrated: {found}")
    figures = ", ".join(f"{name} {value:.2f} %" for name, value in measured.items())
    print(f"accuracy on {len(images.test_labels):,} test images: {figures}")
    return replace(found.checkpoint, history=[{"epoch": 0, "test_accuracy": reached}])
