"""A barrier behind every product with a float weight, so that ONNX Runtime leaves it in float."""

from __future__ import annotations

import onnx

from export.graph import GraphFacts
from export.passes.barrier import barrier, replace_nodes
from runtime.onnx_bytes import GRADIENT_PREFIX

_PRODUCTS = ("Conv", "Gemm", "MatMul")


def keep_float(model: onnx.ModelProto) -> None:
    """Part, in place, every product with a float weight from the quantizer that reads it.

    Between two grids, ONNX Runtime (1.31, WeightBiasQuantization) quantizes a weight that the file has in float.
    It does not where a barrier (export/passes/barrier.py) follows the product.
    """
    graph = model.graph
    facts = GraphFacts(model)

    def is_dequantized(name: str) -> bool:
        return name in facts.producer and facts.producer[name].op_type == "DequantizeLinear"

    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        nodes.append(node)
        if (
            node.op_type in _PRODUCTS
            and not is_dequantized(node.input[1])
            and not node.output[0].startswith(GRADIENT_PREFIX)
            and any(r.op_type in ("QuantizeLinear", "Relu", "Clip") for r in facts.consumers[node.output[0]])
        ):
            result = node.output[0]
            node.output[0] = f"{result}/float"
            nodes.append(barrier(node.output[0], result))
    replace_nodes(graph, nodes)
