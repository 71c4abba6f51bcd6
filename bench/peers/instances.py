"""Contenders measured in turns, again and again in fresh processes.

Every process is an instance of its own: other addresses of the same memory, other order of opening and of turns.
This module run as a program is such a process; it reads what to measure from standard input.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.measure.cold_start import Loading
from bench.measure.statistics import measure
from bench.peers.opening import opened
from runtime import command
from runtime.errors import ModelError

_ROOT = Path(__file__).parents[2]

Times = dict[str, list[np.ndarray]]
"""Name -> of each instance, run times float64 [rounds] in milliseconds; the rounds of all names are the same."""


@dataclass(frozen=True)
class Setting:
    """How contenders are measured.

    Args:
        shape: of the pixels, [N, H, W, C].
        threads: CPU threads of one inference.
        seconds: per contender and instance; 20 rounds at least.
        warm_up_seconds: of each contender, before anything is timed.
        rest_ms: see `bench.measure.statistics.measure`.
    """

    shape: tuple[int, ...]
    threads: int
    seconds: float
    warm_up_seconds: float = 0.5
    rest_ms: float = 0.0


def times_of_instances(loadings: Mapping[str, Loading], setting: Setting, *, instances: int) -> Times:
    """Measure contenders in so many fresh processes, all of them in each.

    Raises:
        ModelError: a process fails; the text has its last line.
    """
    found: Times = {name: [] for name in loadings}
    for number in command.progress(range(instances), label=f"instances, batch {setting.shape[0]}"):
        for name, times in in_fresh_process(loadings, setting, number).items():
            found[name].append(times)
    return found


def in_fresh_process(loadings: Mapping[str, Loading], setting: Setting, number: int) -> dict[str, np.ndarray]:
    """Start one instance and return what it measured; see `times_of_instances`."""
    given = {
        "loadings": {name: asdict(loading) | {"path": str(loading.path)} for name, loading in loadings.items()},
        "setting": asdict(setting),
        "number": number,
    }
    paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", __name__], input=json.dumps(given), text=True,
        capture_output=True, check=False, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )  # fmt: skip
    if done.returncode:
        reason = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
        raise ModelError(f"a fresh process failed to measure {', '.join(loadings)} ({reason})")
    # Engines may have printed something before.
    return {name: np.array(times) for name, times in json.loads(done.stdout.splitlines()[-1]).items()}


def measured(loadings: Mapping[str, Loading], setting: Setting, number: int) -> dict[str, np.ndarray]:
    """Open contenders, in an order that `number` decides, and measure them in this process."""
    if any(loading.program == "torch" for loading in loadings.values()):
        import torch

        torch.set_num_threads(setting.threads)
        torch.backends.cudnn.benchmark = True  # as `bench.peers.gpu_contenders.torch_on_cuda` sets it
    images = np.random.default_rng(0).integers(0, 256, setting.shape, dtype=np.uint8)
    order = np.random.default_rng(number).permutation(len(loadings))
    turns = [list(loadings.items())[turn] for turn in order]
    calls = {name: functools.partial(opened(loading, threads=setting.threads), images) for name, loading in turns}
    return measure(
        calls, seconds=setting.seconds, warm_up_seconds=setting.warm_up_seconds, rest_ms=setting.rest_ms,
        seed=number,
    )  # fmt: skip


def _main() -> None:
    given: dict[str, Any] = json.load(sys.stdin)
    loadings = {
        name: Loading(**{**fields, "path": Path(fields["path"])}) for name, fields in given["loadings"].items()
    }
    setting = Setting(**{**given["setting"], "shape": tuple(given["setting"]["shape"])})
    times = measured(loadings, setting, given["number"])
    print(json.dumps({name: values.tolist() for name, values in times.items()}))


if __name__ == "__main__":
    _main()
