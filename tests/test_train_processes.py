from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from train import checkpoint as checkpoints
from train import processes
from train.recipe import METHODS

ROOT = Path(__file__).parents[1]


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The files of tests/two_processes.py, run in one process and in two."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    script = str(ROOT / "tests" / "two_processes.py")
    for done in (python(script, str(one)), python(*TORCHRUN, script, str(two))):
        assert done.returncode == 0, done.stderr
    return one, two


@pytest.mark.slow  # the fixture: three starts of torch and a hundred small collectives a step
@pytest.mark.parametrize("method", METHODS)
def test_two_processes_compute_what_one_does(folders: tuple[Path, Path], method: str) -> None:
    one, two = (checkpoints.load(folder / f"{method}.pt") for folder in folders)
    assert len(one.history) == len(two.history) == 2
    for a, b in zip(one.history, two.history, strict=True):
        for key in a.keys() - {"seconds"}:
            # Weights differ by 1e-15, and of codes that lie half way the last bit decides: 2 of 360 images turned.
            few_images = 100 * 3 / 360 if key.endswith("accuracy") else 1e-9
            assert b[key] == pytest.approx(a[key], rel=1e-6, abs=few_images), key
    assert abs(one.history[1]["train_loss"] - one.history[0]["train_loss"]) > 0.01
    for name, value in one.state_dict.items():
        assert torch.allclose(two.state_dict[name], value, rtol=1e-6, atol=1e-9), name
    for name, value in one.guidance.items():
        assert torch.allclose(two.guidance[name], value, rtol=1e-6), name


@pytest.mark.slow  # the same fixture
def test_mask_shares_survive_two_processes_and_resuming(folders: tuple[Path, Path]) -> None:
    one, straight, resumed = (
        checkpoints.load(path)
        for path in (folders[0] / "smoot.pt", folders[1] / "smoot.pt", folders[1] / "resumed.pt")
    )
    percent = straight.guidance["percent"]
    assert (percent != 50).sum() > 32  # of 64 images, of which each process saw half
    assert torch.allclose(percent, one.guidance["percent"], rtol=1e-9)
    assert torch.equal(percent, resumed.guidance["percent"])
    assert all(torch.equal(value, resumed.state_dict[name]) for name, value in straight.state_dict.items())


@pytest.mark.slow  # half a minute: a whole epoch of digits in two processes
def test_command_under_torchrun_prints_and_writes_once(tmp_path: Path) -> None:
    arguments = ["--data", "digits", "--arch", "resnet20", "--epochs", "1", "--runs", str(tmp_path), "--name", "a"]
    done = python(*TORCHRUN, "-m", "train", *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch   1/1") == 1
    assert len(list((tmp_path / "a").glob("*events*"))) == 1
    checkpoint = checkpoints.load(tmp_path / "a" / "ckpt.pt")
    assert checkpoint.network()(torch.zeros(1, 1, 8, 8)).shape == (1, 10)
    assert f"test accuracy {checkpoint.test_accuracy:.2f} %" in done.stdout


def test_alone_everything_is_the_identity() -> None:
    value, model = torch.ones(3), nn.BatchNorm2d(2)
    assert processes.rank() == 0
    assert processes.size() == 1
    assert processes.total(value) is value
    assert processes.mean(value) is value
    assert processes.parallel(model) is model
    assert processes.part(7) == slice(0, 7)


@pytest.mark.slow  # another start of two processes
def test_a_batch_that_cannot_be_shared_is_refused(tmp_path: Path) -> None:
    arguments = ["--data", "digits", "--batch-size", "63", "--runs", str(tmp_path)]
    done = python(*TORCHRUN, "-m", "train", *arguments)
    assert done.returncode != 0
    assert "error: batch of 63 images: 2 processes cannot share it equally; give --batch-size a multiple of 2" in (
        done.stderr
    )
    assert "Traceback" not in done.stderr.split("error: ")[0]
