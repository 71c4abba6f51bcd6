"""float16 for the layers that are not INT8, except where float16 could change a code or a class.

TensorRT 11 is strongly typed: a tensor that the file says is float32 is computed in float32. This pass makes the
float islands of a graph, forward and gradient, float16, node by node, and leaves in float32

- QuantizeLinear, DequantizeLinear and the layers that compute on INT8: their scales stay exact, and inside one
  INT8 kernel float32 costs nothing (TensorRT-RTX 1.7.1 converts float16 scales back, and adds casts);
- what is quantized or compared next, such as the sum and the Relu of a residual block or the candidates for a
  maximum, unless a float16 layer gives it: the codes are then those of the float32 graph, bit for bit;
- the last layer and the logits;
- operators that sum squares or exponentials, and nodes with a constant that float16 cannot hold, such as the slope
  2^100 of the gate of a Relu (gradient/rules/pointwise.py): elementwise, so that it costs no pass over memory.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from export.engine.layers import LAYERS, grid_path
from export.graph import GraphFacts, describe, infer_shapes, prune
from runtime.errors import ModelError

_GRIDS = ("QuantizeLinear", "DequantizeLinear")
# What loses too much in float16, and what takes some input in float32 whatever the others are.
_FLOAT32_ONLY = {
    "ConstantOfShape",
    "Exp",
    "EyeLike",
    "LayerNormalization",
    "Log",
    "LogSoftmax",
    "Pow",
    "ReduceL2",
    "ReduceSum",
    "ReduceSumSquare",
    "Resize",
    "Softmax",
}
_TO_THE_ROOT = ("Add", "ReduceMean", "ReduceSum", "Sqrt")
_REARRANGING = ("Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze")
_LARGEST, _SMALLEST = float(np.finfo(np.float16).max), float(np.finfo(np.float16).tiny)


def cast_image_first(model: onnx.ModelProto) -> None:
    """Move the Cast of a uint8 input before what rearranges it, in place: TensorRT takes uint8 into a Cast only.

    Raises:
        ModelError: something computes on the pixels as they are.
    """
    graph = model.graph
    for name in [i.name for i in graph.input if i.type.tensor_type.elem_type == TensorProto.UINT8]:
        chain: list[onnx.NodeProto] = []
        value = name
        while not chain or chain[-1].op_type != "Cast":
            users = [node for node in graph.node if value in node.input]
            if len(users) != 1 or users[0].op_type not in (*_REARRANGING, "Cast"):
                found = ", ".join(map(describe, users)) or "nothing"
                raise ModelError(
                    f"input {name!r}: its uint8 pixels go to {found}; TensorRT takes them into a Cast"
                )
            chain.append(users[0])
            value = users[0].output[0]
        *moves, cast = chain
        if not moves:
            continue
        result = cast.output[0]
        cast.input[0], cast.output[0] = name, f"{name}/float"
        moves[0].input[0], moves[-1].output[0] = cast.output[0], result
        order = [node for node in graph.node if node not in chain]
        place = min(i for i, node in enumerate(graph.node) if node in chain)
        order[place:place] = [cast, *moves]
        copies = [_copy(node) for node in order]
        del graph.node[:], graph.value_info[:]
        graph.node.extend(copies)


def half_precision(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy whose float islands are float16; inputs and outputs keep their types.

    Raises:
        ModelError: the result is not valid ONNX.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    facts = GraphFacts(infer_shapes(copy))
    half = _half_nodes(copy, facts)
    _retype(copy, facts, half)
    try:
        onnx.checker.check_model(copy, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        line = str(error).strip().split("\n")[0]
        raise ModelError(f"the graph cannot be made float16 ({line}); build it with --islands fp32") from None
    return copy


def _half_nodes(model: onnx.ModelProto, facts: GraphFacts) -> set[str]:
    """Return the tensors that the nodes of the float islands give."""
    kept, exact = _float32_nodes(model, facts)
    half: set[str] = set()
    for node in model.graph.node:
        first = node.output[0]
        if first not in kept and (first not in exact or not half.isdisjoint(node.input)):
            half.update(name for name in node.output if facts.type(name) == TensorProto.FLOAT)
    return half


def _float32_nodes(model: onnx.ModelProto, facts: GraphFacts) -> tuple[set[str], set[str]]:
    """Return the first outputs of the nodes that stay float32, and of those that do unless float16 goes in."""
    kept = _of_squares(model)
    exact: set[str] = set()
    to_logits, to_codes = {"logits"}, set()
    for node in reversed(model.graph.node):
        first, is_layer = node.output[0], node.op_type in LAYERS
        moves = grid_path(facts, node) if is_layer else None
        if moves is not None:
            kept.update(move.output[0] for move in moves)
        if moves is not None or node.op_type in _GRIDS or node.op_type in _FLOAT32_ONLY:
            kept.add(first)
        if not _constants_fit(facts, node):
            kept.add(first)
        if first in to_logits:
            kept.add(first)
            to_logits.update(() if is_layer else node.input)
        elif first in to_codes and not is_layer:
            exact.add(first)
            to_codes.update(node.input)
        if not facts.is_float(first):  # a quantizer's codes, or the result of a comparison
            to_codes.update(node.input)
    return kept, exact


def _of_squares(model: onnx.ModelProto) -> set[str]:
    """Return what squares, their means and the roots of these are: above 255, float16 cannot hold a square."""
    found: set[str] = set()
    for node in model.graph.node:
        squares = node.op_type == "Mul" and node.input[0] == node.input[1]
        if squares or (node.op_type in _TO_THE_ROOT and not found.isdisjoint(node.input)):
            found.update(node.output)
    return found


def _constants_fit(facts: GraphFacts, node: onnx.NodeProto) -> bool:
    """Return whether float16 holds a node's constants; in a layer's weight and bias, small numbers may vanish."""
    for name in filter(facts.is_float, node.input):
        if not _is_constant(facts, name):
            continue
        sizes = np.abs(np.asarray(facts.value(name), np.float64))
        smallest = sizes[sizes > 0].min(initial=1.0)
        if sizes.max(initial=0.0) > _LARGEST or (smallest < _SMALLEST and node.op_type not in LAYERS):
            return False
    return True


def _is_constant(facts: GraphFacts, name: str) -> bool:
    producer = facts.producer.get(name)
    return facts.value(name) is not None and (producer is None or producer.op_type == "Constant")


def _retype(model: onnx.ModelProto, facts: GraphFacts, half: set[str]) -> None:
    """Make the tensors in `half` float16, in place, with a Cast wherever the type changes."""
    graph = model.graph
    nodes: list[onnx.NodeProto] = []
    made: set[str] = set()
    for node in graph.node:
        wants_half = node.output[0] in half
        for index, name in enumerate(node.input):
            if facts.type(name) != TensorProto.FLOAT or (name in half) == wants_half:
                continue
            node.input[index] = changed = f"{name}/{'float16' if wants_half else 'float32'}"
            if changed in made:
                continue
            made.add(changed)
            if _is_constant(facts, name):
                value = np.asarray(facts.value(name)).astype(np.float16)
                graph.initializer.append(numpy_helper.from_array(value, changed))
            else:
                nodes.append(_cast(name, changed, TensorProto.FLOAT16 if wants_half else TensorProto.FLOAT))
        if node.op_type == "Cast" and wants_half:
            del node.attribute[:]
            node.attribute.append(helper.make_attribute("to", TensorProto.FLOAT16))
        nodes.append(_copy(node))
    for output in half.intersection(value.name for value in graph.output):
        inner = f"{output}/float16"
        for node in nodes:
            node.input[:] = [inner if name == output else name for name in node.input]
            node.output[:] = [inner if name == output else name for name in node.output]
        nodes.append(_cast(inner, output, TensorProto.FLOAT))
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    prune(graph)


def _cast(source: str, result: str, to: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [result], name=result, to=to)


def _copy(node: onnx.NodeProto) -> onnx.NodeProto:
    """Return a copy that outlives the list it is taken from."""
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    return copy
