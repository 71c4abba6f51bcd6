from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from bench.evidence.accuracy_tables import results, saliency, two_classes
from bench.evidence.explanation_tables import mask_shares, methods
from bench.evidence.published import PUBLISHED
from bench.evidence.speed_tables import against_ptq, environment, latency
from bench.measure import record
from bench.rows import TABLES as ROWS
from bench.tables import PAGES, ROOT, STALE, TABLES, main, rewritten
from runtime.errors import FileError
from train.recipes import PUBLISHED_RUNS


def run(row: str, accuracy: float, seed: int = 0, suffix: str = "", **recipe: Any) -> dict[str, Any]:
    """Return a record of the kind that bench.rows appends; `suffix` ends its name."""
    data, arch, bits, method = row.rsplit("-", 3)
    settings = {"data": data, "method": method, "seed": seed, "epochs": 10, "init": "", "teacher": "", **recipe}
    return {"bench": "training row", "row": row + suffix, "test_accuracy": accuracy, "arch": arch,
            "epochs": settings["epochs"], "bits": int(bits.removesuffix("bit")), "recipe": settings}  # fmt: skip


def ours(table: str) -> list[str]:
    return [line for line in table.splitlines() if "| ours: `" in line]


def test_the_page_shows_what_is_recorded(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--check"]) == 0, capsys.readouterr().out


def test_the_pages_have_every_table() -> None:
    text = "".join((ROOT / page).read_text() for page in PAGES)
    assert [name for name in TABLES if f"<!-- table: {name} -->" not in text] == []


def test_the_gpu_is_part_of_where_it_was_measured() -> None:
    where = {"processor": "CPU", "cores": 2, "system": "Linux", "python": "3.12", "torch": "2.14",
             "openvino": "2026.4", "onnxruntime": "1.31"}  # fmt: skip
    found = {"bench": "compare", "arch": "resnet20", "threads": 1, "input": [1, 32, 32, 3], "environment": where}
    said = "On CPU, 2 virtual cores, Linux, Python 3.12, torch 2.14, ONNX Runtime 1.31, OpenVINO 2026.4"
    assert environment([found]) == f"{said}."
    assert environment([{**found, "environment": {**where, "gpu": "Orin"}}]) == f"{said}, GPU Orin."
    del where["onnxruntime"]
    assert environment([{**found, "environment": {**where, "onnxruntime-gpu": "1.31"}}]) == f"{said}."


def test_a_stale_table_is_named_and_rewritten_and_the_rest_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    readme, folder = tmp_path / "README.md", tmp_path / "results"
    before, after = "# Title\n\nText.\n\n<!-- table: results -->\n", "<!-- end -->\n\nMore text.\n"
    readme.write_text(before + after)
    record.append(folder / "training.jsonl", run("mnist-cnn2-8bit-sgt", 99.41))
    arguments = ["--page", str(readme), "--results", str(folder)]
    assert main([*arguments, "--check"]) == STALE
    assert capsys.readouterr().out == f"{readme}: stale: results; run python -m bench.tables\n"
    assert readme.read_text() == before + after
    assert main(arguments) == 0
    text = readme.read_text()
    assert text.startswith(before)
    assert text.endswith(after)
    assert "| mnist | cnn2 | 8 | sgt | 10 | **99.41** | 1 | last epoch | ours: `mnist-cnn2-8bit-sgt` |\n" in text
    assert main([*arguments, "--check"]) == 0
    record.append(folder / "training.jsonl", run("mnist-cnn2-8bit-sgt", 99.52))
    assert main([*arguments, "--check"]) == STALE


def test_seeds_are_one_line_with_mean_and_sample_deviation() -> None:
    row, accuracies = "mnist-cnn2-8bit-sgt", [99.4, 99.5, 99.7]
    runs = [
        run(row, accuracy, seed, suffix, init=f"runs/mnist-cnn2-8bit-plain{suffix}/ckpt.pt")
        for seed, (accuracy, suffix) in enumerate(zip(accuracies, ("-0", "-1", "-seed2"), strict=True))
    ]
    runs.insert(0, run(row, 90.0, suffix="-0", epochs=5))  # an older recipe does not count
    runs.insert(1, run(row, 91.0, suffix="-0", init="runs/mnist-cnn2-8bit-plain-0/ckpt.pt"))  # nor an older run
    runs.append(run(row, 99.6, epochs=36))  # a run of its own
    longer, short = ours(results(runs))
    assert f"| 10 | **99.53 ± {statistics.stdev(accuracies):.2f}** | 3 |" in short
    assert "| 36 | **99.60** | 1 |" in longer


def test_rows_stand_by_data_then_bits_then_accuracy_beside_the_papers() -> None:
    runs = [run("cifar10-resnet20-2bit-sgt", 90.1), run("cifar10-resnet20-4bit-sgt", 92.1),
            run("mnist-cnn2-8bit-sgt", 99.3)]  # fmt: skip
    lines = results(runs).splitlines()[2:]
    assert len(lines) == len(PUBLISHED) + 3
    cifar10 = [line.split(" | ") for line in lines if line.startswith("| cifar10 ")]
    assert [(cells[2], cells[5]) for cells in cifar10] == [
        ("float", "96.35"), ("4", "92.45"), ("4", "**92.10**"), ("4", "90.80"), ("4", "76.12"),
        ("4", "75.55"), ("3", "90.60"), ("2", "90.96"), ("2", "**90.10**"), ("2", "88.90"),
    ]  # fmt: skip


def test_rows_recorded_before_the_architecture_was_are_named_by_their_row() -> None:
    found = run("fashion-mnist-cnn2-8bit-sgt", 93.8)
    del found["arch"]
    assert "| fashion-mnist | cnn2 | 8 | sgt | 10 | **93.80** | 1 | last epoch | ours: `fash" in results([found])
    assert "| ours: `fashion-mnist --only fashion-mnist-cnn2-8bit-sgt` |" in results(
        [found | {"table": "fashion-mnist"}]
    )


def test_every_row_that_can_be_trained_is_shown_as_it_is_named() -> None:
    # Those of the maps' comparison are told apart by their seeds and recorded by bench.saliency; their names, and
    # those of intermediate steps, say more than data, network, bits and method.
    rows = [row for table in ROWS.values() for row in table]
    for row in (row for row in rows if row.name.endswith(("-plain", "-sgt", "-smoot", "-asg"))):
        data = row.name.rsplit("-", 3)[0]
        bits = 32 if "-float-" in row.name else 8
        name = row.name.replace("-float-", "-32bit-")
        found = run(name, 50.0) | {"bits": bits}
        (line,) = ours(results([found]))
        assert line.startswith(f"| {data} | {name.split('-')[-3]} | {'float' if bits == 32 else 8} |")


def test_the_published_figures_are_those_of_the_recipes() -> None:
    for published in PUBLISHED_RUNS:
        (row,) = [
            row for row in PUBLISHED
            if (row.data, row.method) == (published.recipe.data, published.recipe.method)
            and row.network in ("", published.arch) and row.bits in (None, published.quant.bits)
            and published.source.startswith(row.source)
        ]  # fmt: skip
        assert f"{row.accuracy:.2f} %" in published.figure
        assert row.masked_auc is None or f"AUC {row.masked_auc:.2f}" in published.figure


def measured(model: str, auc: float, precision: str = "8 bit", fill: str = "black") -> dict[str, Any]:
    network = {"model": model, "precision": precision, "accuracy": 99.0, "masked_auc": auc,
               "masked_auc_error": 0.2, "insertion_auc": 0.9, "deletion_auc": 0.2}  # fmt: skip
    exact = network | {"precision": "float", "masked_auc": auc - 1}
    return {"bench": "saliency", "data": "mnist", "n": 500, "fill": fill, "canvas": "blur", "target": "predicted",
            "networks": [network, exact],
            "agreement": [{"pair": [0, 1], "spearman": 0.9876, "top_overlap": 0.9}]}  # fmt: skip


def test_areas_of_several_seeds_have_their_spread_and_of_one_its_error() -> None:
    table = saliency([
        measured("mnist-sgt-0", 30), measured("mnist-sgt-0", 26), measured("mnist-sgt-1", 28),
        measured("mnist-plain", 29, fill="random"),
    ])  # fmt: skip
    assert f"| mnist-sgt-*, 8 bit | 2 | 500 | black | 99.00 | 27.00 ± {statistics.stdev([26, 28]):.2f} |" in table
    assert (
        "| mnist-plain, 8 bit | 1 | 500 | random | 99.00 | 29.00 ± 0.20 | 0.900 | 0.200 | 0.988, 0.900 |" in table
    )
    assert "| mnist | smoot, float (Karkehabadi et al. 2024) |  |  | not told | 99.40 | 33.16 |" in table


def test_a_run_measured_again_leaves_no_row_of_the_older_one() -> None:
    older, newer = measured("mnist-sgt", 30), measured("mnist-sgt", 26)
    newer["networks"], newer["agreement"] = newer["networks"][:1], []
    rows = [line for line in saliency([older, newer]).splitlines() if "mnist-sgt" in line]
    assert rows == ["| mnist | mnist-sgt, 8 bit | 1 | 500 | black | 99.00 | 26.00 ± 0.20 | 0.900 | 0.200 |  |"]


def compared(bench: str, batch: int, processor: str = "one", **times_ms: float) -> dict[str, Any]:
    return {"bench": bench, "arch": "resnet20", "threads": 1, "input": [batch, 32, 32, 3],
            "latency": {name: {"p50_ms": value} for name, value in times_ms.items()},
            "environment": {"processor": processor}}  # fmt: skip


def test_maps_are_held_against_the_only_float_network_where_the_run_has_none() -> None:
    found = measured("runs-2bit", 20.0)
    found["networks"][1]["model"] = "runs-float"
    rows = [line for line in saliency([found]).splitlines() if line.startswith("| mnist | runs-")]
    assert [line.split(" | ")[-1].strip("| ") for line in rows] == ["0.988, 0.900", ""]


def test_two_classes_have_their_sensitivity_and_area_over_seeds() -> None:
    found = [
        {"bench": "accuracy", "model": f"chest-8bit-sgt-seed{seed}.onnx", "precision": "int8", "auc": auc,
         "engine": "openvino 2026", "accuracy": 90.0, "confusion": [[6, 2], [1, 3 + 4 * seed]]}
        for seed, auc in enumerate((0.9, 0.8))
    ]  # fmt: skip
    (line,) = two_classes([found[0] | {"auc": 0.1}, *found, found[0] | {"auc": None}]).splitlines()[2:]
    assert line == (
        "| chest-8bit-sgt-*, int8 on OpenVINO | 2 | 90.00 ± 0.00 | 81.25 ± 8.84 | 75.00 ± 0.00 | 0.8500 ± 0.0707 |"
    )


def test_contenders_stand_slowest_first_from_the_latest_run_on_one_processor() -> None:
    names = {"OpenVINO INT8": 0.2, "PyTorch FP32": 2.0}
    table = latency([
        compared("compare", 1, **{"OpenVINO INT8": 0.5, "PyTorch FP32": 9.0}),
        compared("compare", 32, "another", **names),
        compared("compare-explain", 1, **{"OpenVINO INT8 + map": 0.4, "OpenVINO INT8": 0.2}),
        compared("compare", 1, **names),
        {**compared("compare", 1, **names), "only_ptq": True, "latency": {}},
    ])  # fmt: skip
    assert table.splitlines()[2:] == [
        "| PyTorch FP32 | 2.000 | - |  | **ours, OpenVINO INT8** | **0.400** | - |",
        "| **ours, OpenVINO INT8** | **0.200** | - |  |  |  |  |",
    ]


def test_ours_stand_beside_quantization_after_training_for_each_network_grid_and_batch() -> None:
    def found(batch: int, openvino: float, ort: float | None, grid: str = "0..127") -> dict[str, Any]:
        ratios = {"OpenVINO INT8": openvino} | ({} if ort is None else {"ONNX Runtime INT8": ort})
        return {
            "bench": "compare", "arch": "cnn2", "trained_on": "mnist", "grid": grid, "threads": 1,
            "input": [batch, 28, 28, 1],
            "ratio_to_ptq": {
                n: {"ratio": r, "low": r - 0.01, "high": r + 0.01, "instances": 8} for n, r in ratios.items()
            },
            "instances": 8,
            "quality": {"OpenVINO INT8": {"accuracy": 99.5}, "NNCF PTQ": {"accuracy": 99.25}},
        }  # fmt: skip

    without_ratios = {**found(1, 3.0, 3.0), "ratio_to_ptq": {}}
    # Of one instance, as records were, the interval says nothing of the next one.
    old = {**found(1, 1, None, "0..255"), "environment": {"commit": "0123456789ab-dirty"}}
    old |= {"ratio_to_ptq": {"OpenVINO INT8": {"median": 1.006, "low": 1.005, "high": 1.007}}}
    del old["instances"]
    table = against_ptq([
        found(32, 1.02, None), found(1, 9.0, 9.0), found(1, 0.99, 1.7), without_ratios, old
    ])  # fmt: skip
    assert table.splitlines()[2:] == [
        "| cnn2, mnist | 0..127 | 1 | 1 | 8 | 0.990 (0.980 .. 1.000) | 99.50, 99.25 "
        "| 1.700 (1.690 .. 1.710) | -, - |",
        "|  |  | 1 | 32 | 8 | 1.020 (1.010 .. 1.030) | 99.50, 99.25 | - | -, - |",
        "| cnn2, mnist | 0..255 | 1 | 1 † | 1 | 1.01 | 99.50, 99.25 | - | -, - |",
    ]


def test_without_records_every_table_still_has_its_form() -> None:
    for name, table in TABLES.items():
        assert table([]).startswith("Nothing" if name == "environment" else "| ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- table: other -->\n<!-- end -->", "^a.md: table 'other', expected one of environment, results"),
        ("<!-- table: results -->\n", "^a.md: a marker without its counterpart, expected <!-- table: NAME -->"),
        ("<!-- end -->\n", "^a.md: a marker without its counterpart"),
        ("<!-- table: results -->\n<!-- table: latency -->\n<!-- end -->", "^a.md: a marker without"),
    ],
)
def test_markers_that_are_wrong_are_named(text: str, message: str) -> None:
    with pytest.raises(FileError, match=message):
        rewritten(text, [], "a.md")


