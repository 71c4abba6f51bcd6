"""Runs of `python -m train` that are killed, again and again, at random moments, and resumed."""

from __future__ import annotations

import multiprocessing
import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from runtime import command
from runtime.errors import TrainingError
from train import __main__ as train
from train import checkpoint as checkpoints
from train.checkpoint import Checkpoint
from train.choices import CHECKPOINT_NAME

_SLOW_IMPORTS = ("train.run", "torch.utils.tensorboard", "torch._dynamo", "matplotlib.backends.backend_agg")


@dataclass(frozen=True)
class Kill:
    """One SIGKILL: how long the process had lived, and what the run's folder held then.

    Args:
        seconds: from the start of the process.
        epochs: finished ones in the checkpoint.
        trained: this process had saved an epoch of its own.
        half_written: a temporary file of a checkpoint, a table or a plot was left.
    """

    seconds: float
    epochs: int
    trained: bool
    half_written: bool


def run_straight(arguments: Sequence[str], folder: Path) -> tuple[Checkpoint, float, float]:
    """Train without a kill; return the checkpoint, the seconds to its first epoch's end, and those of each other.

    Raises:
        TrainingError: the run failed.
    """
    imported = _process(int, ())  # the server's imports are no part of the first epoch
    imported.start()
    imported.join()
    path, began = folder / CHECKPOINT_NAME, time.perf_counter()
    process = _started([*arguments, *_into(folder)], folder)
    while process.is_alive() and not path.exists():
        process.join(0.01)
    first_s = time.perf_counter() - began
    process.join()
    _check(process, folder)
    checkpoint = checkpoints.load(path)
    return checkpoint, first_s, (time.perf_counter() - began - first_s) / max(1, len(checkpoint.history) - 1)


def run_killed(
    arguments: Sequence[str],
    folder: Path,
    *,
    kills: int,
    longest_s: float,
    seed: int,
    on_kill: Callable[[], object],
) -> tuple[Checkpoint, list[Kill]]:
    """Train with up to `kills` SIGKILLs, resuming after each, to the end; return the checkpoint and the kills.

    Args:
        arguments: of `python -m train`.
        folder: of the run, not there yet.
        kills: at most so many; a run may end before.
        longest_s: each process is killed after a time drawn evenly from 0 to this.
        seed: of the moments.
        on_kill: called after each kill.

    Raises:
        TrainingError: a process failed.
    """
    moments, done, path = random.Random(seed), list[Kill](), folder / CHECKPOINT_NAME
    while True:
        before = _epochs(path)
        # Killed before its first epoch was saved, a run has nothing to be resumed from.
        process = _started(["--resume", str(folder)] if before else [*arguments, *_into(folder)], folder)
        moment = moments.uniform(0, longest_s)
        process.join(moment if len(done) < kills else None)
        if not process.is_alive():
            _check(process, folder)
            return checkpoints.load(path), done
        process.kill()
        process.join()
        epochs = _epochs(path)
        done.append(Kill(moment, epochs, epochs > before, any(folder.glob(".clearpact-*.tmp"))))
        on_kill()


def differences(straight: Checkpoint, killed: Checkpoint) -> list[str]:
    """Return what differs between two runs, bit for bit: tensors by name, and numbers of the history but time."""
    found = []
    for part in ("state_dict", "guidance", "optimizer"):
        ours, others = (dict(_tensors(part, getattr(c, part))) for c in (straight, killed))
        found += sorted(ours.keys() ^ others.keys())
        found += [name for name in ours.keys() & others.keys() if not _same_bits(ours[name], others[name])]
    rows = [[{k: v for k, v in row.items() if k != "seconds"} for row in c.history] for c in (straight, killed)]
    return found + ["history"] * (rows[0] != rows[1])


def tensor_count(checkpoint: Checkpoint) -> int:
    """Return how many tensors `differences` compares."""
    return sum(len(_tensors(p, getattr(checkpoint, p))) for p in ("state_dict", "guidance", "optimizer"))


def _tensors(name: str, value: object) -> list[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        return [(name, value)]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, item in items for found in _tensors(f"{name}.{key}", item)]


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are equal in type, shape and every bit: 0 and -0 differ, a NaN equals itself."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)))


def _into(folder: Path) -> list[str]:
    return ["--runs", str(folder.parent), "--name", folder.name]


def _epochs(path: Path) -> int:
    return len(checkpoints.load(path).history) if path.exists() else 0


def _started(arguments: list[str], folder: Path) -> ForkServerProcess:
    """Return a new process in which the command trains; what it prints is kept beside the run's folder."""
    process = _process(_train, (arguments, _output(folder)))
    process.start()
    return process


def _process(target: Callable[..., object], arguments: tuple[object, ...]) -> ForkServerProcess:
    # Each starts from a copy of a process that has imported what takes seconds.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_SLOW_IMPORTS))
    return context.Process(target=target, args=arguments)


def _train(arguments: list[str], output: Path) -> None:
    with output.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)  # what is compared must not depend on how a machine shares its cores
    tqdm.set_lock(threading.RLock())  # a semaphore between processes would be left by the killed ones
    command.run(lambda _: train.main(arguments))


def _check(process: ForkServerProcess, folder: Path) -> None:
    if process.exitcode:
        printed = _output(folder).read_text(errors="replace").strip()
        raise TrainingError(f"a run of python -m train ended with status {process.exitcode}: {printed[-500:]}")


def _output(folder: Path) -> Path:
    return folder.with_suffix(".txt")
