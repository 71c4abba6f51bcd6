"""Sessions on OpenVINO: the engine that makes INT8 pay on a CPU."""

from __future__ import annotations

import hashlib
import importlib
import io
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np

from runtime.engines import int16_sums
from runtime.engines.compiled_cache import cache_key, processor_features
from runtime.engines.opening import Opening
from runtime.errors import EngineError, ModelError
from runtime.onnx_bytes import output_names


def _import_openvino() -> Any:
    """Import OpenVINO without its model converter, which takes more than half of the time and 16 MB.

    `openvino` takes an absent converter for one that is not installed. An app that calls
    `openvino.convert_model` still finds it, imported when it asks.
    """
    converter = "openvino.tools.ovc"
    if "openvino" in sys.modules:
        return sys.modules["openvino"]
    sys.modules[converter] = None  # type: ignore[assignment]
    try:
        module = importlib.import_module("openvino")
    finally:
        del sys.modules[converter]

    def when_asked(name: str) -> Any:
        if name != "convert_model":
            raise AttributeError(f"module 'openvino' has no attribute {name!r}")
        return importlib.import_module(converter).convert_model

    vars(module).setdefault("__getattr__", when_asked)
    return module


openvino = _import_openvino()
# The first look at a tensor in a process loads numpy's C interface, under a lock of C++. A second thread waits for
# that lock while it holds Python's own, and both wait for ever. So this first look happens here.
openvino.Tensor(np.zeros(1, np.uint8)).data  # noqa: B018

# Batch sizes kept compiled; the one that was used longest ago makes room. Every run has its own static shape: that
# costs a fifth less than an open one at batch 1, and some graphs are computed wrongly where the batch is open.
_MAX_SHAPES = 8


class OpenVINOSession:
    """A model compiled for one OpenVINO device, once per batch size; see runtime.session.Session."""

    engine = "openvino"
    max_batch = None

    def __init__(self, opening: Opening) -> None:
        self.version: str = openvino.__version__.split("-")[0]
        self.manifest = opening.manifest
        self.device = device = opening.device
        self.outputs = output_names(opening.model)
        self._source = opening.source
        self._closed = False
        self._core = openvino.Core()
        self._check_device()
        self._config: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", **float_precision(self._core, device)}
        if device.upper() == "CPU" and (opening.threads is not None or opening.parallel_runs > 1):
            all_threads = (opening.threads or 1) * opening.parallel_runs
            # Unpinned: two sessions of one app would be pinned to the same cores.
            self._config |= {"INFERENCE_NUM_THREADS": all_threads, "NUM_STREAMS": opening.parallel_runs,
                             "ENABLE_CPU_PINNING": False}  # fmt: skip
        self._config |= opening.options
        self._data: bytes | None = opening.model
        self._model: Any = None
        self._cache = opening.cache if device.upper() == "CPU" else None
        if self._cache is None:
            self._read()
        else:
            # All that decides what is compiled, besides batch size and outputs.
            self._key = (
                hashlib.sha256(opening.model).hexdigest(),
                openvino.__version__,
                self._core.get_property("CPU", "FULL_DEVICE_NAME"),
                self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"),
                processor_features(),
                int16_sums.adds_in_int16(),
                sorted(self._config.items()),
            )
        # (batch size, outputs) -> what is compiled for them.
        self._variants: dict[tuple[int, tuple[str, ...]], _Variant] = {}
        self._lock = threading.Lock()
        if opening.options or device.upper() != "CPU":
            self._variant_for(1, ("logits",))  # what the device or the plugin refuses is refused now

    def run(
        self, inputs: Mapping[str, np.ndarray], outputs: tuple[str, ...] = ("logits",)
    ) -> dict[str, np.ndarray]:
        """Run the model once; see runtime.session.Session."""
        return self._variant_for(len(inputs["image"]), outputs).run(inputs)

    def close(self) -> None:
        """Free the compiled models, once the runs that other threads have begun are done."""
        with self._lock:
            self._closed = True
            self._variants = {}
            self._model = self._data = None

    def _check_device(self) -> None:
        """Raise EngineError where OpenVINO has no such device."""
        if self.device.upper() == "CPU":
            return  # looking for others loads their drivers' libraries
        devices = self._core.available_devices
        # Where there are GPU.0 and GPU.1, GPU is a name too.
        if self.device.upper() not in {name for d in devices for name in (d, d.split(".")[0])}:
            found = ", ".join(devices).lower() or "none"
            raise EngineError(f"device {self.device!r}: OpenVINO does not find it; expected one of: {found}")

    def _read(self) -> Any:
        """Return the whole model, read once."""
        if self._model is None:
            try:
                self._model = self._core.read_model(model=self._data)
            except RuntimeError as error:
                raise ModelError(
                    f"{self._source}: OpenVINO cannot read it ({_first_line(error)}); export it again"
                ) from None
            if self.device.upper() == "CPU" and int16_sums.adds_in_int16():
                full = any("255" in str(layer.get("input")) for layer in self.manifest.layers)
                int16_sums.keep_sums_exact(self._model, openvino.op.Constant, largest_code=255 if full else 127)
        return self._model

    def _variant_for(self, batch: int, outputs: tuple[str, ...]) -> _Variant:
        key = (batch, outputs)
        found = self._variants.get(key)
        if found is not None:
            return found
        with self._lock:
            if self._closed:
                raise EngineError(f"{self._source}: the model is closed; open it again")
            if key not in self._variants:
                same = [k for k in self._variants if k[1] == outputs]
                if len(same) >= _MAX_SHAPES:
                    # Runs that other threads have begun hold it until they are done.
                    del self._variants[min(same, key=lambda k: self._variants[k].used)]
                self._variants[key] = _Variant(self._compile(*key), outputs)
            return self._variants[key]

    def _compile(self, batch: int, outputs: tuple[str, ...]) -> Any:
        """Return the model for a batch size and some outputs, from the cache where it is there."""
        if self._cache is None:
            return self._compiled(batch, outputs)
        key = cache_key((*self._key, batch, outputs))
        kept = self._cache.load(key)
        if kept is not None:
            try:
                return self._core.import_model(kept, "CPU", self._config)
            except RuntimeError:  # whole, but this build of the engine does not take it
                pass
        compiled = self._compiled(batch, outputs)
        exported = io.BytesIO()
        compiled.export_model(exported)
        self._cache.store(key, exported.getvalue())
        return compiled

    def _compiled(self, batch: int, outputs: tuple[str, ...]) -> Any:
        # A model of these outputs alone: what only the others need is neither compiled nor computed.
        whole = self._read().clone()
        model = openvino.Model([whole.output(name) for name in outputs], whole.get_parameters())
        shapes = {port.get_any_name(): port.get_partial_shape() for port in model.inputs}
        for shape in shapes.values():
            shape[0] = batch
        model.reshape(shapes)
        try:
            return self._core.compile_model(model, self.device.upper(), self._config)
        except RuntimeError as error:
            raise EngineError(
                f"{self._source}: OpenVINO does not compile it for {self.device} ({_reason(error)}); check the "
                "device's driver and the options, or use cpu"
            ) from None


