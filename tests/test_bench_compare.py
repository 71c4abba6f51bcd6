from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.compare import main
from bench.contenders import OURS, contenders, missing_peers
from bench.explainers import OURS_WITH_MAP, explainers
from bench.record import append
from bench.statistics import Ratio, ratio
from runtime.agreement import spearman
from runtime.errors import FileError, OptionError
from train.checkpoint import Checkpoint
from train.data import ImageData

PEERS = ["torch.compile FP32", "OpenVINO bf16", "ONNX Runtime PTQ", "NNCF PTQ"]
NAMES = ["PyTorch FP32", "ONNX Runtime FP32", "OpenVINO FP32", "ONNX Runtime INT8", OURS]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_every_contender_classifies_the_same_pixels_alike(digits_checkpoint: Checkpoint) -> None:
    images = digits_checkpoint.samples["images"][:32].permute(0, 2, 3, 1).contiguous().numpy()
    found = contenders(digits_checkpoint, threads=1, peers=False)
    assert list(found) == NAMES
    assert missing_peers(found) == list(PEERS)
    logits = {name: contender.classify(images) for name, contender in found.items()}
    reference = logits["PyTorch FP32"]
    for name, value in logits.items():
        assert value.shape == (32, 10)
        assert np.array_equal(value.argmax(1), reference.argmax(1))
        # Float engines differ by the order of sums; INT8 ones by the grids that float leaves out.
        assert np.abs(value - reference).max() < (1.0 if "INT8" in name else 1e-4)


@pytest.mark.slow  # torch.compile alone takes half a minute
@pytest.mark.filterwarnings("ignore")  # theirs
def test_the_peers_are_set_up_to_classify_as_the_float_network(digits_checkpoint: Checkpoint) -> None:
    pytest.importorskip("nncf", reason="a peer; pip install 'clearpact[peers]'")
    images = digits_checkpoint.samples["images"].permute(0, 2, 3, 1).contiguous().numpy()
    found = contenders(digits_checkpoint, threads=1)
    assert missing_peers(found) == []
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


def test_quality_of_every_contender_on_the_same_images(
    digits_checkpoint_path: Path, digits: ImageData, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(digits_checkpoint_path), "--seconds", "0.01", "--no-peers", "--data", "digits"]
    main([*arguments, "--json"])
    quality = json.loads(capsys.readouterr().out)["quality"]
    assert list(quality) == NAMES
    assert quality["PyTorch FP32"]["agreement"] == 100
    step = 100 / len(digits.test_images)
    for row in quality.values():
        assert row["accuracy"] / step == pytest.approx(round(row["accuracy"] / step))
        assert abs(row["accuracy"] - quality["PyTorch FP32"]["accuracy"]) <= 100 - row["agreement"]
    main(arguments)
    table = capsys.readouterr().out.split("\n\n")[1].splitlines()
    assert table[0].startswith("on digits")
    assert [line[:24].strip() for line in table[1:6]] == NAMES
    assert all(len(line) <= 80 for line in table[:6])
    with pytest.raises(OptionError, match="accuracy is compared without --explain"):
        main([*arguments, "--explain"])


def test_the_interval_of_a_ratio_holds_its_median() -> None:
    rng = np.random.default_rng(0)
    by = rng.uniform(1, 2, 400)
    found = ratio(3 * by * rng.lognormal(0, 0.1, 400), by)
    assert found.low < found.median < found.high
    assert found.median == pytest.approx(3, rel=0.02)
    # Half-width of the median's 95 % interval of a lognormal: 1.96 * sqrt(pi / 2) * 0.1 / sqrt(400) of it.
    assert found.high - found.low == pytest.approx(2 * 1.96 * np.sqrt(np.pi / 2) * 0.1 / 20 * 3, rel=0.4)
    assert ratio(by, by) == Ratio(1.0, 1.0, 1.0)


def test_results_are_recorded_after_those_that_are_there(
    digits_checkpoint_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = tmp_path / "results" / "latency.jsonl"
    record.parent.mkdir()
    record.write_text('{"old": 1}')  # and no newline at its end
    arguments = [str(digits_checkpoint_path), "--seconds", "0.01", "--no-peers", "--record", str(record)]
    main([*arguments, "--json", "--batch", "2"])
    printed = json.loads(capsys.readouterr().out)
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    assert lines == [{"old": 1}, printed]
    assert list(printed["latency"]) == list(printed["ratio_to_OpenVINO INT8"]) == NAMES
    assert printed["ratio_to_OpenVINO INT8"][OURS] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert (printed["arch"], printed["bits"], printed["input"], printed["threads"]) == ("cnn2", 8, [2, 8, 8, 1], 1)
    assert all(row["n"] >= 20 and row["p50_ms"] > 0 for row in printed["latency"].values())
    assert printed["environment"]["commit"]


def test_a_person_reads_one_row_per_contender(
    digits_checkpoint_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(digits_checkpoint_path), "--seconds", "0.01", "--no-peers"])
    out = capsys.readouterr().out.splitlines()
    assert "cnn2, input [1, 8, 8, 1], threads 1" in out[0]
    assert [line[:18].strip() for line in out[2:7]] == NAMES
    assert out[6].split()[-4:] == ["1.00", "1.00", "..", "1.00"]
    assert all(len(line) <= 80 for line in out[1:7])


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
        (["--batch", "0"], "^--batch 0 --threads 1: expected whole numbers from 1$"),
        (["--threads", "0"], "^--batch 1 --threads 0: expected whole numbers from 1$"),
        (["--seconds", "-1"], "^--seconds -1: expected a number above 0$"),
    ],
)
def test_wrong_options_are_refused(digits_checkpoint_path: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        main([str(digits_checkpoint_path), *arguments])


def test_a_record_that_cannot_be_written_is_refused_before_measuring(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=f"^{tmp_path}: is a folder, expected the name of a file to write"):
        main(["absent.pt", "--record", str(tmp_path)])


def test_a_missing_checkpoint_is_one_line_of_a_real_process() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench.compare", "absent.pt"],
        cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: absent.pt: no such file; check the path\n"


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # torch.compile's own deprecations, none of which are ours
def test_every_explainer_gives_the_map_of_the_predicted_class(digits_checkpoint: Checkpoint) -> None:
    images = digits_checkpoint.samples["images"][:16].permute(0, 2, 3, 1).contiguous().numpy()
    calls = explainers(digits_checkpoint, images, threads=1)
    expected = calls["Captum Saliency"]().detach().numpy().max(1)  # type: ignore[attr-defined]
    for name in ("PyTorch autograd", "torch.compile autograd"):
        _, (gradient,) = calls[name]()  # type: ignore[misc]
        assert np.allclose(gradient.abs().amax(1).numpy(), expected, rtol=1e-3, atol=1e-5)
    for name in ("ONNX Runtime FP32 + map", "OpenVINO FP32 + map"):
        assert np.allclose(calls[name]()["saliency"], expected, rtol=1e-3, atol=1e-4)  # type: ignore[index]
    for name in ("ONNX Runtime INT8 + map", OURS_WITH_MAP):
        assert spearman(calls[name]()["saliency"], expected).mean() > 0.9  # type: ignore[index]
    assert list(calls[OURS]()) == ["logits"]  # type: ignore[call-overload]
