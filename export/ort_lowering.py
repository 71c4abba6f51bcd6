"""What ONNX Runtime wants done to an INT8 graph beyond its Q/DQ: no weight dequantized in every run, codes moved.

It executes what it cannot fuse node by node, so that every value that leaves its grid costs. All of this is exact.
ONNX Runtime multiplies codes in a Conv or Gemm between two grids. One whose result is not quantized at once, such
as a convolution before a residual addition, runs in float; its constant DequantizeLinear is then not folded but
executed in every run (1.31, which keeps it for fusions). Its weight is the float that the node would give.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection

import numpy as np
import onnx
from onnx import helper, numpy_helper

from export.barrier import barrier, replace_nodes
from export.gradient_tape import attributes
from runtime.onnx_bytes import GRADIENT_PREFIX

_PRODUCTS = ("Conv", "Gemm", "MatMul")
_MOVES = ("Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze")
# What a shortcut is subsampled and widened with; on codes, so that the sum after it is one of codes.
_SHORTCUTS = ("Slice", "Pad")
# What ONNX Runtime itself moves a DequantizeLinear past.
_PROPAGATED = ("MaxPool", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze")


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


def keep_float(model: onnx.ModelProto) -> None:
    """Part, in place, every product with a float weight from the quantizer that reads it.

    Between two grids, ONNX Runtime (1.31, WeightBiasQuantization) quantizes a weight that the file has in float.
    It does not where a barrier (export/barrier.py) follows the product.
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
    _with_read_codes(graph, moved)


def hold_signed_codes(model: onnx.ModelProto) -> None:
    """Part, in place, signed codes from what would move them to where nothing quantizes them again.

    From opset 21 on ONNX Runtime (1.31, QDQPropagation) puts a QuantizeLinear after a reshaping, slicing or max
    pooling of dequantized int8 codes, and then refuses its own node, as in `move_codes`. It does not where a
    quantizer follows, or where a barrier (export/barrier.py) stands between.
    """
    if max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=0) < 21:
        return
    graph = model.graph
    constants = {t.name: t.data_type for t in graph.initializer}
    readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in graph.node:
        for name in node.input:
            readers[name].append(node)

    def quantized_again(node: onnx.NodeProto) -> bool:
        return any(
            r.op_type == "QuantizeLinear" or (r.op_type in _PROPAGATED and quantized_again(r))
            for r in readers[node.output[0]]
        )

    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        nodes.append(node)
        zero_point = constants.get(node.input[2]) if len(node.input) > 2 else None
        if node.op_type != "DequantizeLinear" or zero_point != onnx.TensorProto.INT8 or node.input[0] in constants:
            continue
        value = node.output[0]
        moving = [r for r in readers[value] if r.op_type in _PROPAGATED and not quantized_again(r)]
        if moving:
            nodes.append(barrier(value, f"{value}/held"))
        for reader in moving:
            reader.input[:] = [f"{value}/held" if name == value else name for name in reader.input]
    replace_nodes(graph, nodes)


def clip_after_pooling(model: onnx.ModelProto) -> None:
    """Clip codes after a max pooling that thins them out, in place; only the gradient clips them before it, too.

    The largest code of a window, clipped, is the largest of its clipped codes. ONNX Runtime pools in the layout of
    its convolutions only what comes straight from one; a Clip between costs a transposition of all that, too.
    """
    graph = model.graph
    producer = {name: node for node in graph.node for name in node.output}
    readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in graph.node:
        for name in node.input:
            readers[name].append(node)
    nodes: list[onnx.NodeProto] = []
    renamed: dict[str, str] = {}
    for node in graph.node:
        nodes.append(node)
        if not _thins_out(node):
            continue
        dequantize = producer.get(node.input[0])
        clip = producer.get(dequantize.input[0]) if dequantize is not None else None
        if (
            dequantize is None
            or clip is None
            or (dequantize.op_type, clip.op_type) != ("DequantizeLinear", "Clip")
        ):
            continue
        values = [n.output[0] for n in readers[clip.output[0]]]
        of_class = [n for v in values for n in readers[v] if not n.output[0].startswith(GRADIENT_PREFIX)]
        if not all(map(_thins_out, of_class)):
            continue
        renamed |= {name: f"{GRADIENT_PREFIX}{name}" for name in (clip.output[0], *values)}
        result, codes = node.output[0], f"{node.output[0]}/codes"
        node.input[0], node.output[0] = clip.input[0], f"{codes}/unclipped"
        nodes += [
            helper.make_node("Clip", [*node.output, *clip.input[1:]], [codes], name=codes),
            helper.make_node("DequantizeLinear", [codes, *dequantize.input[1:]], [result], name=result),
        ]
    for node in nodes:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        if node.output[0] in renamed:  # a gradient's node now, which goes with it
            node.output[0] = node.name = renamed[node.output[0]]
    _with_read_codes(graph, nodes)


def _thins_out(node: onnx.NodeProto) -> bool:
    """Return whether a node is a max pooling of fewer values than it takes, none of them padding."""
    found = attributes(node)
    padded = (
        any(found.get("pads", ())) or found.get("auto_pad", b"NOTSET") != b"NOTSET" or found.get("ceil_mode", 0)
    )
    return node.op_type == "MaxPool" and max(found.get("strides", (1,))) > 1 and not padded


def _with_read_codes(graph: onnx.GraphProto, nodes: list[onnx.NodeProto]) -> None:
    """Give a graph other nodes, without those that read codes for nobody."""
    used = {value.name for value in graph.output}
    kept = []
    for node in reversed(nodes):
        if node.op_type not in ("Clip", "DequantizeLinear") or node.output[0] in used:
            used.update(node.input)
            kept.append(node)
    replace_nodes(graph, kept[::-1])


def _moves(node: onnx.NodeProto, zeros: set[str]) -> bool:
    """Return whether a node does to codes what it does to the values they stand for."""
    if node.op_type == "Pad" and (
        attributes(node).get("mode", b"constant") != b"constant" or not set(node.input[2:3]) <= {"", *zeros}
    ):
        return False
    return node.op_type in _MOVES or (
        node.op_type in _SHORTCUTS and not node.output[0].startswith(GRADIENT_PREFIX)
    )
