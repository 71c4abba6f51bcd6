"""Inference sessions: one small protocol, one module per engine, one function that opens the right one."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from runtime.engines.compiled_cache import CompiledCache
from runtime.engines.opening import Opening
from runtime.errors import EngineError, OptionError
from runtime.files import read_bytes
from runtime.float_input import PixelSession
from runtime.manifest import Manifest, read_manifest
from runtime.signature import check_signature

# Engine name -> (module of its session, package it needs, extra that installs it).
ENGINES = {
    "openvino": ("runtime.engines.openvino", "openvino", "clearpact[openvino]"),
    "ort": ("runtime.engines.ort", "onnxruntime", "clearpact[ort]"),
}
# TensorRT runs plans only, and plans run on nothing else.
PLAN_ENGINE = "tensorrt"
PLAN_OPTIONS = ("graphs", "spin")
PLAN_SUFFIXES = (".plan", ".engine")


class Session(Protocol):
    """A loaded model on one device of one engine. Every method may be called from several threads at once."""

    engine: str
    version: str
    device: str
    manifest: Manifest
    outputs: tuple[str, ...]

    @property
    def max_batch(self) -> int | None:
        """The most images in one run; None where the engine takes any number."""
        ...

    def run(
        self, inputs: Mapping[str, np.ndarray], outputs: tuple[str, ...] = ("logits",)
    ) -> dict[str, np.ndarray]:
        """Run what the asked outputs need of the model, once.

        Args:
            inputs: by name; `image` is uint8 [N, H, W, C], C-contiguous, of the manifest's size; `target` int64
                [N] (-1: the predicted class) where an output depends on it.
            outputs: names among `self.outputs`.

        Returns:
            These outputs by name, in memory of their own; `logits` is float32 [N, K].
        """
        ...

    def close(self) -> None:
        """Free the model; running it afterwards raises EngineError, closing it again does nothing."""
        ...


def open_session(
    model: str | os.PathLike[str] | bytes,
    *,
    engine: str | None = None,
    device: str | None = None,
    threads: int | None = None,
    parallel_runs: int = 1,
    cache: str | os.PathLike[str] | None = None,
    stream: Any = None,
    context: Any = None,
    providers: Sequence[Any] | None = None,
    options: Mapping[str, Any] | None = None,
    sidecar: str | os.PathLike[str] | bytes | None = None,
    version_compatible: bool = False,
    key: str | os.PathLike[str] | bytes | None = None,
) -> Session:
    """Load an exported model.

    Args:
        model: path or contents of an ONNX file that `python -m export.onnx` wrote, or path of a plan that
            `python -m export.engine` built (`.plan` or `.engine`), or its contents with `sidecar`.
        engine: one of ENGINES; None takes the one the file was lowered for where it is installed, otherwise the
            first that is. A plan has one engine only.
        device: another device of the engine than the first: "gpu", "npu" on OpenVINO; "cuda", "tensorrt" on ONNX
            Runtime, "cuda:1" for the second GPU; "cuda:1" for a plan. None is "cpu", and "cuda" for a plan.
        threads: CPU threads of one inference; None leaves the number to the engine.
        parallel_runs: of several threads that call at the same time, so many are served at once by OpenVINO on the
            CPU, each on `threads` (1 where that is None); others wait. ONNX Runtime and plans serve all of them.
        cache: folder of your own where compiled models are kept (see engines/compiled_cache.py), so that the same
            model starts faster the next time. OpenVINO on the CPU and ONNX Runtime on TensorRT use it; the others
            do without.
        stream: for a plan, the app's CUDA stream (PyCUDA, CuPy, PyTorch, cuda.core, or its handle).
        context: for a plan, the app's PyCUDA context.
        providers: of ONNX Runtime, in place of `device`: its names, or (name, options), the first that takes an
            operator runs it.
        options: of the engine, by its own names: properties of OpenVINO's device, options of ONNX Runtime's
            provider, `graphs` and `spin` of a plan (see `runtime.engines.tensorrt.session.open`).
        sidecar: contents or path of a plan's sidecar, where it does not lie beside the plan.
        version_compatible: run the code for the CPU that a plan built with --version-compatible carries. Nothing
            but a signature protects from a plan whose code is another's.
        key: Ed25519 public key, path or contents in PEM, that the file, and the sidecar of a plan, must be signed
            with (`python -m deploy.sign`).

    Raises:
        FileError: the file cannot be read, or `cache` is no folder.
        ModelError: it is no ONNX file, is truncated, or has no manifest; a plan is not for this machine; it is not
            signed with `key`.
        EngineError: the engine is not installed, the device is not there, or does not compile the model.
        OptionError: no such engine, fewer than one thread, or a `cache` that others may write to.
    """
    if sidecar is not None or is_plan(model):
        if engine not in (None, PLAN_ENGINE) or providers is not None:
            name = "model bytes" if isinstance(model, bytes) else model
            given = "providers" if providers is not None else f"engine {engine!r}"
            raise OptionError(f"{given}: {name} is a TensorRT plan; leave the {given.split()[0]} out")
        planned: Session = importlib.import_module("runtime.engines.tensorrt.session").open(
            model, device=device or "cuda", stream=stream, context=context, sidecar=sidecar,
            version_compatible=version_compatible, key=key, **_known(options),
        )  # fmt: skip
        return planned
    if engine == PLAN_ENGINE:
        raise OptionError(
            "engine 'tensorrt': runs plans; build one: python -m export.engine MODEL.onnx -o engine.plan"
        )
    if stream is not None or context is not None:
        raise OptionError("stream and context are for plans on a GPU; leave them out for an ONNX file")
    source = "model bytes" if isinstance(model, bytes) else str(Path(model))
    data = model if isinstance(model, bytes) else read_bytes(model)
    if key is not None:
        if isinstance(model, bytes):
            raise OptionError("key: the signature of model bytes is nowhere; give the path of the file")
        check_signature(model, data, None, key)
    if version_compatible:
        raise OptionError("version_compatible is for plans on a GPU; leave it out for an ONNX file")
    manifest = read_manifest(data, source)
    for name, number in (("threads", threads), ("parallel_runs", parallel_runs)):
        if number is not None and (not isinstance(number, int) or number < 1):
            raise OptionError(f"{name} {number!r}: expected a whole number from 1")
    chosen = engine or _installed_engine(manifest.target)
    if chosen not in ENGINES:
        raise OptionError(f"engine {chosen!r}: expected one of {', '.join(ENGINES)}")
    if providers is not None and (chosen != "ort" or device is not None):
        raise OptionError("providers are ONNX Runtime's, in place of a device; give engine='ort' and no device")
    opener = _opener(chosen, *ENGINES[chosen])
    kept = None if cache is None else CompiledCache(cache)
    session: Session = opener(
        Opening(
            data, manifest, source, device=(device or "cpu").lower(), threads=threads, parallel_runs=parallel_runs,
            cache=kept, options=dict(options or {}), providers=providers,
        )
    )  # fmt: skip
    return PixelSession(session) if manifest.float_layout else session


def is_plan(model: str | os.PathLike[str] | bytes) -> bool:
    """Return whether a model is the path of a TensorRT plan."""
    return not isinstance(model, bytes) and Path(model).suffix.lower() in PLAN_SUFFIXES


def _known(options: Mapping[str, Any] | None) -> dict[str, bool]:
    """Return the options of a plan, having checked them."""
    found = dict(options or {})
    for name, value in found.items():
        if name not in PLAN_OPTIONS or not isinstance(value, bool):
            raise OptionError(f"option {name}={value!r}: a plan has {', '.join(PLAN_OPTIONS)}, True or False")
    return found


def _opener(engine: str, module: str, package: str, extra: str) -> Callable[..., Any]:
    if not _installed(package):
        raise EngineError(f"engine {engine}: {package} is not installed; pip install '{extra}'")
    try:
        opener: Callable[..., Any] = importlib.import_module(module).open
    except ImportError as error:
        raise EngineError(
            f"engine {engine}: {package} is installed but cannot be loaded ({error}); "
            f"pip install --force-reinstall '{extra}'"
        ) from None
    return opener


def _installed_engine(preferred: str) -> str:
    candidates = [preferred, *ENGINES] if preferred in ENGINES else list(ENGINES)
    for name in candidates:
        if _installed(ENGINES[name][1]):
            return name
    extras = " or ".join(f"'{extra}'" for _, _, extra in ENGINES.values())
    raise EngineError(
        f"no inference engine is installed, expected one of {', '.join(ENGINES)}; pip install {extras}"
    )


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
