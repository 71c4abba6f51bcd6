from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.measure import data as bench_data
from bench.networks.other_bits import effect, layers_of, network_with_bits, own_answers
from bench.sensitivity import main
from runtime.errors import OptionError
from train import __main__ as train
from train import checkpoint as checkpoints
from train import loop
from train.checkpoint import Checkpoint
from train.data.images import ImageData
from train.quantization.description import describe
from train.quantization.quantize import quantizers
from train.quantization.spec import QuantSpec
from train.recipe import default_recipe

LAYERS = ["conv1", "conv2", "fc1", "fc2"]


def bits_of(network: torch.nn.Module) -> dict[str, int]:
    return {layer.name: layer.bits for layer in describe(network) if layer.bits is not None}


def test_one_layer_and_what_it_reads_changes_and_all_else_stays(digits_checkpoint: Checkpoint) -> None:
    own, changed = digits_checkpoint.training_network().eval(), network_with_bits(digits_checkpoint, {"conv2": 3})
    assert bits_of(changed) == {"conv1": 8, "conv2": 3, "fc1": 8, "fc2": 8}
    before, after = quantizers(own), quantizers(changed)
    assert [before[name].qmax == after[name].qmax for name in before].count(False) == 1
    for name, value in own.state_dict().items():
        assert torch.equal(changed.state_dict()[name], value)
    for name in ("conv1", "fc1", "fc2"):
        assert torch.equal(own.get_submodule(name).weight, changed.get_submodule(name).weight)  # type: ignore[arg-type]
    assert len(changed.get_submodule("conv2").weight[0].unique()) <= 7  # type: ignore[index, union-attr]


def test_a_learned_step_starts_anew_where_the_bits_change_and_only_there(
    digits: ImageData, digits_checkpoint: Checkpoint
) -> None:
    recipe = dataclasses.replace(default_recipe("digits"), epochs=1)
    trained = loop.start("cnn2", digits, QuantSpec(4, "lsq"), recipe)
    with torch.no_grad():
        for name, value in trained.state_dict.items():
            if name.endswith("learned_scale"):
                value.mul_(1.5)
    changed = network_with_bits(trained, {"fc1": 2}).state_dict()
    for name, value in trained.state_dict.items():
        moved = name == "fc1.parametrizations.weight.0.learned_scale"
        assert torch.equal(changed[name], value) != moved
    weight = trained.state_dict["fc1.parametrizations.weight.original"]
    expected = 2 * weight.abs().mean(1)  # LSQ's start, with a largest code of 1
    assert torch.allclose(changed["fc1.parametrizations.weight.0.learned_scale"], expected)


def test_own_bits_change_nothing_and_fewer_change_the_maps(
    digits_checkpoint: Checkpoint, digits: ImageData
) -> None:
    test = bench_data.collected(bench_data.stream("digits").evenly_spaced(100))
    own = own_answers(digits_checkpoint, test)
    assert own.effect.accuracy == 100 * (own.predicted == test.labels).mean()
    same = effect(digits_checkpoint, {"fc1": 8}, test, own)
    assert (same.accuracy, same.spearman) == (own.effect.accuracy, pytest.approx(1))
    four, two = (effect(digits_checkpoint, {"conv2": bits}, test, own) for bits in (4, 2))
    assert 1 > four.spearman > two.spearman > 0
    assert effect(digits_checkpoint, dict.fromkeys(LAYERS, 2), test, own).accuracy < own.effect.accuracy


def test_the_suggestion_meets_the_budget_and_train_takes_it(
    digits_checkpoint_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "bits.json"
    arguments = [str(digits_checkpoint_path), "--data", "digits", "--samples", "60", "-o", str(file)]
    main([*arguments, "--mean-bits", "3.5", "--json"])
    result = json.loads(capsys.readouterr().out)
    bits, weights = json.loads(file.read_text()), result["weights"]
    assert list(bits) == list(result["layers"]) == LAYERS
    assert (bits["conv1"], bits["fc2"]) == (8, 8)
    assert sum(weights[name] * bits[name] for name in LAYERS) <= 3.5 * sum(weights.values())
    assert result["suggested_bytes"] == sum(weights[name] * bits[name] for name in LAYERS) / 8
    assert set(result["layers"]["fc1"]) == {"8", "4", "3", "2"}
    assert result["own"]["spearman"] == 1
    train.main(["--data", "digits", "--bits-file", str(file), "--init", str(digits_checkpoint_path),
                "--epochs", "1", "--runs", str(tmp_path), "--name", "mixed", "--device", "cpu"])  # fmt: skip
    assert bits_of(checkpoints.load(tmp_path / "mixed" / "ckpt.pt").network()) == bits


def test_a_person_reads_one_row_per_layer(
    digits_checkpoint_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(digits_checkpoint_path), "--data", "digits", "--samples", "40", "--bits", "2,8"]
    main([*arguments, "--size-bytes", "14000", "--all-layers"])
    out = capsys.readouterr().out.splitlines()
    assert out[1].split() == ["layer", "weights", "8", "bit", "2", "bit", "suggested"]
    rows = [line.split() for line in out[2:6]]
    assert [row[0] for row in rows] == LAYERS
    assert all(row[2:4] == rows[0][2:4] and row[3] == "1.000" for row in rows)
    size = sum(int(row[1].replace(",", "")) * int(row[-1]) for row in rows) / 8
    assert size <= 14000
    assert f"{size:,.0f} bytes" in " ".join(out)
    assert all(len(line) <= 80 for line in out[1:6])


def test_a_float_checkpoint_is_compared_with_its_float_network(digits: ImageData) -> None:
    recipe = dataclasses.replace(default_recipe("digits", "plain"), epochs=2)
    trained = loop.start("cnn2", digits, QuantSpec(32), recipe)
    assert list(layers_of(trained)) == LAYERS
    test = bench_data.collected(bench_data.stream("digits").evenly_spaced(50))
    own = own_answers(trained, test)
    eight, two = (effect(trained, dict.fromkeys(LAYERS, bits), test, own) for bits in (8, 2))
    assert 0.85 < eight.spearman < 1
    assert two.spearman < eight.spearman
    assert np.isfinite(two.accuracy)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bits", "8,9"], r"^--bits 8,9: expected whole numbers from 2 to 8, comma-separated$"),
        (["--samples", "0"], r"^--samples, --threads: expected whole numbers from 1$"),
        (["--map-weight", "-1"], r"^--map-weight -1.0: expected a number from 0$"),
        (["--mean-bits", "4", "--size-bytes", "9"], r"^--mean-bits and --size-bytes: expected one budget"),
        (["-o", "bits.json"], r"^-o: expected a budget to assign bits in; add --mean-bits 4"),
    ],
)
def test_wrong_options_are_refused_before_long_work(arguments: list[str], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        main(["absent.pt", "--data", "digits", *arguments])
