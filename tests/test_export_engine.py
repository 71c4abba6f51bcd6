from __future__ import annotations

import dataclasses
import hashlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from export.engine import __main__ as engine
from export.engine import autotune
from export.engine.autotune import Budget, PlanScore
from export.engine.gpu import GPU, find_gpu
from runtime.engines.tensorrt import cuda_choice
from runtime.engines.tensorrt.plan import PlanSidecar, read_sidecar, sidecar_path
from runtime.errors import ClearpactError, EngineError, FileError, ModelError, OptionError
from runtime.onnx_bytes import output_names, without_gradient
from runtime.session import open_session
from tests.fake_cuda import FakeGpu
from tests.qdq_models import conv_model

ORIN = GPU(name="Orin", compute_capability="8.7", driver="12.6")


@pytest.fixture
def rtx() -> None:
    pytest.importorskip(
        "tensorrt_rtx_bindings", reason="no wheel of TensorRT-RTX here: pip install 'clearpact[tensorrt-aot]'"
    )


@pytest.fixture
def orin(rtx: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT-RTX's builder in the place of TensorRT's, and a GPU that is not there."""
    monkeypatch.setitem(sys.modules, "tensorrt", sys.modules["tensorrt_rtx_bindings"])
    monkeypatch.setattr(engine, "find_gpu", lambda: ORIN)


def run(*arguments: object) -> None:
    engine.main([str(argument) for argument in arguments])


@pytest.mark.usefixtures("rtx")
def test_a_plan_is_built_ahead_of_time_with_a_sidecar_that_describes_it(
    digits_models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, plan = digits_models["tensorrt"], tmp_path / "engine.plan"
    run(model, "-o", plan, "--batch", "1,8,32", "--builder", "tensorrt_rtx")
    data, sidecar = plan.read_bytes(), read_sidecar(plan)
    assert sidecar.plan_sha256 == hashlib.sha256(data).hexdigest()
    assert sidecar.onnx_sha256 == hashlib.sha256(model.read_bytes()).hexdigest()
    assert sidecar.manifest.target == "tensorrt"
    assert (sidecar.batch, sidecar.compute_capability, len(sidecar.int8_layers)) == ((1, 8, 32), "", 4)
    assert sidecar.rebuild == (f"python -m export.engine {model} -o {plan} --batch 1,8,32 --builder tensorrt_rtx")
    sidecar.verify(data, "engine.plan", builder="tensorrt_rtx", version="1.7.1.116", compute_capability="8.9")
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines() if line.startswith("  ")]
    assert [row[-1] for row in rows] == ["INT8"] * 4 + ["FP16"] * 3
    assert rows[0] == ["node_conv2d", "Conv", "32x1x3x3", "INT8"]
    assert "4 layers in INT8, 3 layers in FP16\n" in out
    assert "TensorRT-RTX ahead-of-time 1.7.1.116" in out
    assert "TensorRT 1" not in out
    assert "meant for INT8, but" not in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["engine.plan", "engine.plan.json"]


@pytest.mark.usefixtures("rtx")
def test_a_class_only_plan_has_no_gradient(
    digits_models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = tmp_path / "engine.plan"
    run(digits_models["tensorrt"], "-o", plan, "--no-saliency", "--builder", "tensorrt_rtx")
    out = capsys.readouterr().out
    assert out.endswith("batch 1, gives logits\n")
    assert "FP16" not in out


@pytest.mark.usefixtures("rtx")
def test_a_checkpoint_is_exported_for_tensorrt_beside_the_plan(
    digits_checkpoint_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = tmp_path / "engine.plan"
    run(digits_checkpoint_path, "-o", plan, "--no-saliency", "--builder", "tensorrt_rtx")
    model = (tmp_path / "engine.plan.onnx").read_bytes()
    sidecar = read_sidecar(plan)
    assert sidecar.onnx_sha256 == hashlib.sha256(model).hexdigest()
    assert sidecar.manifest.checkpoint == hashlib.sha256(digits_checkpoint_path.read_bytes()).hexdigest()
    assert output_names(model) == ("logits",)


@pytest.mark.usefixtures("rtx")
def test_a_dry_run_parses_and_writes_nothing(
    digits_models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(digits_models["tensorrt"], "-o", tmp_path / "engine.plan", "--dry-run", "--builder", "tensorrt_rtx")
    out = capsys.readouterr().out
    assert "4 layers in INT8, 3 layers in FP16\n" in out
    assert out.endswith("parsed by TensorRT-RTX ahead-of-time 1.7.1.116; nothing was built or written\n")
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_needs_no_tensorrt(
    digits_models: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    run(digits_models["tensorrt"], "--dry-run", "--builder", "tensorrt")
    out = capsys.readouterr().out
    assert "4 layers in INT8, 3 layers in FP16\n" in out
    assert out.splitlines()[-1].startswith("not parsed: TensorRT cannot be imported")


@pytest.mark.usefixtures("orin")
@pytest.mark.filterwarnings("ignore:.*Timing cache operations are no-ops:DeprecationWarning")
def test_on_tensorrt_the_sidecar_names_gpu_and_driver_and_the_timing_cache_is_kept(
    digits_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = tmp_path / "engine.plan"
    given: list[bytes] = []
    build = engine.build
    monkeypatch.setattr(engine, "build", lambda *a: given.append(a[-1]) or build(*a))
    command = (digits_models["tensorrt"], "-o", plan, "--builder", "tensorrt", "--no-saliency")
    run(*command)
    kept = (tmp_path / "engine.plan.cache").read_bytes()
    run(*command)
    assert given == [b"", kept]
    assert len(kept) > 0
    sidecar = read_sidecar(plan)
    assert (sidecar.builder, sidecar.device, sidecar.compute_capability) == ("tensorrt", "Orin", "8.7")
    assert sidecar.driver == "12.6"


@pytest.mark.usefixtures("orin")
@pytest.mark.filterwarnings("ignore:.*Timing cache operations are no-ops:DeprecationWarning")
def test_a_failed_build_leaves_the_old_plan_and_no_half_of_a_new_one(
    digits_models: dict[str, Path], tmp_path: Path
) -> None:
    plan = tmp_path / "engine.plan"
    plan.write_bytes(b"old")
    with pytest.raises(EngineError, match=r"the builder failed: .*libnvinfer_lean"):
        run(digits_models["tensorrt"], "-o", plan, "--version-compatible")
    assert plan.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["engine.plan"]


@pytest.mark.usefixtures("rtx")
def test_the_sidecar_is_written_last(
    digits_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash in between leaves a plan that is refused: with the old sidecar, or with none."""
    plan = tmp_path / "engine.plan"
    command = (digits_models["tensorrt"], "-o", plan, "--builder", "tensorrt_rtx", "--no-saliency")
    written = engine.write_atomically

    def crash(path: Path, data: bytes | str) -> None:
        if path == sidecar_path(plan):
            raise KeyboardInterrupt
        written(path, data)

    monkeypatch.setattr(engine, "write_atomically", crash)
    with pytest.raises(KeyboardInterrupt):
        run(*command)
    assert plan.exists()
    with pytest.raises(ModelError, match=r"its sidecar engine\.plan\.json is missing"):
        read_sidecar(plan)


def absent_manifest(tmp_path: Path) -> Path:
    path = tmp_path / "plain.onnx"
    path.write_bytes(conv_model().SerializeToString())
    return path


@pytest.mark.parametrize(
    ("arguments", "error", "told"),
    [
        (["--batch", "8,1,32"], OptionError, "--batch 8,1,32: expected one whole number from 1, or three rising"),
        (["--batch", "0"], OptionError, "--batch 0: expected"),
        (["--batch", "one"], OptionError, "--batch one: expected"),
        (["--batch", "1,2"], OptionError, "--batch 1,2: expected"),
        (["--workspace", "0"], OptionError, "--workspace 0: expected MiB from 1"),
        (["--autotune"], OptionError, "--autotune: .* holds no labelled samples; give the checkpoint"),
        (["--precision", "int4"], OptionError, "argument --precision: invalid choice"),
        (["--builder", "tensorrt_rtx", "--level", "9"], OptionError, "optimization level 9: expected 0 to 5"),
        (["--builder", "tensorrt_rtx", "--dla-core", "0"], OptionError, "--dla-core: TensorRT-RTX has no such"),
    ],
)
@pytest.mark.usefixtures("rtx")
def test_a_wrong_option_is_one_line(
    digits_models: dict[str, Path], tmp_path: Path, arguments: list[str], error: type[ClearpactError], told: str
) -> None:
    with pytest.raises(error, match=told) as caught:
        run(digits_models["tensorrt"], "-o", tmp_path / "engine.plan", *arguments)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("rtx")
def test_a_wrong_file_is_one_line(digits_models: dict[str, Path], tmp_path: Path) -> None:
    rtx = ("--builder", "tensorrt_rtx", "-o", tmp_path / "engine.plan")
    with pytest.raises(FileError, match="no such file"):
        run(tmp_path / "absent.onnx", *rtx)
    with pytest.raises(ModelError, match="without a clearpact manifest"):
        run(absent_manifest(tmp_path), *rtx)
    with pytest.raises(ModelError, match=r"openvino\.onnx: QuantizeLinear node .* has uint8 codes"):
        run(digits_models["openvino"], *rtx)
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(digits_models["tensorrt"].read_bytes()[:-100])
    with pytest.raises(ClearpactError):
        run(damaged, *rtx)
    assert not (tmp_path / "engine.plan").exists()


def test_tensorrt_without_a_gpu_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    monkeypatch.setattr(cuda_choice, "libraries", lambda: iter(()))
    with pytest.raises(
        EngineError, match=r"^the GPU cannot be asked: .*; pip install 'clearpact\[tensorrt\]', on"
    ):
        find_gpu()


def test_the_gpu_is_named_as_cuda_names_it(gpu: FakeGpu) -> None:
    assert find_gpu() == ORIN
    gpu.devices = 0
    with pytest.raises(EngineError, match=r"^CUDA: cudaGetDeviceCount failed \(cudaErrorNoDevice: .*nvidia-smi"):
        find_gpu()


# --autotune: the choice. Plans are measured on a GPU; here their measurements are given.

ROWS = {
    "mixed": PlanScore(latency_ms=1.0, accuracy=99.0, spearman=0.99),
    "int8": PlanScore(latency_ms=0.8, accuracy=98.0, spearman=0.99),
    "fp16": PlanScore(latency_ms=1.5, accuracy=99.1, spearman=1.0),
}


@pytest.mark.parametrize(
    ("changes", "budget", "expected"),
    [
        ({}, Budget(0.5, 0.95), "mixed"),
        ({}, Budget(2.0, 0.95), "int8"),
        ({}, Budget(0.5, 0.995), "fp16"),
        ({"mixed": {"spearman": None}}, Budget(0.5, 0.995), "mixed"),
        ({"mixed": {"spearman": float("nan")}}, Budget(0.5, 0.95), "fp16"),
    ],
)
def test_the_fastest_plan_within_the_budget_is_kept(
    changes: dict[str, dict[str, Any]], budget: Budget, expected: str
) -> None:
    rows = {name: dataclasses.replace(row, **changes.get(name, {})) for name, row in ROWS.items()}
    assert autotune.choose(rows, 99.1, budget) == expected


def test_no_plan_within_the_budget_is_an_error_that_says_what_to_allow() -> None:
    with pytest.raises(ModelError, match=r"keeps 99\.90 % accuracy .*--max-accuracy-drop or --min-agreement"):
        autotune.choose(ROWS, 100.0, Budget(0.1, 0.95))


def test_the_table_shows_every_plan_and_the_verdict() -> None:
    assert autotune.table(ROWS, 99.1, Budget(), "mixed") == (
        "plan        median   accuracy    maps\n"
        "mixed     1.000 ms    99.00 %   0.990  kept\n"
        "int8      0.800 ms    98.00 %   0.990  outside the budget\n"
        "fp16      1.500 ms    99.10 %   1.000"
    )


def test_outputs_are_compared_with_those_of_the_exported_graph(digits_models: dict[str, Path]) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6, 8, 8, 1)).astype(np.uint8)
    model = digits_models["tensorrt"].read_bytes()
    expected = autotune.expected_outputs(model, images, np.arange(6))
    labels = expected["logits"].argmax(1)
    same = autotune.compare(expected, expected, labels, 2.0)
    assert same == PlanScore(latency_ms=2.0, accuracy=100.0, spearman=pytest.approx(1.0))
    turned = {"logits": -expected["logits"], "saliency": -expected["saliency"]}
    other = autotune.compare(turned, expected, labels, 2.0)
    assert other.accuracy == 0.0
    assert other.spearman == pytest.approx(-1.0)
    assert autotune.compare({"logits": expected["logits"]}, expected, labels, 2.0).spearman is None
    assert autotune.accuracy(expected, labels) == 100.0


