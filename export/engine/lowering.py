"""An exported ONNX graph as TensorRT is to see it: checked, its INT8 layers chosen, the rest made float16."""

from __future__ import annotations

from dataclasses import dataclass

import onnx
from google.protobuf.message import DecodeError

from export.engine.half_precision import cast_image_first, half_precision
from export.engine.layers import Layer, layers, set_precision
from export.engine.rules import check_qdq
from runtime.errors import FileError, ModelError

ISLANDS = ("fp16", "fp32")


@dataclass(frozen=True)
class LoweredGraph:
    """A graph ready for NVIDIA's parser.

    Args:
        onnx: contents of the file.
        layers: its layers and what they compute in.
    """

    onnx: bytes
    layers: tuple[Layer, ...]

    @property
    def int8_layers(self) -> tuple[str, ...]:
        """Names of the layers that compute on INT8."""
        return tuple(layer.name for layer in self.layers if layer.precision == "INT8")


def lower(model: bytes, source: str, *, precision: str = "mixed", islands: str = "fp16") -> LoweredGraph:
    """Return an exported graph as TensorRT is to see it.

    Args:
        model: contents of an ONNX file.
        source: its name, for messages.
        precision: which layers compute on INT8, one of export.engine.layers.PLAN_PRECISIONS.
        islands: one of ISLANDS; "fp16" makes float16 what is not INT8, "fp32" leaves it.

    Raises:
        FileError: it is no ONNX file.
        ModelError: it breaks one of TensorRT's rules; the text names the node.
        OptionError: no such precision.
    """
    try:
        graph = onnx.load_from_string(model)
    except DecodeError as error:
        raise FileError(f"{source}: is not a whole ONNX file ({error}); export it again") from None
    try:
        check_qdq(graph)
        graph = set_precision(graph, precision)
        cast_image_first(graph)
        if islands == "fp16":
            graph = half_precision(graph)
    except ModelError as error:
        raise ModelError(f"{source}: {error}") from None
    return LoweredGraph(graph.SerializeToString(), tuple(layers(graph)))
