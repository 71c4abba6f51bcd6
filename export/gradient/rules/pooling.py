"""Gradients of pooling: MaxPool, AveragePool, LpPool, their global forms, ReduceMax and ReduceMin.

A pooling window is the product of its axes: pooling along the columns and then along the rows gives the same
maximum or mean. So is its gradient, and every rule here works on one axis at a time.

Ties: the whole gradient goes to the first maximum of the window in row-major order, as torch's pooling does.
Quantized activations tie all the time, and a rule that marked every maximum would multiply the gradient.
"""

from __future__ import annotations

import itertools
from functools import reduce

import numpy as np
import onnx

from export.gradient.rules.gates import step
from export.gradient.rules.linear import Axis, sliding
from export.gradient.rules.pointwise import Pairs, Rule
from export.gradient.rules.reductions import axes_of, kept, spread
from export.gradient.tape import Tape
from export.graph import attributes


def _max_pool(t: Tape, node: onnx.NodeProto, y: str, dy: str) -> Pairs:
    x, axes = node.input[0], sliding(t, node, attributes(node)["kernel_shape"])
    if _tiles(axes):
        yield x, _max_in_tiles(t, x, y, dy, axes)
        return
    # Pool along the last axis first: the first row that holds the maximum, and the first column in that row,
    # are the first maximum in row-major order.
    levels = [x]
    for i in reversed(range(1, len(axes))):
        levels.append(_pooled_along(t, levels[-1], axes, i))
    levels.append(y)
    shape = _open_batch(t, y)
    for i, axis in enumerate(axes):
        y, x = levels.pop(), levels[-1]
        dy = _max_along(t, x, y, dy, shape, i + 2, axis)
        shape[i + 2] = axis.size
    yield x, dy


def _tiles(axes: list[Axis]) -> bool:
    """Return whether square windows lie side by side on the image, as most networks pool."""
    return len(axes) == 2 and all(
        a.kernel == a.stride == axes[0].stride > 1 and a.dilation == 1 and a.before == 0 and _beyond(a) == 0
        for a in axes
    )


def _max_in_tiles(t: Tape, x: str, y: str, dy: str, axes: list[Axis]) -> str:
    """Give dy to the first maximum of each tile: a window's elements are channels that DepthToSpace lays out."""
    block, parts, left = axes[0].stride, [], t.array(1.0, dy)
    for first in itertools.product(range(block), repeat=2):
        ends = [f + (a.steps - 1) * block + 1 for f, a in zip(first, axes, strict=True)]
        element = t.op("Slice", x, list(first), ends, [2, 3], [block, block])
        here = t.op("Mul", t.op("Cast", t.op("Equal", element, y), to=t.type(dy)), left)
        left = t.op("Sub", left, here)
        parts.append(t.op("Mul", dy, here))
    dx = t.op("DepthToSpace", t.op("Concat", *parts, axis=1), blocksize=block)
    for axis, a in enumerate(axes, 2):
        dx = _resized(t, dx, 4, axis, 0, a.size - a.steps * block)
    return dx


def _pooled_along(t: Tape, x: str, axes: list[Axis], i: int) -> str:
    """Pool x along its spatial axis i alone."""

    def only(value: int, other: int) -> list[int]:
        return [value if a == i else other for a in range(len(axes))]

    own = axes[i]
    return t.op(
        "MaxPool",
        x,
        kernel_shape=only(own.kernel, 1),
        strides=only(own.stride, 1),
        dilations=only(own.dilation, 1),
        pads=only(own.before, 0) + only(_beyond(own), 0),
    )


def _beyond(axis: Axis) -> int:
    """Return how far the last window reaches beyond the input: under ceil_mode more than was padded."""
    return max((axis.steps - 1) * axis.stride + axis.span - axis.size - axis.before, 0)


