"""What an engine opens, and how: one description, whichever engine it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from runtime.engines.compiled_cache import CompiledCache
from runtime.manifest import Manifest


@dataclass(frozen=True)
class Opening:
    """A model, and how it is to run.

    Args:
        model: contents of the ONNX file.
        manifest: of the file.
        source: its name, for messages.
        device: of the engine, in small letters, such as "cpu" or "cuda:1".
        threads: CPU threads of one inference; None leaves the number to the engine.
        parallel_runs: runs of several threads at the same time.
        cache: where compiled models are kept.
        options: of the device, by the engine's own names, over ours.
        providers: of ONNX Runtime, names or (name, options), in place of a device.
    """

    model: bytes
    manifest: Manifest
    source: str
    device: str = "cpu"
    threads: int | None = None
    parallel_runs: int = 1
    cache: CompiledCache | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    providers: Sequence[Any] | None = None
