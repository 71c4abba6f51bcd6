"""The value between training and export: a network, its image, its classes, and images to try it on."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from train.input_spec import InputSpec
from train.quantization.accumulators import put_biases_on_grid
from train.quantization.quantize import spec_of
from train.quantization.spec import QuantSpec


@dataclass(frozen=True)
class Facts:
    """What a file's manifest tells besides, where it is known.

    Args:
        arch: name of the architecture.
        data: name of the data set the network was trained on.
        metrics: name -> number, such as test_accuracy in percent.
        resize: what the runtime does with images of another size, one of runtime.manifest.RESIZES.
    """

    arch: str = "own"
    data: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    resize: str = "bilinear"


@dataclass(frozen=True)
class QuantizedModel:
    """What export needs of a trained network, and nothing of how it was trained.

    Args:
        network: from `train.quantization.quantize.quantize`, with what was learned. Nobody changes it.
        input: how pixels become what the network was trained on.
        classes: names, in the order of the logits.
        samples: real images uint8 [n, C, H, W], two at least; every file is verified on them.
        labels: their classes int64 [n]; None: maps are compared for the classes that the network predicts.
        calibration_images: training images uint8 [n, C, H, W], which give INT8 gradients their grids; None: every
            second sample does.
        facts: for the manifest.
        original: the float network that was quantized without training, whose maps and classes the export is
            compared with; None: the float network is this one without rounding, which is what was trained.
    """

    network: nn.Module
    input: InputSpec
    classes: tuple[str, ...]
    samples: Tensor
    labels: Tensor | None = None
    calibration_images: Tensor | None = None
    facts: Facts = Facts()
    original: nn.Module | None = None

    @property
    def quant(self) -> QuantSpec:
        """Bits and quantizers of the network."""
        return spec_of(self.network)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        return (self.input.channels, *self.input.size)

    def evaluated(self) -> nn.Module:
        """Return a copy of the network in evaluation mode, its biases on their sums' grids if they are to be."""
        network = copy.deepcopy(self.network).eval()
        if self.quant.bias_grid:
            put_biases_on_grid(network, self.image_shape)
        return network
