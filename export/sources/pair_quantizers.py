"""Every code dequantized where it is quantized: what moves codes about moves the values they stand for.

Ensures that a QuantizeLinear is read by DequantizeLinear, also in files that reshape, transpose or pool codes
between the two, as converters of TFLite and ONNX Runtime's own optimizations write them.
"""

from __future__ import annotations

import onnx
from onnx import helper

from export.graph import GraphFacts, prune

# What gives some of its first input's elements, whatever they stand for.
_MOVES = {
    "Flatten", "Gather", "Identity", "MaxPool", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze",
}  # fmt: skip


def pair_quantizers(model: onnx.ModelProto) -> None:
    """Dequantize, in place, before codes are moved; the values stay what they are."""
    graph = model.graph
    changed = True
    while changed:
        changed = False
        facts = GraphFacts(model)
        for node in list(graph.node):
            move = facts.producer.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
            if move is None or move.op_type not in _MOVES or len(move.output) > 1:
                continue
            if not move.input[0] or facts.constant(node, 1).ndim:
                continue
            _exchange(graph, move, node)
            changed = True
            break
    prune(graph)


def _exchange(graph: onnx.GraphProto, move: onnx.NodeProto, dequantize: onnx.NodeProto) -> None:
    """Put a DequantizeLinear before what moves its codes."""
    value = f"{dequantize.output[0]}/before"
    first = helper.make_node("DequantizeLinear", [move.input[0], *dequantize.input[1:]], [value], name=value)
    moved = onnx.NodeProto()
    moved.CopyFrom(move)
    moved.name, moved.input[0], moved.output[0] = f"{value}/moved", value, dequantize.output[0]
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.output[:1] == dequantize.output[:1]:
            nodes += [first, moved]
        else:
            nodes.append(onnx.NodeProto.FromString(node.SerializeToString()))
    del graph.node[:]
    graph.node.extend(nodes)
