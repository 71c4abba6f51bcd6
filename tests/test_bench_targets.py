"""`bench.targets`: codes as outputs, differences counted by hand, and the command on a small network."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bench.evidence.target_tables import browser as browser_table
from bench.evidence.target_tables import million
from bench.evidence.target_tables import targets as table
from bench.networks.codes import differences, with_codes
from bench.processes.native_start import BUILT
from bench.targets import main
from runtime.session import open_session
from train.data.images import ImageData


@pytest.mark.parametrize("engine", ["openvino", "ort"])
def test_codes_are_outputs_and_on_their_grid(
    engine: str, digits_models: dict[str, Path], digits: ImageData
) -> None:
    data, names = with_codes(digits_models[engine].read_bytes())
    assert len(names) >= 3
    session = open_session(data, engine=engine, threads=1)
    images = digits.test_images[:8].permute(0, 2, 3, 1).contiguous().numpy()
    found = session.run({"image": images, "target": np.full(8, -1, np.int64)}, ("logits", "saliency", *names))
    session.close()
    plain = open_session(digits_models[engine], engine=engine, threads=1)
    assert np.array_equal(found["logits"], plain.run({"image": images})["logits"])
    plain.close()
    for name in names:
        codes = found[name].astype(int)
        assert -128 <= codes.min() < codes.max() <= 127, name  # of pixels, p - 128


def test_differences_are_counted_by_image() -> None:
    expected = {
        "logits": np.array([[1, -4], [2, 0], [0, 3]], np.float32),
        "saliency": np.array([[[2, 1]], [[0, 4]], [[1, 1]]], np.float32),
        "a.codes": np.array([[0, 127], [5, 6], [7, 8]], np.uint8),
        "b.codes": np.zeros((3, 2), np.int8),  # in another shape: passed over
    }
    found = {
        "logits": np.array([[1, -3], [2, 0.5], [3.5, 3]], np.float32),
        "saliency": np.array([[[2, 0.5]], [[0, 4]], [[1, 0]]], np.float32),
        "a.codes": np.array([[2, 0], [5, 6], [7, 9]], np.uint8),
        "b.codes": np.zeros((3, 4), np.int8),
    }
    row = differences(expected, found)
    assert (row.images, row.codes, row.codes_moved, row.largest_step) == (3, 6, 3, 127)
    assert (row.images_with_moved_codes, row.classes_differing) == (2, 1)
    assert (row.logits, row.map) == pytest.approx((3.5 / 3, 1.0))
    assert (row.logits_of_equal_codes, row.map_of_equal_codes) == (0.25, 0.0)
    all_moved = differences({**expected, "a.codes": found["a.codes"] + np.uint8(1)}, found)
    assert all_moved.logits_of_equal_codes is all_moved.map_of_equal_codes is None
    uncompared = differences(expected, {name: found[name] for name in ("logits", "saliency", "b.codes")})
    assert (uncompared.codes, uncompared.codes_moved, uncompared.images_with_moved_codes) == (0, 0, 0)
    assert uncompared.logits_of_equal_codes is uncompared.map_of_equal_codes is None


def test_the_command_compares_what_is_here_and_records_it(
    digits_checkpoint_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = tmp_path / "record.jsonl"
    arguments = ["--images", "40", "--seconds", "0.05", "--allow-dirty", "--record", str(record)]
    main([str(digits_checkpoint_path), *arguments])
    assert "40 images of digits" in capsys.readouterr().out
    found = json.loads(record.read_text())
    assert found["targets"].keys() == {"OpenVINO, x86", "ONNX Runtime, x86"}
    for row in found["targets"].values():
        assert (row["images"], row["classes_differing"]) == (40, 0)
        assert row["codes"] > 40 * 1000
        assert row["codes_moved"] <= 1e-4 * row["codes"]
        assert row["logits_of_equal_codes"] < 1e-5
        assert row["latency_p50_ms"] > 0
    # The same gradient, in floats; OpenVINO's may be in codes.
    assert found["targets"]["ONNX Runtime, x86"]["map_of_equal_codes"] < 1e-5
    assert "| OpenVINO, x86 | 40 of 40 |" in table([found])


def test_the_latency_in_a_browser_is_a_row_for_class_and_for_map() -> None:
    old, new = (
        {
            "bench": "browser",
            "arch": "cnn2",
            "data": "mnist",
            "latency": {
                f"{kind}, {where}": {"p50_ms": each}
                for kind, each in (("class", ms), ("class and map", 3 * ms))
                for where in ("browser", "native")
            },
            "ratio": {
                "class": {"ratio": 4.0, "low": 3.5, "high": 4.5, "instances": 8},
                "class and map": {"ratio": 2.0, "low": None, "high": None, "instances": 1},
            },
        }
        for ms in (1.0, 2.0)
    )
    assert browser_table([old, new]).splitlines()[2:] == [
        "| cnn2, mnist | class | 2.00 | 2.00 | 4.0 (3.5 .. 4.5) |",
        "| cnn2, mnist | class and map | 6.00 | 6.00 | 2.0 |",
    ]


def test_the_programs_are_sought_where_make_builds_them() -> None:
    makefile = Path(__file__).parents[1] / "Makefile"
    assert f"-B {BUILT.relative_to(makefile.parent)} " in makefile.read_text()


def test_a_million_images_are_told_beside_one_classifier_and_beside_as_many_at_once() -> None:
    one, two, ours = (
        "Classifier alone",
        "Classifier, 2 at once",
        ("deploy.batch, 1 processes", "deploy.batch, 2 processes"),
    )
    rates = {one: [1000.0, 2000.0, 1000.0], ours[0]: [950.0, 1920.0, 940.0],
             two: [900.0, 800.0, 1000.0], ours[1]: [855.0, 800.0, 850.0]}  # fmt: skip
    found = {"bench": "throughput", "arch": "cnn2", "data": "mnist", "engine": "openvino 2026.4.1",
             "explain": True, "images": 1000, "images_per_cpu_second": rates,
             "start_cpu_seconds": {name: [1.0] for name in rates},
             "result_bytes": {ours[0]: 230_000, ours[1]: 231_000},
             "beside": {ours[0]: one, ours[1]: two}}  # fmt: skip
    assert million([found]).splitlines()[2:] == [
        "| cnn2, mnist, OpenVINO | class and map | 1 processes | 950 | 95% | 95% | 0.29 | 1.0 | 0.23 |",
        "| cnn2, mnist, OpenVINO | class and map | 2 processes | 850 | 85% | 95% | 0.33 | 1.0 | 0.23 |",
    ]
    del found["beside"]  # as recorded before
    assert [row.split(" | ")[5] for row in million([found]).splitlines()[2:]] == ["-", "-"]
