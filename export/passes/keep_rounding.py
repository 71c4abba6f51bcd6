"""A barrier between two quantizers that OpenVINO would merge.

A quantizer that reads another one's values, directly or through what its plugin (2026.4) moves a scale through
(Relu, MaxPool, Pad, sums, Concat), is merged into it, or into the convolution before both: the first rounding is
lost, and where a Concat has unequal scales and an open batch, each channel's scale too.

Ensures that between two grids stands a product or a barrier.
"""

from __future__ import annotations

import onnx

from export.graph import GraphFacts
from export.passes.barrier import barrier, replace_nodes
from runtime.onnx_bytes import GRADIENT_PREFIX

_PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def keep_rounding(model: onnx.ModelProto) -> None:
    """Part, in place, every quantizer of the class's graph from a grid that it reads without a product between."""
    graph = model.graph
    facts = GraphFacts(model)
    constants = {t.name for t in graph.initializer}
    on_grid: dict[str, bool] = {}

    def from_grid(name: str) -> bool:
        """Return whether a value is one of a grid, or made of such values alone (of a Concat: of one)."""
        if name not in on_grid:
            on_grid[name] = False
            node = facts.producer.get(name)
            if node is not None and node.op_type not in _PRODUCTS:
                given = [i for i in node.input if i and i not in constants]
                if node.op_type == "DequantizeLinear":
                    on_grid[name] = True
                elif node.op_type == "Concat":
                    on_grid[name] = any(map(from_grid, given))
                else:
                    on_grid[name] = bool(given) and all(map(from_grid, given))
        return on_grid[name]

    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        # The clip of a quantizer stands before it, or is its saturation.
        clip = facts.producer.get(node.input[0]) if node.op_type == "QuantizeLinear" else None
        reader = clip if clip is not None and clip.op_type in ("Clip", "Relu") else node
        if (
            node.op_type == "QuantizeLinear"
            and not node.name.startswith(GRADIENT_PREFIX)
            and not node.output[0].startswith(GRADIENT_PREFIX)
            and from_grid(reader.input[0])
        ):
            apart = f"{reader.input[0]}/apart/{node.output[0]}"
            parted = barrier(reader.input[0], apart)
            reader.input[0] = apart
            if reader is node:
                nodes.append(parted)
            else:
                nodes.insert(nodes.index(reader), parted)
        nodes.append(node)
    replace_nodes(graph, nodes)
