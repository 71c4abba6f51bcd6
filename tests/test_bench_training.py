from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench.measure.training_step import first_images, first_step, step_of
from bench.training import main
from runtime.errors import OptionError
from train.data.images import ImageData
from train.quantization.spec import QuantSpec
from train.recipe import METHODS, default_recipe


def test_command_prints_and_records_every_method(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "training.jsonl"
    own = "tests.toy_models:small_convnet"
    main(["--data", "digits", "--arch", own, "--batch-size", "32", "--seconds", "0.1", "--allow-dirty",
          "--record", str(path)])  # fmt: skip
    out = capsys.readouterr().out
    (row,) = [json.loads(line) for line in path.read_text().splitlines()]
    assert (row["arch"], row["batch"]) == (own, 32)
    assert set(row["step"]) == set(METHODS)
    assert row["plain_steps"]["plain"] == 1
    assert 1 < row["plain_steps"]["sgt"] < 10
    assert row["step"]["sgt"]["n"] >= 20
    assert f"{row['plain_steps']['sgt']:.2f}" in out
    assert row["environment"]["torch"] == torch.__version__.split("+")[0]


def test_first_images_hold_no_others_in_memory(digits: ImageData) -> None:
    few = first_images(digits, 32)
    assert torch.equal(few.train_images, digits.train_images[:32])
    assert torch.equal(few.test_labels, digits.test_labels[:32])
    assert few.classes == digits.classes
    assert isinstance(few.train_images, torch.Tensor)
    assert few.train_images.untyped_storage().nbytes() == 32 * 64


def test_a_timed_step_leaves_the_network_as_it_was(digits: ImageData) -> None:
    """Otherwise the last rounds would time a batch known by heart."""
    step = step_of(digits, "cnn2", QuantSpec(8), default_recipe("digits"))
    losses = [step().cross_entropy.item() for _ in range(6)]  # type: ignore[attr-defined]
    assert max(losses) - min(losses) < 0.5  # dropout alone moves it


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--threads", "0"], "--threads 0: expected a whole number from 1"),
     (["--seconds", "0"], "--seconds 0: expected a number above 0"),
     (["--arch", "resnet21"], "--arch resnet21: expected one of cnn2, .*, or package.module:factory of your own")],
)  # fmt: skip
def test_options_out_of_range_are_refused(options: list[str], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        main(["--data", "digits", *options])


def test_a_step_that_fails_is_told_in_one_line() -> None:
    def fails() -> None:
        raise RuntimeError("no double backward\nlong trace")

    failed = first_step(fails)
    assert (failed.failure, failed.graph_breaks) == ("RuntimeError: no double backward", {})
    ran = first_step(lambda: None)
    assert ran.failure == ""
    assert 0 <= ran.seconds < 1


# TorchDynamo itself looks at .grad of the image that saliency made a variable, and warns of it.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.slow  # Inductor compiles both steps, half a minute each
def test_compiled_steps_stand_beside_eager_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "training.jsonl"
    arguments = ["--data", "digits", "--batch-size", "32", "--seconds", "0.1", "--compile"]
    main([*arguments, "--allow-dirty", "--record", str(path)])
    out = capsys.readouterr().out
    (row,) = [json.loads(line) for line in path.read_text().splitlines()]
    assert list(row["step"]) == ["plain", "sgt", "plain, compiled", "sgt, compiled"]
    for method, first in row["first"].items():
        assert first["failure"] == ""
        assert first["graph_breaks"] == {}
        assert first["seconds"] > 1e-3 * row["step"][f"{method}, compiled"]["p50_ms"]
        assert f"{row['times_eager'][method]:14.2f}" in out
    assert "sgt, compiled: its first step took" in out
