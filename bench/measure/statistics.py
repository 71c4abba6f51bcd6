"""Latency samples and what is said about them; several contenders are always measured in turns."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import numpy as np

from runtime import command
from runtime.errors import OptionError

SETTLE_MS = 3.0
QUANTILE_PERCENTS = tuple(range(0, 101, 5))


@dataclass(frozen=True)
class Percentiles:
    """What is said of n run times."""

    n: int
    p50_ms: float
    p90_ms: float
    p95_ms: float
    p99_ms: float
    mean_ms: float
    std_ms: float

    @staticmethod
    def of(samples_ms: np.ndarray) -> Percentiles:
        """Return it for run times float [n] in milliseconds."""
        p50, p90, p95, p99 = (float(p) for p in np.percentile(samples_ms, [50, 90, 95, 99]))
        return Percentiles(len(samples_ms), p50, p90, p95, p99, float(samples_ms.mean()), float(samples_ms.std()))


@dataclass(frozen=True)
class Latency(Percentiles):
    """Percentiles of one contender's run times, and the images it does in a second.

    `quantiles_ms` are the percentiles QUANTILE_PERCENTS, the distribution from the smallest time to the largest.
    """

    images_per_second: float
    quantiles_ms: tuple[float, ...]


def summarize(samples_ms: np.ndarray, batch: int) -> Latency:
    """Return the statistics of run times float [n] in milliseconds of batches of `batch` images."""
    found = Percentiles.of(samples_ms)
    return Latency(
        **asdict(found),
        images_per_second=1000 * batch / found.p50_ms,
        quantiles_ms=tuple(round(float(q), 6) for q in np.percentile(samples_ms, QUANTILE_PERCENTS)),
    )


@dataclass(frozen=True)
class Ratio:
    """The median over rounds of one contender's time by another's, with the bootstrap's 95 % interval of it."""

    median: float
    low: float
    high: float


def ratio(times_ms: np.ndarray, by_ms: np.ndarray, *, resamples: int = 1000) -> Ratio:
    """Return how many times as long one contender takes as another, measured in the same rounds.

    Args:
        times_ms: run times float64 [n] of the one.
        by_ms: of the other, in the same rounds.
        resamples: how often the rounds are drawn again, with replacement (percentile bootstrap, Efron 1979).
    """
    quotients = times_ms / by_ms
    drawn = np.random.default_rng(0).integers(0, len(quotients), (resamples, len(quotients)))
    low, high = np.percentile(np.median(quotients[drawn], axis=1), [2.5, 97.5])
    return Ratio(float(np.median(quotients)), float(low), float(high))


def batch_sizes(text: str) -> list[int]:
    """Return the numbers in an option such as "1,8,32"; raise OptionError unless all are batch sizes."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise OptionError(f"--batch {text}: expected whole numbers from 1, comma-separated, such as 1,8,32")
    return [int(part) for part in parts]


def check_seconds(seconds: float) -> None:
    """Raise OptionError unless `seconds` is a time that `measure` can fill."""
    if not (math.isfinite(seconds) and seconds > 0):
        raise OptionError(f"--seconds {seconds:g}: expected a number above 0")


def measure(
    contenders: Mapping[str, Callable[[], object]],
    *,
    runs: int | None = None,
    seconds: float = 3.0,
    warm_up_seconds: float = 0.5,
    rest_ms: float = 0.0,
    label: str = "measuring",
) -> dict[str, np.ndarray]:
    """Time each contender again and again, one after the other in every round.

    In turns, whatever else the machine does meets all of them alike, so that their ratios hold even where their
    absolute times do not. Each runs untimed for SETTLE_MS, once at least, before it is timed: caches and branch
    predictors are then as if it ran alone, and not full of the contender before it.

    Args:
        contenders: name -> function to time.
        runs: rounds to measure; None fills `seconds` per contender, with 20 rounds at least.
        seconds: see `runs`.
        warm_up_seconds: calls before anything is timed, per contender.
        rest_ms: pause before each turn. Worker threads of ONNX Runtime and of OpenMP spin on after their work is
            done and would take a core from the next contender: with several threads, give them time to sleep.
        label: of the progress bar.

    Returns:
        Name -> run times float64 [runs] in milliseconds.
    """
    typical_s = {}
    for name, call in contenders.items():
        call()  # may compile or allocate, and says nothing about the others
        began, calls = time.perf_counter(), 0
        while calls < 3 or time.perf_counter() - began < warm_up_seconds:
            call()
            calls += 1
        typical_s[name] = (time.perf_counter() - began) / calls
    settle_s = SETTLE_MS / 1000 if len(contenders) > 1 else 0.0
    round_s = sum(rest_ms / 1000 + max(settle_s, typical) + typical for typical in typical_s.values())
    rounds = runs or max(20, int(seconds * len(typical_s) / round_s))
    samples = {name: np.empty(rounds) for name in contenders}
    for index in command.progress(range(rounds), label=label):
        for name, call in contenders.items():
            time.sleep(rest_ms / 1000)
            settled = time.perf_counter() + settle_s
            call()
            while time.perf_counter() < settled:
                call()
            began = time.perf_counter()
            call()
            samples[name][index] = 1000 * (time.perf_counter() - began)
    return samples
