"""What bench.saliency and bench.sanity measure, beside Quantus where it has the metric; insertion it has not."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bench import sanity
from bench.networks.methods import _located, pasted
from bench.networks.network import Network
from bench.networks.opened import exported_network
from bench.networks.randomized import layers_from_the_head, randomized
from bench.networks.removal import PERCENTS, removal_curves, salience_ranks
from runtime import Classifier
from tests.exports import exported
from train.checkpoint import Checkpoint
from train.data.images import ImageData

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import quantus

_COUNT = 60
_QUIET: dict[str, Any] = {"abs": False, "normalise": False, "disable_warnings": True}


@pytest.fixture(scope="module")
def file(digits_checkpoint: Checkpoint) -> bytes:
    """The digits checkpoint with its gradient."""
    return exported(digits_checkpoint, saliency_precision="float32").data


@pytest.fixture(scope="module")
def network(file: bytes) -> Network:
    return exported_network(file, "digits", threads=1)


@pytest.fixture(scope="module")
def images(digits: ImageData) -> np.ndarray:
    return digits.test_images[:_COUNT].permute(0, 2, 3, 1).contiguous().numpy()


class _Pixels(nn.Module):
    """The network on float [N, C, H, W] that hold whole pixels, as Quantus hands them over."""

    def __init__(self, logits: Callable[[np.ndarray], np.ndarray]) -> None:
        super().__init__()
        self.logits = logits
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(self.logits(x.permute(0, 2, 3, 1).numpy().astype(np.uint8)))


def _handed_over(images: np.ndarray) -> np.ndarray:
    return images.transpose(0, 3, 1, 2).astype(np.float32)


def _in_our_order(maps: np.ndarray) -> np.ndarray:
    """Return maps that rank as `maps` do, without equal values, whose order Quantus leaves open."""
    return -salience_ranks(maps).astype(np.float32)[:, None]


# Removed pixels that were black already, at which Quantus wonders.
@pytest.mark.filterwarnings("ignore:The settings for perturbing input")
def test_deletion_is_pixel_flipping(network: Network, images: np.ndarray, digits: ImageData) -> None:
    labels = digits.test_labels[:_COUNT].numpy()
    ours, maps = removal_curves(network, images, labels, fill="black")
    explained = network.logits(images).argmax(1)
    theirs = np.array(quantus.PixelFlipping(features_in_step=1, perturb_baseline="black", **_QUIET)(
        _Pixels(network.logits), _handed_over(images), explained, a_batch=_in_our_order(maps), softmax=True,
    ))  # fmt: skip
    counts = [percent * maps[0].size // 100 for percent in PERCENTS]
    assert counts[0] == 0
    np.testing.assert_allclose(ours.deletion[:, 1:], theirs[:, np.array(counts[1:]) - 1], atol=1e-5)
    assert np.ptp(ours.deletion[:, 0] - ours.deletion[:, -1]) > 0.1


def test_energy_and_hits_are_relevance_mass_and_pointing_game(
    network: Network, images: np.ndarray, digits: ImageData
) -> None:
    labels = digits.test_labels[:_COUNT].numpy()
    count, energy, pointing, _ = _located(network, images, labels, 0)
    fields, boxes = pasted(images)
    logits, maps = network.explain(fields, np.full(_COUNT, -1))
    inside = np.zeros((_COUNT, 1, *images.shape[1:3]))
    for one, box in zip(inside, boxes, strict=True):
        one[0][box] = 1
    counted = (logits.argmax(1) == labels) & (maps.max((1, 2)) > 0)
    assert count == counted.sum() > 8
    given = (_Pixels(network.logits), _handed_over(fields), labels)
    rest: dict[str, Any] = {"a_batch": maps[:, None], "s_batch": inside}
    energies = np.array(quantus.RelevanceMassAccuracy(**_QUIET)(*given, **rest))[counted]
    hits = np.array(quantus.PointingGame(**_QUIET)(*given, **rest))[counted]
    assert energy / count == pytest.approx(energies.mean(), abs=1e-6)
    assert pointing / count == hits.mean()
    assert 0.1 < energy / count < 0.99


class _Layer(nn.Module):
    """A layer of a file; Quantus makes layers random by this method."""

    random = False

    def reset_parameters(self) -> None:
        self.random = True


class _File(nn.Module):
    """An exported file whose layers can be made random one by one, as `bench.sanity` does it."""

    def __init__(self, data: bytes) -> None:
        super().__init__()
        self.data, self.layers = data, layers_from_the_head(data)
        # From the image to the head: Quantus begins at the end.
        for layer in reversed(self.layers):
            self.add_module(layer.name.replace(".", "_"), _Layer())

    def maps(self, pixels: np.ndarray, target: np.ndarray) -> np.ndarray:
        count = sum(layer.random for layer in self.children() if isinstance(layer, _Layer))
        with Classifier(randomized(self.data, self.layers[:count]), threads=1) as classifier:
            images = pixels.transpose(0, 2, 3, 1).astype(np.uint8)
            return np.asarray(classifier.explain(images, target, method="gradient").map)[:, None]


def _explain(model: _File, inputs: np.ndarray, targets: np.ndarray, **_: object) -> np.ndarray:
    return model.maps(inputs, targets)


def test_sanity_is_model_parameter_randomisation(file: bytes, network: Network, images: np.ndarray) -> None:
    model = _File(file).eval()
    target = network.logits(images).argmax(1)
    _, rows = sanity.measure(file, images, "gradient", stages=len(model.layers))
    theirs = quantus.MPRT(layer_order="top_down", **_QUIET)(
        model,
        _handed_over(images),
        target,
        a_batch=model.maps(_handed_over(images), target),
        explain_func=_explain,
    )
    assert np.mean(theirs.pop("original")) == pytest.approx(1)
    assert [row["layers"] for row in rows] == [1, 2, 3, 4]
    found = [float(np.mean(scores)) for scores in theirs.values()]
    assert [row["spearman"] for row in rows] == pytest.approx(found, abs=1e-5)
    assert found[-1] < 0.9
