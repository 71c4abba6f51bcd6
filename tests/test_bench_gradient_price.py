from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.gradient_price import main, summarize
from runtime.agreement import spearman, top_overlap
from runtime.errors import OptionError
from tests.code_gate import with_code_gate
from train.checkpoint import Checkpoint
from train.data.images import ImageData


def test_the_price_of_the_gate_is_that_in_torch(
    digits_checkpoint_path: Path,
    digits_checkpoint: Checkpoint,
    digits: ImageData,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    record = tmp_path / "results.jsonl"
    main([str(digits_checkpoint_path), "--data", "digits", "--images", "100", "--record", str(record)])
    printed = json.loads(record.read_text())
    assert (printed["arch"], printed["bits"], printed["data"], printed["n"]) == ("cnn2", 8, "digits", 100)
    assert (printed["choice"], printed["values"]) == ("gate", ["code", "ste"])

    maps = []
    for network in (with_code_gate(digits_checkpoint.network()), digits_checkpoint.network()):
        x = digits_checkpoint.input.normalize(digits.test_images[:100]).requires_grad_()
        chosen = network(x).gather(1, digits.test_labels[:100, None])
        maps.append(torch.autograd.grad(chosen.sum(), x)[0].abs().amax(1).numpy())
    for name, agreement in (("spearman", spearman(*maps)), ("top_overlap", top_overlap(*maps))):
        assert printed[name] == pytest.approx(summarize(agreement), abs=2e-3)
        assert 0.5 < printed[name]["lowest_decile"] <= printed[name]["mean"] < 1

    out = capsys.readouterr().out.splitlines()
    assert out[1] == "maps of gate code against ste"
    assert out[3].split()[1:] == [f"{value:.3f}" for value in printed["spearman"].values()]
    assert out[4].split()[3:] == [f"{value:.3f}" for value in printed["top_overlap"].values()]


def test_summary() -> None:
    assert summarize(np.arange(11.0)) == {"mean": 5.0, "median": 5.0, "lowest_decile": 1.0}


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--data", "digits", "--images", "0"], "--images 0 --threads 1: expected whole numbers from 1"),
        (
            ["--data", "large.npz"],
            r"\[9, 9, 1\] of 10 classes, expected \[8, 8, 1\] of 10 as the model has",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused(
    digits_checkpoint_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("large.npz", images=np.zeros((10, 9, 9, 1), np.uint8), labels=np.arange(10))
    with pytest.raises(OptionError, match=message):
        main([str(digits_checkpoint_path), *option])
