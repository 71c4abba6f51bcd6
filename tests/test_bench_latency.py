from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import openvino
import pytest

from bench.evidence import speed_tables
from bench.latency import main
from bench.measure.environment import PACKAGES, _state, commit, describe, environment
from bench.peers.benchmark_app import Beside, frames_per_second
from runtime.errors import FileError, OptionError
from tests.exports import exported
from train.checkpoint import Checkpoint

ROOT = Path(__file__).parents[1]


def test_json_of_a_real_process_has_every_figure_and_its_environment(digits_models: dict[str, Path]) -> None:
    path = digits_models["openvino"]
    done = subprocess.run(
        [sys.executable, "-m", "bench.latency", str(path), "--batch", "1,3", "--runs", "20", "--seconds", "0.1",
         "--json"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    result = json.loads(done.stdout)
    assert result["bench"] == "latency"
    assert (result["model"], result["arch"], result["precision"]) == ("openvino.onnx", "cnn2", "int8")
    assert result["engine"] == f"openvino {openvino.__version__.split('-')[0]}"
    assert (result["device"], result["threads"]) == ("cpu", 1)
    assert result["file_bytes"] == path.stat().st_size
    assert list(result["latency"]) == ["1", "3"]
    for batch, rows in result["latency"].items():
        assert list(rows) == ["class"]
        row = rows["class"]
        assert row["n"] == 20
        assert 0 < row["p50_ms"] <= row["quantiles_ms"][-1]
        assert row["p90_ms"] is row["p99_ms"] is None  # of 20 runs
        assert result["throughput_images_per_second"][batch] > 0
    assert result["requests"] == len(os.sched_getaffinity(0))
    assert 0 < result["cold_start"]["import_ms"] < result["cold_start"]["first_prediction_ms"]
    assert result["peak_memory_bytes"] > path.stat().st_size
    assert result["environment"]["commit"] == commit()
    assert result["environment"]["cores"] == len(os.sched_getaffinity(0))
    assert result["environment"]["openvino"].startswith("20")


def test_class_and_map_are_measured_in_turns(
    digits_models: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(digits_models["openvino"])
    main([model, "--explain", "--batch", "2", "--runs", "5", "--seconds", "0.05", "--no-cold-start", "--json"])
    result = json.loads(capsys.readouterr().out)
    rows = result["latency"]["2"]
    assert list(rows) == ["class", "class + map"]
    assert result["maps"] == {"class + map": "gradient"}
    assert (result["data"], result["input"]) == ("digits", [8, 8, 1])
    assert rows["class + map"]["n"] == 5
    main([model, "--explain", "--runs", "5", "--seconds", "0.05", "--no-cold-start"])
    out = capsys.readouterr().out.splitlines()
    assert [line[6:18].strip() for line in out[2:4]] == ["class", "class + map"]
    assert re.match(r" +class and map together cost \d+\.\d\d times the class alone", out[4])


def test_a_person_reads_one_row_per_batch_size(
    digits_models: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(digits_models["float"]), "--engine", "ort", "--batch", "1, 70", "--runs", "5"]
    main([*arguments, "--seconds", "0.05", "--no-cold-start"])
    out = capsys.readouterr().out.splitlines()
    assert "fp32 on ort " in out[0]
    assert out[0].endswith("cpu, threads 1")
    assert out[1].split()[:3] == ["batch", "p50", "ms"]
    assert [(line.split()[0], line.split()[-1]) for line in (out[2], out[4])] == [("1", "5"), ("70", "5")]
    assert out[2].split()[3:6] == ["-", "-", "-"]
    cores = len(os.sched_getaffinity(0))
    assert all(re.match(rf" +throughput, {cores} requests in parallel: [\d,]+ images/s$", out[n]) for n in (3, 5))
    assert out[6] == "-: 5 runs, and p90 needs 100, p95 needs 200, p99 needs 1,000; measure longer"
    assert out[7].startswith(f"file {digits_models['float'].stat().st_size:,} bytes, peak memory ")
    assert "commit " in out[8]
    assert all(len(line) <= 80 for line in out[1:8])


def test_the_way_from_a_frame_to_its_answer_is_measured_beside_the_network(
    digits_models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded = tmp_path / "frames.jsonl"
    arguments = ["--frame", "48x64", "--explain", "--runs", "5", "--seconds", "0.05", "--no-cold-start"]
    arguments += ["--allow-dirty", "--record", str(recorded)]
    main([str(digits_models["openvino"]), *arguments])
    (result,) = map(json.loads, recorded.read_text().splitlines())
    assert result["frame"] == [48, 64]
    found = result["frame_latency"]
    assert list(found) == ["network", "frame to class", "network + map", "frame to class + map"]
    assert all(row["n"] == 5 for row in found.values())
    assert found["frame to class"]["p50_ms"] > found["network"]["p50_ms"]
    assert "48x64 frame to class + map" in capsys.readouterr().out
    result["environment"]["commit"] = "0123456789ab"  # whatever the state of the code that is tested
    row = speed_tables.frames([result]).splitlines()[-1]
    assert row.startswith("| cnn2, INT8 on OpenVINO | 64x48 | 1 |")
    assert f" {found['frame to class']['p50_ms']:.2f} |" in row


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "0"], "^--batch 0: expected whole numbers from 1, comma-separated, such as 1,8,32$"),
        (["--batch", "1,,2"], "^--batch 1,,2: expected whole numbers"),
        (["--batch", "²"], "^--batch ²: expected whole numbers"),
        (["--runs", "0"], "^--runs 0: expected a whole number from 1$"),
        (["--seconds", "nan"], "^--seconds nan: expected a number above 0$"),
        (["--frame", "1080"], "^--frame 1080: expected HEIGHTxWIDTH in pixels, such as 1080x1920$"),
        (["--frame", "0x5"], "^--frame 0x5: expected HEIGHTxWIDTH"),
        (["--threads", "0"], "^threads 0: expected a whole number from 1$"),
    ],
)
def test_wrong_options_are_refused(digits_models: dict[str, Path], arguments: list[str], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        main([str(digits_models["ort"]), *arguments])


def test_a_missing_model_is_refused() -> None:
    with pytest.raises(FileError, match=r"^absent.onnx: no such file"):
        main(["absent.onnx"])


def test_the_environment_names_what_a_number_depends_on() -> None:
    found = environment()
    assert found["numpy"] == np.__version__
    installed = {name for name in PACKAGES if next(importlib.metadata.Distribution.discover(name=name), None)}
    assert {"numpy", "onnxruntime", "openvino", "torch", "onnx"} <= installed  # those of [dev]
    always = {"processor", "cores", "system", "python", "commit", "command", "load_1min"}
    assert set(found) - {"governor", "clock_mhz", "power_mode"} == always | installed
    assert 0 <= found["load_1min"] < 10_000
    assert (
        describe({"processor": "CPU", "cores": 2, "system": "Linux", "commit": "ab", "command": "python -m any"})
        == "CPU, cores 2, Linux, commit ab"
    )


def test_the_environment_names_the_power_mode_the_governor_and_the_clock(tmp_path: Path) -> None:
    clocks = tmp_path / "cpu0" / "cpufreq"
    clocks.mkdir(parents=True)
    (clocks / "scaling_governor").write_text("schedutil\n")
    (clocks / "scaling_cur_freq").write_text("1510400\n")
    nvpmodel = tmp_path / "nvpmodel"
    nvpmodel.write_text("#!/bin/sh\necho 'NV Power Mode: MAXN_SUPER'\necho 2\n")
    nvpmodel.chmod(0o755)
    found = _state(tmp_path, str(nvpmodel))
    del found["load_1min"]
    assert found == {"governor": "schedutil", "clock_mhz": 1510, "power_mode": "MAXN_SUPER"}
    nvpmodel.write_text("#!/bin/sh\nexit 1\n")
    assert set(_state(tmp_path / "none", str(nvpmodel))) == {"load_1min"}


def test_a_record_names_the_command_that_made_it() -> None:
    arguments = ["-c", "from bench.measure.environment import environment; print(environment()['command'])", "a b"]
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == shlex.join(["python", *arguments])


def test_peak_memory_holds_what_was_allocated_and_freed() -> None:
    code = "from bench.measure.environment import peak_memory_bytes; b = b'1' * 10**8; del b; "
    done = subprocess.run(
        [sys.executable, "-c", code + "print(peak_memory_bytes())"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert 10**8 < int(done.stdout) < 4 * 10**8


def test_the_throughput_that_benchmark_app_prints_is_read() -> None:
    assert frames_per_second("[ INFO ] Latency:\n[ INFO ] Throughput:   1234.50 FPS\n") == 1234.5
    assert frames_per_second("[ ERROR ] no such file") is None
    assert Beside((3.0, 2.0, 9.0), (2.0, 2.0, 10.0)).ratio == 1.0


def test_benchmark_app_measures_files_of_openvino_without_maps(digits_models: dict[str, Path]) -> None:
    for name in ("openvino", "ort"):  # with a map; of another engine
        with pytest.raises(
            OptionError, match=r"--beside-benchmark-app: .*, and a file of export.onnx --target openv"
        ):
            main([str(digits_models[name]), "--runs", "2", "--seconds", "0.05", "--beside-benchmark-app"])


@pytest.mark.slow  # the tool measures whole seconds, three times
def test_throughput_beside_benchmark_app(
    digits_checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "class.onnx"
    path.write_bytes(exported(digits_checkpoint, saliency=False).data)
    main([str(path), "--seconds", "1", "--no-cold-start", "--beside-benchmark-app", "--json"])
    found = json.loads(capsys.readouterr().out)["benchmark_app"]
    assert len(found["ours"]) == len(found["tool"]) == 3
    # Of so small a network Python's part of a run decides: only the order of magnitude is sure.
    assert 0.1 < found["ratio"] < 10
