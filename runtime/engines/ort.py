"""Sessions on ONNX Runtime."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime

from runtime.engines.compiled_cache import CompiledCache
from runtime.engines.int16_sums import adds_in_int16
from runtime.engines.opening import Opening
from runtime.errors import EngineError, ModelError, OptionError
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

    def __init__(self, opening: Opening) -> None:
        self.version: str = onnxruntime.__version__
        self.manifest = opening.manifest
        self.device = opening.device
        self.outputs = output_names(opening.model)
        # The gradient and its map cost the same: one session gives both.
        self._by_gradient = tuple(name for name in self.outputs if name in _OF_GRADIENT)
        self._source = opening.source
        self._providers = (
            _device_providers(self.device, self.manifest.precision, opening.cache, dict(opening.options))
            if opening.providers is None
            else _named(opening.providers)
        )
        self._provider = self._providers[0][0]
        if opening.providers is not None:
            self.device = next((name for name, p in _PROVIDERS.items() if p == self._provider), self._provider)
        if self._provider != _PROVIDERS["cpu"] and hasattr(onnxruntime, "preload_dlls"):
            # The CUDA libraries that pip installs, which the system's loader does not search; from 1.21 on.
            # It prints what it does not find.
            with contextlib.redirect_stdout(sys.stderr):
                onnxruntime.preload_dlls()
        self._options = onnxruntime.SessionOptions()
        self._options.log_severity_level = 3  # errors; its warnings are for graph authors
        if adds_in_int16():  # weights become u8 then, whose products are added in 32 bits
            self._options.add_session_config_entry("session.x64quantprecision", "1")
        if opening.threads is not None:
            self._options.intra_op_num_threads = opening.threads
            self._options.inter_op_num_threads = 1
        self._model: bytes | None = opening.model
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
            names, options = zip(*self._providers, strict=True)
            session = onnxruntime.InferenceSession(
                model, self._options, providers=list(names), provider_options=list(options)
            )
        except Exception as error:
            reason = str(error).splitlines()[0]
            if self._provider != _PROVIDERS["cpu"]:
                raise EngineError(
                    f"{self._source}: ONNX Runtime does not start it on {self.device} ({reason}); check the "
                    "driver and the options, or use cpu"
                ) from None
            raise ModelError(
                f"{self._source}: ONNX Runtime cannot load it ({reason}); export it with --target ort"
            ) from None
        # Where a provider's libraries do not load, ONNX Runtime takes the CPU and says so in a log only.
        if self._provider not in session.get_providers():
            raise EngineError(
                f"device {self.device!r}: ONNX Runtime cannot start it; check its driver, or use cpu"
            )
        return session


def open(opening: Opening) -> ORTSession:
    """Load a model on ONNX Runtime.

    Args:
        opening: the model and how it runs. The device is "cpu", "cuda" or "tensorrt"; "cuda:1" is the second GPU.
            Runs of several threads are parallel, whatever `parallel_runs` says. The cache keeps TensorRT's
            engines, which take minutes to build; it is not used on the CPU: ResNet-20's session opens in 13 ms,
            and from its serialized optimized form in 6.

    Raises:
        EngineError: this build of ONNX Runtime has no such device, or cannot start it with these options.
        ModelError: ONNX Runtime cannot load the model.
        OptionError: `providers` is no list of names, or the device has no such options.
    """
    return ORTSession(opening)


def _device_providers(
    device: str, precision: str, cache: CompiledCache | None, options: dict[str, Any]
) -> list[tuple[str, dict[str, str]]]:
    """Return the providers of a device with their options, the device's own first."""
    name, _, number = device.partition(":")
    provider = _PROVIDERS.get(name)
    known = provider is not None and (not number or (number.isdecimal() and name != "cpu"))
    available = onnxruntime.get_available_providers()
    if not known or provider not in available:
        found = ", ".join(name for name, p in _PROVIDERS.items() if p in available)
        remedy = f"expected one of: {found}"
        if known:
            remedy += "; pip uninstall onnxruntime && pip install onnxruntime-gpu"
        raise EngineError(f"device {device!r}: ONNX Runtime does not find it; {remedy}")
    if name == "cpu" and options:
        raise OptionError(f"option {next(iter(options))!r}: ONNX Runtime has none on the CPU; leave it out")
    ours: dict[str, Any] = {"device_id": number} if number else {}
    if name != "tensorrt":
        return _named([(provider, ours | options)])
    # Without these it computes everything in float32, whatever grids the file has.
    ours |= {"trt_fp16_enable": True, "trt_int8_enable": precision == "int8"}
    if cache is not None:
        folder = str(cache.own_folder())
        ours |= {"trt_engine_cache_enable": True, "trt_engine_cache_path": folder,
                 "trt_timing_cache_enable": True, "trt_timing_cache_path": folder}  # fmt: skip
    # What TensorRT does not take runs on CUDA, not on the CPU.
    rest = {"device_id": number} if number else {}
    return _named([(provider, ours | options), ("CUDAExecutionProvider", rest)])


def _named(providers: Sequence[Any]) -> list[tuple[str, dict[str, str]]]:
    """Return providers as (name, options), options as the texts that ONNX Runtime reads."""
    found = []
    available = onnxruntime.get_available_providers()
    for given in [providers] if isinstance(providers, str) else providers:
        name, options = (given, {}) if isinstance(given, str) else given
        if name not in available:
            raise EngineError(f"provider {name!r}: ONNX Runtime does not find it; expected {', '.join(available)}")
        found.append((name, {str(key): _text(value) for key, value in dict(options).items()}))
    if not found:
        raise OptionError("providers: none given, expected names such as CPUExecutionProvider")
    return found


def _text(value: object) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value)
