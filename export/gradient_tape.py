"""What the rules of differentiation read and write: the forward graph's facts, the backward nodes.

A tape is filled once, from the model, and then only grows: every rule asks it for shapes, types and constant
values of the forward graph and appends nodes of the gradient. It decides nothing.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from runtime.errors import ModelError

Dimension = int | None
"""A size known at export, or None where it is only known at run time (the batch)."""

FLOATS = {TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16}


# Scope of the nodes that make the target's one-hot gradient.
TARGET_SCOPE = "target"


class Tape:
    """The forward graph as facts, and the backward graph as it is written.

    Args:
        model: a model of opset 18 or later without functions or control flow. It is read, never changed.
        gate: "code" or "ste", which rule decides where a quantizer lets the gradient through.
        int8: whether products with weights of int8 codes are to be computed on codes (gradient_precision.py).

    Attributes:
        nodes: the backward nodes, in the order they were emitted.
        initializers: the constants that the backward nodes use.
        source: the tensor that is differentiated by.
        active: the tensors that change with the source; the caller fills it before the first rule.
        scope: what the next nodes' names start with, after "grad/": the forward node they belong to.
        producer: tensor name to the forward node that computes it.
        consumers: tensor name to the forward nodes that read it.
    """

    def __init__(self, model: onnx.ModelProto, gate: str, *, int8: bool = False) -> None:
        self.gate = gate
        self.int8 = int8
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.source = ""
        self.active: set[str] = set()
        self.scope = ""
        graph = model.graph
        self.producer = {name: node for node in graph.node for name in node.output if name}
        self.consumers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in graph.node:
            for name in dict.fromkeys(node.input):
                self.consumers[name].append(node)
        self._opsets = model.opset_import
        self._ir_version = model.ir_version
        self._constants = {tensor.name: tensor for tensor in graph.initializer}
        self._values: dict[str, np.ndarray | None] = {}
        self._emitted: dict[bytes, str] = {}
        self._types: dict[str, int] = {tensor.name: tensor.data_type for tensor in graph.initializer}
        self._shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
        for value in (*graph.input, *graph.value_info, *graph.output):
            tensor = value.type.tensor_type
            self._types.setdefault(value.name, tensor.elem_type)
            if tensor.HasField("shape"):
                shape = tuple(d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim)
                self._shapes.setdefault(value.name, shape)

    # The forward graph.

    def shape(self, name: str) -> tuple[Dimension, ...]:
        """Return a forward tensor's shape; raise ModelError where even its rank is unknown."""
        shape = self._shapes.get(name)
        if shape is None:
            raise ModelError(
                f"{self._where(name)}: its shape is unknown, expected an inferable one; "
                "export with fixed image sizes"
            )
        return shape

    def sizes(self, name: str, axes: Iterable[int]) -> list[int]:
        """Return a forward tensor's sizes along `axes`; raise ModelError where one is not fixed."""
        shape, axes = self.shape(name), list(axes)
        known = [size for axis in axes if (size := shape[axis]) is not None]
        if len(known) < len(axes):
            raise ModelError(
                f"{self._where(name)}: its shape {_text(shape)} must be fixed along axes {axes} "
                "to be differentiated; export with fixed image sizes"
            )
        return known

    def rank(self, name: str) -> int:
        """Return a forward tensor's number of axes."""
        return len(self.shape(name))

    def type(self, name: str) -> int:
        """Return a tensor's element type (TensorProto.FLOAT, ...), 0 where it is unknown."""
        return self._types.get(name, TensorProto.UNDEFINED)

    def is_float(self, name: str) -> bool:
        """Return whether a tensor holds floating-point numbers."""
        return self.type(name) in FLOATS

    def value(self, name: str) -> np.ndarray | None:
        """Return a forward tensor that no input influences, computed now; None where there is none."""
        if name not in self._values:
            self._values[name] = self._evaluate(name)
        return self._values[name]

    def constant(self, node: onnx.NodeProto, index: int, default: Any = None) -> np.ndarray:
        """Return the constant value of a node's optional input; raise ModelError where it is computed."""
        if index >= len(node.input) or not node.input[index]:
            return np.asarray(default)
        value = self.value(node.input[index])
        if value is None:
            raise ModelError(
                f"{describe(node)}: its input {node.input[index]!r} is computed at run time, expected "
                "a constant; fold constants before the gradient is appended"
            )
        return value

    def _evaluate(self, name: str) -> np.ndarray | None:
        if name in self._constants:
            return numpy_helper.to_array(self._constants[name])
        node = self.producer.get(name)
        if node is None or name in self.active:
            return None
        inputs = {i: self.value(i) for i in node.input if i}
        if any(value is None for value in inputs.values()) or "Random" in node.op_type:
            return None
        feeds = [helper.make_tensor_value_info(i, self.type(i), None) for i in inputs]
        results = [helper.make_tensor_value_info(name, self.type(name), None)]
        graph = helper.make_graph([node], "constant", feeds, results)
        opsets = [helper.make_opsetid(o.domain, _readable(o, node)) for o in self._opsets]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=self._ir_version)
        computed: Any = ReferenceEvaluator(model).run(None, inputs)
        return np.asarray(computed[0])

    def _where(self, name: str) -> str:
        node = self.producer.get(name)
        return f"{describe(node)}: tensor {name!r}" if node else f"tensor {name!r}"

    # The backward graph.

    def op(self, op_type: str, *inputs: str | float | np.ndarray | list[int], **attributes: Any) -> str:
        """Append one backward node and return the name of its output.

        An input is a tensor's name, or a constant: a float (a scalar of the first tensor's type), a list of
        integers (int64 axes, shapes, pads) or an array as it is.
        """
        like = next(i for i in inputs if isinstance(i, str))
        names = [i if isinstance(i, str) else self.array(i, like) for i in inputs]
        output = f"grad/{self.scope}/{op_type}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, names, [output], name=output, **attributes))
        if op_type == "Cast":
            self._types[output] = attributes["to"]
        else:
            typed = {"DequantizeLinear": 1, "QuantizeLinear": 2}
            self._types[output] = self.type(names[typed[op_type]] if op_type in typed else like)
        return output

    def array(self, value: float | np.ndarray | list[int], like: str) -> str:
        """Return the name of a constant of the backward graph, shared by all that need the same one."""
        if isinstance(value, float):
            value = np.asarray(value, helper.tensor_dtype_to_np_dtype(self.type(like) or TensorProto.FLOAT))
        elif isinstance(value, list):
            value = np.asarray(value, np.int64)
        tensor = numpy_helper.from_array(np.ascontiguousarray(value).reshape(np.shape(value)))
        key = hashlib.sha256(tensor.SerializeToString()).digest()
        if key not in self._emitted:
            tensor.name = f"grad/constant_{len(self.initializers)}"
            self.initializers.append(tensor)
            self._emitted[key] = name = tensor.name
            self._types[name] = tensor.data_type
        return self._emitted[key]

    def parameter(self, name: str, value: np.ndarray) -> str:
        """Return the name of a constant of the current node alone, to be set later."""
        tensor = numpy_helper.from_array(value, f"grad/{self.scope}/{name}_{len(self.initializers)}")
        self.initializers.append(tensor)
        self._types[tensor.name] = tensor.data_type
        return tensor.name

    def is_one_hot(self, gradient: str) -> bool:
        """Return whether a gradient is the logits' own: 1 for the target, 0 for the other classes."""
        return gradient.startswith(f"grad/{TARGET_SCOPE}/")

    def numpy_type(self, name: str) -> np.dtype:
        """Return the NumPy type of a tensor's elements."""
        return helper.tensor_dtype_to_np_dtype(self.type(name))

    def reshape_like(self, gradient: str, name: str) -> str:
        """Reshape a gradient to the shape of a forward tensor, of which one size may be open (the batch)."""
        shape = self.shape(name)
        if shape.count(None) > 1:
            raise ModelError(
                f"{self._where(name)}: its shape {_text(shape)} has more than one open size, expected "
                "the batch alone; export with fixed image sizes"
            )
        return self.op("Reshape", gradient, [-1 if size is None else size for size in shape])

    def rearranged(self, name: str, rearrange: Callable[[np.ndarray], np.ndarray]) -> str:
        """Return a weight with its elements moved (flipped, transposed, reshaped) at export, in floats.

        In floats also where it is stored as codes: ONNX Runtime 1.31 would dequantize them in every run, and
        OpenVINO 2026.4 multiplies up to four rows of floats by a matrix of codes with errors of up to 20 %.

        Raises:
            ModelError: the weight is computed from the image.
        """
        value = self.value(name)
        if value is None:
            raise ModelError(
                f"{self._where(name)}: is computed at run time, expected a constant weight; "
                "only constant weights can be differentiated through"
            )
        return self.array(rearrange(value), name)


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """Return a node's attributes as Python values (text as bytes, as ONNX stores it)."""
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def describe(node: onnx.NodeProto) -> str:
    """Return how messages name a node: its operator and its name, or its first output's."""
    return f"{node.op_type} node {node.name or next(iter(node.output), '')!r}"


def _text(shape: tuple[Dimension, ...]) -> str:
    return "[" + ", ".join("?" if size is None else str(size) for size in shape) + "]"


def _readable(opset: onnx.OperatorSetIdProto, node: onnx.NodeProto) -> int:
    """Return the version at which ONNX's own evaluator knows a node: the pair of Q and DQ from 19 on alone."""
    of_pair = node.op_type in ("QuantizeLinear", "DequantizeLinear") and opset.domain in ("", "ai.onnx")
    return max(opset.version, 19) if of_pair else opset.version
