"""Weights in float for the layers that ONNX Runtime computes in float.

It multiplies codes in a Conv or Gemm between two grids, and in a Gemm whose result stays in float, such as the
last layer's, if its bias is codes, too. Any other layer whose result is not quantized at once, such as a
convolution before a residual addition, runs in float; its constant DequantizeLinear is then not folded but
executed in every run (1.31, which keeps it for fusions). The weight stored is the float that the node would give.

Requires codes and scales under their layers' names (layer_constants.py).
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx
from onnx import helper, numpy_helper

from export.graph import attributes

_PRODUCTS = ("Conv", "Gemm", "MatMul")
_LARGEST_CODE = 2**30  # half of int32, the rest for the products
_WHOLE = 2.0**-22  # of a bias, float32: rounded twice


def store_float_weights(model: onnx.ModelProto, layers: Collection[str] = ()) -> None:
    """Replace, in place, the codes of `network.X.codes` by the float `network.X.weight` where X runs in float.

    Args:
        model: an exported graph.
        layers: names X that are to run in float, besides those whose result is not quantized at once.
    """
    graph = model.graph
    codes = {t.name: t for t in graph.initializer}
    weights = {
        n.output[0]: n for n in graph.node if n.op_type == "DequantizeLinear" and n.input[0].endswith(".codes")
    }
    quantized = {n.input[0] for n in graph.node if n.op_type == "QuantizeLinear"}
    values_of = {n.output[0]: n for n in graph.node if n.op_type == "DequantizeLinear"}
    for product in [n for n in graph.node if n.op_type in _PRODUCTS]:
        node = weights.get(product.input[1])
        if node is None or node.input[0] not in codes:
            continue
        named = node.input[0].removeprefix("network.").removesuffix(".codes")
        if named not in layers and (
            product.output[0] in quantized
            or _stores_bias_codes(graph, product, node, values_of.get(product.input[0]))
        ):
            continue
        stored = codes[node.input[0]]
        values = numpy_helper.to_array(stored)
        layout = [1] * values.ndim
        layout[attributes(node)["axis"]] = -1
        scale = numpy_helper.to_array(codes[node.input[1]]).reshape(layout)
        name = stored.name.removesuffix("codes") + "weight"
        graph.initializer.append(numpy_helper.from_array(values.astype(np.float32) * scale, name))
        product.input[1] = name
    used = {name for node in graph.node for name in node.input}
    for node in weights.values():
        if node.output[0] not in used:
            graph.node.remove(node)
    used = {name for node in graph.node for name in node.input}
    for tensor in codes.values():
        if tensor.name not in used:
            graph.initializer.remove(tensor)


def _stores_bias_codes(
    graph: onnx.GraphProto, product: onnx.NodeProto, weight: onnx.NodeProto, inputs: onnx.NodeProto | None
) -> bool:
    """Give, in place, a Gemm of codes its bias as codes, too, and return whether that is possible.

    The bias must be a whole number of its accumulator's steps, which calibration and training see to.
    """
    if product.op_type != "Gemm" or inputs is None or len(product.input) < 3:
        return False
    wanted = inputs.input[1], weight.input[1], product.input[2]
    constants = {t.name: numpy_helper.to_array(t) for t in graph.initializer if t.name in wanted}
    if any(name not in constants for name in wanted):
        return False
    of_inputs, of_weight, bias = (constants[name] for name in wanted)
    scale = of_inputs * of_weight
    codes = np.rint(bias / scale.astype(np.float64))
    if np.abs(codes).max() > _LARGEST_CODE or not np.allclose(codes * scale, bias, rtol=_WHOLE, atol=0):
        return False
    name = product.input[2]
    stored = {
        f"{name}_codes": codes.astype(np.int32), f"{name}_scale": scale,
        f"{name}_zero_point": np.zeros(scale.shape, np.int32),
    }  # fmt: skip
    for key, values in stored.items():
        graph.initializer.append(numpy_helper.from_array(values, key))
    product.input[2] = f"{name}/value"
    place = next(i for i, n in enumerate(graph.node) if n.output[0] == product.output[0])
    graph.node.insert(place, helper.make_node("DequantizeLinear", [*stored], [product.input[2]], axis=0))
    return True
