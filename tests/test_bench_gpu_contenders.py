"""What is compared on a GPU, against the strict models of CUDA and TensorRT: no GPU has run any of this."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench import compare
from bench.measure.cold_start import Loading
from bench.networks.checkpoint import as_network
from bench.peers import gpu_contenders, instances, torch_ways
from bench.peers.contenders import Found, contenders, loading_torch, write_exports
from bench.peers.gpu_contenders import found_on_gpu, gpu_explaining_networks, gpu_name, torch_on_cuda
from bench.peers.gpu_explainers import gpu_explainers
from bench.peers.opening import explaining
from bench.peers.plans import build_plan, in_plans
from bench.peers.torch_ways import WAYS, Normalized, TorchWay, classify_in_torch, explain_in_torch
from export.deploy_form import deploy_form
from runtime.engines.tensorrt.plan import read_sidecar
from runtime.errors import EngineError, ModelError
from runtime.manifest import read_manifest
from runtime.session import open_session
from tests import fake_tensorrt
from tests.fake_cuda import FakeGpu
from tests.fake_tensorrt import network, write_plan
from train.checkpoint import Checkpoint
from train.data.images import ImageData

TENSORRT = ["TensorRT FP16", "TensorRT INT8"]
IN_TORCH = ["PyTorch CUDA FP32", "PyTorch CUDA graph FP16", "torch.compile CUDA FP16"]
ON_GPU = [*IN_TORCH, "ONNX Runtime CUDA FP32", *TENSORRT]
NO_DEVICE = (
    "CUDA: cudaGetDeviceCount failed (cudaErrorNoDevice: nodevice); check that nvidia-smi (on Jetson: tegrastats) "
    "shows the GPU"
)
NO_TENSORRT = (
    "TensorRT cannot be imported (import of tensorrt halted; None in sys.modules); "
    "pip install 'clearpact[tensorrt]'"
)


@pytest.fixture
def unclosed(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    """The model of a GPU for what keeps its plans loaded until the process ends."""
    gpu = FakeGpu()
    fake_tensorrt.install(monkeypatch, gpu)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return gpu


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, str]]:
    """Plans of the modelled TensorRT for digits; of each one's file the precision, the batch and --precision."""
    monkeypatch.setattr(fake_tensorrt, "SIZE", (8, 8))
    monkeypatch.setattr(fake_tensorrt, "CHANNELS", 1)
    monkeypatch.setattr(fake_tensorrt, "CLASSES", 10)
    asked: list[tuple[str, int, str]] = []

    def build(model: Path, plan: Path, *, batch: int, precision: str) -> Path:
        manifest = read_manifest(model.read_bytes(), model.name)
        assert manifest.target == "tensorrt"
        asked.append((manifest.precision, batch, precision))
        return write_plan(plan, batch=(1, batch, batch), saliency="map" in plan.name, manifest=manifest)

    monkeypatch.setattr(gpu_contenders, "build_plan", build)
    return asked


def digits(n: int) -> np.ndarray:
    return np.random.default_rng(n).integers(0, 256, (n, 8, 8, 1), np.uint8)


