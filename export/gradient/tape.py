"""What the rules of differentiation read and write: the forward graph's facts, the backward nodes.

A tape is filled once, from the model, and then only grows: every rule asks it for shapes, types and constant
values of the forward graph and appends nodes of the gradient. It decides nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from export.graph import GraphFacts, shape_text
from runtime.errors import ModelError

# Scope of the nodes that make the target's one-hot gradient.
TARGET_SCOPE = "target"


class Tape(GraphFacts):
    """The forward graph as facts, and the backward graph as it is written.

    Args:
        model: a model of opset 18 or later without functions or control flow. It is read, never changed.
        gate: "code" or "ste", which rule decides where a quantizer lets the gradient through.
        int8: whether products with weights of int8 codes are to be computed on codes (gradient_precision.py).

    Attributes:
        nodes: the backward nodes, in the order they were emitted.
        initializers: the constants that the backward nodes use.
        source: the image: the tensor that the input gradient is by.
        wanted: the tensors whose gradients are asked for: no rule may skip one.
        active: the tensors that change with a wanted one; the caller fills it before the first rule.
        target: the class of each image whose logit is differentiated, int64 [N, 1].
        scope: what the next nodes' names start with, after "grad/": the forward node they belong to.
    """

    def __init__(self, model: onnx.ModelProto, gate: str, *, int8: bool = False) -> None:
        super().__init__(model)
        self.gate = gate
        self.int8 = int8
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.source = ""
        self.wanted: set[str] = set()
        self.active: set[str] = set()
        self.target = ""
        self.scope = ""
        self._emitted: dict[bytes, str] = {}

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
                f"{self._where(name)}: its shape {shape_text(shape)} has more than one open size, expected "
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
