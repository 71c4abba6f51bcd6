"""The image's bytes as its codes, where they are: no cast, no normalization, no rounding in every run.

Requires the normalized image under its name, read by one quantizer. Changes nothing where pixels are no codes.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper

from export.graph import GraphFacts


def take_pixels_as_codes(model: onnx.ModelProto, normalized: str) -> None:
    """Read the image's bytes as its codes where they are, in place: no cast, no normalization, no rounding.

    Args:
        model: an INT8 graph, whose image is cast and normalized, and then quantized.
        normalized: name of the normalized image, which becomes that of the same values on their grid.
    """
    graph = model.graph
    facts = GraphFacts(model)
    constants = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    scaled = facts.producer[normalized]
    shifted = facts.producer[scaled.input[0]]
    cast = facts.producer[shifted.input[0]]
    quantizers = facts.consumers[normalized]
    readers = facts.consumers[quantizers[0].output[0]]
    if [n.op_type for n in (*quantizers, *readers)] != ["QuantizeLinear", "DequantizeLinear"]:
        return
    (quantize,), (dequantize,) = quantizers, readers
    scale, zero_point = (constants[name] for name in quantize.input[1:3])
    pixels = np.arange(256, dtype=np.float32).reshape(-1, 1, 1, 1)
    by, apply = constants[scaled.input[1]], np.multiply if scaled.op_type == "Mul" else np.divide
    codes = np.rint(apply(pixels - constants[shifted.input[1]], by) / scale) + zero_point
    if zero_point.dtype != np.uint8 or not np.all(codes == pixels):
        return
    facts.producer[cast.input[0]].output[0] = quantize.output[0]
    for node in graph.node:
        node.input[:] = [normalized if name == dequantize.output[0] else name for name in node.input]
    dequantize.output[0] = normalized
    for node in (cast, shifted, scaled, quantize):
        graph.node.remove(node)
