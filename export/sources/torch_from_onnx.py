"""A float ONNX classifier as a PyTorch network, so that it can be quantized like one.

Layers become modules (nn.Conv2d, nn.Linear, nn.BatchNorm2d, activations), everything else a call. Only what the
logits need is read: the integers that compute a shape are not, since the shapes are inferred.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import torch
from torch import fx, nn

from export.graph import GraphFacts, describe, infer_shapes
from export.plain_graph import expand_functions, hold_shapes
from export.sources.onnx_file import OnnxClassifier
from export.sources.torch_forms import FORMS, SHAPED
from export.sources.torch_reader import REMEDY, as_float32
from runtime.errors import ModelError

_QUANTIZED = ("QuantizeLinear", "DequantizeLinear", "QLinearConv", "QLinearMatMul", "ConvInteger")


def to_torch(found: OnnxClassifier) -> nn.Module:
    """Return a classifier as a graph of PyTorch's layers: normalized images [N, C, H, W] in, logits [N, K] out.

    Raises:
        ModelError: it is quantized already, or an operator has no form here; the text names the node.
    """
    return _Reader(found).read()


class _Reader:
    """Builds the graph, node by node in the file's order."""

    def __init__(self, found: OnnxClassifier) -> None:
        self.found = found
        self.model = _with_constant_shapes(found)
        self.facts = GraphFacts(infer_shapes(self.model))
        self.root = nn.Module()
        self.graph = fx.Graph()
        self.values: dict[str, fx.Node] = {}

    def read(self) -> nn.Module:
        """Return the whole network."""
        image = self.graph.placeholder("image")
        if self.found.layout == "NHWC":
            image = self.graph.call_method("permute", (image, 0, 2, 3, 1))
        self.values[self.found.input] = image
        if any(node.op_type in _QUANTIZED for node in self.model.graph.node):
            raise ModelError("is quantized already; leave --int8 and --bits out to take it as it is")
        needed = self._needed()
        for node in self.model.graph.node:
            if not needed.isdisjoint(node.output) and node.output[0] not in self.values:
                if node.op_type not in FORMS:
                    raise ModelError(f"{describe(node)}: cannot be quantized; {REMEDY}")
                self.values[node.output[0]] = FORMS[node.op_type](self, node)
        self.graph.output(self.values[self.found.output])
        module = fx.GraphModule(self.root, self.graph)
        _drop_double_permutations(module.graph)
        module.recompile()
        return module.eval()

    def _needed(self) -> set[str]:
        """Return the values that the logits are computed of, other than constants and the shapes of reshapes."""
        needed, waiting = set(), [self.found.output]
        while waiting:
            name = waiting.pop()
            node = self.facts.producer.get(name)
            if name in needed or node is None or name not in self.facts.varying:
                continue
            needed.add(name)
            waiting += node.input[:1] if node.op_type in SHAPED else [i for i in node.input if i]
        return needed

    def value(self, name: str) -> fx.Node:
        """Return a value of the graph, a constant as a buffer."""
        if name not in self.values:
            constant = self.facts.value(name)
            if constant is None:
                raise ModelError(f"tensor {name!r}: is computed in a way that cannot be quantized; {REMEDY}")
            attribute = self._free(name)
            self.root.register_buffer(attribute, torch.from_numpy(as_float32(constant)))
            self.values[name] = self.graph.get_attr(attribute)
        return self.values[name]

    def constant(self, node: onnx.NodeProto, index: int) -> np.ndarray | None:
        """Return a constant input, None where it is absent; raise ModelError where it is computed."""
        if index >= len(node.input) or not node.input[index]:
            return None
        return self.facts.constant(node, index)

    def layer(self, node: onnx.NodeProto, module: nn.Module, source: fx.Node) -> fx.Node:
        """Add a module under the node's name and return what it gives."""
        name = self._free(node.name or node.output[0])
        self.root.add_module(name, module)
        return self.graph.call_module(name, (source,))

    def call(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> fx.Node:
        """Add the call of a function."""
        return self.graph.call_function(function, arguments, options)

    def bias_after(self, node: onnx.NodeProto, count: int, axis: int) -> np.ndarray | None:
        """Return the constant that alone is added to a layer's result, float [count], and let the layer have it.

        Args:
            node: the layer.
            count: its outputs.
            axis: of them, from the end: -1 of rows, -3 of images.
        """
        consumers = self.facts.consumers[node.output[0]]
        if len(consumers) != 1 or consumers[0].op_type != "Add" or node.output[0] == self.found.output:
            return None
        (other,) = [name for name in consumers[0].input if name != node.output[0]] or [""]
        value = self.facts.value(other) if other else None
        if value is None or value.size != count:
            return None
        # Of fewer axes it is added along another one, such as the columns of an image.
        if count > 1 and (value.ndim < -axis or value.shape[axis] != count):
            return None
        return value.reshape(-1)

    def _free(self, name: str) -> str:
        base = re.sub(r"\W", "_", name).strip("_") or "value"
        base = f"n{base}" if base[0].isdigit() else base
        taken, number = base, 1
        while hasattr(self.root, taken):
            taken, number = f"{base}_{number}", number + 1
        return taken


def _drop_double_permutations(graph: fx.Graph) -> None:
    """Remove, in place, permutations that undo the one before: those of images with their channels last."""
    for node in list(graph.nodes):
        before = node.args[0] if node.target == "permute" else None
        if isinstance(before, fx.Node) and before.target == "permute":
            first, second = before.args[1:], node.args[1:]
            if [first[axis] for axis in second] == list(range(len(second))):
                node.replace_all_uses_with(before.args[0])
    graph.eliminate_dead_code()


def _with_constant_shapes(found: OnnxClassifier) -> onnx.ModelProto:
    """Return the graph for one image, with constant shapes and without operators that have a body of known ones.

    Reshapes and slices then have constant arguments. The forms leave the first axis, of the images, open again.
    """
    model = onnx.ModelProto()
    model.CopyFrom(found.model)
    for value in (*model.graph.input, *model.graph.output):
        if value.name == found.input or value.name in {output.name for output in model.graph.output}:
            dimension = value.type.tensor_type.shape.dim
            if dimension:
                dimension[0].Clear()
                dimension[0].dim_value = 1
    model = expand_functions(model, FORMS)
    hold_shapes(model)
    return model
