from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.measure.statistics import QUANTILE_PERCENTS
from bench.report.__main__ import main
from bench.report.charts import SERIES, chart, line_chart, spectrum
from bench.report.page import Html, document, tag
from bench.report.provenance import train_command
from bench.report.sources import read
from bench.report.speed import pareto_front
from runtime.errors import ClearpactError
from tests.commands import run_command
from tests.html_page import Element, assert_sound, read_page
from train import checkpoint as checkpoints
from train import recipes
from train.checkpoint import Checkpoint
from train.options import training_parser
from train.run import settings

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
HOSTILE = "<script>alert(1)</script>\"'&$x_1$ <img src=x onerror=alert(2)>"


def latency(p50_ms: float, **more: Any) -> dict[str, Any]:
    return {"n": 1000, "p50_ms": p50_ms, "p90_ms": 1.1 * p50_ms, "p99_ms": 1.5 * p50_ms, "mean_ms": p50_ms,
            "std_ms": 0.1, **more}  # fmt: skip


def comparison(times: dict[str, float], accuracies: dict[str, float] | None = None, **more: Any) -> dict[str, Any]:
    quality = {
        name: {"accuracy": percent, "sensitivity": percent, "specificity": 99.0, "agreement": 98.5}
        for name, percent in (accuracies or {}).items()
    }
    ratio = {"ratio": 2.0, "low": 1.9, "high": 2.1, "instances": 8}
    where = {"processor": "CPU", "cores": 2, "python": "3.12", "command": "python -m bench.compare c.pt"}
    return {
        "bench": "compare", "arch": "cnn2", "bits": 8, "input": [1, 8, 8, 1], "threads": 1,
        "latency": {name: latency(p50_ms) for name, p50_ms in times.items()},
        "ratio_to_OpenVINO INT8": {name: dict(ratio) for name in times},
        "file_bytes": dict.fromkeys(times, 1_234_000), "data": "digits", "quality": quality,
        "missing": ["NNCF PTQ"], "environment": where, **more,
    }  # fmt: skip


