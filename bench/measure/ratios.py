"""How many times as long one contender takes as another, and how far that figure can be trusted.

Two instances of one file differ by about a percent, by where their memory lies: rounds of a single instance say
how that instance does, however many they are. So contenders are opened again and again, in fresh processes, and
the interval comes from instances first and from the rounds within each of them second.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

# With three instances the interval holds the truth in three of four cases; from five on in 19 of 20.
FEWEST_INSTANCES = 5

_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Ratio:
    """One contender's time by another's.

    Args:
        ratio: geometric mean over instances of the median over the rounds of each.
        low: lower end of the 95 % interval; None of fewer than FEWEST_INSTANCES.
        high: upper end.
        instances: fresh processes that were measured.
    """

    ratio: float
    low: float | None
    high: float | None
    instances: int

    def __str__(self) -> str:
        return self.told(3)

    def told(self, digits: int) -> str:
        """Return the ratio and its interval in so many digits behind the point."""
        if self.low is None or self.high is None:
            return f"{self.ratio:.{digits}f}"
        return f"{self.ratio:.{digits}f} ({self.low:.{digits}f} .. {self.high:.{digits}f})"


def ratio(times_ms: Sequence[np.ndarray], by_ms: Sequence[np.ndarray], *, resamples: int = 2000) -> Ratio:
    """Return how many times as long one contender takes as another, measured in turns in the same processes.

    The interval is the hierarchical bootstrap's: instances are drawn with replacement, and the rounds within each
    (Davison and Hinkley 1997, section 3.8). Its percentiles are those that give a mean of so few values the width
    of Student's interval (expanded percentiles, Hesterberg 2015, section 5.3).

    Args:
        times_ms: of each instance, run times float64 [rounds] of the one.
        by_ms: of the other, in the same rounds of the same instances.
        resamples: how often instances and rounds are drawn.
    """
    quotients = [np.log(times / by) for times, by in zip(times_ms, by_ms, strict=True)]
    medians = np.array([np.median(of_rounds) for of_rounds in quotients])
    found, n = float(np.exp(medians.mean())), len(medians)
    if n < FEWEST_INSTANCES:
        return Ratio(found, None, None, n)
    rng = np.random.default_rng(0)
    drawn = np.stack([_resampled_medians(of_rounds, resamples, rng) for of_rounds in quotients])
    # Where an instance is drawn twice, each time with rounds of its own.
    which, rounds = rng.integers(0, n, (n, resamples)), rng.integers(0, resamples, (n, resamples))
    means = drawn[which, rounds].mean(0)
    tail = _expanded_tail(n)
    low, high = np.exp(np.quantile(means, [tail, 1 - tail]))
    return Ratio(found, float(low), float(high), n)


def read_ratio(recorded: Mapping[str, Any]) -> Ratio:
    """Return a ratio as it was recorded.

    Records from before there were instances have an interval over the rounds of one: it is left out, being too
    narrow (8 of 16 of them excluded 1 where a model was held against itself).
    """
    if "instances" in recorded:
        return Ratio(recorded["ratio"], recorded["low"], recorded["high"], recorded["instances"])
    return Ratio(float(recorded["median"]), None, None, 1)


def _resampled_medians(values: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Return the medians float64 [resamples] of values drawn with replacement.

    No n values are drawn for each of them: the rank of the median among uniform ones is beta-distributed.
    """
    ordered, n = np.sort(values), len(values)
    low = rng.beta((n + 1) // 2, n + 1 - (n + 1) // 2, resamples)
    at = np.minimum((low * n).astype(int), n - 1)
    if n % 2:
        return ordered[at]
    # Given the one in the middle, the next one is the smallest of the n / 2 that lie above it.
    above = low + (1 - low) * rng.beta(1, n // 2, resamples)
    return (ordered[at] + ordered[np.minimum((above * n).astype(int), n - 1)]) / 2


def _expanded_tail(n: int) -> float:
    """Return the share below the lower end that makes the bootstrap of n values' mean as wide as Student's."""
    from scipy.stats import t  # only who asks for an interval needs it

    outside = (1 - _CONFIDENCE) / 2
    return NormalDist().cdf(-float(np.sqrt(n / (n - 1)) * t.ppf(1 - outside, n - 1)))
