"""Operators on codes, as ONNX Runtime's QOperator format and converters write them, as pairs of Q and DQ.

A QLinearConv is DequantizeLinear of its image, its weight and its bias, Conv, and QuantizeLinear; engines fuse
these again, and the gradient passes through them. The codes and scales stay what they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from export.graph import attributes, describe
from runtime.errors import ModelError

_MICROSOFT = "com.microsoft"
# What quantizes by the range of each image: its codes have no fixed scale.
_DYNAMIC = {
    "DynamicQuantizeLinear",
    "ConvInteger",
    "MatMulInteger",
    "DynamicQuantizeMatMul",
    "MatMulIntegerToFloat",
}
# Operators of one operand, as (x, x scale, x zero point, y scale, y zero point), and what they are of floats.
_UNARY = {
    "QLinearAveragePool": "AveragePool", "QLinearGlobalAveragePool": "GlobalAveragePool",
    "QLinearLeakyRelu": "LeakyRelu", "QLinearReduceMean": "ReduceMean", "QLinearSigmoid": "Sigmoid",
    "QLinearSoftmax": "Softmax",
}  # fmt: skip
_BINARY = {"QLinearAdd": "Add", "QLinearMul": "Mul", "QLinearMatMul": "MatMul"}
_OWN_ATTRIBUTES = {"channels_last", "opset"}


def has_q_operators(model: onnx.ModelProto) -> bool:
    """Return whether a graph computes with codes."""
    return any(node.op_type in FORMS or node.op_type in _DYNAMIC for node in model.graph.node)


def to_pairs(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with operators on floats between quantizers, at an opset that has scales by channel.

    Raises:
        ModelError: codes have no fixed scale, or channels lie last.
    """
    for node in model.graph.node:
        if node.op_type in _DYNAMIC:
            raise ModelError(
                f"{describe(node)}: quantizes by the range of each image, expected fixed scales; quantize the "
                "float network (--int8 --data), or statically elsewhere"
            )
        if attributes(node).get("channels_last", 0):
            raise ModelError(f"{describe(node)}: has its channels last, expected NCHW; quantize the file before "
                             "an engine optimizes it")  # fmt: skip
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    writer = _Writer(graph)
    for node in list(graph.node):
        form = FORMS.get(node.op_type)
        if form is None:
            writer.nodes.append(node)
        else:
            form(writer, node)
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in writer.nodes]
    del graph.node[:]
    graph.node.extend(nodes)
    kept = [o for o in result.opset_import if o.domain != _MICROSOFT or any(n.domain == _MICROSOFT for n in nodes)]
    kept = [onnx.OperatorSetIdProto.FromString(o.SerializeToString()) for o in kept]
    del result.opset_import[:]
    result.opset_import.extend(kept)
    return result


