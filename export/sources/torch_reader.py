"""What the forms of ONNX operators ask of whoever reads the graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import onnx
from torch import fx, nn

from export.graph import GraphFacts

REMEDY = (
    "export the network itself (module:factory --int8), or quantize the file elsewhere (onnxruntime, NNCF) and "
    "export it as it is"
)


class Reader(Protocol):
    """What a form asks of `export.sources.torch_from_onnx`."""

    facts: GraphFacts
    graph: fx.Graph
    values: dict[str, fx.Node]

    def value(self, name: str) -> fx.Node:
        """Return a value of the graph, a constant as a buffer."""

    def constant(self, node: onnx.NodeProto, index: int) -> np.ndarray | None:
        """Return a constant input, None where it is absent."""

    def layer(self, node: onnx.NodeProto, module: nn.Module, source: fx.Node) -> fx.Node:
        """Add a module under the node's name and return what it gives."""

    def call(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> fx.Node:
        """Add the call of a function."""

    def bias_after(self, node: onnx.NodeProto, count: int, axis: int) -> np.ndarray | None:
        """Return the constant that alone is added to a layer's result, float [count]."""


def as_float32(values: np.ndarray) -> np.ndarray:
    """Return a constant of the file, floats as float32."""
    return np.array(values, np.float32 if np.issubdtype(values.dtype, np.floating) else values.dtype)
