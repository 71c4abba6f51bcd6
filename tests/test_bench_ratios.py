from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bench.measure.cold_start import Loading
from bench.measure.ratios import FEWEST_INSTANCES, Ratio, _resampled_medians, ratio, read_ratio
from bench.peers.instances import Setting, in_fresh_process, times_of_instances
from runtime.errors import ModelError

BETWEEN, WITHIN, ROUNDS = 0.01, 0.05, 100  # of instances, of the rounds in one; what was found of real ones


def aa(rng: np.random.Generator, instances: int, *, rounds: int = ROUNDS) -> list[list[np.ndarray]]:
    """Return the times of two contenders that are one and the same: instances differ, and so do their rounds."""
    return [
        [np.exp(rng.normal(0, BETWEEN)) * rng.lognormal(0, WITHIN, rounds) for _ in range(instances)]
        for _ in range(2)
    ]


def holds_one(found: Ratio) -> bool:
    assert found.low is not None
    assert found.high is not None
    return found.low <= 1 <= found.high


@pytest.mark.parametrize("instances", [FEWEST_INSTANCES, 8])
def test_a_against_a_is_one_in_nineteen_of_twenty_intervals(instances: int) -> None:
    rng, trials = np.random.default_rng(instances), 400
    covered = np.mean([holds_one(ratio(*aa(rng, instances), resamples=500)) for _ in range(trials)])
    # Standard error of a share of 95 % in 400 trials: 1.1 %. Rounds that are drawn once more widen it a little.
    assert 0.95 - 3 * 0.011 < covered <= 0.995


def test_rounds_of_a_single_instance_do_not_say_how_the_next_one_does() -> None:
    """Why instances are needed: the same rounds, taken for independent ones, mostly miss the truth."""
    rng, trials = np.random.default_rng(0), 100
    covered = 0
    for _ in range(trials):
        (one,), (other,) = aa(rng, 1, rounds=800)
        pieces = [np.split(times, 8) for times in (one, other)]
        covered += holds_one(ratio(*pieces, resamples=300))
    assert covered < 0.6 * trials


def test_more_instances_narrow_the_interval_and_more_rounds_hardly_do() -> None:
    rng = np.random.default_rng(1)

    def width(instances: int, rounds: int) -> float:
        found = [ratio(*aa(rng, instances, rounds=rounds), resamples=300) for _ in range(40)]
        return float(np.mean([each.high - each.low for each in found]))  # type: ignore[operator]

    narrow, wide = width(32, 100), width(8, 100)
    # Student's quantiles 2.365 and 2.040, by the square roots of 8 and 32.
    assert wide / narrow == pytest.approx(2.365 / 2.040 * 2, rel=0.15)
    assert width(8, 1600) > 0.6 * wide


def test_the_ratio_is_that_of_the_times() -> None:
    times, by = aa(np.random.default_rng(2), 8)
    found = ratio([3 * of for of in times], by)
    same = ratio(times, by)
    assert found.ratio == pytest.approx(3 * same.ratio, rel=1e-12)
    assert found.ratio == pytest.approx(
        np.exp(np.mean([np.median(np.log(a / b)) for a, b in zip(times, by, strict=True)])) * 3
    )
    assert found.low < found.ratio < found.high  # type: ignore[operator]
    assert ratio(by, by) == Ratio(1.0, 1.0, 1.0, 8)
    assert str(Ratio(1.0061, 0.9949, 1.0172, 8)) == "1.006 (0.995 .. 1.017)"


def test_few_instances_give_a_ratio_without_an_interval() -> None:
    times, by = aa(np.random.default_rng(3), FEWEST_INSTANCES - 1)
    found = ratio(times, by)
    assert (found.low, found.high, found.instances) == (None, None, FEWEST_INSTANCES - 1)
    assert Ratio(1.5, None, None, 1).told(2) == "1.50"


def test_intervals_of_one_instance_are_not_read_from_old_records() -> None:
    assert read_ratio({"median": 1.006, "low": 1.005, "high": 1.007}) == Ratio(1.006, None, None, 1)
    kept = {"ratio": 1.006, "low": 0.99, "high": 1.02, "instances": 8}
    assert read_ratio(kept) == Ratio(1.006, 0.99, 1.02, 8)


@pytest.mark.parametrize("n", [1, 2, 5, 20, 101])
def test_resampled_medians_are_distributed_as_those_of_drawn_values(n: int) -> None:
    rng = np.random.default_rng(n)
    values = rng.normal(size=n)
    found = _resampled_medians(values, 20000, rng)
    drawn = np.median(values[rng.integers(0, n, (20000, n))], axis=1)
    assert found.mean() == pytest.approx(drawn.mean(), abs=0.02)
    assert found.std() == pytest.approx(drawn.std(), rel=0.05, abs=1e-12)
    assert {*np.round(found, 9)} <= {*np.round((values[:, None] + values).ravel() / 2, 9)}


def test_every_instance_is_a_process_that_opens_and_measures_all(digits_models: dict[str, Path]) -> None:
    loadings = {name: Loading("runtime", digits_models[name], name) for name in ("openvino", "ort")}
    setting = Setting((2, 8, 8, 1), threads=1, seconds=0.001, warm_up_seconds=0.001)
    found = times_of_instances(loadings, setting, instances=2)
    assert list(found) == ["openvino", "ort"]
    for each in found.values():
        assert [times.shape for times in each] == [(20,), (20,)]
        assert all((times > 0).all() for times in each)
    with pytest.raises(
        ModelError, match=r"^a fresh process failed to measure absent \(.*absent.onnx: no such file"
    ):
        in_fresh_process({"absent": Loading("runtime", Path("absent.onnx"), "ort")}, setting, 0)


@pytest.mark.slow
def test_one_file_against_itself_in_real_processes(digits_models: dict[str, Path]) -> None:
    """The same file twice, five times over: an interval that is honest holds 1 in all but one of them."""
    loadings = {name: Loading("runtime", digits_models["openvino"], "openvino") for name in "ab"}
    setting = Setting((1, 8, 8, 1), threads=1, seconds=0.3, warm_up_seconds=0.05)
    covered = 0
    for _ in range(5):
        times = times_of_instances(loadings, setting, instances=FEWEST_INSTANCES)
        found = ratio(times["a"], times["b"])
        assert found.ratio == pytest.approx(1, abs=0.2)
        covered += holds_one(found)
    assert covered >= 4
