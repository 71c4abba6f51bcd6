"""Sessions on ONNX Runtime."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnxruntime

from runtime.engines.compiled_cache import CompiledCache
from runtime.errors import EngineError, ModelError
from runtime.manifest import Manifest
from runtime.onnx_bytes import output_names, with_outputs

_PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
_OF_GRADIENT = {"logits", "gradient", "saliency"}


class ORTSession:
    """A model in ONNX Runtime; see runtime.session.Session.

    ONNX Runtime computes every output of a session, asked for or not: the class alone gets a session of its own,
    and those that explain, by the gradient or by a map of a layer, are opened when such a map is first asked for.
    """

    engine = "ort"
    max_batch = None

    def __init__(self, model: bytes, manifest: Manifest, source: str, *, device: str, threads: int | None) -> None:
        self.version: str = onnxruntime.__version__
        self.manifest = manifest
        self.device = device
        self.outputs = output_names(model)
        # The gradient and its map cost the same: one session gives both.
        self._by_gradient = tuple(name for name in self.outputs if name in _OF_GRADIENT)
        self._source = source
        self._provider = _PROVIDERS.get(device)
        # What TensorRT does not take runs on CUDA, not on the CPU.
        self._providers = [self._provider, *(["CUDAExecutionProvider"] if device == "tensorrt" else [])]
        available = onnxruntime.get_available_providers()
        if self._provider not in available:
            found = ", ".join(name for name, p in _PROVIDERS.items() if p in available)
            remedy = f"expected one of: {found}"
            if self._provider is not None:
                remedy += "; pip uninstall onnxruntime && pip install onnxruntime-gpu"
            raise EngineError(f"device {device!r}: ONNX Runtime does not find it; {remedy}")
        if device != "cpu" and hasattr(onnxruntime, "preload_dlls"):
            # The CUDA libraries that pip installs, which the system's loader does not search; from 1.21 on.
            # It prints what it does not find.
            with contextlib.redirect_stdout(sys.stderr):
                onnxruntime.preload_dlls()
        self._options = onnxruntime.SessionOptions()
        self._options.log_severity_level = 3  # errors; its warnings are for graph authors
        if threads is not None:
            self._options.intra_op_num_threads = threads
            self._options.inter_op_num_threads = 1
        self._model: bytes | None = model
        self._lock = threading.Lock()
        self._sessions: dict[tuple[str, ...], Any] = {}
        self._session_of(("logits",))

    def run(
        self, inputs: Mapping[str, np.ndarray], outputs: tuple[str, ...] = ("logits",)
    ) -> dict[str, np.ndarray]:
        """Run the model once; see runtime.session.Session."""
        kind = outputs if outputs == ("logits",) or not _OF_GRADIENT.issuperset(outputs) else self._by_gradient
        # Held here, so that closing in another thread does not free it now.
        session = self._sessions.get(kind) or self._session_of(kind)
        return dict(zip(outputs, session.run(list(outputs), dict(inputs)), strict=True))

    def close(self) -> None:
        """Free the model."""
        with self._lock:
            self._model = None
            self._sessions = {}

    def _session_of(self, outputs: tuple[str, ...]) -> Any:
        """Return the session that computes these outputs and no others."""
        with self._lock:
            if self._model is None:
                raise EngineError(f"{self._source}: the model is closed; open it again")
            if outputs not in self._sessions:
                whole = set(outputs) == set(self.outputs)
                self._sessions[outputs] = self._open(self._model if whole else with_outputs(self._model, outputs))
            return self._sessions[outputs]

    def _open(self, model: bytes) -> Any:
        try:
            session = onnxruntime.InferenceSession(model, self._options, providers=self._providers)
        except Exception as error:
            reason = str(error).splitlines()[0]
            raise ModelError(
                f"{self._source}: ONNX Runtime cannot load it ({reason}); export it with --target ort"
            ) from None
        # Where a provider's libraries do not load, ONNX Runtime takes the CPU and says so in a log only.
        if self._provider not in session.get_providers():
            raise EngineError(
                f"device {self.device!r}: ONNX Runtime cannot start it; check its driver, or use cpu"
            )
        return session


def open(
    model: bytes,
    manifest: Manifest,
    source: str,
    *,
    device: str,
    threads: int | None,
    parallel_runs: int = 1,
    cache: CompiledCache | None = None,
) -> ORTSession:
    """Load a model on ONNX Runtime.

    Args:
        model: contents of the ONNX file.
        manifest: of the file.
        source: its name, for messages.
        device: "cpu", "cuda" or "tensorrt".
        threads: CPU threads of one inference, or None.
        parallel_runs: not used: runs of several threads are parallel.
        cache: not used: ResNet-20's session opens in 13 ms, and from its serialized optimized form in 6.

    Raises:
        EngineError: this build of ONNX Runtime has no such device.
        ModelError: ONNX Runtime cannot load the model.
    """
    return ORTSession(model, manifest, source, device=device, threads=threads)
