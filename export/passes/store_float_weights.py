"""Weights in float for the layers that ONNX Runtime computes in float.

It multiplies codes in a Conv or Gemm between two grids. One whose result is not quantized at once, such as a
convolution before a residual addition, runs in float; its constant DequantizeLinear is then not folded but
executed in every run (1.31, which keeps it for fusions). The weight stored is the float that the node would give.

Requires codes and scales under their layers' names (layer_constants.py).
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx
from onnx import numpy_helper

from export.graph import attributes

_PRODUCTS = ("Conv", "Gemm", "MatMul")


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
    for product in [n for n in graph.node if n.op_type in _PRODUCTS]:
        node = weights.get(product.input[1])
        if node is None or node.input[0] not in codes:
            continue
        named = node.input[0].removeprefix("network.").removesuffix(".codes")
        if product.output[0] in quantized and named not in layers:
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
