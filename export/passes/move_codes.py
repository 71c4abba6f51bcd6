"""Codes reshaped, transposed, sliced and padded in the place of what they stand for.

ONNX Runtime executes what it cannot fuse node by node, so that every value that leaves its grid costs.
Ensures that a DequantizeLinear of one scale comes after such moves.
"""

from __future__ import annotations

import onnx
from onnx import numpy_helper

from export.graph import attributes
from export.passes.barrier import replace_nodes_read
from runtime.onnx_bytes import GRADIENT_PREFIX

_MOVES = ("Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze")
# What a shortcut is subsampled and widened with; on codes, so that the sum after it is one of codes.
_SHORTCUTS = ("Slice", "Pad")


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
    replace_nodes_read(graph, moved)


def _moves(node: onnx.NodeProto, zeros: set[str]) -> bool:
    """Return whether a node does to codes what it does to the values they stand for."""
    if node.op_type == "Pad" and (
        attributes(node).get("mode", b"constant") != b"constant" or not set(node.input[2:3]) <= {"", *zeros}
    ):
        return False
    return node.op_type in _MOVES or (
        node.op_type in _SHORTCUTS and not node.output[0].startswith(GRADIENT_PREFIX)
    )
