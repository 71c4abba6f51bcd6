"""A network of anyone's own loop is exported without a recipe; a checkpoint contains the same value."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from export.pipeline import export
from runtime import Classifier
from runtime.errors import ModelError
from train.checkpoint import Checkpoint
from train.choices import FLOAT_BITS
from train.data.images import ImageData
from train.input_spec import InputSpec
from train.model import QuantizedModel
from train.quantization.quantize import quantize, spec_of
from train.quantization.spec import QuantSpec

SPEC = InputSpec(size=(8, 8), channels=1, mean=(128 / 255,), std=(0.5,))


def own_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(128, 10),
    )  # fmt: skip


@pytest.mark.parametrize("target", ["openvino", "ort"])
@pytest.mark.parametrize("bits", [8, 4, FLOAT_BITS])
def test_a_network_of_ones_own_loop_is_one_in_one_line(bits: int, target: str, digits: ImageData) -> None:
    network = quantize(own_network(), QuantSpec(bits), input_scale=SPEC.grid_scale)
    before = copy.deepcopy(network.state_dict())
    images = digits.test_images[:32]
    mine = QuantizedModel(network, SPEC, tuple("abcdefghij"), images)
    exported = export(mine, int8=bits != FLOAT_BITS, target=target)
    assert exported.verification.changed_classes == 0
    assert exported.agreement is not None
    assert exported.agreement.float_accuracy is None
    assert "its class on" in str(exported.agreement)
    manifest = exported.manifest
    assert (manifest.classes, manifest.data, manifest.metrics, manifest.arch) == (mine.classes, "", {}, "own")
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    expected = mine.evaluated()(SPEC.normalize(images)).detach().numpy()
    with Classifier(exported.data) as classifier:
        found = classifier.logits(images.permute(0, 2, 3, 1).numpy())
    assert np.abs(found - expected).max() < 1e-4 * max(1, np.abs(expected).max())


def test_a_network_remembers_what_it_was_quantized_by() -> None:
    spec = QuantSpec(4, "lsq", bias_grid=False)
    network = quantize(own_network(), spec)
    assert spec_of(network) == spec_of(copy.deepcopy(network)) == spec
    assert spec_of(own_network()).bits == FLOAT_BITS


def test_a_checkpoint_contains_one(digits_checkpoint: Checkpoint) -> None:
    model = digits_checkpoint.model()
    assert model.quant == digits_checkpoint.quant
    assert model.image_shape == digits_checkpoint.image_shape
    assert (model.classes, model.facts.arch, model.facts.data) == (digits_checkpoint.classes, "cnn2", "digits")
    assert model.facts.metrics == {"test_accuracy": digits_checkpoint.test_accuracy}
    x = model.input.normalize(model.samples)
    assert torch.equal(model.evaluated()(x), digits_checkpoint.network()(x))


def test_one_image_is_too_few(digits: ImageData) -> None:
    network = quantize(own_network(), QuantSpec(8), input_scale=SPEC.grid_scale)
    with pytest.raises(ModelError, match="samples: fewer than two images"):
        export(QuantizedModel(network, SPEC, tuple("abcdefghij"), digits.test_images[:1]))
