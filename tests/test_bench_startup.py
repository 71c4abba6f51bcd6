from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from bench.measure.cold_start import ColdStart, Loading, median, start
from bench.processes.startup import FIRST, SECOND, WITHOUT, main
from runtime.errors import ModelError, OptionError


def test_a_start_counts_import_load_compile_and_the_first_prediction(digits_models: dict[str, Path]) -> None:
    found = median([start(Loading("runtime", digits_models["ort"], "ort"), shape=(8, 8, 1), threads=1)])
    assert min(found.import_ms, found.open_ms, found.predict_ms) > 0
    assert found.classifier_ms == pytest.approx(found.open_ms + found.predict_ms)
    assert found.first_prediction_ms == pytest.approx(found.import_ms + found.classifier_ms)
    assert 20e6 < found.above_numpy_bytes < found.above_interpreter_bytes < found.resident_bytes < 500e6


def test_the_medians_are_those_of_each_field() -> None:
    rows = ([1, 2, 3, 5, 6, 9, 9, 9, 4], [2, 9, 1, 10, 12, 7, 8, 8, 4], [3, 1, 2, 3, 6, 8, 7, 7, 5])
    found = median([ColdStart(*row) for row in rows])
    assert (found.import_ms, found.open_ms, found.predict_ms, found.classifier_ms) == (2, 2, 2, 5)
    assert (found.resident_bytes, found.above_numpy_bytes, found.peak_memory_bytes) == (8, 8, 4)


def test_a_start_that_fails_says_why() -> None:
    with pytest.raises(
        ModelError, match=r"^absent.onnx: cold start failed \(.*absent.onnx: no such file; check the"
    ):
        start(Loading("runtime", Path("absent.onnx"), "ort"), shape=(8, 8, 1), threads=None)


def test_a_person_and_a_program_read_three_kinds_of_start(
    digits_models: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two starts of each say nothing about time on a busy machine; what lies in the cache is sure."""
    seen = []

    def files(folder: str) -> list[os.stat_result]:
        return [path.stat() for path in Path(folder).iterdir()] if folder else []

    def watched(loading: Loading, **options: Any) -> ColdStart:
        before = files(loading.cache)
        found = start(loading, **options)
        seen.append((bool(loading.cache), before, files(loading.cache)))
        return found

    monkeypatch.setattr("bench.processes.startup.start", watched)
    record = tmp_path / "startup.jsonl"
    main([str(digits_models["openvino"]), "--starts", "2", "--explain", "--allow-dirty", "--record", str(record)])
    out = capsys.readouterr().out
    (line,) = record.read_text().splitlines()
    found = json.loads(line)["cold_start"]
    assert list(found) == [WITHOUT, FIRST, SECOND]
    for row in out.splitlines():
        assert len(row) <= 80 or "medians of" in row or "cores" in row
    ratio = found[FIRST]["classifier_ms"] / found[SECOND]["classifier_ms"]
    assert f"from the cache {ratio:.2f} times as fast as the first time" in out
    assert found[SECOND]["above_numpy_bytes"] < 120e6
    for without, first, second in (seen[:3], seen[3:]):
        assert without == (False, [], [])
        assert first[:2] == (True, [])
        (stored,) = first[2]
        assert second[:2] == (True, [stored])
        (used,) = second[2]
        assert used.st_ino == stored.st_ino  # not written again
        assert used.st_mtime_ns > stored.st_mtime_ns  # a file that is read is marked as used


def test_no_starts_are_refused(digits_models: dict[str, Path]) -> None:
    with pytest.raises(OptionError, match=r"^--starts 0: expected a whole number from 1$"):
        main([str(digits_models["ort"]), "--starts", "0"])
