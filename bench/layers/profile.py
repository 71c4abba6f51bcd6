"""What each layer of a plan takes, in which precision, and which ONNX nodes it came from.

Times are those that TensorRT reports to a profiler, run without a CUDA graph; the sum is a little more than a run
without one. What a layer is comes from the engine inspector, in full for plans built with detailed verbosity, as
`python -m export.engine` does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from runtime.engines.tensorrt.session import TensorRTSession

# How the inspector of different releases writes types: "Row major linear FP16 format", "Int8 NC/32HW32", "Half".
_PRECISIONS = (
    ("INT8", re.compile(r"\bu?int8\b", re.I)),
    ("FP8", re.compile(r"\bfp8\b", re.I)),
    ("BF16", re.compile(r"\b(bf16|bfloat16)\b", re.I)),
    ("FP16", re.compile(r"\b(fp16|half|float16)\b", re.I)),
    ("FP32", re.compile(r"\b(fp32|float|float32)\b", re.I)),
)
# Layers that move or convert data: their inputs' type says nothing about what is computed.
_COPIES = re.compile(r"reformat|copy|shuffle|cast|NoOp|constant|signal|wait", re.I)


@dataclass(frozen=True)
class Layer:
    """A layer of a plan.

    Args:
        name: in the plan, after fusion.
        kind: TensorRT's type of it, "" where the plan was built without details.
        nodes: names of the ONNX nodes that it computes.
        precision: "INT8", "FP8", "BF16", "FP16" or "FP32", the narrowest of its inputs; "copy" where it only moves
            or converts data; "?" where the plan does not say.
        ms: median time, 0.0 where it was not measured.
    """

    name: str
    kind: str
    nodes: tuple[str, ...]
    precision: str
    ms: float = 0.0


def inspected(information: str) -> list[Layer]:
    """Return the layers in the inspector's JSON, without times."""
    return [_layer(entry) for entry in json.loads(information)["Layers"]]


def profile(session: TensorRTSession, images: np.ndarray, *, runs: int = 50) -> list[Layer]:
    """Return the layers of a plan with their median times, in the order in which they run.

    Args:
        session: the plan.
        images: uint8 [N, H, W, C].
        runs: how many to take the median of.
    """
    times = _layer_times(session, images, runs)
    known = {layer.name: layer for layer in inspected(session.plan.layer_information())}
    found = []
    for name in times[0]:
        layer = known.get(name) or _layer(name)
        median = float(np.median([run.get(name, 0.0) for run in times]))
        found.append(Layer(layer.name, layer.kind, layer.nodes, layer.precision, median))
    return found


def table(layers: list[Layer]) -> Iterator[str]:
    """Yield lines for people: every layer, and the share of each precision."""
    total = sum(layer.ms for layer in layers) or 1.0
    yield "     ms  share  type  layer  <- ONNX nodes"
    for layer in layers:
        nodes = f"  <- {', '.join(layer.nodes)}" if layer.nodes else ""
        yield f"{layer.ms:7.4f} {layer.ms / total:6.1%}  {layer.precision:5} {layer.name}{nodes}"
    for precision in dict.fromkeys(layer.precision for layer in layers):
        own = [layer.ms for layer in layers if layer.precision == precision]
        yield f"{sum(own):7.4f} {sum(own) / total:6.1%}  {precision:5} in {len(own)} layers"


def _layer_times(session: TensorRTSession, images: np.ndarray, runs: int) -> list[dict[str, float]]:
    trt: Any = session.plan.trt

    class Profiler(trt.IProfiler):
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)
            self.times: dict[str, float] = {}

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.times[layer_name] = self.times.get(layer_name, 0.0) + ms

    profiler, found = Profiler(), []
    with session.worker() as worker:
        worker.prepare(session.complete(images))
        worker.upload()
        for index in range(runs + 1):
            profiler.times = {}
            worker.compute()
            worker.mark()
            worker.wait()
            if index == 0:
                worker.report_to(profiler)  # the first run sets TensorRT up
            else:
                found.append(profiler.times)
    return found


def _layer(entry: dict[str, Any] | str) -> Layer:
    """Return one of the inspector's entries; a name alone where the plan was built without details."""
    if isinstance(entry, str):
        return Layer(entry, "", (), "copy" if _COPIES.search(entry) else "?")
    name, kind = str(entry["Name"]), str(entry.get("LayerType", ""))
    nodes = re.findall(r"\[ONNX Layer: ([^\]]*)\]", str(entry.get("Metadata", "")))
    types = " ".join(f"{port.get('Format/Datatype', '')} {port.get('Datatype', '')}" for port in entry["Inputs"])
    precision = next((label for label, pattern in _PRECISIONS if pattern.search(types)), "?")
    if _COPIES.search(kind):
        precision = "copy"
    return Layer(name, kind, tuple(dict.fromkeys(nodes)), precision)
