from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from runtime.errors import TrainingError
from train import checkpoint as checkpoints
from train import loop
from train.__main__ import main
from train.data.images import ImageData
from train.divergence import diverged, where_it_diverged
from train.models.cnn2 import CNN2
from train.quantization.quantize import float_weight, quantize
from train.quantization.spec import QuantSpec
from train.recipe import default_recipe


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (0.0, False),
        (2.3, False),
        (9_999.0, False),
        (1e5, True),
        (-1e5, True),
        (float("inf"), True),
        (float("nan"), True),
    ],
)
def test_what_counts_as_diverged(loss: float, expected: bool) -> None:
    assert diverged(loss) is expected


def test_the_layer_that_broke_and_its_alpha_are_named() -> None:
    model = quantize(CNN2(1, (8, 8), 3), QuantSpec(4, alpha=2.5), input_scale=1 / 64)
    images = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        float_weight(model.get_submodule("conv2"))[0, 0, 0, 0] = float("nan")
    assert where_it_diverged(model, images) == "layer conv2 (largest output nan), alpha 2.5 of relu2"


def test_a_broken_alpha_names_the_layer_it_clips() -> None:
    model = quantize(CNN2(1, (8, 8), 3), QuantSpec(4), input_scale=1 / 64)
    with torch.no_grad():
        model.get_submodule("quantizers.relu2").alpha.fill_(float("nan"))  # type: ignore[operator, union-attr]
    assert "layer conv2 (" in where_it_diverged(model, torch.randn(2, 1, 8, 8))
    assert where_it_diverged(model, torch.randn(2, 1, 8, 8)).endswith("alpha nan of relu2")


def test_without_a_nan_the_largest_output_is_named() -> None:
    model = CNN2(1, (8, 8), 3).eval()
    with torch.no_grad():
        model.fc1.bias.fill_(1e9)
        model.fc2.weight.zero_()
    assert where_it_diverged(model, torch.randn(2, 1, 8, 8)) == (
        "layer fc1 (largest output 1e+09), no alpha in a float network"
    )


def test_a_diverging_run_stops_and_keeps_the_last_good_epoch(digits: ImageData, tmp_path: Path) -> None:
    recipe = dataclasses.replace(default_recipe("digits"), epochs=3)
    path = tmp_path / "ckpt.pt"

    def explode(checkpoint: checkpoints.Checkpoint) -> None:
        if len(checkpoint.history) == 2:  # the live parameters, on the CPU
            checkpoint.state_dict["fc2.bias"].fill_(float("inf"))

    small = dataclasses.replace(
        digits, train_images=digits.train_images[:256], train_labels=digits.train_labels[:256]
    )
    with pytest.raises(TrainingError) as caught:
        loop.fit(loop.start("cnn2", small, QuantSpec(4), recipe), small, path, on_epoch=explode)
    message = str(caught.value)
    assert message.startswith("epoch 3, step 1: the loss is nan; layer fc2 (largest output inf), alpha ")
    assert message.endswith(f"of relu3; lower --lr (0.05) or try another --seed; {path} keeps epoch 2")
    kept = checkpoints.load(path)
    assert len(kept.history) == 2
    assert all(torch.isfinite(value).all() for value in kept.state_dict.values())


def test_the_command_says_it_in_one_line(tmp_path: Path) -> None:
    arguments = ["--data", "digits", "--bits", "4", "--lr", "1e6", "--runs", str(tmp_path), "--name", "a"]
    with pytest.raises(TrainingError, match=r"epoch 1, step \d+: the loss is .*alpha .*no epoch was finished"):
        main(arguments)
    assert not (tmp_path / "a" / "ckpt.pt").exists()
