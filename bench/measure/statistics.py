"""Latency samples and what is said about them; several contenders are always measured in turns."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from runtime import command
from runtime.errors import OptionError

SETTLE_MS = 3.0
QUANTILE_PERCENTS = tuple(range(0, 101, 5))
# Of fewer, less than ten runs lie beyond the percentile, and it is told by a handful of chance events.
FEWEST_RUNS = {90: 100, 95: 200, 99: 1000}


@dataclass(frozen=True)
class Percentiles:
    """What is said of n run times; a percentile is None where n is less than its FEWEST_RUNS."""

    n: int
    p50_ms: float
    p90_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    mean_ms: float
    std_ms: float

    @staticmethod
    def of(samples_ms: np.ndarray) -> Percentiles:
        """Return it for run times float [n] in milliseconds."""
        n, p50 = len(samples_ms), float(np.median(samples_ms))
        p90, p95, p99 = (
            float(np.percentile(samples_ms, percent)) if n >= fewest else None
            for percent, fewest in FEWEST_RUNS.items()
        )
        return Percentiles(n, p50, p90, p95, p99, float(samples_ms.mean()), float(samples_ms.std()))


@dataclass(frozen=True)
class Latency(Percentiles):
    """Percentiles of one contender's run times, one run after the other.

    `quantiles_ms` are the percentiles QUANTILE_PERCENTS, the distribution from the smallest time to the largest.
    """

    quantiles_ms: tuple[float, ...]


def summarize(samples_ms: np.ndarray) -> Latency:
    """Return the statistics of run times float [n] in milliseconds."""
    found = Percentiles.of(samples_ms)
    return Latency(
        **asdict(found),
        quantiles_ms=tuple(round(float(q), 6) for q in np.percentile(samples_ms, QUANTILE_PERCENTS)),
    )


def percentile(row: Mapping[str, Any], percent: int) -> float | None:
    """Return a percentile in milliseconds of a recorded Percentiles; None where its runs are too few to tell it.

    Records from before there was such a limit hold it all the same.
    """
    found = row.get(f"p{percent}_ms")
    return float(found) if found is not None and row["n"] >= FEWEST_RUNS.get(percent, 1) else None


def told(milliseconds: float | None, digits: int = 3) -> str:
    """Return a time as text, "-" where there is none."""
    return "-" if milliseconds is None else f"{milliseconds:.{digits}f}"


def missing_percentiles(counts: Iterable[int], percents: Iterable[int] = tuple(FEWEST_RUNS)) -> list[str]:
    """Return why a table of so many runs each shows "-" for some percentiles, as a line; none if it does not."""
    least = min(counts)
    missing = [
        f"p{percent} needs {FEWEST_RUNS[percent]:,}" for percent in percents if least < FEWEST_RUNS[percent]
    ]
    return [f"-: {least:,} runs, and {', '.join(missing)}; measure longer"] if missing else []


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
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Time each contender again and again, one after the other in every round.

    In turns, whatever else the machine does meets all of them alike, so that their ratios hold even where their
    absolute times do not. Every round has an order of its own: nobody always follows the same one. Each runs
    untimed for SETTLE_MS, once at least, before it is timed: caches and branch predictors are then as if it ran
    alone, and not full of the contender before it.

    Args:
        contenders: name -> function to time.
        runs: rounds to measure; None fills `seconds` per contender, with 20 rounds at least.
        seconds: see `runs`.
        warm_up_seconds: calls before anything is timed, per contender.
        rest_ms: pause before each turn. Worker threads of ONNX Runtime and of OpenMP spin on after their work is
            done and would take a core from the next contender: with several threads, give them time to sleep.
        label: of the progress bar.
        seed: of the orders.

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
    rng, turns = np.random.default_rng(seed), list(contenders.items())
    for index in command.progress(range(rounds), label=label):
        for turn in rng.permutation(len(turns)):
            name, call = turns[turn]
            time.sleep(rest_ms / 1000)
            settled = time.perf_counter() + settle_s
            call()
            while time.perf_counter() < settled:
                call()
            began = time.perf_counter()
            call()
            samples[name][index] = 1000 * (time.perf_counter() - began)
    return samples
