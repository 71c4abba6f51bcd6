"""What ONNX Runtime wants done to an INT8 graph beyond its Q/DQ: no weight dequantized in every run, codes moved.

It executes what it cannot fuse node by node, so that every value that leaves its grid costs. All of this is exact.
ONNX Runtime multiplies codes in a Conv or Gemm between two grids. One whose result is not quantized at once, such
as a convolution before a residual addition, runs in float; its constant DequantizeLinear is then not folded but
executed in every run (1.31, which keeps it for fusions). Its weight is the float that the node would give.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper

from export.gradient_tape import attributes
from runtime.onnx_bytes import GRADIENT_PREFIX

_PRODUCTS = ("Conv", "Gemm", "MatMul")
_MOVES = ("Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze")
# What a shortcut is subsampled and widened with; on codes, so that the sum after it is one of codes.
_SHORTCUTS = ("Slice", "Pad")


def store_float_weights(model: onnx.ModelProto) -> None:
    """Replace, in place, the codes of `network.X.codes` by the float `network.X.weight` where X runs in float."""
    graph = model.graph
    codes = {t.name: t for t in graph.initializer}
    weights = {
        n.output[0]: n for n in graph.node if n.op_type == "DequantizeLinear" and n.input[0].endswith(".codes")
    }
    quantized = {n.input[0] for n in graph.node if n.op_type == "QuantizeLinear"}
    for product in [n for n in graph.node if n.op_type in _PRODUCTS]:
        node = weights.get(product.input[1])
        if node is None or node.input[0] not in codes or product.output[0] in quantized:
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


def take_pixels_as_codes(model: onnx.ModelProto, normalized: str) -> None:
    """Read the image's bytes as its codes where they are, in place: no cast, no normalization, no rounding.

    Args:
        model: an INT8 graph, whose image is cast and normalized, and then quantized.
        normalized: name of the normalized image, which becomes that of the same values on their grid.
    """
    graph = model.graph
    producer = {name: node for node in graph.node for name in node.output}
    constants = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    scaled = producer[normalized]
    shifted = producer[scaled.input[0]]
    cast = producer[shifted.input[0]]
    quantizers = [node for node in graph.node if normalized in node.input]
    readers = [node for node in graph.node if quantizers[0].output[0] in node.input]
    if [n.op_type for n in quantizers + readers] != ["QuantizeLinear", "DequantizeLinear"]:
        return
    (quantize,), (dequantize,) = quantizers, readers
    scale, zero_point = (constants[name] for name in quantize.input[1:3])
    pixels = np.arange(256, dtype=np.float32).reshape(-1, 1, 1, 1)
    by, apply = constants[scaled.input[1]], np.multiply if scaled.op_type == "Mul" else np.divide
    codes = np.rint(apply(pixels - constants[shifted.input[1]], by) / scale) + zero_point
    if zero_point.dtype != np.uint8 or not np.all(codes == pixels):
        return
    producer[cast.input[0]].output[0] = quantize.output[0]
    for node in graph.node:
        node.input[:] = [normalized if name == dequantize.output[0] else name for name in node.input]
    dequantize.output[0] = normalized
    for node in (cast, shifted, scaled, quantize):
        graph.node.remove(node)


def move_codes(model: onnx.ModelProto) -> None:
    """Reshape, transpose, slice and pad codes, not what they stand for, in place: DequantizeLinear comes after.

    ONNX Runtime does so itself, but for Pad, where codes are unsigned; where they are signed it ends in a graph
    that it then refuses ("output_dtype INT8 does not match y_zero_point type UINT8", 1.31).
    """
    graph = model.graph
    scalars = {t.name for t in graph.initializer if not t.dims}
    zeros = {t.name for t in graph.initializer if not t.dims and not numpy_helper.to_array(t)}
    dequantizers = {
        n.output[0]: n for n in graph.node if n.op_type == "DequantizeLinear" and n.input[1] in scalars
    }
    moved: list[onnx.NodeProto] = []
    for node in graph.node:
        source = dequantizers.get(node.input[0])
        if source is None or not _moves(node, zeros):
            moved.append(node)
            continue
        codes, result = f"{node.output[0]}/codes", node.output[0]
        move, after = onnx.NodeProto(), onnx.NodeProto()
        move.CopyFrom(node)
        move.input[0], move.output[0] = source.input[0], codes
        if node.op_type == "Pad":  # with the code of zero
            move.input[:] = [*move.input[:2], source.input[2], *move.input[3:]]
        after.CopyFrom(source)
        after.name = f"{node.name}/dequantize"
        after.input[0], after.output[0] = codes, result
        dequantizers[result] = after
        moved += [move, after]
    used = {name for node in moved for name in node.input} | {value.name for value in graph.output}
    kept = [node for node in moved if node.op_type != "DequantizeLinear" or node.output[0] in used]
    copies = [onnx.NodeProto() for _ in kept]
    for copy, node in zip(copies, kept, strict=True):
        copy.CopyFrom(node)
    del graph.node[:]
    graph.node.extend(copies)


def _moves(node: onnx.NodeProto, zeros: set[str]) -> bool:
    """Return whether a node does to codes what it does to the values they stand for."""
    if node.op_type == "Pad" and (
        attributes(node).get("mode", b"constant") != b"constant" or not set(node.input[2:3]) <= {"", *zeros}
    ):
        return False
    return node.op_type in _MOVES or (
        node.op_type in _SHORTCUTS and not node.output[0].startswith(GRADIENT_PREFIX)
    )
