"""Run an ONNX graph as it is written, operator by operator, and look at the values inside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx

Run = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]


def reference_run(model: onnx.ModelProto, values: Sequence[str] = ()) -> tuple[Run, str]:
    """Return what gives a graph's outputs and inner `values` for its inputs, and the name of what runs it."""
    probed = onnx.ModelProto()
    probed.CopyFrom(model)
    known = {v.name for v in probed.graph.output}
    probed.graph.output.extend(onnx.ValueInfoProto(name=v) for v in values if v not in known)
    outputs = [v.name for v in probed.graph.output]
    try:
        import onnxruntime
    except ImportError:
        from onnx.reference import ReferenceEvaluator

        evaluator = ReferenceEvaluator(probed)
        return lambda feeds: dict(zip(outputs, evaluator.run(None, dict(feeds)), strict=True)), "onnx reference"
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(probed.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda feeds: dict(zip(outputs, session.run(None, dict(feeds)), strict=True)), (
        "ONNX Runtime, optimizations off"
    )
