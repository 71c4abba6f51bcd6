from __future__ import annotations

import csv
import dataclasses
import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.errors import EngineError, OptionError
from tests.commands import run_command
from train import checkpoint as checkpoints
from train import loop
from train.__main__ import main
from train.checkpoint import Checkpoint
from train.data.images import ImageData
from train.quantization.spec import QuantSpec
from train.recipe import METHODS, Recipe, default_recipe

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def small(digits: ImageData) -> ImageData:
    return dataclasses.replace(
        digits, train_images=digits.train_images[:256], train_labels=digits.train_labels[:256]
    )


def run(data_set: ImageData, path: Path, recipe: Recipe, bits: int = 4) -> Checkpoint:
    return loop.fit(loop.start("cnn2", data_set, QuantSpec(bits), recipe), data_set, path)


def state_equal(a: Checkpoint, b: Checkpoint) -> bool:
    return all(torch.equal(v, b.state_dict[k]) for k, v in a.state_dict.items())


def without_seconds(checkpoint: Checkpoint) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in checkpoint.history]


def test_a_seed_makes_a_run_repeatable(small: ImageData, tmp_path: Path) -> None:
    recipe = dataclasses.replace(default_recipe("digits"), epochs=2, crop_padding=1, flip=True)
    first, second = (run(small, tmp_path / f"{i}.pt", recipe) for i in range(2))
    other = run(small, tmp_path / "other.pt", dataclasses.replace(recipe, seed=1))
    assert state_equal(first, second)
    assert without_seconds(first) == without_seconds(second)
    assert not state_equal(first, other)


EVERYTHING = {
    "flip": True, "crop_padding": 1, "rotate_degrees": 10.0, "zoom": 0.1, "elastic_pixels": 0.3, "erase_pixels": 2,
    "label_smoothing": 0.1, "precision": "bfloat16",
}  # fmt: skip


@pytest.mark.parametrize(
    ("method", "options"), [*((method, {}) for method in METHODS), ("sgt", EVERYTHING), ("asg", EVERYTHING)]
)
def test_resuming_gives_the_same_parameters_bit_for_bit(
    small: ImageData, digits_checkpoint_path: Path, tmp_path: Path, method: str, options: dict[str, Any]
) -> None:
    if options:
        options = {**options, "init": str(digits_checkpoint_path), "teacher": str(digits_checkpoint_path)}
    recipe = dataclasses.replace(default_recipe("digits", method), epochs=3, **options)
    straight = run(small, tmp_path / "straight.pt", recipe)

    class StopHereError(Exception):
        pass

    def stop(checkpoint: Checkpoint) -> None:
        if len(checkpoint.history) == 2:
            raise StopHereError

    path = tmp_path / "resumed.pt"
    with pytest.raises(StopHereError):
        loop.fit(loop.start("cnn2", small, QuantSpec(4), recipe), small, path, on_epoch=stop)
    torch.randn(17)  # whatever the process drew in between does not matter
    resumed = checkpoints.load(path)
    assert len(resumed.history) == 2
    loop.fit(resumed, small, path)
    assert state_equal(resumed, straight)
    assert without_seconds(resumed) == without_seconds(straight)


@pytest.mark.parametrize("weights", ["absmax", "lsq"])
def test_a_run_starts_from_the_parameters_of_another_at_other_bits(
    digits: ImageData, digits_checkpoint: Checkpoint, digits_checkpoint_path: Path, weights: str
) -> None:
    recipe = dataclasses.replace(default_recipe("digits"), init=str(digits_checkpoint_path))
    started = loop.start("cnn2", digits, QuantSpec(4, weights), recipe)
    for name, value in digits_checkpoint.float_state().items():
        assert torch.equal(started.float_state()[name], value), name
    four = loop.evaluate(started, started.network(), digits.test_images, digits.test_labels)
    assert four > digits_checkpoint.test_accuracy - 10
    # Back to float and to 8 bits again: nothing was lost on the way.
    floating = loop.start("cnn2", digits, QuantSpec(32), recipe)
    assert floating.state_dict.keys() == digits_checkpoint.float_state().keys()
    assert (
        loop.evaluate(floating, floating.network(), digits.test_images, digits.test_labels)
        > digits_checkpoint.test_accuracy - 2
    )


def test_a_run_that_starts_from_one_with_the_same_grids_takes_over_alphas_and_scales(
    digits: ImageData, tmp_path: Path
) -> None:
    spec, path = QuantSpec(2, "lsq"), tmp_path / "first.pt"
    recipe = dataclasses.replace(default_recipe("digits", "plain"), epochs=1)
    first = loop.fit(loop.start("cnn2", digits, spec, recipe), digits, path)
    started = loop.start("cnn2", digits, spec, dataclasses.replace(recipe, init=str(path)))
    assert state_equal(started, first)
    off_grid = QuantSpec(2, "lsq", bias_grid=False)  # of the sums: codes and scales are the same
    assert state_equal(loop.start("cnn2", digits, off_grid, dataclasses.replace(recipe, init=str(path))), first)
    # On another grid they would mean something else: they start from the images again.
    other = loop.start("cnn2", digits, QuantSpec(3, "lsq"), dataclasses.replace(recipe, init=str(path)))
    scales = [key for key in first.state_dict if key.endswith("learned_scale")]
    assert scales
    assert not any(torch.equal(other.state_dict[key], first.state_dict[key]) for key in scales)


def test_a_start_from_another_architecture_is_refused(digits: ImageData, digits_checkpoint_path: Path) -> None:
    recipe = dataclasses.replace(default_recipe("digits"), init=str(digits_checkpoint_path))
    with pytest.raises(OptionError, match=r"init .*: holds .*cnn2.*; name a run of the same architecture"):
        loop.start("resnet20", digits, QuantSpec(4), recipe)


