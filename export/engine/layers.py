"""Which layers of a graph compute on INT8, and which had better not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from export.engine.rules import output_axis
from export.graph import GraphFacts, attributes, infer_shapes
from runtime.errors import OptionError

PLAN_PRECISIONS = ("mixed", "int8", "fp16")
"""INT8 where it is expected to pay; wherever the graph has it; nowhere."""

LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
# Operators that give of codes the same codes: an engine moves DequantizeLinear to behind them.
_MOVING = (
    "DepthToSpace",
    "Flatten",
    "Identity",
    "MaxPool",
    "Reshape",
    "Slice",
    "Squeeze",
    "Transpose",
    "Unsqueeze",
)
_FEW_CHANNELS = 16
_NAMES: dict[int, str] = {TensorProto.FLOAT: "FP32", TensorProto.FLOAT16: "FP16"}


@dataclass(frozen=True)
class Layer:
    """One matrix product of a graph.

    Args:
        name: of its node.
        op_type: one of LAYERS.
        weight: shape of its weight.
        precision: "INT8", "FP16" or "FP32".
    """

    name: str
    op_type: str
    weight: tuple[int | None, ...]
    precision: str

    def __str__(self) -> str:
        shape = "x".join(str(size or "?") for size in self.weight)
        return f"{self.name:40} {self.op_type:13} {shape:14} {self.precision}"


def layers(model: onnx.ModelProto) -> list[Layer]:
    """Return the layers of a graph in its order; INT8 is a layer both of whose factors come from a grid."""
    facts = GraphFacts(infer_shapes(model))
    return [
        Layer(
            name=node.name or node.output[0],
            op_type=node.op_type,
            weight=facts.shape(node.input[1]),
            precision="INT8" if grid_path(facts, node) is not None else _NAMES.get(facts.type(node.input[0]), "?"),
        )
        for node in model.graph.node
        if node.op_type in LAYERS
    ]


def grid_path(facts: GraphFacts, layer: onnx.NodeProto) -> list[onnx.NodeProto] | None:
    """Return the nodes that move codes from a layer's grids to it, often none; None if it is not INT8."""
    moves: list[onnx.NodeProto] = []
    for name in layer.input[:2]:
        node = facts.producer.get(name)
        while node is not None and node.op_type in _MOVING:
            moves.append(node)
            node = facts.producer.get(node.input[0])
        if node is None or node.op_type != "DequantizeLinear":
            return None
    return moves


def set_precision(model: onnx.ModelProto, precision: str) -> onnx.ModelProto:
    """Return a copy in which the layers that are not to compute on INT8 have float weights.

    Their activations keep their grids: the network stays the one that was trained. Where a weight alone has one,
    "mixed" makes it float, too.

    Args:
        model: a graph that keeps the rules of export/engine/rules.py.
        precision: one of PLAN_PRECISIONS.

    Raises:
        OptionError: no such precision.
    """
    if precision not in PLAN_PRECISIONS:
        raise OptionError(f"precision {precision!r}: expected one of {', '.join(PLAN_PRECISIONS)}")
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    if precision == "int8":
        return copy
    facts = GraphFacts(infer_shapes(model))
    for index, node in _quantized_weights(copy, facts):
        users = facts.consumers[node.output[0]]
        int8 = [user for user in users if grid_path(facts, user) is not None]
        if precision == "mixed" and not all(_slow_in_int8(facts, user) for user in int8):
            continue
        value = facts.value(node.output[0])
        assert value is not None  # its inputs are constants
        copy.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(value), node.output[0]))
        del copy.graph.node[index]
    return copy


def _quantized_weights(model: onnx.ModelProto, facts: GraphFacts) -> Iterator[tuple[int, onnx.NodeProto]]:
    """Yield the DequantizeLinear nodes of weights, last first, so that they can be deleted on the way."""
    for index in reversed(range(len(model.graph.node))):
        node = model.graph.node[index]
        if node.op_type == "DequantizeLinear" and facts.value(node.input[0]) is not None:
            yield index, node


def _slow_in_int8(facts: GraphFacts, layer: onnx.NodeProto) -> bool:
    """Return whether a convolution has too few channels for INT8 to pay.

    The rule is that of NVIDIA's Model Optimizer (modelopt/onnx/quantization/graph_utils.py,
    find_nodes_from_convs_to_exclude), which quantizes ONNX files for TensorRT. With fewer than 16 input or output
    channels a convolution is left in float, unless

    - it is not grouped, its kernel is square, one of both numbers is a multiple of 8, and it is the first layer or
      one of both is at least 16;
    - or it is grouped, its outputs are a multiple of 8 and its kernel is 3 or more along every axis.
    """
    if layer.op_type != "Conv":
        return False
    outputs, inputs, *kernel = facts.sizes(layer.input[1], range(facts.rank(layer.input[1])))
    if min(outputs, inputs) >= _FEW_CHANNELS:
        return False
    if attributes(layer).get("group", 1) > 1:
        return outputs % 8 != 0 or min(kernel) < 3
    aligned = outputs % 8 == 0 or inputs % 8 == 0
    wide = max(outputs, inputs) >= _FEW_CHANNELS or _is_first(facts, layer)
    return not (aligned and wide and len(set(kernel)) == 1)


def _is_first(facts: GraphFacts, layer: onnx.NodeProto) -> bool:
    """Return whether no other layer stands between the image and this one."""
    waiting = [layer.input[0]]
    while waiting:
        node = facts.producer.get(waiting.pop())
        if node is not None:
            if output_axis(node, 2) is not None:
                return False
            waiting.extend(filter(None, node.input))
    return True
