"""Sessions on OpenVINO: the engine that makes INT8 pay on a CPU."""

from __future__ import annotations

import queue
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import openvino

from runtime.errors import EngineError, ModelError
from runtime.manifest import Manifest

# Batch sizes compiled for their own shape: a static shape costs a fifth less than a dynamic one at batch 1.
_MAX_STATIC_SHAPES = 4


class OpenVINOSession:
    """A model compiled for one OpenVINO device, once per batch size; see runtime.session.Session."""

    engine = "openvino"

    def __init__(self, model: bytes, manifest: Manifest, source: str, *, device: str, threads: int | None) -> None:
        self.version: str = openvino.__version__.split("-")[0]
        self.manifest = manifest
        self.device = device
        self._source = source
        self._closed = False
        self._core = openvino.Core()
        devices = self._core.available_devices
        if device.upper() not in {
            name for d in devices for name in (d, d.split(".")[0])
        }:  # GPU.0, GPU.1: also GPU
            found = ", ".join(devices).lower() or "none"
            raise EngineError(f"device {device!r}: OpenVINO does not find it; expected one of: {found}")
        # Float islands compute in float32, so that the codes are those of the checkpoint: left to itself the
        # plugin takes bfloat16 where the processor has it, and the residual sums then miss codes for no gain.
        self._config: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
        if device.upper() == "CPU" and threads is not None:
            self._config |= {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
        try:
            self._model = self._core.read_model(model=model)
        except RuntimeError as error:
            raise ModelError(
                f"{source}: OpenVINO cannot read it ({_first_line(error)}); export it again"
            ) from None
        self._outputs = [output.get_any_name() for output in self._model.outputs]
        # Batch size (0: any) -> the compiled model and its idle requests.
        self._compiled: dict[int, tuple[Any, queue.LifoQueue[Any]]] = {}
        self._lock = threading.Lock()

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run the model once; see runtime.session.Session."""
        compiled, idle = self._compiled_for(len(inputs["image"]))
        try:
            request = idle.get_nowait()
        except queue.Empty:
            request = compiled.create_infer_request()
        try:
            for name, value in inputs.items():
                # OpenVINO shares only what it could write to; it never writes to an input.
                request.set_tensor(name, openvino.Tensor(value, shared_memory=value.flags.writeable))
            request.infer()
            return {name: request.get_output_tensor(i).data.copy() for i, name in enumerate(self._outputs)}
        finally:
            idle.put(request)

    def close(self) -> None:
        """Free the compiled models, once the runs that other threads have begun are done."""
        with self._lock:
            self._closed = True
            self._compiled = {}
            self._model = None

    def _compiled_for(self, batch: int) -> tuple[Any, queue.LifoQueue[Any]]:
        """Return the model compiled for a batch size and its idle requests, compiling it first where needed."""
        found = self._compiled.get(batch)
        if found is not None:
            return found
        with self._lock:
            if self._closed:
                raise EngineError(f"{self._source}: the model is closed; open it again")
            # The one for any batch size counts too: there is never room for another after it.
            key = batch if batch in self._compiled or len(self._compiled) < _MAX_STATIC_SHAPES else 0
            if key not in self._compiled:
                self._compiled[key] = (self._compile(key), queue.LifoQueue())
            return self._compiled[key]

    def _compile(self, batch: int) -> Any:
        model = self._model
        if batch:
            model = model.clone()
            shapes = {port.get_any_name(): port.get_partial_shape() for port in model.inputs}
            for shape in shapes.values():
                shape[0] = batch
            model.reshape(shapes)
        return self._core.compile_model(model, self.device.upper(), self._config)


def open(model: bytes, manifest: Manifest, source: str, *, device: str, threads: int | None) -> OpenVINOSession:
    """Load a model on OpenVINO.

    Args:
        model: contents of the ONNX file.
        manifest: of the file.
        source: its name, for messages.
        device: "cpu", "gpu" or "npu".
        threads: CPU threads of one inference, or None.

    Raises:
        EngineError: OpenVINO does not find the device.
        ModelError: OpenVINO cannot read the model.
    """
    return OpenVINOSession(model, manifest, source, device=device, threads=threads)


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
