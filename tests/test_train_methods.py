from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from train import checkpoint as checkpoints
from train import loop
from train.choices import FLOAT_BITS, WEIGHT_METHODS
from train.data.images import ImageData
from train.quantization.description import describe
from train.quantization.spec import QuantSpec
from train.recipe import METHODS, default_recipe


@pytest.fixture(scope="module")
def few_digits(digits: ImageData) -> ImageData:
    return dataclasses.replace(
        digits, train_images=digits.train_images[:128], train_labels=digits.train_labels[:128]
    )


@pytest.mark.parametrize("bits", [32, 8, 4, 3, 2])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_at_every_width(few_digits: ImageData, tmp_path: Path, method: str, bits: int) -> None:
    recipe = dataclasses.replace(default_recipe("digits", method), epochs=6, batch_size=32)
    checkpoint = loop.fit(loop.start("cnn2", few_digits, QuantSpec(bits), recipe), few_digits, tmp_path / "a.pt")
    first, last = checkpoint.history[0], checkpoint.history[-1]
    assert last["train_cross_entropy"] < first["train_cross_entropy"]
    assert all(math.isfinite(value) for value in last.values())
    again = checkpoints.load(tmp_path / "a.pt")
    assert all(torch.equal(value, again.guidance[name]) for name, value in checkpoint.guidance.items())
    assert {row.bits for row in describe(again.network())} == ({None} if bits == FLOAT_BITS else {8, bits})


@pytest.mark.parametrize("weights", WEIGHT_METHODS)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_with_every_weight_quantizer_and_bits_of_single_layers(
    few_digits: ImageData, tmp_path: Path, method: str, weights: str
) -> None:
    quant = QuantSpec(4, weights, layer_bits={"conv2": 3, "fc1": 2})
    recipe = dataclasses.replace(default_recipe("digits", method), epochs=6, batch_size=32)
    checkpoint = loop.fit(loop.start("cnn2", few_digits, quant, recipe), few_digits, tmp_path / "a.pt")
    first, last = checkpoint.history[0], checkpoint.history[-1]
    assert last["train_cross_entropy"] < first["train_cross_entropy"]
    assert [row.bits for row in describe(checkpoint.network())] == [8, 3, 2, 8]


def test_history_holds_what_a_method_learns(few_digits: ImageData, tmp_path: Path) -> None:
    learned = {}
    for method in METHODS:
        recipe = dataclasses.replace(default_recipe("digits", method), epochs=1, batch_size=32)
        checkpoint = loop.fit(loop.start("cnn2", few_digits, QuantSpec(4), recipe), few_digits, tmp_path / "a.pt")
        learned[method] = checkpoint.history[0].keys()
    percents = {"mask_percent_min", "mask_percent_median", "mask_percent_max"}
    assert learned["plain"] == learned["sgt"]
    assert learned["smoot"] - learned["sgt"] == percents
    assert learned["asg"] - learned["sgt"] == {"threshold", "train_saliency_norm"}
