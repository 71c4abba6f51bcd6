from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from bench.measure.kills import differences, tensor_count
from bench.processes.killed import main
from runtime.errors import OptionError
from train.checkpoint import Checkpoint


def test_equal_runs_do_not_differ(digits_checkpoint: Checkpoint) -> None:
    rows = [{**row, "seconds": 2 * row["seconds"]} for row in digits_checkpoint.history]
    again = dataclasses.replace(digits_checkpoint, history=rows)
    assert differences(digits_checkpoint, again) == []
    assert tensor_count(digits_checkpoint) > len(digits_checkpoint.state_dict) > 10


def test_one_changed_bit_anywhere_is_named(digits_checkpoint: Checkpoint) -> None:
    name = "fc1.bias"
    for value, other in ((0.0, -0.0), (1.0, 1.0 + 2**-23)):
        state = {k: v.clone() for k, v in digits_checkpoint.state_dict.items()}
        ours = dataclasses.replace(digits_checkpoint, state_dict=state)
        state[name][0] = value
        theirs = dataclasses.replace(ours, state_dict={k: v.clone() for k, v in state.items()})
        theirs.state_dict[name][0] = other
        assert differences(ours, theirs) == [f"state_dict.{name}"]
    nan = dataclasses.replace(digits_checkpoint, guidance={"percent": torch.tensor([float("nan")])})
    assert differences(nan, nan) == []
    assert differences(nan, digits_checkpoint) == ["guidance.percent"]
    shorter = dataclasses.replace(digits_checkpoint, history=digits_checkpoint.history[:-1])
    assert differences(shorter, digits_checkpoint) == ["history"]


@pytest.mark.parametrize("option", ["images", "epochs", "kills"])
def test_numbers_out_of_range_are_refused(option: str) -> None:
    with pytest.raises(OptionError, match=rf"--{option} 0: expected a whole number from \d+"):
        main(["--data", "digits", f"--{option}", "0"])


@pytest.mark.slow  # half a minute: a run without a kill, and seven starts
def test_command_kills_and_records(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    options = ["--arch", "cnn2", "--kills", "6", "--epochs", "4"]
    main(["--data", "digits", *options, "--record", str(path), "--allow-dirty"])
    (row,) = [json.loads(line) for line in path.read_text().splitlines()]
    assert row["kills"] == 6 == len(row["moments"])
    assert row["runs"] >= 1
    assert all(0 <= m["epochs"] <= 4 for m in row["moments"])
    assert row["tensors_equal"] > 20
