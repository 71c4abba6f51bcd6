"""Gradients of Resize, DepthToSpace, SpaceToDepth, Tile and Trilu: pixels are weighted, moved or repeated."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx
from onnx import helper
from onnx.reference import ReferenceEvaluator

from export.gradient.rules.layout import multiply_along
from export.gradient.rules.pointwise import Pairs, Rule
from export.gradient.tape import Tape
from export.graph import attributes, describe
from runtime.errors import ModelError

_DOUBLE = onnx.TensorProto.DOUBLE
_OPSET = 19
_WHOLE = 1e-4


def _resize(t: Tape, node: onnx.NodeProto, y: str, dy: str) -> Pairs:
    """Whatever its mode, Resize multiplies each axis by a matrix of weights; its transpose goes back."""
    x, at, rank = node.input[0], attributes(node), t.rank(node.input[0])
    axes = [axis % rank for axis in at.pop("axes", range(rank))]
    scales, roi = t.constant(node, 2, []), t.constant(node, 1, [])
    mode = at.get("coordinate_transformation_mode")
    if at.pop("keep_aspect_ratio_policy", b"stretch") != b"stretch" and not scales.size:
        raise ModelError(f"{describe(node)}: keeps the aspect ratio of sizes, expected scales; give scales")
    if mode == b"tf_crop_and_resize":
        changing = list(range(len(axes)))
    elif scales.size:
        changing = [i for i in range(len(axes)) if scales[i] != 1]
    else:
        changing = [i for i, axis in enumerate(axes) if t.shape(x)[axis] not in (None, t.shape(y)[axis])]
    for i in changing:
        axis = axes[i]
        (before,), (after,) = t.sizes(x, [axis]), t.sizes(y, [axis])
        by_size = not scales.size or mode == b"align_corners" or _is_size(at, float(scales[i]), before, after)
        own = {"size": after} if by_size else {"scale": float(scales[i])}
        region = roi.reshape(2, -1)[:, i].tolist() if roi.size else [0.0, 1.0]
        dy = multiply_along(t, dy, rank, axis, _weights(at, before, region, **own).T)
    yield x, dy


def _is_size(at: dict[str, Any], scale: float, before: int, after: int) -> bool:
    """Say whether sizes describe this Resize better than its scale, a float32.

    0.6 times 5 pixels is 3.0000001. The nearest pixel may then be another one than in the engines, whose float32
    rounds to 3; weights of other modes change by as little as the scale does, so its own value is right. A scale
    that lies below, such as 2.9999998, gives a pixel less than the engines have.
    """
    if abs(scale * before - after) >= _WHOLE:
        return False
    return at.get("mode", b"nearest") == b"nearest" or math.floor(scale * before) != after


def _weights(
    at: dict[str, Any], before: int, region: list[float], *, scale: float = 0.0, size: int = 0
) -> np.ndarray:
    """Return by which weights [before, after] a Resize of one axis adds up its elements, as ONNX defines it."""
    inputs = ["x", "roi", "scales" if scale else "", "" if scale else "sizes"]
    feeds: dict[str, np.ndarray] = {
        "roi": np.array([0, region[0], 1, region[1]], np.float32),
        **({"scales": np.array([1, scale], np.float32)} if scale else {"sizes": np.array([before, size])}),
    }
    x = helper.make_tensor_value_info("x", _DOUBLE, [before, before])
    kinds = {"roi": 1, "scales": 1, "sizes": 7}
    values = [x, *(helper.make_tensor_value_info(name, kinds[name], None) for name in feeds)]
    graph = helper.make_graph(
        [helper.make_node("Resize", inputs, ["y"], **at)], "axis", values,
        [helper.make_tensor_value_info("y", _DOUBLE, None)],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=9)
    evaluator: Any = ReferenceEvaluator(model)
    # What is put in from outside the image is a constant, and has no weight.
    images = np.eye(before), np.zeros((before, before))
    ones, nothing = (np.asarray(evaluator.run(None, {"x": image, **feeds})[0]) for image in images)
    return ones - nothing


def _depth_to_space(t: Tape, node: onnx.NodeProto, y: str, dy: str) -> Pairs:
    at, block = attributes(node), attributes(node)["blocksize"]
    dx = t.op("SpaceToDepth", dy, blocksize=block)
    if at.get("mode", b"DCR") == b"CRD":
        (channels,) = t.sizes(y, [1])
        dx = t.op("Gather", dx, np.arange(channels * block**2).reshape(-1, channels).T.reshape(-1), axis=1)
    yield node.input[0], dx


def _space_to_depth(t: Tape, node: onnx.NodeProto, y: str, dy: str) -> Pairs:
    at = attributes(node)
    yield node.input[0], t.op("DepthToSpace", dy, blocksize=at["blocksize"], mode=at.get("mode", b"DCR").decode())


def _tile(t: Tape, node: onnx.NodeProto, y: str, dy: str) -> Pairs:
    """Add up the copies: each repeated axis as two, of which the first is summed."""
    x, repeats = node.input[0], t.constant(node, 1).tolist()
    shape: list[int] = []
    summed = []
    for axis, count in enumerate(repeats):
        size = t.shape(x)[axis]
        if count != 1:
            (size,) = t.sizes(x, [axis])
            summed.append(len(shape))
            shape.append(count)
        shape.append(-1 if size is None else size)
    yield x, t.op("ReduceSum", t.op("Reshape", dy, shape), summed, keepdims=0) if summed else dy


def _triangle(t: Tape, node: onnx.NodeProto, y: str, dy: str) -> Pairs:
    yield node.input[0], t.op("Trilu", dy, *node.input[1:], **attributes(node))


RULES: dict[str, Rule] = {
    "DepthToSpace": _depth_to_space,
    "Resize": _resize,
    "SpaceToDepth": _space_to_depth,
    "Tile": _tile,
    "Trilu": _triangle,
}