def report(tmp_path: Path, *sources: object, records: list[dict[str, Any]] | None = None) -> Element:
    """Write a report of sources and records and read it."""
    given = [str(source) for source in sources]
    if records is not None:
        (tmp_path / "given.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
        given.append(str(tmp_path / "given.jsonl"))
    main([*given, "-o", str(tmp_path / "report.html")])
    root = read_page((tmp_path / "report.html").read_text())
    assert_sound(root)
    return root


def section(root: Element, title: str) -> Element:
    (found,) = [s for s in root.find("section") if s.find("h2")[0].text == title]
    return found


def test_text_cannot_become_markup() -> None:
    found = tag("td", HOSTILE, Html("<b>made here</b>"), title=HOSTILE, data_x=None)
    assert "<script" not in found
    assert "<img" not in found
    root = read_page(document(HOSTILE, HOSTILE, []))
    assert_sound(root)
    assert root.find("h1")[0].text == root.find("title")[0].text == HOSTILE
    (cell,) = read_page(found).find("td")
    assert (cell.text, cell.attributes) == (f"{HOSTILE}made here", {"title": HOSTILE})


def test_what_no_file_can_hold_is_replaced(tmp_path: Path) -> None:
    assert tag("p", "a\x00b\ud800c\td") == "<p>a�b�c\td</p>"
    picture = line_chart({"a\x01": ([1], [2]), "漢字": ([1], [2])}, title="\x02", xlabel="x", ylabel="y")
    assert "漢字" in picture
    root = report(tmp_path, records=[comparison({"a\x00\ud800": 1.0, "_b": 2.0})])
    assert "_b" in section(root, "Latency").text


def test_a_picture_holds_its_names_its_colours_and_ids_of_its_own() -> None:
    many = {f"layer {n}": ([1, 2], [n, n + 1]) for n in range(20)}
    few = {HOSTILE: ([1.0, 2.0], [3.0, 4.5]), "b": ([1.0], [2.0])}
    for series in (many, few):
        picture = line_chart(series, title="T", xlabel="epoch", ylabel="alpha")
        (svg,) = read_page(picture).find("svg")
        texts = [element.text.strip() for element in svg.find("text")]
        assert set(series) <= set(texts)
        assert "#01" not in picture
        assert "#02" not in picture
        assert "#03" not in picture
        assert "font-family" not in picture
        assert "currentColor" in picture
    assert "var(--series-0)" in picture
    assert "3 at 1 to 4.5 at 2" in svg.find("desc")[0].text
    assert len({spectrum(n, 20) for n in range(20)}) == 20
    assert len(set(SERIES)) == 6
    once, twice = (chart(lambda axes: axes.plot([1, 2]), title=t, description="A line from 1 to 2.") for t in "ab")
    assert_sound(read_page(document("two", "", [])))
    ids = [[e.attributes["id"] for e in read_page(p).walk() if "id" in e.attributes] for p in (once, twice)]
    assert ids[0]
    assert not set(ids[0]) & set(ids[1])


def test_the_pareto_front_is_what_nothing_is_as_fast_and_as_accurate_as() -> None:
    points = {"slow": (9.0, 99.0), "same, slower": (5.0, 98.0), "middle": (4.0, 98.0), "fast": (1.0, 90.0)}
    assert pareto_front(points) == ["fast", "middle", "slow"]
    assert pareto_front({"a": (1.0, 98.0), "b": (1.0, 99.0)}) == ["b"]


def test_recorded_comparisons_become_pictures_and_numbers(tmp_path: Path) -> None:
    times = {"PyTorch FP32": 2.0, "OpenVINO INT8": 0.5, "NNCF PTQ": 0.25}
    accuracies = {"PyTorch FP32": 99.0, "OpenVINO INT8": 99.25, "NNCF PTQ": 98.5}
    quantiles = [0.4 + 0.01 * percent for percent in QUANTILE_PERCENTS]
    records = [comparison({"old": 7.0}), comparison(times, accuracies), comparison(times, input=[32, 8, 8, 1])]
    records[1]["latency"]["OpenVINO INT8"]["quantiles_ms"] = quantiles
    root = report(tmp_path, records=records)
    front = section(root, "Accuracy against latency")
    assert "On the Pareto front: NNCF PTQ, OpenVINO INT8." in front.find("figcaption")[0].text
    assert "OpenVINO INT8: 0.5 ms, 99.25 %" in front.find("desc")[0].text
    times_section = section(root, "Latency")
    assert len(times_section.find("svg")) == 2  # the old one was measured again
    rows = [[cell.text for cell in row.children if isinstance(cell, Element)]
            for row in times_section.find("table")[0].find("tr")]  # fmt: skip
    assert rows[0] == [
        "",
        "p50 ms",
        "p99 ms",
        "times OpenVINO INT8",
        "accuracy %",
        "as float %",
        "file kB",
    ]
    assert rows[1] == ["NNCF PTQ", "0.250", "0.375", "2.00 (1.90 .. 2.10)", "98.50", "98.50", "1,234"]
    assert [row[0] for row in rows[2:]] == ["OpenVINO INT8", "PyTorch FP32"]
    assert "Not compared: NNCF PTQ; pip install 'clearpact[peers]'." in times_section.text
    assert "python -m bench.compare c.pt" in section(root, "Commands").text
    assert "python -m bench.report runs/NAME -o report.html" in section(root, "Training").text


def test_what_is_ours_is_held_against_what_runs_on_the_same_device(tmp_path: Path) -> None:
    times = {"PyTorch FP32": 8.0, "OpenVINO INT8": 2.0, "PyTorch CUDA FP32": 0.75, "TensorRT FP16": 0.4}
    with_plan = times | {"TensorRT INT8": 0.25}
    maps = {"Captum Saliency": 9.0, "OpenVINO INT8 + map": 3.0, "TensorRT INT8 + map": 0.5}
    gpu = {"TensorRT INT8": "no GPU", "TensorRT FP16": "no GPU", "NNCF PTQ": "pip install 'clearpact[peers]'"}
    for given, tile in (
        (comparison(with_plan, dict.fromkeys(with_plan, 99.0)), "cnn2 on TensorRT INT8, 3.0 times as fast as "
         "PyTorch CUDA FP32"),
        (comparison(times, missing=gpu), "cnn2 on OpenVINO INT8, 4.0 times as fast as PyTorch FP32"),
        # Without an opponent on the GPU, its plan is not held against one on the CPU.
        (comparison(maps, bench="compare-explain"), "cnn2 on OpenVINO INT8, 3.0 times as fast as Captum Saliency"),
        (comparison(maps | {"Captum CUDA": 2.0}, bench="compare-explain"),
         "cnn2 on TensorRT INT8, 4.0 times as fast as Captum CUDA"),
    ):  # fmt: skip
        root = report(tmp_path, records=[given])
        (found,) = section(root, "At a glance").find("div", class_="tile")
        assert tile in found.text
        if given.get("missing") == gpu:
            said = section(root, "Latency").text
            assert "Not compared: TensorRT INT8, TensorRT FP16; no GPU." in said
            assert "Not compared: NNCF PTQ; pip install 'clearpact[peers]'." in said
        elif given["quality"]:
            names = {span.text for span in section(root, "Latency").find("span", class_="ours")}
            assert names == {"OpenVINO INT8", "TensorRT INT8"}
            texts = [text.text for text in section(root, "Accuracy against latency").find("text")]
            assert set(with_plan) <= set(texts)


def test_single_files_are_points_where_both_are_recorded(tmp_path: Path) -> None:
    def pair(model: str, p50_ms: float, accuracy: float) -> list[dict[str, Any]]:
        shared = {"model": model, "engine": "ort 1.31", "arch": "cnn2", "precision": "int8", "target": "ort"}
        return [
            {"bench": "accuracy", "data": "digits", "n": 9, "accuracy": accuracy, "sensitivity": 1.0,
             "specificity": 1.0, "confusion": [[9]], **shared},
            {"bench": "latency", "latency": {"1": {"class": latency(p50_ms)}}, "device": "cpu", "threads": None,
             "cold_start": None, "peak_memory_bytes": 2**20, **shared},
        ]  # fmt: skip

    root = report(tmp_path, records=[*pair("a.onnx", 2.0, 90.0), *pair("b.onnx", 1.0, 95.0)])
    assert "b.onnx, ort: 1 ms, 95.00 %" in section(root, "Accuracy against latency").find("desc")[0].text
    assert [row.find("th")[0].text for row in section(root, "Latency").find("tr")] == ["file", "a.onnx", "b.onnx"]


def test_names_in_records_cannot_execute(tmp_path: Path) -> None:
    root = report(
        tmp_path, records=[comparison({HOSTILE: 1.0, "b": 2.0}, {HOSTILE: 90.0, "b": 91.0}, arch=HOSTILE)]
    )
    assert HOSTILE in section(root, "Latency").find("td", class_="number")[0].parent.text  # type: ignore[union-attr]
    assert HOSTILE in [text.text for text in section(root, "Accuracy against latency").find("text")]


@pytest.mark.slow  # 9 s; that the tables can be written from them is tested each time
def test_the_records_of_this_project_can_be_read(tmp_path: Path) -> None:
    root = report(tmp_path, RESULTS)
    assert len(section(root, "Latency").find("svg")) >= 6
    assert "AMD EPYC" in section(root, "Environment").text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("no json", "given.jsonl, line 2: expected one result of a bench command; remove the line"),
        ('{"a": 1}', "given.jsonl, line 2: expected one result of a bench command; remove the line"),
        ("[" * 5000, "given.jsonl, line 2: expected one result of a bench command; remove the line"),
        ('{"bench": "compare", "latency": 3}', "line 2: a 'compare' record of another form, expected what its"),
        ('{"bench": "saliency", "networks": [3]}', "line 2: a 'saliency' record of another form, expected what"),
    ],
)  # fmt: skip
def test_lines_that_are_no_records_are_named(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "given.jsonl").write_text(f"\n{line}\n")
    with pytest.raises(ClearpactError, match=message):
        main([str(tmp_path / "given.jsonl"), "-o", str(tmp_path / "report.html")])
    assert not (tmp_path / "report.html").exists()