def _max_along(t: Tape, x: str, y: str, dy: str, shape: list[int], axis: int, window: Axis) -> str:
    """Give dy, along one axis, to the first element of each window of x that equals its maximum y."""
    if window.kernel == window.stride == 1:
        return _resized(t, dy, len(shape), axis, -window.before, -window.after)
    parts, left = [], t.array(1.0, dy)
    for tap in range(window.kernel):
        # The windows whose element of this tap lies in the image; x is not padded, since OpenVINO 2026.4 fails on
        # infinities around what it holds as codes.
        offset = tap * window.dilation - window.before
        first = max(-(offset // window.stride), 0)
        last = min((window.size - 1 - offset) // window.stride, window.steps - 1)
        if last < first:
            parts.append(t.op("Mul", dy, 0.0))
            continue
        start, end = first * window.stride + offset, last * window.stride + offset + 1
        element = t.op("Slice", x, [start], [end], [axis], [window.stride])
        outside = (-first, last + 1 - window.steps)
        here = t.op("Cast", t.op("Equal", element, _resized(t, y, len(shape), axis, *outside)), to=t.type(dy))
        here = t.op("Mul", _resized(t, here, len(shape), axis, *(-width for width in outside)), left)
        left = t.op("Sub", left, here)
        parts.append(t.op("Mul", dy, here))
    return _placed(t, parts, shape, axis, window)


def _placed(t: Tape, parts: list[str], shape: list[int], axis: int, window: Axis) -> str:
    """Add up, for every input along one axis, what the windows that cover it give it.

    Args:
        t: the tape.
        parts: for each element of the window, what it gets from every window; tensors of one `shape`.
        shape: their sizes, -1 for the batch; `window.steps` along `axis`.
        axis: the axis that the window slides along.
        window: how it slides.
    """
    # Window o covers the inputs o * stride + tap * dilation (counted with the padding): within a lane of
    # inputs of the same remainder by the stride, its parts are shifted and added; the lanes interleave.
    stride, rank = window.stride, len(shape)
    rows = window.steps + (window.span - 1) // stride
    lanes: list[list[str]] = [[] for _ in range(stride)]
    for tap, part in enumerate(parts):
        shift, lane = divmod(tap * window.dilation, stride)
        lanes[lane].append(_resized(t, part, rank, axis, shift, rows - window.steps - shift))
    sums = [reduce(lambda a, b: t.op("Add", a, b), lane) if lane else "" for lane in lanes]
    dx = sums[0]
    if stride > 1:
        nothing = "" if all(sums) else t.op("Mul", dx, 0.0)
        columns = [t.op("Unsqueeze", lane or nothing, [axis + 1]) for lane in sums]
        between = t.op("Concat", *columns, axis=axis + 1)
        dx = t.op("Reshape", between, [*shape[:axis], rows * stride, *shape[axis + 1 :]])
    return _resized(t, dx, rank, axis, -window.before, window.before + window.size - rows * stride)


def _resized(t: Tape, x: str, rank: int, axis: int, before: int, after: int) -> str:
    """Pad both ends of one axis with zeros; negative widths crop."""
    pads = [max(before, 0) * (a == axis) for a in range(rank)] + [max(after, 0) * (a == axis) for a in range(rank)]
    if any(pads):
        x = t.op("Pad", x, pads, 0.0)
    if min(before, after) < 0:
        x = t.op("Slice", x, [max(-before, 0)], [after if after < 0 else np.iinfo(np.int64).max], [axis])
    return x


def _average_pool(t: Tape, node: onnx.NodeProto, y: str, dy: str) -> Pairs:
    at = attributes(node)
    axes = sliding(t, node, at["kernel_shape"])
    counts = np.ones(())
    for axis in axes:
        counts = np.multiply.outer(counts, _counts(axis, at.get("count_include_pad", 0)))
    share = (1 / counts if np.ptp(counts) else 1 / counts.flat[:1].reshape(())).astype(t.numpy_type(dy))
    dy = t.op("Mul", dy, share)
    shape = _open_batch(t, y)
    for i, axis in enumerate(axes, 2):
        dy = _placed(t, [dy] * axis.kernel, shape, i, axis)
        shape[i] = axis.size
    yield node.input[0], dy


def _counts(axis: Axis, include_pad: bool) -> np.ndarray:
    """Return how many elements each window along an axis divides by; what ceil_mode adds never counts."""
    position = np.arange(axis.steps)[:, None] * axis.stride + np.arange(axis.kernel) * axis.dilation - axis.before
    low, high = (-axis.before, axis.size + axis.after) if include_pad else (0, axis.size)
    return ((position >= low) & (position < high)).sum(1)


def _lp_pool(t: Tape, node: onnx.NodeProto, y: str, dy: str) -> Pairs:
    """y = (sum |x|^p)^(1/p): dx = sign(x) |x|^(p - 1) times the sum of dy y^(1 - p) of the windows around x."""
    x, at = node.input[0], attributes(node)
    axes, power = sliding(t, node, at["kernel_shape"]), at.get("p", 2)
    dy, shape = _by_norm(t, y, dy, power), _open_batch(t, y)
    for i, axis in enumerate(axes, 2):
        dy = _placed(t, [dy] * axis.kernel, shape, i, axis)
        shape[i] = axis.size
    yield x, t.op("Mul", dy, _slope_of_power(t, x, power))


def _global_lp_pool(t: Tape, node: onnx.NodeProto, y: str, dy: str) -> Pairs:
    x, power = node.input[0], attributes(node).get("p", 2)
    share = spread(t, _by_norm(t, y, dy, power), x, list(range(2, t.rank(x))))
    yield x, t.op("Mul", share, _slope_of_power(t, x, power))


def _by_norm(t: Tape, y: str, dy: str, power: int) -> str:
    """Return dy y^(1 - p); where a norm y is 0, dy as it is: what it is multiplied by is 0 there."""
    norm = t.op("Add", y, t.op("Sub", t.array(1.0, y), step(t, y)))
    return t.op("Mul", dy, t.op("Pow", norm, float(1 - power)))


def _slope_of_power(t: Tape, x: str, power: int) -> str:
    """Return sign(x) |x|^(p - 1)."""
    if power == 2:
        return x
    sign = t.op("Sign", x)
    return sign if power == 1 else t.op("Mul", sign, t.op("Pow", t.op("Abs", x), float(power - 1)))


def _global_average_pool(t: Tape, node: onnx.NodeProto, y: str, dy: str) -> Pairs:
    x = node.input[0]
    axes = list(range(2, t.rank(x)))
    yield x, spread(t, t.op("Mul", dy, 1 / float(np.prod(t.sizes(x, axes)))), x, axes)


def _global_max_pool(t: Tape, node: onnx.NodeProto, y: str, dy: str) -> Pairs:
    x = node.input[0]
    yield x, _first_maximum(t, x, list(range(2, t.rank(x))), dy)


def _reduce_max(t: Tape, node: onnx.NodeProto, y: str, dy: str) -> Pairs:
    x = node.input[0]
    axes = axes_of(t, node, t.rank(x))
    yield x, _first_maximum(t, x, axes, kept(t, node, dy, axes))


def _reduce_min(t: Tape, node: onnx.NodeProto, y: str, dy: str) -> Pairs:
    x = node.input[0]
    axes = axes_of(t, node, t.rank(x))
    yield x, _first_maximum(t, x, axes, kept(t, node, dy, axes), values=t.op("Neg", x))


def _first_maximum(t: Tape, x: str, axes: list[int], dy: str, *, values: str | None = None) -> str:
    """Give dy, of size 1 along `axes`, to the first maximum of x, or of `values`, there in row-major order."""
    sizes, rank = t.sizes(x, axes), t.rank(x)
    levels = [values or x]
    for axis in reversed(axes[1:]):
        levels.append(t.op("ReduceMax", levels[-1], [axis], keepdims=1))
    for axis, size in zip(axes, sizes, strict=True):
        winner = t.op("ArgMax", levels.pop(), axis=axis, keepdims=1)
        places = np.arange(size).reshape([-1 if a == axis else 1 for a in range(rank)])
        dy = t.op("Mul", dy, t.op("Cast", t.op("Equal", winner, places), to=t.type(dy)))
    return dy


def _open_batch(t: Tape, y: str) -> list[int]:
    return [-1, *t.sizes(y, range(1, t.rank(y)))]


RULES: dict[str, Rule] = {
    "AveragePool": _average_pool,
    "GlobalAveragePool": _global_average_pool,
    "GlobalLpPool": _global_lp_pool,
    "GlobalMaxPool": _global_max_pool,
    "LpPool": _lp_pool,
    "MaxPool": _max_pool,
    "ReduceMax": _reduce_max,
    "ReduceMin": _reduce_min,
}
