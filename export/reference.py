"""Run an ONNX graph as it is written, operator by operator, and look at the values inside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx

from runtime.float_input import normalized
from runtime.manifest import INPUT_NAME, METADATA_KEY, Manifest

Run = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]

# Of more, values inside no longer stay near the processor, and gigabytes are taken at once.
_IMAGES_AT_ONCE, _PIXELS_AT_ONCE = 32, 1 << 18


def reference_run(model: onnx.ModelProto, values: Sequence[str] = ()) -> tuple[Run, str]:
    """Return what gives a graph's outputs and inner `values` for its inputs, and the name of what runs it.

    A graph whose manifest says that it takes normalized floats is given pixels all the same.
    """
    manifests = [p.value for p in model.metadata_props if p.key == METADATA_KEY]
    manifest = Manifest.from_json(manifests[0], "graph") if manifests else None
    probed = onnx.ModelProto()
    probed.CopyFrom(model)
    known = {v.name for v in probed.graph.output}
    probed.graph.output.extend(onnx.ValueInfoProto(name=v) for v in values if v not in known)
    outputs = [v.name for v in probed.graph.output]

    def given(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        if manifest is None or not manifest.float_layout:
            return dict(feeds)
        return {**feeds, INPUT_NAME: normalized(feeds[INPUT_NAME], manifest)}

    try:
        import onnxruntime
    except ImportError:
        from onnx.reference import ReferenceEvaluator

        evaluator = ReferenceEvaluator(probed)
        return lambda feeds: dict(zip(outputs, evaluator.run(None, given(feeds)), strict=True)), "onnx reference"
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(probed.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda feeds: dict(zip(outputs, session.run(None, given(feeds)), strict=True)), (
        "ONNX Runtime, optimizations off"
    )


def images_at_once(pixels: int) -> int:
    """Return how many images of so many pixels are best computed at once: 32, of large ones fewer."""
    return max(1, min(_IMAGES_AT_ONCE, _PIXELS_AT_ONCE // max(1, pixels)))


def run_in_parts(run: Run, feeds: Mapping[str, np.ndarray], outputs: Sequence[str]) -> dict[str, np.ndarray]:
    """Return some outputs of a graph for any number of images uint8 [N, H, W, C], few of them at once."""
    count, height, width, _ = feeds[INPUT_NAME].shape
    size = images_at_once(height * width)
    found = []
    for start in range(0, count, size):
        part = run({name: value[start : start + size] for name, value in feeds.items()})
        found.append([part[name] for name in outputs])
    return {name: np.concatenate(values) for name, values in zip(outputs, zip(*found, strict=True), strict=True)}
