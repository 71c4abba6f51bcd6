"""Average poolings written as what OpenVINO computes in float.

Behind a grid its plugin (2026.4) averages the integer codes, and rounds. The same mean as a convolution with equal
weights, or as a ReduceMean where the window is the whole image, is exact.

Requires fixed image sizes. Ensures that no AveragePool of the class is left.
"""

from __future__ import annotations

import math

import numpy as np
import onnx
from onnx import helper, numpy_helper, shape_inference

from export.graph import attributes, describe
from export.passes.barrier import replace_nodes
from runtime.errors import ModelError
from runtime.onnx_bytes import GRADIENT_PREFIX


def average_exactly(model: onnx.ModelProto) -> None:
    """Replace every average pooling of the class's graph, in place, by a mean or a depthwise convolution.

    Raises:
        ModelError: the image's size at a pooling is not fixed.
    """
    graph = model.graph
    if not any(node.op_type == "AveragePool" for node in graph.node):
        return
    shapes = _shapes(model)
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.op_type != "AveragePool" or node.name.startswith(GRADIENT_PREFIX):
            nodes.append(node)
            continue
        _, channels, *sizes = shapes.get(node.input[0], (0, 0, 0))
        if not channels or not all(sizes):
            raise ModelError(f"{describe(node)}: its image has no fixed size; export with fixed image sizes")
        nodes += _averaged(node, graph, channels, sizes)
    replace_nodes(graph, nodes)


def _averaged(
    node: onnx.NodeProto, graph: onnx.GraphProto, channels: int, sizes: list[int]
) -> list[onnx.NodeProto]:
    found, axes = attributes(node), len(sizes)
    kernel = list(found["kernel_shape"])
    strides = list(found.get("strides") or [1] * axes)
    dilations = list(found.get("dilations") or [1] * axes)
    windows = [
        _windows(*one, found) for one in zip(sizes, kernel, strides, dilations, _pads(found, axes), strict=True)
    ]
    result, name = node.output[0], node.name or node.output[0]

    def constant(part: str, value: np.ndarray) -> str:
        graph.initializer.append(numpy_helper.from_array(value, f"{name}/{part}"))
        return graph.initializer[-1].name

    if kernel == sizes and all(len(counts) == 1 and not any(pads) for counts, pads in windows):
        axis = constant("axes", np.arange(2, 2 + axes))
        return [helper.make_node("ReduceMean", [node.input[0], axis], [result], name=name, keepdims=1)]
    weight = constant("weight", np.full((channels, 1, *kernel), 1 / math.prod(kernel), np.float32))
    pads = [pads for _, pads in windows]
    convolution = helper.make_node(
        "Conv", [node.input[0], weight], [result], name=name, kernel_shape=kernel, strides=strides,
        dilations=dilations, group=channels, pads=[p[0] for p in pads] + [p[1] for p in pads],
    )  # fmt: skip
    counts = windows[0][0]
    for other, _ in windows[1:]:
        counts = np.multiply.outer(counts, other)
    if np.all(counts == math.prod(kernel)):
        return [convolution]
    # Windows that reach over the edge average fewer pixels.
    convolution.output[0] = f"{result}/sums"
    factor = constant("factor", (math.prod(kernel) / counts)[None, None].astype(np.float32))
    return [convolution, helper.make_node("Mul", [convolution.output[0], factor], [result], name=f"{name}/mean")]


def _pads(found: dict[str, object], axes: int) -> list[tuple[int, int] | str]:
    auto = found.get("auto_pad", b"NOTSET")
    assert isinstance(auto, bytes)
    if auto not in (b"NOTSET", b""):
        return [auto.decode()] * axes
    pads = list(found.get("pads") or [0] * (2 * axes))  # type: ignore[call-overload]
    return list(zip(pads[:axes], pads[axes:], strict=True))


def _windows(
    size: int, kernel: int, stride: int, dilation: int, pads: tuple[int, int] | str, found: dict[str, object]
) -> tuple[np.ndarray, tuple[int, int]]:
    """Return, along one axis, how many pixels each window averages, and the padding of such a convolution."""
    reach = dilation * (kernel - 1) + 1
    if isinstance(pads, str):
        total = max(0, (math.ceil(size / stride) - 1) * stride + reach - size) if pads != "VALID" else 0
        pads = (total // 2, total - total // 2) if pads != "SAME_LOWER" else (total - total // 2, total // 2)
    before, after = pads
    steps = (size + before + after - reach) / stride
    count = (math.ceil(steps) if found.get("ceil_mode", 0) else math.floor(steps)) + 1
    if found.get("ceil_mode", 0) and (count - 1) * stride >= size + before:
        count -= 1  # a window that begins in the padding behind the image is none
    starts = np.arange(count) * stride - before
    taps = starts[:, None] + np.arange(kernel) * dilation
    padded = bool(found.get("count_include_pad", 0))
    first, end = (-before, size + after) if padded else (0, size)
    counts = ((taps >= first) & (taps < end)).sum(1)
    return counts, (before, max(after, (count - 1) * stride + reach - size - before))


def _shapes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a graph's values as far as they are known, 0 where a size is open."""
    inferred = shape_inference.infer_shapes(model).graph
    return {
        value.name: tuple(d.dim_value for d in value.type.tensor_type.shape.dim)
        for value in (*inferred.value_info, *inferred.input, *inferred.output)
    }