class _Variant:
    """A model compiled for one batch size and some of its outputs, with its idle requests."""

    def __init__(self, compiled: Any, outputs: tuple[str, ...]) -> None:
        self._compiled = compiled
        self._outputs = outputs
        self.used = 0.0
        # Its ends are safe to use from several threads, and a run takes 1.4 us less than with a queue.
        self._idle: deque[_Request] = deque()

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.used = time.monotonic()
        try:
            request = self._idle.pop()
        except IndexError:
            request = _Request(self._compiled.create_infer_request(), self._outputs)
        try:
            return request.run(inputs)
        finally:
            self._idle.append(request)


class _Request:
    """An inference request, and views of its memory: copying in costs less than binding."""

    def __init__(self, request: Any, outputs: tuple[str, ...]) -> None:
        self._request = request
        self._outputs = outputs
        ports = request.model_inputs
        self._inputs = {p.get_any_name(): request.get_input_tensor(i).data for i, p in enumerate(ports)}

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        for name, value in inputs.items():
            np.copyto(self._inputs[name], value, casting="no")
        self._request.infer(share_outputs=True)
        return {name: self._request.get_output_tensor(i).data.copy() for i, name in enumerate(self._outputs)}


def open(opening: Opening) -> OpenVINOSession:
    """Load a model on OpenVINO.

    Args:
        opening: the model and how it runs. The device is "cpu", "gpu" or "npu"; the options are its properties,
            such as {"INFERENCE_PRECISION_HINT": "bf16"}. The cache is used on the CPU; the model itself is then
            read when one is missing there.

    Raises:
        EngineError: OpenVINO does not find the device, or does not compile the model for it with these options.
        ModelError: OpenVINO cannot read the model.
    """
    return OpenVINOSession(opening)


def float_precision(core: Any, device: str) -> dict[str, str]:
    """Return the property that says in what a device computes float islands: in float32 where it can.

    So the codes are those of the checkpoint: left to itself the CPU's plugin takes bfloat16 where the processor
    has it, and the residual sums then miss codes for no gain. NPUs have float16 alone and refuse float32.
    """
    if device.upper() == "CPU":
        return {"INFERENCE_PRECISION_HINT": "f32"}
    try:
        known = core.get_property(device.upper(), "OPTIMIZATION_CAPABILITIES")
    except RuntimeError:
        return {}
    found = next((name for name in ("FP32", "FP16") if name in known), None)
    return {} if found is None else {"INFERENCE_PRECISION_HINT": found.lower().replace("fp", "f")}


def _reason(error: Exception) -> str:
    """Return the last thing that OpenVINO says, after the places in its sources that it names first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in reversed(lines) if not line.startswith("Exception from ")), "no reason given")


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
