"""The image as the network has it, normalized floats, for programs that normalize already.

Requires the normalized image under its name, made of pixels by the four nodes in front. Ensures that the graph's
input `image` is float32 in the given layout, and that nothing is left of the normalization.
"""

from __future__ import annotations

import onnx
from onnx import TensorProto, helper

from export.graph import GraphFacts, prune
from runtime.manifest import INPUT_NAME

_FRONT = 4  # transpose, cast, shift, scale


def keep_input(model: onnx.ModelProto, *, normalized: str, layout: str) -> None:
    """Take the normalized image instead of its pixels, in place.

    Args:
        model: a graph whose input is `image`, uint8 [N, H, W, C].
        normalized: name of the normalized image, float32 [N, C, H, W].
        layout: "NCHW" or "NHWC", of the new input.
    """
    graph = model.graph
    producer = GraphFacts(model).producer
    node = producer[normalized]
    for _ in range(_FRONT):
        graph.node.remove(node)
        node = producer.get(node.input[0])
    (image,) = (value for value in graph.input if value.name == INPUT_NAME)
    batch, height, width, channels = (d.dim_param or d.dim_value for d in image.type.tensor_type.shape.dim)
    shape = [batch, channels, height, width] if layout == "NCHW" else [batch, height, width, channels]
    image.CopyFrom(helper.make_tensor_value_info(INPUT_NAME, TensorProto.FLOAT, shape))
    if layout == "NHWC":
        front = helper.make_node("Transpose", [INPUT_NAME], [normalized], perm=[0, 3, 1, 2])
    else:
        front = helper.make_node("Identity", [INPUT_NAME], [normalized])
    graph.node.insert(0, front)
    prune(graph)