def test_training_learns_and_moves_alpha(digits_checkpoint: Checkpoint) -> None:
    first, last = digits_checkpoint.history[0], digits_checkpoint.history[-1]
    assert last["test_accuracy"] > 90
    assert last["train_loss"] < first["train_loss"] / 2
    moved = [abs(last[k] - first[k]) for k in first if k.startswith("alpha/")]
    assert len(moved) == 3
    assert max(moved) > 0.1


def test_learning_rate_warms_up_then_falls_to_zero() -> None:
    recipe = Recipe("digits", epochs=10, lr=0.4)
    rates = [recipe.lr_at(step, 100) for step in range(1000)]
    assert rates[0] == pytest.approx(0.004)
    assert rates[99] == rates[100] == pytest.approx(0.4)
    assert rates[550] == pytest.approx(0.2, rel=0.01)
    assert 0 < rates[999] < 1e-4
    assert all(a >= b for a, b in itertools.pairwise(rates[100:]))


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "adadelta"])
def test_every_optimizer_learns_and_resumes(small: ImageData, tmp_path: Path, optimizer: str) -> None:
    lr = {"sgd": 0.05, "adam": 1e-3, "adamw": 1e-3, "adadelta": 1.0}[optimizer]
    recipe = dataclasses.replace(
        default_recipe("digits", "plain"), optimizer=optimizer, lr=lr, schedule="constant", epochs=4
    )
    straight = run(small, tmp_path / "a.pt", recipe)
    assert straight.history[-1]["train_cross_entropy"] < straight.history[0]["train_cross_entropy"] - 0.2
    assert [row["lr"] for row in straight.history] == [lr] * 4
    halfway = run(small, tmp_path / "b.pt", dataclasses.replace(recipe, epochs=2))
    halfway.recipe = recipe
    checkpoints.save(halfway, tmp_path / "b.pt")
    assert state_equal(loop.fit(checkpoints.load(tmp_path / "b.pt"), small, tmp_path / "b.pt"), straight)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data": "imagenet"}, "data 'imagenet': expected one of digits"),
        ({"method": "magic"}, "method 'magic': expected one of plain, sgt, smoot, asg"),
        ({"epochs": 0}, "epochs 0: expected a number >= 1"),
        ({"lr": float("nan")}, "lr nan: expected a number >= 0"),
        ({"mask_share": 1.5}, "mask_share 1.5: expected a share from 0 to 1"),
        (
            {"method": "smoot", "mask_share": 0.1},
            "mask_share 0.1: expected 0.2 to 0.8, the bounds of smoot's masks",
        ),
        ({"optimizer": "lion"}, "optimizer 'lion': expected one of sgd, adam, adamw, adadelta"),
        ({"threshold_rate": -1.0}, "threshold_rate -1.0: expected a number >= 0"),
        ({"fill": "noise"}, "fill 'noise': expected one of random, zero, mean"),
    ],
)
def test_recipes_out_of_range_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Recipe(**{"data": "digits", **values})  # type: ignore[arg-type]


def test_command_leaves_checkpoint_metrics_events_and_plots(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--data", "digits", "--runs", str(tmp_path), "--epochs", "2", "--bits", "4", "--name", "a"]
    main(arguments)
    folder = tmp_path / "a"
    assert {p.name for p in folder.iterdir() if "events" not in p.name} == {
        "ckpt.pt", "metrics.csv", "curves.png", "alpha.png"
    }  # fmt: skip
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert {"train_loss", "test_accuracy", "alpha/relu1"} <= rows[0].keys()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    logged = [event.value for event in events.Scalars("test_accuracy")]
    assert logged == pytest.approx([float(row["test_accuracy"]) for row in rows])
    assert f"test accuracy {float(rows[-1]['test_accuracy']):.2f} %" in capsys.readouterr().out
    with pytest.raises(OptionError, match="holds a run already; continue it with --resume"):
        main(arguments)
    main([*arguments, "--overwrite"])


@pytest.mark.parametrize("bits", ["5.5", "1", "nine", "16"])
def test_bits_out_of_range_are_one_line(bits: str) -> None:
    with pytest.raises(OptionError, match=f"--bits {bits}: expected a whole number from 2 to 8, or 32 for float"):
        main(["--data", "digits", "--bits", bits])


def test_a_device_that_is_not_there_is_one_line() -> None:
    with pytest.raises(EngineError, match="--device tpu: not found on this machine; use --device cpu"):
        main(["--data", "digits", "--device", "tpu"])


def test_user_errors_end_with_status_2_and_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--data", "digits", "--bits", "5.5"], ["--data", "faces"], ["--resume", str(tmp_path)], []):
        done = run_command(main, [*arguments, "--runs", str(tmp_path / "runs")], capsys)
        assert done.status == 2
        assert done.err.startswith("error: ")
        assert done.err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_ctrl_c_keeps_the_epochs_and_says_how_to_go_on(tmp_path: Path) -> None:
    arguments = ["--data", "digits", "--runs", str(tmp_path), "--epochs", "500", "--name", "a"]
    process = subprocess.Popen(
        [sys.executable, "-m", "train", *arguments], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    path = tmp_path / "a" / "ckpt.pt"
    deadline = time.monotonic() + 120
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.strip().endswith("interrupted")
    epochs = len(checkpoints.load(path).history)
    assert epochs >= 1
    assert f"{epochs} epochs are saved; continue: python -m train --resume {tmp_path / 'a'}" in out
