"""What the tables say of recorded sanity checks, drift, calibration, other images, attacks, and costs of maps."""

from __future__ import annotations

from typing import Any

from bench.evidence.accuracy_tables import engines
from bench.evidence.explanation_tables import cost
from bench.evidence.speed_tables import compiled_step, throughput
from bench.evidence.trust_tables import calibration, drift, outliers, robustness, sanity

DIRTY = {"environment": {"commit": "0123456789ab-dirty"}}


def rows(table: str) -> list[str]:
    return table.splitlines()[2:]


def test_sanity_tells_the_last_stage_of_each_method_and_which_one_fails() -> None:
    stages = [
        {"method": method, "layers": layers, "spearman": value, "ssim": value / 2}
        for layers, by in ((2, 0.9), (4, 0.5)) for method, value in (("gradient", by), ("layercam:conv2", 2 * by))
    ]  # fmt: skip
    found = {"bench": "sanity", "model": "files/a-8bit.onnx", "precision": "int8", "data": "mnist", "n": 64,
             "rows": stages, "passed": {"gradient": True, "layercam:conv2": False}}  # fmt: skip
    older = {**found, "rows": [{**row, "spearman": 0.0} for row in stages]}
    assert rows(sanity([older, found])) == [
        "| a-8bit, int8, 64 images | gradient | 0.50 | 0.25 | yes |",
        "|  | layercam of conv2 | 1.00 | 0.50 | **no** |",
    ]


def test_drift_is_the_agreement_with_the_float_network_alone() -> None:
    spread = {"mean": 0.9, "median": 0.0}
    measures = dict.fromkeys(("spearman", "pearson", "ssim", "top_overlap", "top_20_overlap"), spread)
    networks = [{"model": "runs-8bit/ckpt.onnx", "precision": "int8"}, {"model": "ckpt", "precision": "float"}]
    found = {"bench": "agreement", "networks": networks, "data": "mnist", "images": 1500, "differing": 2,
             "same_class": {"Spearman": 0.91}, **measures, **DIRTY}  # fmt: skip
    other = {**found, "networks": [networks[0], {**networks[1], "precision": "8 bit"}]}
    assert rows(drift([found, other])) == [
        "| runs-8bit, int8 † | 1,500 | 2 | 0.900 | 0.900 | 0.900 | 0.900 | 0.900 | 0.910 |"
    ]


def test_calibration_says_where_it_was_measured_on_images_of_the_fit() -> None:
    raw, calibrated = ({"ece_percent": e, "nll": e / 10, "brier": e / 100} for e in (3.0, 1.0))
    found = {"bench": "accuracy", "model": "a.onnx", "precision": "int8", "data": "mnist", "n": 5000,
             "temperature": 1.5, "raw": raw, "calibrated": calibrated}  # fmt: skip
    numbers = "| 1.500 | 3.00 -> 1.00 | 0.3000 -> 0.1000 | 0.0300 -> 0.0100 |"
    assert rows(calibration([found])) == [f"| a, int8, mnist | 5,000, those of the fit among them {numbers}"]
    assert rows(calibration([{**found, "part": "odd"}, found, {**found, "temperature": 1.0}])) == [
        f"| a, int8, mnist | 5,000 {numbers}"
    ]


def test_outliers_of_two_data_sets() -> None:
    found = {"bench": "outliers", "model": "files/a.onnx", "precision": "int8", "data": "mnist", "n": [5000, 868],
             "against": "folder:data/photos", "energy": {"auroc": 99.234, "fpr95": 2.16},
             "softmax": {"auroc": 98.0, "fpr95": 4.14}, "flagged": [5.0, 97.84]}  # fmt: skip
    lines = rows(
        outliers([{**found, "flagged": None}, found, {**found, "against": "fashion-mnist", "flagged": None}])
    )
    assert lines == [
        "| a, int8 | mnist, 5,000 | photos, 868 | 99.23 (98.00) | 2.2 (4.1) | 5.0, 97.8 |",
        "| a, int8 | mnist, 5,000 | fashion-mnist, 868 | 99.23 (98.00) | 2.2 (4.1) |  |",
    ]