class _Writer:
    """Collects nodes in their order, under names that are taken from the node they are written for."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        self.graph = graph
        self.nodes: list[onnx.NodeProto] = []

    def value(self, name: str) -> np.ndarray:
        """Return a constant."""
        return numpy_helper.to_array(self.constants[name])

    def dequantized(self, node: onnx.NodeProto, index: int, *, axis: int | None = None) -> str:
        """Return what the codes of one operand, with scale and zero point behind, stand for."""
        codes, scale, zero_point = node.input[index : index + 3]
        by_channel = scale in self.constants and self.value(scale).size > 1 and axis is not None
        return self.pair("DequantizeLinear", [codes, scale, zero_point], node, f"operand_{index}",
                         axis if by_channel else None)  # fmt: skip

    def quantized(self, value: str, scale: str, zero_point: str, node: onnx.NodeProto) -> None:
        """Quantize a node's result."""
        self.nodes.append(
            helper.make_node("QuantizeLinear", [value, scale, zero_point], [node.output[0]], name=f"{value}/codes")
        )

    def pair(self, kind: str, inputs: list[str], node: onnx.NodeProto, part: str, axis: int | None = None) -> str:
        """Add a quantizer, whose scales of size 1 become numbers."""
        output, named = f"{node.output[0]}/{part}", list(inputs)
        if axis is None:
            for i, name in enumerate(inputs[1:], 1):
                if name in self.constants and self.value(name).ndim:
                    named[i] = self.constant(f"{name}/number", self.value(name).reshape(()))
        options: dict[str, Any] = {} if axis is None else {"axis": axis}
        self.nodes.append(helper.make_node(kind, named, [output], name=output, **options))
        return output

    def constant(self, name: str, values: np.ndarray) -> str:
        """Add a constant, once."""
        if name not in self.constants:
            tensor = self.graph.initializer.add()
            tensor.CopyFrom(numpy_helper.from_array(np.asarray(values), name))
            self.constants[name] = tensor
        return name

    def computed(self, kind: str, inputs: list[str], node: onnx.NodeProto) -> str:
        """Add the operator on floats."""
        output = f"{node.output[0]}/floats"
        kept = {key: value for key, value in attributes(node).items() if key not in _OWN_ATTRIBUTES}
        self.nodes.append(helper.make_node(kind, inputs, [output], name=node.name or output, **kept))
        return output

    def bias(self, node: onnx.NodeProto, name: str, image_scale: str, weight_scale: str) -> str:
        """Return the bias of a layer, int32 in units of the product of both scales."""
        scale = self.value(image_scale).reshape(-1) * self.value(weight_scale).reshape(-1)
        by_channel = scale.size > 1
        unit = self.constant(f"{node.output[0]}/bias_scale", scale if by_channel else scale.reshape(()))
        return self.pair("DequantizeLinear", [name, unit], node, "bias", 0 if by_channel else None)


def _convolution(w: _Writer, node: onnx.NodeProto) -> None:
    inputs = [w.dequantized(node, 0), w.dequantized(node, 3, axis=0)]
    if len(node.input) > 8 and node.input[8]:
        inputs.append(w.bias(node, node.input[8], node.input[1], node.input[4]))
    w.quantized(w.computed("Conv", inputs, node), node.input[6], node.input[7], node)


def _gemm(w: _Writer, node: onnx.NodeProto) -> None:
    turned = attributes(node).get("transB", 0)
    inputs = [w.dequantized(node, 0), w.dequantized(node, 3, axis=0 if turned else 1)]
    if len(node.input) > 6 and node.input[6]:
        inputs.append(w.bias(node, node.input[6], node.input[1], node.input[4]))
    result = w.computed("Gemm", inputs, node)
    if len(node.input) > 7 and node.input[7]:
        w.quantized(result, node.input[7], node.input[8], node)
    else:
        w.nodes.append(helper.make_node("Identity", [result], [node.output[0]]))


def _unary(w: _Writer, node: onnx.NodeProto) -> None:
    result = w.computed(_UNARY[node.op_type], [w.dequantized(node, 0)], node)
    w.quantized(result, node.input[3], node.input[4], node)


def _binary(w: _Writer, node: onnx.NodeProto) -> None:
    inputs = [w.dequantized(node, 0), w.dequantized(node, 3, axis=1 if node.op_type == "QLinearMatMul" else None)]
    w.quantized(w.computed(_BINARY[node.op_type], inputs, node), node.input[6], node.input[7], node)


def _concat(w: _Writer, node: onnx.NodeProto) -> None:
    inputs = [w.dequantized(node, index) for index in range(2, len(node.input), 3)]
    w.quantized(w.computed("Concat", inputs, node), node.input[0], node.input[1], node)


FORMS: dict[str, Callable[[_Writer, onnx.NodeProto], None]] = {
    "QLinearConv": _convolution, "QGemm": _gemm, "QLinearConcat": _concat,
    **dict.fromkeys(_UNARY, _unary), **dict.fromkeys(_BINARY, _binary),
}  # fmt: skip
