"""A barrier behind every product with a float weight, so that ONNX Runtime leaves it in float."""

from __future__ import annotations

from collections import defaultdict

import onnx

from export.passes.barrier import barrier, replace_nodes
from runtime.onnx_bytes import GRADIENT_PREFIX

_PRODUCTS = ("Conv", "Gemm", "MatMul")


def keep_float(model: onnx.ModelProto) -> None:
    """Part, in place, every product with a float weight from the quantizer that reads it.

    Between two grids, ONNX Runtime (1.31, WeightBiasQuantization) quantizes a weight that the file has in float.
    It does not where a barrier (export/passes/barrier.py) follows the product.
    """
    graph = model.graph
    dequantized = {n.output[0] for n in graph.node if n.op_type == "DequantizeLinear"}
    readers: dict[str, set[str]] = defaultdict(set)
    for node in graph.node:
        for name in node.input:
            readers[name].add(node.op_type)
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        nodes.append(node)
        if (
            node.op_type in _PRODUCTS
            and node.input[1] not in dequantized
            and not node.output[0].startswith(GRADIENT_PREFIX)
            and readers[node.output[0]] & {"QuantizeLinear", "Relu", "Clip"}
        ):
            result = node.output[0]
            node.output[0] = f"{result}/float"
            nodes.append(barrier(node.output[0], result))
    replace_nodes(graph, nodes)