def test_of_attacks_the_last_record_of_a_data_set_counts() -> None:
    network = {"model": "files/a.onnx", "precision": "fp32", "accuracy": {"clean": 99.8, "PGD 8": 0.04}}
    found = {"bench": "robustness", "data": "mnist", "n": 500, "networks": [network]}
    assert rows(robustness([{**found, "networks": [network] * 3}, found])) == [
        "| a, fp32, mnist | 500 | 99.8 | 0.0 |"
    ]


def test_a_map_costs_so_many_times_the_class() -> None:
    times = {"class": {"p50_ms": 0.25}, "class + map": {"p50_ms": 0.625}, "class + cam_c2": {"p50_ms": 0.26}}
    found: dict[str, Any] = {"bench": "latency", "arch": "cnn2", "precision": "int8", "engine": "openvino 1",
                             "threads": 1, "latency": {"1": times}, "input": [28, 28, 1], "frame": None,
                             "maps": {"class + map": "gradient", "class + cam_c2": "layercam:c2"}}  # fmt: skip
    passed_over = [{**found, "threads": 2}, {**found, "frame": [480, 640]},
                   {**found, "latency": {"1": {"class": times["class"]}}}]  # fmt: skip
    assert rows(cost([found, *passed_over])) == [
        "| cnn2, INT8 on OpenVINO, 28 pixels | gradient | 0.250 | 0.625 | 2.50 |",
        "|  | layercam of c2 | 0.250 | 0.260 | 1.04 |",
    ]


def test_networks_of_other_bits_have_their_own_line_of_engines() -> None:
    found = {"bench": "accuracy", "arch": "resnet20", "data": "cifar10", "precision": "int8", "target": "ort",
             "engine": "ort 1", "n": 10000, "checkpoint_accuracy": 91.0, "accuracy": 90.0,
             "classified_differently": 7}  # fmt: skip
    lines = rows(engines([found, {**found, "bits": 4}, {**found, "bits": 8, "accuracy": 91.0}]))
    assert lines == [
        "| resnet20, cifar10, 8 | INT8 on ONNX Runtime | 91.00 | 91.00 | 7 of 10,000 |",
        "| resnet20, cifar10, 4 | INT8 on ONNX Runtime | 91.00 | 90.00 | 7 of 10,000 |",
    ]


def test_a_step_that_does_not_compile_is_told_with_its_reason() -> None:
    first = {"plain": {"seconds": 41.2, "failure": "", "graph_breaks": {"a": 2, "b": 1}},
             "sgt": {"seconds": 3.0, "failure": "RuntimeError: a | b", "graph_breaks": {}}}  # fmt: skip
    times_ms = {"plain": 80.0, "plain, compiled": 100.0, "sgt": 200.0}
    found = {"bench": "compiled step", "arch": "cnn2", "data": "mnist", "bits": 8, "batch": 128, "threads": 1,
             "precision": "float32", "first": first, "times_eager": {"plain": 1.25},
             "step": {name: {"p50_ms": ms} for name, ms in times_ms.items()}}  # fmt: skip
    assert rows(compiled_step([found])) == [
        "| cnn2, mnist, 8 bit | 128 | 1 | float32 | plain | 80.0 | 100.0 | 1.25 | 41 | 3 parts left to Python |",
        "| cnn2, mnist, 8 bit | 128 | 1 | float32 | sgt | 200.0 | - | - | 3 | RuntimeError: a / b |",
    ]


def test_throughput_stands_beside_the_tool_of_openvino() -> None:
    beside = {"batch": 32, "ours": [900.0, 1000.0, 1100.0], "tool": [2000.0, 1999.0, 2500.0], "ratio": 0.5}
    found = {"bench": "latency", "arch": "cnn2", "data": "mnist", "precision": "int8", "threads": 1, "requests": 2,
             "benchmark_app": beside}  # fmt: skip
    assert rows(throughput([{**found, "benchmark_app": None}, found])) == [
        "| cnn2, mnist, INT8 on OpenVINO | 32 | 2 of 1 | 1,000 | 2,000 | 0.50 |"
    ]