def test_without_a_gpu_all_are_missing_for_one_reason_that_was_asked_for_once(
    gpu: FakeGpu, digits_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu.devices = 0
    found = gpu_contenders.gpu_contenders(digits_checkpoint, tmp_path, batches=[1], threads=1)
    assert (found.ready, found.missing) == ({}, dict.fromkeys(ON_GPU, NO_DEVICE))
    assert gpu.calls == ["cudaGetDeviceCount"]
    ours = gpu_contenders.gpu_contenders(digits_checkpoint, tmp_path, batches=[1], threads=1, peers=False)
    assert ours.missing == dict.fromkeys(TENSORRT, NO_DEVICE)
    maps = ["Captum CUDA", "PyTorch CUDA autograd", *IN_TORCH[1:], "TensorRT INT8 + map"]
    explained = gpu_explainers(digits_checkpoint, 1, tmp_path, threads=1)
    assert explained.missing == dict.fromkeys(maps, NO_DEVICE)
    explained = gpu_explainers(digits_checkpoint, 1, tmp_path, threads=1, peers=False)
    assert explained.missing == {"TensorRT INT8 + map": NO_DEVICE}
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    found = gpu_contenders.gpu_contenders(digits_checkpoint, tmp_path, batches=[1], threads=1)
    assert set(found.missing.values()) == {
        "the GPU cannot be asked: cuda.bindings.runtime cannot be imported (import of cuda.bindings.runtime "
        "halted; None in sys.modules); pip install cuda-bindings, or unset CLEARPACT_CUDART"
    }
    assert list(tmp_path.iterdir()) == []


def test_what_fails_is_named_with_its_reason_and_the_rest_goes_on(unclosed: FakeGpu, tmp_path: Path) -> None:
    def refused() -> int:
        raise ModelError(f"{tmp_path}/TensorRT INT8.onnx: TensorRT's parser refuses 'node'")

    def defect() -> int:
        raise ZeroDivisionError

    found = found_on_gpu({"a": refused, "b": lambda: 3}, tmp_path)
    assert found == Found({"b": 3}, {"a": "TensorRT INT8.onnx: TensorRT's parser refuses 'node'"})
    with pytest.raises(ZeroDivisionError):
        found_on_gpu({"a": defect}, tmp_path)


def test_on_a_gpu_what_is_not_installed_is_missing_and_told_how_to_get(
    unclosed: FakeGpu, digits_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    write_exports(tmp_path, "ONNX Runtime FP32", digits_checkpoint, "ort", int8=False)
    found = gpu_contenders.gpu_contenders(digits_checkpoint, tmp_path, batches=[1], threads=1)
    assert found.ready == {}
    assert list(found.missing) == ON_GPU
    assert {found.missing[name] for name in IN_TORCH} == {
        "PyTorch does not find the GPU; install its build for this GPU's CUDA, see pytorch.org"
    }
    assert found.missing["ONNX Runtime CUDA FP32"] == (
        "device 'cuda': ONNX Runtime does not find it; expected one of: cpu; "
        "pip uninstall onnxruntime && pip install onnxruntime-gpu"
    )
    assert [found.missing[name] for name in TENSORRT] == [NO_TENSORRT] * 2
    assert gpu_name() == "Orin, compute capability 8.7, driver for CUDA 12.6"


def test_images_go_to_the_smallest_plan_that_takes_them_else_in_pieces_to_the_largest(
    gpu: FakeGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions = [open_session(write_plan(tmp_path / f"{n}.plan", batch=(1, n, n))) for n in (2, 5)]
    runs: list[tuple[int | None, int]] = []
    for session in sessions:

        def run(inputs: Mapping[str, Any], *outputs: Any, session: Any = session) -> Any:
            runs.append((session.max_batch, len(inputs["image"])))
            return type(session).run(session, inputs, *outputs)

        monkeypatch.setattr(session, "run", run)
    classify = in_plans(sessions)
    for n, expected in (
        (1, [(2, 1)]),
        (2, [(2, 2)]),
        (3, [(5, 3)]),
        (5, [(5, 5)]),
        (12, [(5, 5), (5, 5), (5, 2)]),
    ):
        images = np.random.default_rng(n).integers(0, 256, (n, 4, 5, 3), np.uint8)
        runs.clear()
        np.testing.assert_array_equal(classify(images), network(images, None)["logits"])
        assert runs == expected
    for session in sessions:
        session.close()
    monkeypatch.undo()  # it holds the sessions, and they the context


def test_a_plan_for_each_batch_and_the_logits_of_its_network(
    unclosed: FakeGpu, built: list[tuple[str, int, str]], digits_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    found = gpu_contenders.gpu_contenders(digits_checkpoint, tmp_path, batches=[32, 1, 32], threads=1, peers=False)
    assert found.missing == {}
    assert list(found.ready) == TENSORRT
    assert built == [("fp32", 1, "fp16"), ("fp32", 32, "fp16"), ("int8", 1, "mixed"), ("int8", 32, "mixed")]
    for name, contender in found.ready.items():
        plan = tmp_path / f"{name}, 1.plan"
        assert contender.loading == contender.loading_of(1) == Loading("runtime", plan, "tensorrt", "cuda")
        assert contender.loading_of(32).path == tmp_path / f"{name}, 32.plan"
        assert contender.file_bytes == plan.stat().st_size
        for n in (1, 32, 64):
            np.testing.assert_array_equal(contender.classify(digits(n)), network(digits(n), None)["logits"])
    built.clear()
    (explained,) = gpu_explaining_networks(digits_checkpoint, tmp_path).ready.items()
    assert explained[0] == "TensorRT INT8"
    logits, maps = explained[1].explain(digits(64), np.full(64, -1))
    with_map = gpu_explainers(digits_checkpoint, 3, tmp_path, threads=1, peers=False)
    explain = explaining(with_map.ready["TensorRT INT8 + map"], threads=1)
    assert built == [("int8", 64, "mixed"), ("int8", 3, "mixed")]
    expected = network(digits(64), None)
    np.testing.assert_array_equal(logits, expected["logits"])
    np.testing.assert_array_equal(maps, expected["saliency"])
    np.testing.assert_array_equal(explain(digits(3))[1], network(digits(3), None)["saliency"])


@pytest.mark.filterwarnings("ignore:.*Timing cache operations are no-ops:DeprecationWarning")
def test_plans_are_those_of_export_engine(
    digits_checkpoint: Checkpoint, tmp_path: Path, unclosed: FakeGpu, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """TensorRT-RTX's builder in the place of TensorRT's, which needs a GPU."""
    bindings = pytest.importorskip(
        "tensorrt_rtx_bindings", reason="no wheel of TensorRT-RTX here: pip install 'clearpact[tensorrt-aot]'"
    )
    monkeypatch.setitem(sys.modules, "tensorrt", bindings)
    for int8, precision, layers in ((False, "fp16", 0), (True, "mixed", 4)):
        model, _ = write_exports(tmp_path, precision, digits_checkpoint, "tensorrt", int8=int8)
        sidecar = read_sidecar(build_plan(model, tmp_path / "a.plan", batch=3, precision=precision))
        assert (sidecar.batch, sidecar.builder, len(sidecar.int8_layers)) == ((1, 3, 3), "tensorrt", layers)
        assert (sidecar.device, sidecar.driver, sidecar.manifest.arch) == ("Orin", "12.6", "cnn2")
    assert capsys.readouterr().out == ""
    assert (tmp_path / "timing.cache").stat().st_size > 0


@pytest.mark.slow  # 20 s: six exports, and all contenders at two batches
def test_compare_measures_plans_beside_the_others(
    unclosed: FakeGpu, built: list[tuple[str, int, str]], digits_checkpoint_path: Path, digits: ImageData,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    # The model of a GPU is in this process only: no other could open its plans.
    monkeypatch.setattr(instances, "in_fresh_process", instances.measured)
    arguments = [str(digits_checkpoint_path), "--seconds", "0.01", "--no-peers", "--starts", "0"]
    compare.main([*arguments, "--data", "digits", "--map-images", "20", "--batch", "1,3", "--json"])
    one, three = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert three["input"] == [3, 8, 8, 1]
    for result in (one, three):
        assert list(result["latency"])[-2:] == TENSORRT
        assert result["missing"] == {}
        assert result["environment"]["gpu"] == "Orin, compute capability 8.7, driver for CUDA 12.6"
    # The modelled network has random weights; it and nothing else gives this accuracy.
    images = digits.test_images[:].permute(0, 2, 3, 1).numpy()
    hits = network(images, None)["logits"].argmax(1) == digits.test_labels.numpy()
    assert one["quality"]["TensorRT INT8"]["accuracy"] == pytest.approx(100 * hits.mean())
    assert one["maps"]["TensorRT INT8"]["spearman"] < one["maps"]["OpenVINO INT8"]["spearman"]
    assert "TensorRT FP16" not in one["maps"]


# Those of the GPU, as far as they run on a CPU: a CUDA graph does not, and torch.compile takes half a minute.
ON_CPU = {
    "eager": (WAYS["eager"], 1e-5),
    "captum": (WAYS["captum"], 1e-5),
    "graph": (replace(WAYS["graph"], cuda_graph=False), 2e-2),
    "max-autotune": (replace(WAYS["max-autotune"], compiled=""), 2e-2),
}


@pytest.mark.parametrize("name", ON_CPU)
def test_every_way_in_torch_gives_the_float_network_s_classes_and_maps(
    digits_checkpoint: Checkpoint, name: str
) -> None:
    images, (way, tolerance) = digits(5), ON_CPU[name]
    float_network = deploy_form(digits_checkpoint.network(), digits_checkpoint.input, int8=False).network
    expected = as_network(float_network, digits_checkpoint, "float", "float").explain(images, np.full(5, -1))
    found = explain_in_torch(digits_checkpoint, way, "cpu")(images)
    classified = classify_in_torch(digits_checkpoint, way, "cpu")(images)
    assert [each.dtype for each in (*found, classified)] == [np.float32] * 3
    assert expected[1].max() > 0.01
    for given in (found[0], classified):
        np.testing.assert_allclose(given, expected[0], rtol=0, atol=tolerance * np.abs(expected[0]).max())
    # Half precision puts a few units on the other side of zero: single pixels of a map move, not the whole.
    half, moved = way.precision == "float16", np.abs(found[1] - expected[1])
    assert np.quantile(moved, 0.95 if half else 1) <= tolerance * expected[1].max()
    assert (np.abs(found[0] - expected[0]).max() > 1e-5) == half  # it did compute in float16


def test_a_graph_is_recorded_once_for_each_shape_and_then_launched(
    digits_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With CUDA's part played by Python: what is recorded runs again at every launch, on the same tensors."""
    recorded: list[int] = []
    launched: list[int] = []

    def record(run: Any, given: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...], Any]:
        results = run(given)
        recorded.append(len(given))

        class Graph:
            def replay(self) -> None:
                launched.append(len(given))
                for result, again in zip(results, run(given), strict=True):
                    with torch.inference_mode():
                        result.copy_(again)

        return given, results, Graph()

    monkeypatch.setattr(torch_ways, "_record", record)
    way = TorchWay(cuda_graph=True)
    for make in (classify_in_torch, explain_in_torch):
        recorded.clear()
        launched.clear()
        graph, eager = make(digits_checkpoint, way, "cpu"), make(digits_checkpoint, TorchWay(), "cpu")
        for n in (2, 3, 2, 2, 3):
            images = np.random.default_rng(len(launched)).integers(0, 256, (n, 8, 8, 1), np.uint8)
            for given, wanted in zip(graph(images), eager(images), strict=True):
                np.testing.assert_allclose(given, wanted, rtol=1e-6, atol=1e-7)
        assert recorded == [2, 3]
        assert launched == [2, 3, 2, 2, 3]


def test_the_peers_are_set_up_as_their_guides_have_it() -> None:
    assert WAYS["graph"] == TorchWay("float16", channels_last=True, cuda_graph=True)
    assert WAYS["max-autotune"] == TorchWay("float16", channels_last=True, compiled="max-autotune")


@pytest.mark.parametrize("name", ["digits_checkpoint", "resnet_checkpoint"])
def test_peers_normalize_as_we_do_with_constants_on_the_device(name: str, request: pytest.FixtureRequest) -> None:
    checkpoint: Checkpoint = request.getfixturevalue(name)
    pixels = torch.from_numpy(digits(3))
    found = Normalized(checkpoint.input)(pixels)
    expected = checkpoint.input.normalize(pixels.permute(0, 3, 1, 2))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert {k for k, _ in Normalized(checkpoint.input).named_buffers()} == {"factor", "offset"}


def test_the_contender_in_torch_is_the_one_of_the_cpu_on_another_device(
    digits_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    ours = contenders(digits_checkpoint, tmp_path, threads=1, peers=False).ready["PyTorch FP32"]
    on_gpu = loading_torch(digits_checkpoint, tmp_path, device="cuda")
    assert replace(on_gpu, device="cpu") == ours.loading
    classify = classify_in_torch(digits_checkpoint, WAYS[on_gpu.way], "cpu")
    np.testing.assert_array_equal(classify(digits(4)), ours.classify(digits(4)))


@pytest.mark.parametrize("name", ["digits_checkpoint", "resnet_checkpoint"])
def test_no_tensor_of_a_network_stays_behind_on_the_cpu(name: str, request: pytest.FixtureRequest) -> None:
    """PyTorch's device without data refuses to compute with tensors of the CPU, as a GPU does."""
    checkpoint: Checkpoint = request.getfixturevalue(name)
    form = deploy_form(checkpoint.network(), checkpoint.input, int8=False).to("meta")
    pixels = torch.from_numpy(digits(2)).to("meta")
    x = Normalized(checkpoint.input).to("meta")(pixels).requires_grad_()
    logits = form.network(x)
    (gradient,) = torch.autograd.grad(logits.amax(1).sum(), x)
    assert (logits.device.type, gradient.shape) == ("meta", (2, 1, 8, 8))
    assert form(pixels).shape == (2, 10)


def test_torch_s_own_errors_on_the_gpu_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def too_new() -> None:
        with torch_on_cuda():
            assert torch.backends.cudnn.benchmark
            raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nCompile ...")

    with pytest.raises(EngineError) as caught:
        too_new()
    assert str(caught.value) == (
        "PyTorch fails on the GPU (CUDA error: no kernel image is available for execution on the device); "
        "install its build for this GPU's CUDA, see pytorch.org"
    )
