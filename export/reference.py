"""Run an ONNX graph as it is written, operator by operator, and look at the values inside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx

from runtime.float_input import normalized
from runtime.manifest import INPUT_NAME, METADATA_KEY, Manifest

Run = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]


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