@pytest.mark.parametrize("saliency", [True, False])
def test_a_session_is_measured_on_all_samples(
    digits_models: dict[str, Path], saliency: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same function measures plans on a GPU; here the same graph on ONNX Runtime."""
    monkeypatch.setattr(autotune, "_RUNS", 5)
    images = np.random.default_rng(0).integers(0, 256, (7, 8, 8, 1)).astype(np.uint8)
    data = digits_models["ort"].read_bytes()
    expected = autotune.expected_outputs(data, images, np.arange(7))
    labels = expected["logits"].argmax(1)
    expected = autotune.expected_outputs(data, images, labels)
    session = open_session(data if saliency else without_gradient(data), engine="ort", threads=1)
    measured = autotune.measure(session, (2, 2, 3), images, labels, expected)
    session.close()
    assert measured.accuracy == 100.0
    assert measured.latency_ms > 0
    assert measured.spearman == (pytest.approx(1.0, abs=1e-3) if saliency else None)


@pytest.mark.usefixtures("orin")
@pytest.mark.filterwarnings("ignore:.*Timing cache operations are no-ops:DeprecationWarning")
def test_autotune_builds_every_precision_and_writes_the_one_it_keeps(
    digits_checkpoint_path: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measured: list[PlanSidecar] = []

    def measure(plan: bytes, sidecar: PlanSidecar, images: np.ndarray, labels: np.ndarray, *_: Any) -> PlanScore:
        assert sidecar.plan_sha256 == hashlib.sha256(plan).hexdigest()
        assert (images.dtype, len(images)) == (np.uint8, len(labels))
        measured.append(sidecar)
        return PlanScore(latency_ms=3.0 - len(measured), accuracy=100.0, spearman=None)

    monkeypatch.setattr(autotune, "measure_plan", measure)
    plan = tmp_path / "engine.plan"
    run(digits_checkpoint_path, "-o", plan, "--autotune", "--no-saliency", "--builder", "tensorrt")
    assert [len(sidecar.int8_layers) for sidecar in measured] == [4, 4, 0]
    assert read_sidecar(plan) == measured[2]
    out = capsys.readouterr().out
    assert "fp16      0.000 ms   100.00 %       -  kept" in out


def test_batches_fit_the_plan_s_profile() -> None:
    images, labels = np.arange(7 * 12, dtype=np.uint8).reshape(7, 2, 2, 3), np.arange(7)
    parts = list(autotune._batches(images, labels, 2, 3))
    assert [len(x) for x, _ in parts] == [3, 3, 2]
    np.testing.assert_array_equal(np.concatenate([y for _, y in parts])[:7], labels)
    np.testing.assert_array_equal(np.concatenate([x for x, _ in parts])[:7], images)


def test_lowered_files_are_valid_onnx(digits_models: dict[str, Path]) -> None:
    for precision in ("mixed", "int8", "fp16"):
        lowered = engine.lower(digits_models["tensorrt"].read_bytes(), "m", precision=precision)
        onnx.checker.check_model(onnx.load_from_string(lowered.onnx), full_check=True)
