"""Opening a plan: what is refused before TensorRT loads it, and in which words."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

from runtime import Classifier
from runtime.engines.tensorrt.plan import read_sidecar, sidecar_path
from runtime.engines.tensorrt.session import open as open_plan
from runtime.errors import ClearpactError, EngineError, ModelError, OptionError
from runtime.session import open_session
from tests.fake_cuda import FakeGpu
from tests.fake_tensorrt import (
    CLASSES,
    VERSION,
    images,
    install,
    network,
    write_plan,
)


def test_a_version_compatible_plan_may_run_the_code_it_carries_and_no_other_may(
    gpu: FakeGpu, tmp_path: Path
) -> None:
    portable = write_plan(tmp_path / "portable.plan", version_compatible=True)
    refused = r"portable.plan: carries code for the CPU, .*; open it with version_compatible=True"
    for opener in (open_plan, Classifier):
        with pytest.raises(OptionError, match=refused):
            opener(portable)
    assert "deserialize_cuda_engine" not in gpu.calls
    open_plan(portable, version_compatible=True).close()
    Classifier(portable, version_compatible=True).close()
    plain = write_plan(tmp_path / "plain.plan", version_compatible=True)
    sidecar = sidecar_path(plain)
    sidecar.write_text(dataclasses.replace(read_sidecar(plain), version_compatible=False).to_json())
    for asked in (False, True):
        with pytest.raises(EngineError, match="host code is not allowed"):
            open_plan(plain, version_compatible=asked)


@pytest.mark.parametrize(
    ("sidecar", "message"),
    [
        ({"plan_sha256": "1" * 64}, "sha256 .* but its sidecar is for 111111111111; build it again"),
        ({"builder_version": "11.4.0.106"}, "built with TensorRT 11.4.0.106, but this is TensorRT 10.16.1.11"),
        (
            {"compute_capability": "8.6"},
            "built on compute capability 8.6, but this is 8.7; .* export.engine model.onnx",
        ),
        ({"platform": "win32-amd64"}, "built on win32-amd64, but this is "),
    ],
)
def test_a_plan_for_another_machine_is_refused_before_it_is_loaded(
    gpu: FakeGpu, tmp_path: Path, sidecar: dict[str, str], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        open_plan(write_plan(tmp_path / "engine.plan", **sidecar))
    assert "deserialize_cuda_engine" not in gpu.calls
    assert "cudaMalloc" not in gpu.calls


def test_a_plan_may_be_called_engine_or_come_as_bytes_with_its_sidecar(gpu: FakeGpu, plan: Path) -> None:
    contents, sidecar = plan.read_bytes(), sidecar_path(plan).read_bytes()
    other = plan.with_name("other.engine")
    other.write_bytes(contents)
    sidecar_path(other).write_bytes(sidecar)
    elsewhere = plan.with_name("elsewhere.json")
    elsewhere.write_bytes(sidecar)
    for model, described in (
        (other, None), (contents, sidecar), (contents, elsewhere), (plan, str(elsewhere)),
    ):  # fmt: skip
        with Classifier(model, sidecar=described) as classifier:
            assert classifier.predict(images(1)[0]).index == network(images(1), None)["logits"].argmax()
    assert repr(classifier) == (
        f"<Classifier: cnn2, int8, 4x5x3 -> {CLASSES} classes, tensorrt {VERSION} on cuda:0, closed>"
    )
    with pytest.raises(OptionError, match=r"^plan bytes: nothing says what they are; give sidecar"):
        open_plan(contents)
    with pytest.raises(ModelError, match=r"^sidecar bytes: is not a plan's readable JSON"):
        open_plan(contents, sidecar=b"{")


def test_options_of_a_plan_are_passed_on(gpu: FakeGpu, plan: Path) -> None:
    with Classifier(plan, options={"graphs": False, "spin": True}) as classifier:
        for _ in range(4):
            classifier.predict(images(1)[0])
    assert "cudaStreamBeginCapture" not in gpu.calls
    for options in ({"graph": True}, {"graphs": "no"}):
        with pytest.raises(OptionError, match=r"^option .*: a plan has graphs, spin, True or False$"):
            Classifier(plan, options=options)
    with pytest.raises(
        OptionError, match=r"^providers: .*engine.plan is a TensorRT plan; leave the providers out$"
    ):
        Classifier(plan, providers=["CUDAExecutionProvider"])


def test_a_plan_without_sidecar_names_the_command(gpu: FakeGpu, tmp_path: Path) -> None:
    (tmp_path / "engine.plan").write_bytes(b"plan")
    with pytest.raises(ModelError, match=r"its sidecar engine.plan.json is missing; .* python -m export.engine"):
        Classifier(tmp_path / "engine.plan")
    assert gpu.calls == []


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"engine": "ort"}, OptionError, "^engine 'ort': .*engine.plan is a TensorRT plan; leave the engine out$"),
        ({"device": "cpu"}, OptionError, "^device 'cpu': a plan runs on a GPU, expected cuda or cuda:1$"),
        ({"device": "cuda:1"}, EngineError, r"^device cuda:1: not there; expected one of: cuda:0$"),
    ],
)
def test_wrong_options_are_refused(
    gpu: FakeGpu, plan: Path, options: dict[str, str], error: type[ClearpactError], message: str
) -> None:
    with pytest.raises(error, match=message):
        Classifier(plan, **options)


def test_an_onnx_file_takes_neither_the_engine_nor_a_stream(digits_models: dict[str, Path]) -> None:
    with pytest.raises(OptionError, match=r"^engine 'tensorrt': runs plans; build one: python -m export.engine"):
        open_session(digits_models["tensorrt"], engine="tensorrt")
    with pytest.raises(OptionError, match=r"^stream and context are for plans on a GPU"):
        open_session(digits_models["ort"], stream=1)


def test_without_tensorrt_the_extra_is_named(plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(
        EngineError, match=r"^TensorRT plan: tensorrt cannot be imported \(.*pip install 'clearpact\["
    ):
        Classifier(plan)


def test_without_a_gpu_the_driver_is_named(plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu(devices=0)
    install(monkeypatch, gpu)
    with pytest.raises(EngineError, match=r"^CUDA: cuda\w+ failed \(cudaError"):
        Classifier(plan)
    gpu.assert_clean()
