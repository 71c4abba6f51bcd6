from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from bench.measure.parallel_requests import images_per_second
from bench.measure.statistics import (
    SETTLE_MS,
    Percentiles,
    check_seconds,
    measure,
    missing_percentiles,
    percentile,
    summarize,
    told,
)
from runtime.errors import OptionError


def test_statistics_of_known_samples() -> None:
    # 1..101 ms: percentiles fall on samples.
    found = summarize(np.arange(1.0, 102.0)[np.random.default_rng(0).permutation(101)])
    assert found.n == 101
    assert (found.p50_ms, found.p90_ms, found.mean_ms) == (51.0, 91.0, 51.0)
    assert found.std_ms == pytest.approx(np.sqrt((101**2 - 1) / 12), rel=1e-12)
    assert found.quantiles_ms == tuple(range(1, 102, 5))


def test_an_outlier_moves_the_mean_and_not_the_median() -> None:
    found = summarize(np.array([2.0] * 990 + [1002.0] * 10))
    assert (found.p50_ms, found.p90_ms, found.mean_ms) == (2.0, 2.0, 12.0)
    assert found.p99_ms == pytest.approx(2 + 0.01 * 1000)


def test_a_percentile_is_told_where_ten_runs_at_least_lie_beyond_it() -> None:
    for percent, fewest in ((90, 100), (95, 200), (99, 1000)):
        few, enough = (Percentiles.of(np.arange(1.0, n + 1)) for n in (fewest - 1, fewest))
        assert getattr(few, f"p{percent}_ms") is None
        assert getattr(enough, f"p{percent}_ms") == pytest.approx(1 + (fewest - 1) * percent / 100)
        # Records from before hold percentiles of any number of runs.
        row = {"n": fewest - 1, f"p{percent}_ms": 3.0}
        assert percentile(row, percent) is None
        assert percentile(row | {"n": fewest}, percent) == 3.0
    assert (told(None), told(0.12349), told(0.12349, 1)) == ("-", "0.123", "0.1")
    assert missing_percentiles([5000, 199]) == ["-: 199 runs, and p95 needs 200, p99 needs 1,000; measure longer"]
    assert missing_percentiles([199], [90]) == missing_percentiles([1000]) == []


def test_images_a_second_are_those_of_requests_in_parallel() -> None:
    running, most = 0, 0
    lock = threading.Lock()

    def call() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.02)
        with lock:
            running -= 1

    found = images_per_second(call, batch=4, requests=3, seconds=0.3)
    assert most == 3
    # 3 requests of 4 images in 20 ms: 600 a second at best, and a busy machine wakes threads late. One by the
    # latency would be 200.
    assert 250 < found <= 600
    with pytest.raises(ZeroDivisionError):
        images_per_second(lambda: 1 // 0, batch=1, requests=2, seconds=0.1)


def test_contenders_are_measured_in_turns_each_settled_before() -> None:
    calls: list[tuple[str, float]] = []

    def contender(name: str) -> Callable[[], None]:
        def call() -> None:
            calls.append((name, time.perf_counter()))
            time.sleep(SETTLE_MS / 1000 / 3)

        return call

    samples = measure({name: contender(name) for name in "abc"}, runs=5, warm_up_seconds=0.0)
    assert {name: times.shape for name, times in samples.items()} == {"a": (5,), "b": (5,), "c": (5,)}
    blocks = [(name, [t for _, t in block]) for name, block in itertools.groupby(calls, key=lambda c: c[0])]
    # Whose turn comes last in one round and first in the next has one block of calls for both.
    names = "".join(name for name, _ in blocks)
    assert names.startswith("abc")
    assert all(names.count(name) >= 4 for name in "abc")
    assert "abc" * 5 not in names  # nobody always follows the same one
    for name in "abc":
        assert sum(times[-1] - times[0] for each, times in blocks[1:] if each == name) >= 5 * SETTLE_MS / 1000


def test_a_slow_contender_settles_in_one_call() -> None:
    calls: list[str] = []
    samples = measure(
        {"slow": lambda: calls.append("s") or time.sleep(0.005), "fast": lambda: calls.append("f")},
        runs=4,
        warm_up_seconds=0.0,
    )
    assert len(samples["slow"]) == 4
    assert calls.count("s") == 4 + 2 * 4


def test_times_are_milliseconds_of_one_call() -> None:
    samples = measure({"slow": lambda: time.sleep(0.004), "fast": lambda: None}, runs=5, warm_up_seconds=0.0)
    assert samples["slow"].dtype == np.float64
    assert 4.0 <= np.median(samples["slow"]) < 40.0
    assert np.median(samples["fast"]) < 1.0


def test_without_runs_as_many_fit_as_the_time_given_and_twenty_at_least() -> None:
    few = measure({"a": lambda: time.sleep(0.002)}, seconds=0.001, warm_up_seconds=0.0)
    assert len(few["a"]) == 20
    many = measure({"a": lambda: time.sleep(0.001)}, seconds=0.4, warm_up_seconds=0.05)
    assert 40 < len(many["a"]) <= 200


def test_a_first_call_that_compiles_does_not_shorten_the_measurement() -> None:
    first = iter([0.3])
    began = time.perf_counter()
    samples = measure({"a": lambda: time.sleep(next(first, 0.001))}, seconds=0.4, warm_up_seconds=0.05)
    assert len(samples["a"]) > 40
    assert time.perf_counter() - began < 5


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_a_time_that_cannot_be_filled_is_refused(seconds: float) -> None:
    with pytest.raises(OptionError, match=f"^--seconds {seconds:g}: expected a number above 0$"):
        check_seconds(seconds)
    check_seconds(0.1)
