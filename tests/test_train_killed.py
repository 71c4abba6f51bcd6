"""Real runs, killed with SIGKILL, which no program can catch."""

from __future__ import annotations

import csv
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from train import checkpoint as checkpoints
from train.__main__ import main

ROOT = Path(__file__).parents[1]
EPOCHS = 12


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "train", *arguments], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def kill_inside_a_checkpoint_write(folder: Path, process: subprocess.Popen[str]) -> Path:
    """Kill the process while a temporary file grows into the next checkpoint, and return that file."""
    whole = (folder / "ckpt.pt").stat().st_size
    while process.poll() is None:
        for entry in os.scandir(folder):
            if entry.name.endswith(".tmp") and _size(entry.path) > whole // 2:  # larger than any table or plot
                process.kill()
                process.communicate()
                return Path(entry.path)
    raise AssertionError("the run ended first")


def _size(path: str) -> int:
    try:
        return Path(path).stat().st_size
    except FileNotFoundError:
        return 0


@pytest.mark.slow  # half a minute: five starts of the command
def test_a_killed_run_loses_nothing(tmp_path: Path) -> None:
    arguments = ["--data", "digits", "--method", "smoot", "--bits", "4", "--epochs", str(EPOCHS)]
    main([*arguments, "--runs", str(tmp_path), "--name", "straight"])
    straight = checkpoints.load(tmp_path / "straight" / "ckpt.pt")

    folder, moments = tmp_path / "killed", random.Random(0)
    process = start(*arguments, "--runs", str(tmp_path), "--name", "killed")
    reached = [0]
    leftovers = []
    for kill in ("at random", "in a write", "at random"):
        wait_for(folder / "metrics.csv", process)
        if kill == "in a write":
            leftovers.append(kill_inside_a_checkpoint_write(folder, process))
        else:
            time.sleep(moments.uniform(0, 2))
            process.kill()
            process.communicate()
        reached.append(len(checkpoints.load(folder / "ckpt.pt").history))
        process = start("--resume", str(folder))
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert reached[-1] > 0
    assert reached == sorted(reached)
    assert f"resumed  after epoch {reached[-1]}" in out or reached[-1] == EPOCHS

    ended = checkpoints.load(folder / "ckpt.pt")
    assert all(torch.equal(value, ended.state_dict[name]) for name, value in straight.state_dict.items())
    assert all(torch.equal(value, ended.guidance[name]) for name, value in straight.guidance.items())
    rows = [[{k: v for k, v in row.items() if k != "seconds"} for row in c.history] for c in (straight, ended)]
    assert rows[0] == rows[1]
    with (folder / "metrics.csv").open() as file:
        assert len(list(csv.DictReader(file))) == EPOCHS
    assert not list(folder.glob("*.tmp"))  # what the kill in a write left is gone