def test_wrong_sources_are_one_line_and_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").write_text("")
    for source, message in (
        ("empty", "empty: holds neither ckpt.pt nor .jsonl files; expected a run folder, ckpt.pt,"),
        ("a.txt", "a.txt: expected a run folder, ckpt.pt, .onnx file, .jsonl file or a folder of them"),
        ("absent.jsonl", "absent.jsonl: no such file; check the path"),
    ):
        done = run_command(main, [str(tmp_path / source), "-o", str(tmp_path / "report.html")], capsys)
        assert (done.status, done.out) == (2, "")
        assert done.err.count("\n") == 1
        assert message in done.err
    assert not (tmp_path / "report.html").exists()


def test_a_run_shows_its_training(
    tmp_path: Path, digits_checkpoint_path: Path, digits_checkpoint: Checkpoint
) -> None:
    root = report(tmp_path, digits_checkpoint_path.parent)
    training = section(root, "Training")
    titles = [svg.find("title")[0].text for svg in training.find("svg")]
    run = digits_checkpoint_path.parent.name
    assert titles == [f"Alpha over training of {run}", f"Accuracy of {run}", f"Training loss of {run}"]
    last = digits_checkpoint.history[-1]
    assert f"relu1: {digits_checkpoint.history[0]['alpha/relu1']:.4g} at 1 to" in training.find("desc")[0].text
    assert f"test {last['test_accuracy']:.2f} %" in training.text
    commands = [found.text for found in section(root, "Commands").find("code")]
    assert train_command(digits_checkpoint) in commands
    assert f"python -m export.onnx {digits_checkpoint_path} --int8" in commands


def test_the_training_command_gives_the_same_settings(digits_checkpoint: Checkpoint) -> None:
    for run in recipes.PUBLISHED_RUNS:
        checkpoint = checkpoints.Checkpoint(
            {"name": run.arch}, run.quant, digits_checkpoint.input, (), run.recipe, {}, {}
        )
        words = train_command(checkpoint).split()
        assert words[:3] == ["python", "-m", "train"]
        assert settings(training_parser().parse_args(words[3:])) == (run.arch, run.quant, run.recipe)


def test_sources_are_taken_once(tmp_path: Path, digits_checkpoint_path: Path) -> None:
    folder = digits_checkpoint_path.parent
    assert len(read([str(folder), str(digits_checkpoint_path)]).runs) == 1


def test_times_of_other_networks_are_not_put_at_a_run(digits_checkpoint_path: Path, tmp_path: Path) -> None:
    times = {"PyTorch FP32": 8.0, "OpenVINO INT8": 2.0}
    others = [
        comparison(times, arch="resnet20", trained_on="cifar10"),
        comparison(times, trained_on="mnist"),
        comparison(times),  # of before records said it
    ]
    for records, tiles in ((others, 0), ([*others, comparison(times, trained_on="digits")], 1)):
        root = report(tmp_path, digits_checkpoint_path, records=records)
        found = [tile.text for tile in section(root, "At a glance").find("div", class_="tile")]
        assert sum("Class of one image" in text for text in found) == tiles
