"""A strict model of the part of TensorRT that runtime/engines uses, on top of `tests.fake_cuda`.

A plan is JSON. Its network is linear, logits = W pixels, so that logits and gradient are known exactly.
"""

from __future__ import annotations

import abc
import enum
import hashlib
import importlib.machinery
import json
import sys
import weakref
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from runtime.engines.tensorrt.cuda_choice import VARIABLE
from runtime.engines.tensorrt.plan import PlanSidecar, sidecar_path, this_platform
from runtime.manifest import ImageInput, Manifest
from tests.fake_cuda import FakeGpu
from tests.fake_cuda_parts import Operation

VERSION = "10.16.1.11"
KERNEL_MS = 0.25
SIZE, CHANNELS, CLASSES = (4, 5), 3, 7

# In the words of TensorRT's inspector; a plan without details has names only.
LAYERS: list[dict[str, Any] | str] = [
    {
        "Name": "Reformatting CopyNode for Input Tensor 0 to conv1 + relu1",
        "LayerType": "Reformat",
        "Inputs": [{"Name": "image", "Dimensions": [1, 3, 4, 5], "Format/Datatype": "Row major linear FP32"}],
        "Outputs": [],
        "Metadata": "",
    },
    {
        "Name": "conv1 + relu1",
        "LayerType": "CaskConvolution",
        "Inputs": [
            {
                "Name": "image_q",
                "Dimensions": [1, 3, 4, 5],
                "Format/Datatype": "Thirty-two wide channel vectorized row major Int8 format",
            }
        ],
        "Outputs": [],
        "Metadata": "[ONNX Layer: node_conv2d]\u001e[ONNX Layer: node_relu]\u001e[ONNX Layer: node_conv2d]",
    },
    {
        "Name": "grad_conv",
        "LayerType": "CaskConvolution",
        "Inputs": [{"Name": "g", "Dimensions": [1, 8, 4, 5], "Format": "NHWC8", "Datatype": "Half"}],
        "Outputs": [],
        "Metadata": "[ONNX Layer: grad/conv]",
    },
    "head",
]


class DataType(enum.Enum):
    FLOAT = np.float32
    UINT8 = np.uint8
    INT64 = np.int64
    HALF = np.float16


class TensorIOMode(enum.Enum):
    INPUT = 1
    OUTPUT = 2


class ILogger(abc.ABC):
    ERROR, INTERNAL_ERROR, WARNING = 1, 0, 2

    @abc.abstractmethod
    def log(self, severity: int, message: str) -> None: ...


class IProfiler(abc.ABC):
    @abc.abstractmethod
    def report_layer_time(self, layer_name: str, ms: float) -> None: ...


def weights() -> np.ndarray:
    """Return W, float32 [K, H * W * C]: small whole numbers, so that products are exact in any order."""
    n = SIZE[0] * SIZE[1] * CHANNELS
    return np.random.default_rng(1).integers(-8, 9, (CLASSES, n)).astype(np.float32)


def network(image: np.ndarray, target: np.ndarray | None) -> dict[str, np.ndarray]:
    """Return what the plan's network computes for images uint8 [N, H, W, C] and classes int64 [N]."""
    logits = image.reshape(len(image), -1).astype(np.float32) @ weights().T
    chosen = logits.argmax(1) if target is None else np.where(target < 0, logits.argmax(1), target)
    gradient = weights()[chosen].reshape(len(image), *SIZE, CHANNELS).transpose(0, 3, 1, 2)
    return {
        "logits": logits,
        "gradient": np.ascontiguousarray(gradient),
        "saliency": np.abs(gradient).max(1),
    }


def images(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, *SIZE, CHANNELS), np.uint8)


