from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench.compare import main
from bench.measure.cold_start import in_turns
from bench.measure.record import append, missing_by_reason
from bench.peers.contenders import contenders
from bench.peers.explainers import explainers
from bench.peers.names import OURS, OURS_WITH_MAP, PTQ
from bench.peers.opening import opened
from runtime.errors import FileError, ModelError, OptionError
from runtime.explanations.agreement import spearman
from tests.fake_cuda import FakeGpu
from train.checkpoint import Checkpoint
from train.data.images import ImageData

PEERS = ["torch.compile FP32", "OpenVINO bf16", "ONNX Runtime PTQ", "NNCF PTQ"]
NAMES = ["PyTorch FP32", "ONNX Runtime FP32", "OpenVINO FP32", "ONNX Runtime INT8", OURS]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _no_gpu(gpu: FakeGpu) -> None:
    """Whatever the machine has: tests/test_bench_gpu_contenders.py is about GPUs."""
    gpu.devices = 0


def test_every_contender_classifies_the_same_pixels_alike(digits_checkpoint: Checkpoint, tmp_path: Path) -> None:
    images = digits_checkpoint.samples["images"][:32].permute(0, 2, 3, 1).contiguous().numpy()
    found = contenders(digits_checkpoint, tmp_path, threads=1, peers=False)
    assert list(found.ready) == NAMES
    assert found.missing == {}
    logits = {name: contender.classify(images) for name, contender in found.ready.items()}
    reference = logits["PyTorch FP32"]
    for name, value in logits.items():
        assert value.shape == (32, 10)
        assert np.array_equal(value.argmax(1), reference.argmax(1))
        # Float engines differ by the order of sums; INT8 ones by the grids that float leaves out.
        assert np.abs(value - reference).max() < (1.0 if "INT8" in name else 1e-4)


