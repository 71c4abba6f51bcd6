"""A barrier where ONNX Runtime would move signed codes and refuse its own graph.

Ensures that a model with int8 grids opens with its default optimizations. It comes last, after passes that move
codes.
"""

from __future__ import annotations

import onnx

from export.graph import GraphFacts
from export.passes.barrier import barrier, replace_nodes

# What ONNX Runtime itself moves a DequantizeLinear past.
_PROPAGATED = ("MaxPool", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze")


def hold_signed_codes(model: onnx.ModelProto) -> None:
    """Part, in place, signed codes from what would move them to where nothing quantizes them again.

    From opset 21 on ONNX Runtime (1.31, QDQPropagation) puts a QuantizeLinear after a reshaping, slicing or max
    pooling of dequantized int8 codes, and then refuses its own node, as in `move_codes`. It does not where a
    quantizer follows, or where a barrier (export/passes/barrier.py) stands between.
    """
    if max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=0) < 21:
        return
    graph = model.graph
    constants = {t.name: t.data_type for t in graph.initializer}
    facts = GraphFacts(model)

    def quantized_again(node: onnx.NodeProto) -> bool:
        return any(
            r.op_type == "QuantizeLinear" or (r.op_type in _PROPAGATED and quantized_again(r))
            for r in facts.consumers[node.output[0]]
        )

    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        nodes.append(node)
        zero_point = constants.get(node.input[2]) if len(node.input) > 2 else None
        if node.op_type != "DequantizeLinear" or zero_point != onnx.TensorProto.INT8 or node.input[0] in constants:
            continue
        value = node.output[0]
        moving = [r for r in facts.consumers[value] if r.op_type in _PROPAGATED and not quantized_again(r)]
        if moving:
            nodes.append(barrier(value, f"{value}/held"))
        for reader in moving:
            reader.input[:] = [f"{value}/held" if name == value else name for name in reader.input]
    replace_nodes(graph, nodes)