def write_plan(
    path: Path, *, saliency: bool = True, batch: tuple[int, int, int] = (1, 4, 8), recordable: bool = True,
    **sidecar: Any,
) -> Path:  # fmt: skip
    """Write a plan of the fake TensorRT with its sidecar."""
    host_code = sidecar.get("version_compatible", False)
    described = {"saliency": saliency, "batch": batch, "recordable": recordable, "host_code": host_code}
    plan = json.dumps(described).encode()
    path.write_bytes(plan)
    image = ImageInput(SIZE, CHANNELS, (0.5,) * 3, (0.25,) * 3)
    known: dict[str, Any] = {
        "manifest": Manifest("cnn2", "int8", "tensorrt", image, tuple(f"class {k}" for k in range(CLASSES))),
        "onnx_sha256": "0" * 64,
        "plan_sha256": hashlib.sha256(plan).hexdigest(),
        "builder": "tensorrt",
        "builder_version": VERSION,
        "compute_capability": "8.7",
        "platform": this_platform(),
        "batch": batch,
        "rebuild": "python -m export.engine model.onnx -o engine.plan",
    }
    sidecar_path(path).write_text(PlanSidecar(**{**known, **sidecar}).to_json())
    return path


def fake_tensorrt(gpu: FakeGpu) -> Any:
    """Return the module `tensorrt` for a GPU."""
    module = ModuleType("tensorrt")
    module.__dict__.update(
        __version__=VERSION, ILogger=ILogger, IProfiler=IProfiler, TensorIOMode=TensorIOMode, DataType=DataType,
        LayerInformationFormat=SimpleNamespace(JSON="json"),
        nptype=lambda dtype: dtype.value,
        Runtime=lambda logger: Runtime(gpu, logger),
    )  # fmt: skip
    return module


def _tracked(gpu: FakeGpu, thing: Any, name: str, made_from: Any = None) -> None:
    """Count a runtime, engine or context until it is gone, which what was made from it must be before."""
    gpu.objects.append(name)
    thing.children = children = [0]
    parents: list[int] = [0] if made_from is None else made_from.children
    parents[0] += 1

    def gone() -> None:
        gpu.objects.remove(name)
        parents[0] -= 1
        if children[0]:
            gpu.violations.append(f"the {name} goes before what was made from it")

    weakref.finalize(thing, gone)


def install(monkeypatch: pytest.MonkeyPatch, gpu: FakeGpu) -> None:
    """Make `import tensorrt` and `import cuda.bindings.runtime` find the models."""
    tensorrt = fake_tensorrt(gpu)
    tensorrt.__spec__ = importlib.machinery.ModuleSpec("tensorrt", None)
    for name, module in (("cuda", ModuleType("cuda")), ("cuda.bindings", ModuleType("cuda.bindings"))):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv(VARIABLE, "cuda-bindings")  # whatever libcudart the machine has
    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", gpu)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", gpu)  # type: ignore[arg-type]


class Runtime:
    def __init__(self, gpu: FakeGpu, logger: ILogger) -> None:
        self._gpu, self._logger = gpu, logger
        self.DLA_core = -1
        self.engine_host_code_allowed = False
        _tracked(gpu, self, "runtime")

    def deserialize_cuda_engine(self, plan: bytes) -> Engine | None:
        self._gpu.current_context()
        if self._gpu.fails("deserialize_cuda_engine"):
            self._logger.log(ILogger.ERROR, "Error Code 1:\n  Serialization assertion failed")
            return None
        described = json.loads(plan)
        if described["host_code"] and not self.engine_host_code_allowed:
            self._logger.log(ILogger.ERROR, "Error Code 4: Internal Error (host code is not allowed)")
            return None
        engine = Engine(self._gpu, self._logger, described)
        _tracked(self._gpu, engine, "engine", self)
        return engine


class Engine:
    def __init__(self, gpu: FakeGpu, logger: ILogger, plan: dict[str, Any]) -> None:
        self.gpu, self.logger, self.plan = gpu, logger, plan
        n = -1 if len(set(plan["batch"])) > 1 else plan["batch"][0]
        self.tensors = {
            "logits": (DataType.FLOAT, (n, CLASSES)),
            "image": (DataType.UINT8, (n, *SIZE, CHANNELS)),
        }
        if plan["saliency"]:
            self.tensors |= {
                "target": (DataType.INT64, (n,)),
                "saliency": (DataType.FLOAT, (n, *SIZE)),
                "gradient": (DataType.FLOAT, (n, CHANNELS, *SIZE)),
            }

    @property
    def num_io_tensors(self) -> int:
        return len(self.tensors)

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in ("image", "target") else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return self.tensors[name][0]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name][1]

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        assert profile == 0
        assert self.get_tensor_mode(name) == TensorIOMode.INPUT
        return [(n, *self.tensors[name][1][1:]) for n in self.plan["batch"]]

    def create_execution_context(self) -> Context | None:
        if self.gpu.fails("create_execution_context"):
            self.logger.log(ILogger.ERROR, "out of memory")
            return None
        context = Context(self)
        _tracked(self.gpu, context, "context", self)
        return context

    def create_engine_inspector(self) -> Any:
        return SimpleNamespace(get_engine_information=lambda _: json.dumps({"Layers": LAYERS}))