@pytest.mark.slow  # torch.compile alone takes half a minute
@pytest.mark.filterwarnings("ignore")  # theirs
def test_the_peers_are_set_up_to_classify_as_the_float_network(
    digits_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    pytest.importorskip("nncf", reason="a peer; pip install 'clearpact[peers]'")
    images = digits_checkpoint.samples["images"].permute(0, 2, 3, 1).contiguous().numpy()
    peers = contenders(digits_checkpoint, tmp_path, threads=1)
    assert peers.missing == {}
    found = peers.ready
    reference = found["PyTorch FP32"].classify(images)
    for name, tolerance, same in (
        ("torch.compile FP32", 1e-4, 1.0),
        ("OpenVINO bf16", 0.5, 0.98),
        ("ONNX Runtime PTQ", 1.5, 0.98),
        ("NNCF PTQ", 1.5, 0.98),
    ):
        logits = found[name].classify(images)
        assert np.abs(logits - reference).max() < tolerance, name
        assert (logits.argmax(1) == reference.argmax(1)).mean() >= same, name
    # They are compared with int8 files, so theirs must be: less than half of the float file's bytes.
    for name, by in (("ONNX Runtime PTQ", "ONNX Runtime FP32"), ("NNCF PTQ", "OpenVINO FP32")):
        assert 0 < found[name].file_bytes < found[by].file_bytes / 2
    loadings = {name: contender.loading for name, contender in found.items()}
    starts = in_turns(loadings, shape=(8, 8, 1), threads=1, starts=1)
    assert list(starts) == [*NAMES, *PEERS]
    assert all(start.first_prediction_ms > 0 and start.peak_memory_bytes > 30e6 for start in starts.values())


@pytest.mark.slow  # NNCF and ONNX Runtime quantize
def test_ratios_to_other_quantization_need_four_contenders_only(
    digits_checkpoint_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--only-ptq", "--instances", "1", "--seconds", "0.1", "--starts", "0", "--json"]
    main([str(digits_checkpoint_path), *options])
    result = json.loads(capsys.readouterr().out)
    assert result["latency"].keys() == {*PTQ, *PTQ.values()}
    assert result["ratio_to_ptq"].keys() == PTQ.keys()
    assert result["only_ptq"]
    assert not set(result["missing"]) & set(PEERS[:2])  # what nobody asked for is not missing


@pytest.mark.slow  # four fresh processes, two of which import torch
def test_cold_start_and_memory_are_those_of_fresh_processes(digits_checkpoint: Checkpoint, tmp_path: Path) -> None:
    found = contenders(digits_checkpoint, tmp_path, threads=1, peers=False).ready
    loadings = {name: found[name].loading for name in ("PyTorch FP32", OURS)}
    starts = in_turns(loadings, shape=(8, 8, 1), threads=1, starts=1)
    torch_start, ours = starts.values()
    # Measured: 98 and 618 MB. Times are not compared: on a busy machine a single start says nothing.
    assert 30e6 < ours.peak_memory_bytes < torch_start.peak_memory_bytes / 2
    assert min(ours.first_prediction_ms, torch_start.first_prediction_ms) > 50
    broken = {OURS: dataclasses.replace(loadings[OURS], path=tmp_path / "absent.onnx")}
    with pytest.raises(ModelError, match=f"^{OURS}: cold start failed .*absent.onnx: no such file"):
        in_turns(broken, shape=(8, 8, 1), threads=1, starts=1)


def test_speed_and_quality_are_printed_and_recorded_after_what_is_there(
    digits_checkpoint_path: Path, digits: ImageData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One run, since it exports five contenders and starts a process for each size of batch."""
    record = tmp_path / "results" / "latency.jsonl"
    record.parent.mkdir()
    record.write_text('{"old": 1}')  # and no newline at its end
    arguments = [
        str(digits_checkpoint_path),
        "--seconds",
        "0.01",
        "--no-peers",
        "--starts",
        "0",
        "--instances",
        "1",
    ]
    arguments += ["--data", "digits", "--map-images", "60"]
    main([*arguments, "--batch", "2,3", "--allow-dirty", "--record", str(record)])
    old, first, last = (json.loads(line) for line in record.read_text().splitlines())
    assert old == {"old": 1}
    assert (first["input"], last["input"]) == ([2, 8, 8, 1], [3, 8, 8, 1])
    speed, table, resources = capsys.readouterr().out.split("\n\n")
    check_speed(first, speed.splitlines())
    check_quality(last, table.splitlines(), resources.splitlines(), n=len(digits.test_images))
    with pytest.raises(OptionError, match="accuracy is compared without --explain"):
        main([*arguments, "--explain"])


def check_speed(found: dict[str, Any], printed: list[str]) -> None:
    """A person reads one row for each contender, and what others need."""
    assert list(found["latency"]) == list(found["ratio_to_OpenVINO INT8"]) == NAMES
    same = {"ratio": 1.0, "low": None, "high": None, "instances": 1}
    assert found["ratio_to_OpenVINO INT8"][OURS] == same
    assert (found["instances"], found["warm_up_seconds"]) == (1, 0.01)
    assert (found["arch"], found["bits"], found["threads"]) == ("cnn2", 8, 1)
    assert all(row["n"] >= 20 and row["p50_ms"] > 0 for row in found["latency"].values())
    assert (found["grid"], found["trained_on"], found["ratio_to_ptq"]) == ("0..127", "digits", {})
    assert found["environment"]["commit"]
    assert "cnn2, input [2, 8, 8, 1], threads 1" in printed[0]
    assert printed[1].endswith("rounds in turns, fresh processes: 1; each warmed up 0.01 s")
    assert [line[:18].strip() for line in printed[3:8]] == NAMES
    assert printed[7].split()[-2:] == ["-", "1.000"]
    assert printed[8].endswith("runs, and p99 needs 1,000; measure longer")
    assert "no interval with --instances 1; it needs 5" in printed
    assert [line for line in printed[1:9] if len(line) > 80] == []


def check_quality(found: dict[str, Any], table: list[str], resources: list[str], *, n: int) -> None:
    """All contenders on the same n images."""
    quality, maps = found["quality"], found["maps"]
    assert list(quality) == list(maps) == NAMES
    assert quality["PyTorch FP32"]["agreement"] == 100
    step = 100 / n
    for row in quality.values():
        assert row["accuracy"] / step == pytest.approx(round(row["accuracy"] / step))
        assert abs(row["accuracy"] - quality["PyTorch FP32"]["accuracy"]) <= 100 - row["agreement"] + 1e-9
    for name, row in maps.items():
        assert row["spearman"] == (1 if name == "PyTorch FP32" else pytest.approx(1, abs=0.08))
        assert row["masked_auc"] == pytest.approx(maps["PyTorch FP32"]["masked_auc"], abs=4)
        assert ("INT8" in name) == (row["spearman"] < 1 - 1e-4)
    assert found["first_prediction"] == {}
    assert table[0].startswith("on digits")
    for lines in (table, resources):
        assert [line[:24].strip() for line in lines[1:6]] == NAMES
        assert all(len(line) <= 80 for line in lines[:6])
    row = maps[OURS]
    assert resources[5].split()[2:] == [
        "-", "-", f"{found['file_bytes'][OURS] / 1000:,.0f}", f"{row['masked_auc']:.2f}", f"{row['spearman']:.3f}"
    ]  # fmt: skip
    assert resources[-4:-1] == [
        "not compared: TensorRT FP16, TensorRT INT8",
        "  CUDA: cudaGetDeviceCount failed (cudaErrorNoDevice: nodevice)",
        "  check that nvidia-smi (on Jetson: tegrastats) shows the GPU",
    ]
    assert [line for line in resources[-4:-1] if len(line) > 80] == []


def test_peers_that_are_not_installed_are_named_with_what_installs_them(
    digits_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "nncf", None)
    monkeypatch.setattr(torch, "compile", lambda network, **_: network)  # half a minute, and not what is tested
    found = contenders(digits_checkpoint, tmp_path, threads=1)
    assert list(found.ready) == [*NAMES, *PEERS[:-1]]
    assert found.missing == {"NNCF PTQ": "pip install 'clearpact[peers]'"}


def test_what_was_missing_is_read_from_records_with_and_without_reasons() -> None:
    assert missing_by_reason({"missing": ["NNCF PTQ", "OpenVINO bf16"]}) == {
        "pip install 'clearpact[peers]'": ["NNCF PTQ", "OpenVINO bf16"]
    }
    assert missing_by_reason({"missing": {"a": "x", "b": "y", "c": "x"}}) == {"x": ["a", "c"], "y": ["b"]}
    assert missing_by_reason({"missing": []}) == missing_by_reason({}) == {}


def test_append_adds_lines_and_keeps_the_old_ones(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.jsonl"
    for n in range(3):
        append(path, {"n": n, "text": "µs\n"})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"n": n, "text": "µs\n"} for n in range(3)
    ]
    assert list(path.parent.iterdir()) == [path]
    with pytest.raises(FileError, match=f"^{tmp_path}: is a folder"):
        append(tmp_path, {})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "0"], "^--batch 0: expected whole numbers from 1, comma-separated, such as 1,8,32$"),
        (
            ["--threads", "0"],
            "^--threads, --map-images, --instances: expected whole numbers from 1; --starts: from 0$",
        ),
        (
            ["--instances", "0"],
            "^--threads, --map-images, --instances: expected whole numbers from 1; --starts: from 0$",
        ),
        (
            ["--starts", "-1"],
            "^--threads, --map-images, --instances: expected whole numbers from 1; --starts: from 0$",
        ),
        (["--seconds", "-1"], "^--seconds -1: expected a number above 0$"),
        (["--only-ptq", "--explain"], "^--only-ptq with --no-peers or --explain: these have no such contenders"),
    ],
)
def test_wrong_options_are_refused(digits_checkpoint_path: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        main([str(digits_checkpoint_path), *arguments])


def test_a_record_that_cannot_be_written_is_refused_before_measuring(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=f"^{tmp_path}: is a folder, expected the name of a file to write"):
        main(["absent.pt", "--allow-dirty", "--record", str(tmp_path)])


def test_a_missing_checkpoint_is_one_line_of_a_real_process() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench.compare", "absent.pt"],
        cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: absent.pt: no such file; check the path\n"


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # torch.compile's own deprecations, none of which are ours
def test_every_explainer_gives_the_map_of_the_predicted_class(
    digits_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    images = digits_checkpoint.samples["images"][:16].permute(0, 2, 3, 1).contiguous().numpy()
    loadings = explainers(digits_checkpoint, tmp_path)
    assert loadings.missing == {}
    found = {name: opened(loading, threads=1)(images) for name, loading in loadings.ready.items()}
    maps = {name: each[1] for name, each in found.items() if isinstance(each, tuple)}
    expected = maps["Captum Saliency"]
    for name in ("PyTorch autograd", "torch.compile autograd"):
        assert np.allclose(maps[name], expected, rtol=1e-3, atol=1e-5)
    for name in ("ONNX Runtime FP32 + map", "OpenVINO FP32 + map"):
        assert np.allclose(maps[name], expected, rtol=1e-3, atol=1e-4)
    for name in ("ONNX Runtime INT8 + map", OURS_WITH_MAP):
        assert spearman(maps[name], expected).mean() > 0.9
    assert isinstance(found[OURS], np.ndarray)  # the class alone
