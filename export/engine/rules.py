"""What TensorRT asks of a graph with QuantizeLinear and DequantizeLinear, checked before its parser sees it.

The parser refuses some of it in words about its own nodes, reads a uint8 zero point as int8 with a mere warning,
takes the rest in silence and computes it in float. Here each is an error that names the ONNX node.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto

from export.graph import GraphFacts, attributes, describe, infer_shapes
from runtime.errors import ModelError

REMEDY = "export it with `python -m export.onnx CKPT --int8 --target tensorrt`"


def check_qdq(model: onnx.ModelProto) -> None:
    """Refuse a graph whose Q/DQ TensorRT does not compute on INT8 as written.

    All codes are int8 with zero points 0 and constant scales; activations have one scale, weights one or one for
    each output channel; nothing computes on codes; biases are float; a residual Add has Q/DQ on its identity
    branch only, so that Add and Relu stay part of the convolution on the other.

    Raises:
        ModelError: it does not keep one of these rules; the text names the node.
    """
    facts = GraphFacts(infer_shapes(model))
    for node in model.graph.node:
        problem = ""
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            problem = _codes_problem(facts, node) or _scale_problem(facts, node)
        elif node.op_type == "Add":
            problem = _residual_problem(facts, node)
        if problem:
            raise ModelError(f"{describe(node)}: {problem}; {REMEDY}")


def output_axis(node: onnx.NodeProto, rank: int) -> int | None:
    """Return the axis of a layer's weight (of `rank` axes) that its output channels lie on; None for no layer."""
    values = attributes(node)
    if node.op_type == "Gemm":
        return 0 if values.get("transB", 0) else 1
    return {"Conv": 0, "ConvTranspose": 1, "MatMul": rank - 1}.get(node.op_type)


def _codes_problem(facts: GraphFacts, node: onnx.NodeProto) -> str:
    quantizes = node.op_type == "QuantizeLinear"
    kind = facts.type(node.output[0] if quantizes else node.input[0])
    name = TensorProto.DataType.Name(kind).lower()
    if kind == TensorProto.INT32:
        return "has int32 codes, as a quantized bias does; TensorRT takes biases in float only"
    if kind != TensorProto.INT8:
        return f"has {name} codes; TensorRT computes on int8 only, and would read them as int8"
    zero_point = facts.value(node.input[2]) if len(node.input) > 2 and node.input[2] else np.zeros(1)
    if zero_point is None or np.any(zero_point):
        found = "computed at run time" if zero_point is None else str(zero_point[zero_point != 0][0])
        return f"has the zero point {found}, expected 0; TensorRT's grids are symmetric"
    users = [user for user in facts.consumers[node.output[0]] if quantizes and user.op_type != "DequantizeLinear"]
    if users:
        return f"its codes are used by {describe(users[0])}; TensorRT expects DequantizeLinear right after"
    return ""


def _scale_problem(facts: GraphFacts, node: onnx.NodeProto) -> str:
    scale = facts.value(node.input[1])
    if scale is None:
        return "its scale is computed at run time; TensorRT needs a constant"
    if not (np.isfinite(scale).all() and (scale > 0).all()):
        return "its scale is not above 0 throughout; TensorRT expects positive numbers"
    if attributes(node).get("block_size"):
        return "quantizes in blocks; TensorRT computes int8 with one scale for a tensor or an output channel"
    if scale.size == 1:
        return ""
    if facts.value(node.input[0]) is None:
        return f"has {scale.size} scales for an activation; TensorRT computes int8 with one alone, else in float"
    rank = facts.rank(node.input[0])
    axis = attributes(node).get("axis", 1) % rank
    for user in facts.consumers[node.output[0]]:
        wanted = output_axis(user, rank)
        if wanted is not None and wanted != axis:
            return (
                f"has scales along axis {axis} of the weight of {describe(user)}, expected axis {wanted}, its "
                "output channels; TensorRT would compute it in float"
            )
    return ""


def _residual_problem(facts: GraphFacts, node: onnx.NodeProto) -> str:
    """A branch that is quantized between its layer and the Add can no longer be computed in one kernel with it."""
    for name in node.input:
        dequantize = facts.producer.get(name)
        quantize = facts.producer.get(dequantize.input[0]) if dequantize is not None and dequantize.input else None
        if dequantize is None or quantize is None or quantize.op_type != "QuantizeLinear":
            continue
        layer = facts.producer.get(quantize.input[0])
        alone = len(facts.consumers[name]) == 1 and len(facts.consumers[quantize.output[0]]) == 1
        if alone and layer is not None and output_axis(layer, 2) is not None:
            return (
                f"its addend from {describe(layer)} is quantized before the sum; TensorRT computes both in one "
                "kernel only if the other addend alone is"
            )
    return ""