class Context:
    profiler: IProfiler | None = None

    def __init__(self, engine: Engine) -> None:
        self._gpu, self._logger, self._plan = engine.gpu, engine.logger, engine.plan
        self._tensors, self._mode = engine.tensors, engine.get_tensor_mode
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._state = 0  # counts changes of shape
        self._settled = -1  # the state that TensorRT has set itself up for

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if self._gpu.fails("set_input_shape"):
            return False
        low, _, high = self._plan["batch"]
        if not low <= shape[0] <= high or tuple(shape[1:]) != self._tensors[name][1][1:]:
            raise self._gpu.violated(f"{name} of shape {shape} is outside the profile")
        self._shapes[name] = tuple(shape)
        self._state += 1
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        batch = self._shapes["image"][0]
        return (batch, *self._tensors[name][1][1:])

    def set_tensor_address(self, name: str, address: int) -> bool:
        if address % 256 and self._mode(name) == TensorIOMode.INPUT:
            raise self._gpu.violated(f"{name} at {address:#x} is not aligned")
        self._addresses[name] = address
        return not self._gpu.fails("set_tensor_address")

    def execute_async_v3(self, stream: int) -> bool:
        with self._gpu.lock:
            return self._execute(stream)

    def _execute(self, stream: int) -> bool:
        found = self._gpu._stream(stream)
        if self._gpu.fails("execute_async_v3"):
            found.invalidated = found.recording is not None
            self._logger.log(ILogger.ERROR, "Error Code 1: Cuda Runtime")
            return False
        if set(self._shapes) != {n for n in self._tensors if self._mode(n) == TensorIOMode.INPUT}:
            raise self._gpu.violated("an input has no shape")
        if found.recording is not None:
            if self._settled != self._state:
                raise self._gpu.violated("a shape is recorded before it was ever run")
            if not self._plan["recordable"]:
                found.invalidated = True
                return False
        self._settled = self._state
        recorded_state, addresses = self._state, dict(self._addresses)
        shapes = {name: self.get_tensor_shape(name) for name in self._tensors}
        arrays = {name: (dtype.value, shapes[name]) for name, (dtype, _) in self._tensors.items()}
        n_bytes = {name: int(np.prod(shape)) * np.dtype(dtype).itemsize for name, (dtype, shape) in arrays.items()}
        memory = tuple(self._gpu.allocation(addresses[name], n_bytes[name]) for name in arrays)
        for piece in memory:
            if piece.kind != "device":
                raise self._gpu.violated("a tensor is not in GPU memory")
        alive = weakref.ref(self)

        def run() -> None:
            if alive() is None:
                raise self._gpu.violated("a context is gone before its work is done")
            given = {
                name: np.frombuffer(self._gpu.bytes_at(addresses[name], n_bytes[name]), dtype).reshape(shape)
                for name, (dtype, shape) in arrays.items()
                if self._mode(name) == TensorIOMode.INPUT
            }
            computed = network(given["image"], given.get("target"))
            for name in arrays.keys() - given.keys():
                self._gpu.bytes_at(addresses[name], n_bytes[name])[:] = computed[name].tobytes()

        def allowed() -> None:
            context = alive()
            if context is None or context._state != recorded_state:
                raise self._gpu.violated("a graph of another shape, or of a context that is gone, is launched")

        self._gpu.enqueue(stream, Operation(run, KERNEL_MS, memory, allowed))
        if self.profiler is not None:
            for index, layer in enumerate(LAYERS):
                name = layer if isinstance(layer, str) else layer["Name"]
                self.profiler.report_layer_time(name, 0.125 * (index + 1))
        return True
