"""Gradients of sums, means and products along axes, and of running sums."""

from __future__ import annotations

import math

import numpy as np
import onnx

from export.gradient.rules.gates import step
from export.gradient.rules.pointwise import Pairs, Rule
from export.gradient.tape import Tape
from export.graph import attributes


def axes_of(t: Tape, node: onnx.NodeProto, rank: int) -> list[int]:
    """Return the axes that a reduction runs over, ascending; all where it names none."""
    axes = t.constant(node, 1, []).tolist()
    if not axes and not attributes(node).get("noop_with_empty_axes", 0):
        return list(range(rank))
    return sorted(axis % rank for axis in axes)


def spread(t: Tape, name: str, x: str, axes: list[int]) -> str:
    """Repeat a tensor that has size 1 along `axes` to x's sizes there."""
    shape = [1] * t.rank(x)
    for axis, size in zip(axes, t.sizes(x, axes), strict=True):
        shape[axis] = size
    return t.op("Expand", name, shape)


def kept(t: Tape, node: onnx.NodeProto, name: str, axes: list[int]) -> str:
    """Give a reduction's result, or its gradient, back the axes of size 1 that it dropped."""
    if attributes(node).get("keepdims", 1) or not axes:
        return name
    return t.op("Unsqueeze", name, axes)


def _reduce_sum(t: Tape, node: onnx.NodeProto, y: str, dy: str) -> Pairs:
    x = node.input[0]
    axes = axes_of(t, node, t.rank(x))
    yield x, spread(t, kept(t, node, dy, axes), x, axes)


def _reduce_mean(t: Tape, node: onnx.NodeProto, y: str, dy: str) -> Pairs:
    x = node.input[0]
    axes = axes_of(t, node, t.rank(x))
    share = t.op("Mul", kept(t, node, dy, axes), 1 / math.prod(t.sizes(x, axes)))
    yield x, spread(t, share, x, axes)


def _reduce_l2(t: Tape, node: onnx.NodeProto, y: str, dy: str) -> Pairs:
    """dx = dy x / y, and 0 where the norm y is 0, since x is 0 there."""
    x = node.input[0]
    axes = axes_of(t, node, t.rank(x))
    norm = t.op("Add", y, t.op("Sub", t.array(1.0, y), step(t, y)))
    share = kept(t, node, t.op("Div", dy, norm), axes)
    yield x, t.op("Mul", x, share)


def _reduce_prod(t: Tape, node: onnx.NodeProto, y: str, dy: str) -> Pairs:
    """The product of all others: beside a zero nothing has a gradient, and of several zeros none has."""
    x = node.input[0]
    axes = axes_of(t, node, t.rank(x))
    if not axes:
        yield x, dy
        return
    zero = t.op("Cast", t.op("Equal", x, 0.0), to=t.type(x))
    safe = t.op("Add", x, zero)
    others = t.op("Div", t.op("ReduceProd", safe, axes, keepdims=1), safe)
    # 1 - zeros at what is no zero, 2 - zeros at a zero: 1 where no other is zero, at most 0 where one is.
    none = t.op("Sub", t.op("Add", zero, 1.0), t.op("ReduceSum", zero, axes, keepdims=1))
    yield x, t.op("Mul", t.op("Mul", kept(t, node, dy, axes), others), t.op("Clip", none, 0.0, 1.0))


def _cumulative_sum(t: Tape, node: onnx.NodeProto, y: str, dy: str) -> Pairs:
    """The running sum from the other end."""
    at = attributes(node)
    axis, turned = int(t.constant(node, 1)), 1 - at.get("reverse", 0)
    turned_sum = t.op("CumSum", dy, np.asarray(axis, np.int64), exclusive=at.get("exclusive", 0), reverse=turned)
    yield node.input[0], turned_sum


RULES: dict[str, Rule] = {
    "CumSum": _cumulative_sum,
    "ReduceL2": _reduce_l2,
    "ReduceMean": _reduce_mean,
    "ReduceProd": _reduce_prod,
    "ReduceSum": _reduce_sum,
}