@pytest.mark.parametrize("line", ["{", "[1]", '{"n": 1}'])
def test_a_line_that_is_no_result_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"bench": "x"}) + "\n" + line + "\n")
    with pytest.raises(
        FileError, match=f"^{path}, line 2: expected one result of a bench command; remove the line$"
    ):
        record.read(tmp_path)


def test_of_methods_the_last_record_of_a_data_set_counts() -> None:
    row = {"model": "files/cifar10-8bit.onnx", "precision": "int8", "method": "gradcam:stage3.2.conv2",
           "accuracy": 90.5, "masked_auc": 31.1, "road": 31.54, "insertion_auc": 0.757, "deletion_auc": 0.304,
           "energy": 0.74, "pointing": None, "times_class": 1.318}  # fmt: skip
    found = {"bench": "saliency-methods", "data": "cifar10", "n": 1200, "methods": [row]}
    other = {
        **found,
        "data": "folder:caltech101-128@a50c93f4624f",
        "methods": [{**row, "method": "input_x_gradient"}],
    }
    lines = methods([{**found, "methods": [row | {"road": 99.0}, row]}, other, found]).splitlines()
    assert lines[2:] == [
        "| cifar10 | cifar10-8bit, int8 | gradcam of stage3.2.conv2 | 1,200 | 90.5 | 31.10 | 31.5 | 0.757 | 0.304 "
        "| 0.74 |  | 1.32 |",
        "| caltech101-128 | cifar10-8bit, int8 | input x gradient | 1,200 | 90.5 | 31.10 | 31.5 | 0.757 | 0.304 "
        "| 0.74 |  | 1.32 |",
    ]


def test_mask_shares_are_those_of_the_last_run_of_a_row() -> None:
    masked = {"mask_percent": {"min": 20.0, "median": 47.25, "max": 71.0}}
    found = run("mnist-cnn2-8bit-smoot", 99.4, epochs=2) | masked
    lines = mask_shares([run("mnist-cnn2-8bit-sgt", 99), {**found, "test_accuracy": 1.0}, found]).splitlines()
    assert (
        lines[2]
        == "| caltech101, resnet18, float | 19.9, 47.2, 56.7 | 95.10 | Karkehabadi et al. 2024, Table IV |"
    )
    assert lines[3:] == ["| mnist-cnn2-8bit-smoot | 20.0, 47.2, 71.0 | 99.40 | ours, 2 epochs |"]
