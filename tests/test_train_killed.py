"""Real runs, killed with SIGKILL, which no program can catch."""

from __future__ import annotations

import contextlib
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
EPOCHS = 24


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "train", *arguments], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_for_a_checkpoint(folder: Path, process: subprocess.Popen[str]) -> None:
    """Return when the process has written a checkpoint of its own."""
    path = folder / "ckpt.pt"
    before = path.stat().st_mtime_ns if path.exists() else None
    while not path.exists() or path.stat().st_mtime_ns == before:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def wait_for_a_write(folder: Path, process: subprocess.Popen[str]) -> None:
    """Return while a temporary file is about to become the next checkpoint."""
    whole = (folder / "ckpt.pt").stat().st_size
    while process.poll() is None:
        with contextlib.suppress(FileNotFoundError):  # renamed meanwhile
            # Larger than any table or plot.
            if any(p.suffix == ".tmp" and p.stat().st_size > whole // 2 for p in list(folder.iterdir())):
                return
    raise AssertionError("the run ended first")


@pytest.mark.slow  # half a minute: four or more starts of the command
def test_a_killed_run_loses_nothing(tmp_path: Path) -> None:
    arguments = ["--data", "digits", "--method", "smoot", "--bits", "4", "--epochs", str(EPOCHS)]
    main([*arguments, "--runs", str(tmp_path), "--name", "straight"])
    straight = checkpoints.load(tmp_path / "straight" / "ckpt.pt")

    folder, moments = tmp_path / "killed", random.Random(0)
    process = start(*arguments, "--runs", str(tmp_path), "--name", "killed")
    reached, kills, half_written = [0], 0, False
    while kills < 2 or not half_written:
        wait_for_a_checkpoint(folder, process)
        if kills % 2:
            wait_for_a_write(folder, process)
        else:
            time.sleep(moments.uniform(0, 0.5))
        process.kill()
        process.communicate()
        kills += 1
        half_written = half_written or bool(list(folder.glob("*.tmp")))
        reached.append(len(checkpoints.load(folder / "ckpt.pt").history))
        process = start("--resume", str(folder))
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert reached == sorted(reached)
    assert 0 < reached[-1] < EPOCHS
    assert f"resumed  after epoch {reached[-1]}" in out

    ended = checkpoints.load(folder / "ckpt.pt")
    assert all(torch.equal(value, ended.state_dict[name]) for name, value in straight.state_dict.items())
    assert all(torch.equal(value, ended.guidance[name]) for name, value in straight.guidance.items())
    rows = [[{k: v for k, v in row.items() if k != "seconds"} for row in c.history] for c in (straight, ended)]
    assert rows[0] == rows[1]
    with (folder / "metrics.csv").open() as file:
        assert len(list(csv.DictReader(file))) == EPOCHS
    assert not list(folder.glob("*.tmp"))  # what the kill in a write left is gone
