"""What an ONNX graph says of itself: who computes and who reads a tensor, shapes, types, constant values.

The gradient, the passes and the checks of TensorRT's rules all ask it. It is filled once, and changes nothing.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import onnx
import onnx.shape_inference
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from runtime.errors import ModelError

Dimension = int | None
"""A size known at export, or None where it is only known at run time (the batch)."""

# What keeps its input's shape, and ONNX 1.23 infers none for.
_WITHOUT_INFERENCE = "GroupNormalization"

# What asks a tensor for its shape alone.
_OF_SHAPE = {"Shape", "Size"}
# Sizes of the batch: what is equal for all of them does not depend on it. Of branches it is 1 that is asked for.
_STAND_INS = (1, 2, 61)

FLOATS = {TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16}


class GraphFacts:
    """A graph as facts.

    Args:
        model: a model of opset 18 or later without functions or control flow, with as many shapes as are asked
            for (`onnx.shape_inference`). It is read, never changed.

    Attributes:
        producer: tensor name to the node that computes it.
        consumers: tensor name to the nodes that read it.
        varying: the tensors that change with an input, be it only with its shape.
        of_shapes: those of them that are computed from shapes alone.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        graph = model.graph
        self.producer = {name: node for node in graph.node for name in node.output if name}
        self.consumers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        self._constants = {tensor.name: tensor for tensor in graph.initializer}
        self.varying = {value.name for value in graph.input if value.name not in self._constants}
        by_content = set(self.varying)
        for node in graph.node:
            for name in dict.fromkeys(node.input):
                self.consumers[name].append(node)
            # A branch or a loop may read anything.
            opaque = any(True for _ in graphs_inside(node))
            if opaque or not self.varying.isdisjoint(node.input):
                self.varying.update(filter(None, node.output))
            if opaque or (node.op_type not in _OF_SHAPE and not by_content.isdisjoint(node.input)):
                by_content.update(filter(None, node.output))
        self.of_shapes = self.varying - by_content
        self._opsets = model.opset_import
        self._ir_version = model.ir_version
        self._values: dict[tuple[str, int], np.ndarray | None] = {}
        self._types: dict[str, int] = {tensor.name: tensor.data_type for tensor in graph.initializer}
        self._shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
        for value in (*graph.input, *graph.value_info, *graph.output):
            tensor = value.type.tensor_type
            self._types.setdefault(value.name, tensor.elem_type)
            if tensor.HasField("shape"):
                shape = tuple(d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim)
                self._shapes.setdefault(value.name, shape)

    def shape(self, name: str) -> tuple[Dimension, ...]:
        """Return a tensor's shape; raise ModelError where even its rank is unknown."""
        shape = self._shapes.get(name)
        if shape is None:
            raise ModelError(
                f"{self._where(name)}: its shape is unknown, expected an inferable one; "
                "export with fixed image sizes"
            )
        return shape

    def has_rank(self, name: str) -> bool:
        """Return whether a tensor's number of axes is known."""
        return name in self._shapes

    def sizes(self, name: str, axes: Iterable[int]) -> list[int]:
        """Return a tensor's sizes along `axes`; raise ModelError where one is not fixed."""
        shape, axes = self.shape(name), list(axes)
        known = [size for axis in axes if (size := shape[axis]) is not None]
        if len(known) < len(axes):
            raise ModelError(
                f"{self._where(name)}: its shape {shape_text(shape)} must be fixed along axes {axes} "
                "to be differentiated; export with fixed image sizes"
            )
        return known

    def rank(self, name: str) -> int:
        """Return a tensor's number of axes."""
        return len(self.shape(name))

    def type(self, name: str) -> int:
        """Return a tensor's element type (TensorProto.FLOAT, ...), 0 where it is unknown."""
        return self._types.get(name, TensorProto.UNDEFINED)

    def is_float(self, name: str) -> bool:
        """Return whether a tensor holds floating-point numbers."""
        return self.type(name) in FLOATS

    def value(self, name: str) -> np.ndarray | None:
        """Return a tensor that is the same for every input, computed now; None where it is not.

        What is computed from shapes alone is the same where it does not change with the open sizes, the batch.
        """
        first, *others = (self._value(name, size) for size in self._stand_ins(name))
        same = all(first is not None and other is not None and np.array_equal(first, other) for other in others)
        return first if same else None

    def _stand_ins(self, name: str) -> tuple[int, ...]:
        """Return the sizes to try in place of open ones: one where nothing depends on a shape."""
        return _STAND_INS if name in self.of_shapes else _STAND_INS[:1]

    def constant(self, node: onnx.NodeProto, index: int, default: Any = None) -> np.ndarray:
        """Return the constant value of a node's optional input; raise ModelError where it is computed."""
        if index >= len(node.input) or not node.input[index]:
            return np.asarray(default)
        value = self.value(node.input[index])
        if value is None:
            raise ModelError(
                f"{describe(node)}: its input {node.input[index]!r} is computed at run time, expected "
                "a constant; export it with a constant there"
            )
        return value

    def _value(self, name: str, open_size: int) -> np.ndarray | None:
        """Return a tensor that depends on no input's content, if every open size is `open_size`."""
        key = name, open_size if name in self.varying else 0
        if key not in self._values:
            self._values[key] = self._evaluate(name, open_size)
        return self._values[key]

    def _evaluate(self, name: str, open_size: int) -> np.ndarray | None:
        if name in self._constants:
            return numpy_helper.to_array(self._constants[name])
        node = self.producer.get(name)
        if node is None or (name in self.varying and name not in self.of_shapes):
            return None
        if node.op_type in _OF_SHAPE and node.input[0] in self.varying:
            return self._of_shape(node, open_size)
        inputs = {i: self._value(i, open_size) for i in node.input if i}
        if any(value is None for value in inputs.values()) or "Random" in node.op_type:
            return None
        feeds = [helper.make_tensor_value_info(i, self.type(i), None) for i in inputs]
        results = [helper.make_tensor_value_info(name, self.type(name), None)]
        graph = helper.make_graph([node], "constant", feeds, results)
        opsets = [helper.make_opsetid(o.domain, _readable(o, node)) for o in self._opsets]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=self._ir_version)
        computed: Any = ReferenceEvaluator(model).run(None, inputs)
        return np.asarray(computed[0])

    def _of_shape(self, node: onnx.NodeProto, open_size: int) -> np.ndarray | None:
        if not self.has_rank(node.input[0]):
            return None
        shape = [open_size if size is None else size for size in self.shape(node.input[0])]
        if node.op_type == "Size":
            return np.asarray(math.prod(shape), np.int64)
        found = attributes(node)
        return np.asarray(shape[found.get("start", 0) : found.get("end", len(shape))], np.int64)

    def _where(self, name: str) -> str:
        node = self.producer.get(name)
        return f"{describe(node)}: tensor {name!r}" if node else f"tensor {name!r}"


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """Return a node's attributes as Python values (text as bytes, as ONNX stores it)."""
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def graphs_inside(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """Yield the branches or the body of a node of control flow."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def describe(node: onnx.NodeProto) -> str:
    """Return how messages name a node: its operator and its name, or its first output's."""
    return f"{node.op_type} node {node.name or next(iter(node.output), '')!r}"


def shape_text(shape: tuple[Dimension, ...]) -> str:
    """Return how messages show a shape: [?, 3, 8, 8]."""
    return "[" + ", ".join("?" if size is None else str(size) for size in shape) + "]"


def _readable(opset: onnx.OperatorSetIdProto, node: onnx.NodeProto) -> int:
    """Return the version at which ONNX's own evaluator knows a node: the pair of Q and DQ from 19 on alone."""
    of_pair = node.op_type in ("QuantizeLinear", "DequantizeLinear") and opset.domain in ("", "ai.onnx")
    return max(opset.version, 19) if of_pair else opset.version


def prune(graph: onnx.GraphProto) -> None:
    """Drop the nodes and constants that no output needs; the nodes are in order.

    RemoveUnusedNodesPass of onnx_ir finds the same on a ResNet-20, but converts the model twice: 12 ms, not 0.6.
    """
    needed = {output.name for output in graph.output}
    for i in reversed(range(len(graph.node))):
        if needed.isdisjoint(graph.node[i].output):
            del graph.node[i]
        else:
            needed |= read_by(graph.node[i])
    for i in reversed(range(len(graph.initializer))):
        if graph.initializer[i].name not in needed:
            del graph.initializer[i]


def read_by(node: onnx.NodeProto) -> set[str]:
    """Return the tensors that a node reads, in the branches of an If and the bodies of loops, too."""
    names = set(filter(None, node.input))
    for graph in graphs_inside(node):
        names |= _free(graph.node, {value.name for value in (*graph.input, *graph.initializer)})
        names |= {value.name for value in graph.output}
    return names


def _free(nodes: Iterable[onnx.NodeProto], bound: set[str]) -> set[str]:
    found: set[str] = set()
    for node in nodes:
        found |= read_by(node) - bound
        bound = bound | set(node.output)
    return found


def unread(model: onnx.ModelProto) -> list[str]:
    """Return the constants and the nodes that no output of a model needs: engines drop them, and warn."""
    kept = onnx.ModelProto()
    kept.CopyFrom(model)
    prune(kept.graph)
    left = {tensor.name for tensor in kept.graph.initializer} | {
        name for n in kept.graph.node for name in n.output
    }
    names = [tensor.name for tensor in model.graph.initializer] + [node.output[0] for node in model.graph.node]
    return [name for name in names if name not in left]


def infer_shapes(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy with every shape that can be inferred, strictly where the model allows it."""
    stand_in = onnx.ModelProto()
    stand_in.CopyFrom(model)
    for node in stand_in.graph.node:
        if node.op_type == _WITHOUT_INFERENCE:
            node.op_type = "Identity"
            del node.input[1:], node.attribute[:]
    inferred = _inferred(stand_in)
    del inferred.graph.node[:]
    inferred.graph.node.extend(model.graph.node)
    return inferred


def _inferred(model: onnx.ModelProto) -> onnx.ModelProto:
    try:
        return onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    except onnx.shape_inference.InferenceError:
        # What could not be inferred is asked for, with its node's name, by the rule that needs it.
        return onnx.shape_inference.infer_shapes(model, data_prop=True)
