"""Both ends of anyone's graph as ours are: an image of floats in front, logits [N, K] of floats behind.

An image of integers becomes the floats that it stands for. Behind, what the runtime does itself is left out: the
softmax, with what only hands its result on, and a quantizer of the result.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper

from export.graph import GraphFacts, attributes, shape_text
from export.plain_graph import is_flat
from runtime.errors import ModelError

_BYTES: dict[int, int] = {TensorProto.UINT8: 0, TensorProto.INT8: 128}
"""What is subtracted of a pixel from 0 to 255 to store it in such a type."""
_MOVES = {"Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}
_HANDS_ON = {"Cast", "DequantizeLinear", "Dropout", "Flatten", "Identity", "QuantizeLinear", "Reshape", "Squeeze",
             "Unsqueeze"}  # fmt: skip


@dataclass(frozen=True)
class IntegerImage:
    """An image that a file takes as integers.

    Args:
        kind: its element type, of onnx.TensorProto.
        mean: with `std`, what the network computes of a pixel p from 0 to 255: (p / 255 - mean) / std.
        std: likewise.
    """

    kind: int
    mean: float
    std: float

    def codes(self, pixels: np.ndarray) -> np.ndarray:
        """Return pixels, uint8 of any shape, as the file takes them."""
        shifted = pixels.astype(np.int16) - _BYTES[self.kind]
        return shifted.astype(helper.tensor_dtype_to_np_dtype(self.kind))


def take_floats(model: onnx.ModelProto) -> IntegerImage | None:
    """Let a graph with one image of integers take the floats that they stand for, in place.

    Returns:
        How the integers stand for pixels; None where the image is of floats already.

    Raises:
        ModelError: the integers are neither cast nor dequantized at once.
    """
    graph = model.graph
    constants = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in constants]
    if len(inputs) != 1 or inputs[0].type.tensor_type.elem_type not in _BYTES:
        return None
    image, kind = inputs[0], inputs[0].type.tensor_type.elem_type
    floats, facts = f"{image.name}/floats", GraphFacts(model)
    readers = _readers(facts, image.name)
    ends = {node.op_type for node in readers}
    if ends == {"Cast"} and kind == TensorProto.UINT8:
        to, found = attributes(readers[0])["to"], IntegerImage(kind, 0.0, 1 / 255)
        front = helper.make_node("Identity", [floats], [image.name])
    elif ends == {"DequantizeLinear"} and facts.constant(readers[0], 1).ndim == 0:
        to, scale = TensorProto.FLOAT, float(facts.constant(readers[0], 1))
        shift = int(facts.constant(readers[0], 2, 0)) + _BYTES[kind]
        found = IntegerImage(kind, shift / 255, 1 / (255 * scale))
        # What is no pixel is rounded as the file would.
        front = helper.make_node("QuantizeLinear", [floats, *readers[0].input[1:]], [image.name])
    else:
        name = TensorProto.DataType.Name(kind).lower()
        raise ModelError(
            f"input {image.name!r}: is {name} and read by {', '.join(sorted(ends))}, expected floats, or a Cast "
            "or DequantizeLinear of it; export the network with an image of floats"
        )
    del graph.value_info[:]  # what was of integers there is of floats now
    image.name = floats
    image.type.tensor_type.elem_type = to
    rest = [front, *graph.node]
    del graph.node[:]
    graph.node.extend(rest)
    return found


def _readers(facts: GraphFacts, name: str) -> list[onnx.NodeProto]:
    """Return what reads a tensor, behind operators that only move its elements."""
    found = []
    for node in facts.consumers[name]:
        found += _readers(facts, node.output[0]) if node.op_type in _MOVES else [node]
    return found


def find_output(model: onnx.ModelProto, facts: GraphFacts) -> tuple[str, str, bool]:
    """Return the classifier's own result in floats, its logits, and whether the result is their softmax.

    Raises:
        ModelError: there is no one output of a class scores' shape.
    """
    outputs = [value.name for value in model.graph.output]
    fitting = [
        name for name in outputs if name in facts.producer and facts.has_rank(name) and is_flat(facts, name)
    ]
    if len(fitting) != 1:
        known = [f" {shape_text(facts.shape(name))}" if facts.has_rank(name) else "" for name in outputs]
        shapes = ", ".join(name + shape for name, shape in zip(outputs, known, strict=True))
        raise ModelError(
            f"{len(fitting)} of the outputs ({shapes}) are logits [N, K], expected one; "
            "cut the others off with onnx.utils.extract_model"
        )
    last = facts.producer[fitting[0]]
    result = last.input[0] if last.op_type == "QuantizeLinear" else fitting[0]
    node = facts.producer[result]
    while node.op_type in _HANDS_ON and node.input[0] in facts.producer and is_flat(facts, node.input[0]):
        node = facts.producer[node.input[0]]
    if node.op_type == "Softmax" and _over_classes(facts, node):
        return result, node.input[0], True
    return result, result, False


def _over_classes(facts: GraphFacts, node: onnx.NodeProto) -> bool:
    return attributes(node).get("axis", -1) % facts.rank(node.input[0]) == 1
