"""Gradients of the operators that move, repeat or drop elements."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx

from export.gradient.rules.choosing import gathered_at_run_time
from export.gradient.rules.pointwise import Pairs, Rule, unbroadcast
from export.gradient.tape import Tape
from export.graph import attributes, describe
from runtime.errors import ModelError


@dataclass(frozen=True)
class Places:
    """`count` places along an axis of `size` elements, the first at `first`; the caller knows their distance."""

    size: int
    first: int
    count: int

    def cells(self, block: int) -> int:
        """Return how many cells of `block` elements cover the axis."""
        return -(-self.size // block)


def move_axis(t: Tape, name: str, rank: int, source: int, target: int) -> str:
    """Return a tensor with one axis moved, as numpy.moveaxis does."""
    if source == target:
        return name
    perm = [axis for axis in range(rank) if axis != source]
    perm.insert(target, source)
    return t.op("Transpose", name, perm=perm)


def scatter(t: Tape, dy: str, rank: int, axis: int, index: np.ndarray, size: int) -> str:
    """Place dy[i] at index[i] along one axis of `size` elements, add what meets, zeros elsewhere."""
    start = int(index[0])
    if np.array_equal(index, np.arange(start, start + len(index))):
        ends = (start, size - start - len(index))
        return t.op(
            "Pad",
            dy,
            [ends[0] * (a == axis) for a in range(rank)] + [ends[1] * (a == axis) for a in range(rank)],
        )
    place = np.zeros((len(index), size), t.numpy_type(dy))
    place[np.arange(len(index)), index] = 1
    return multiply_along(t, dy, rank, axis, place)


def multiply_along(t: Tape, dy: str, rank: int, axis: int, matrix: np.ndarray) -> str:
    """Multiply a tensor, taken as rows along one axis, by a constant matrix [size before, size after]."""
    matrix, last = matrix.astype(t.numpy_type(dy)), rank - 1
    if axis == last:
        return t.op("MatMul", dy, matrix)
    if axis == last - 1:
        return t.op("MatMul", t.array(np.ascontiguousarray(matrix.T), dy), dy)
    return move_axis(t, t.op("MatMul", move_axis(t, dy, rank, axis, last), matrix), rank, last, axis)


def place_on_grid(t: Tape, dy: str, channels: int, block: int, places: list[Places]) -> str:
    """Place dy [N, C, h, w] at every `block`-th row and column of a tensor of zeros [N, C, H, W].

    A grid cell of block x block pixels is block^2 channels at the place of one pixel; DepthToSpace lays them out.
    """
    (top, below), (left, right) = ((p.first // block, p.cells(block) - p.first // block - p.count) for p in places)
    phase = places[0].first % block * block + places[1].first % block
    before, after = phase * channels, (block * block - 1 - phase) * channels
    return lay_out(t, t.op("Pad", dy, [0, before, top, left, 0, after, below, right]), block, places)


def lay_out(t: Tape, cells: str, block: int, places: list[Places], mode: str = "DCR") -> str:
    """Turn [N, block^2 C, h, w] into [N, C, H, W], cropped where the last cells reach over the edge."""
    pixels = t.op("DepthToSpace", cells, blocksize=block, mode=mode)
    sizes = [p.size for p in places]
    if all(p.cells(block) * block == p.size for p in places):
        return pixels
    return t.op("Slice", pixels, [0, 0], sizes, [2, 3])


def _reshape(t: Tape, node: onnx.NodeProto, y: str, dy: str) -> Pairs:
    yield node.input[0], t.reshape_like(dy, node.input[0])


def _transpose(t: Tape, node: onnx.NodeProto, y: str, dy: str) -> Pairs:
    x = node.input[0]
    perm = attributes(node).get("perm", list(range(t.rank(x)))[::-1])
    yield x, t.op("Transpose", dy, perm=np.argsort(perm).tolist())


def _expand(t: Tape, node: onnx.NodeProto, y: str, dy: str) -> Pairs:
    yield node.input[0], unbroadcast(t, dy, node.input[0], y)


def _concat(t: Tape, node: onnx.NodeProto, y: str, dy: str) -> Pairs:
    axis = attributes(node)["axis"] % t.rank(y)
    ends = np.cumsum([t.sizes(x, [axis])[0] for x in node.input]).tolist()
    for x, start, end in zip(node.input, [0, *ends], ends, strict=False):
        if x in t.active:
            yield x, t.op("Slice", dy, [start], [end], [axis])


def _split(t: Tape, node: onnx.NodeProto, y: str, dy: str) -> Pairs:
    x, rank = node.input[0], t.rank(y)
    axis = attributes(node).get("axis", 0) % rank
    index = list(node.output).index(y)
    start = sum(t.sizes(part, [axis])[0] for part in node.output[:index])
    where = np.arange(start, start + t.sizes(y, [axis])[0])
    if not len(where):
        yield x, t.op("Mul", x, 0.0)
        return
    yield x, scatter(t, dy, rank, axis, where, t.sizes(x, [axis])[0])


def _slice(t: Tape, node: onnx.NodeProto, y: str, dy: str) -> Pairs:
    """Every second row and column, x[:, :, ::2, ::2], arrives as two Slices; they are differentiated as one."""
    x, taken = node.input[0], _taken(t, node)
    before = t.producer.get(x)
    if before is not None and before.op_type == "Slice" and len(t.consumers[x]) == 1 and x not in t.wanted:
        earlier = _taken(t, before)
        if earlier.keys().isdisjoint(taken):
            x, taken = before.input[0], taken | earlier
    if not all(map(len, taken.values())):
        return  # it takes nothing
    rank = t.rank(x)
    block = _block(taken) if rank == 4 else 0
    if block:
        places = [Places(t.sizes(x, [a])[0], int(taken[a][0]), len(taken[a])) for a in (2, 3)]
        dy = place_on_grid(t, dy, t.sizes(x, [1])[0], block, places)
    else:
        for axis, index in taken.items():
            dy = scatter(t, dy, rank, axis, index, t.sizes(x, [axis])[0])
    yield x, dy


def _taken(t: Tape, node: onnx.NodeProto) -> dict[int, np.ndarray]:
    """Return axis -> the places that a Slice takes; an axis taken whole, whose size may stay open, is left out."""
    x = node.input[0]
    starts, ends = t.constant(node, 1).tolist(), t.constant(node, 2).tolist()
    axes = t.constant(node, 3, range(len(starts))).tolist()
    steps = t.constant(node, 4, [1] * len(starts)).tolist()
    taken = {}
    for axis, start, end, stride in zip(axes, starts, ends, steps, strict=True):
        if (start, stride) == (0, 1) and end >= np.iinfo(np.int32).max:
            continue
        size = t.sizes(x, [axis])[0]
        # ONNX clamps as Python does, but for "down to the first": an end before every element.
        last = None if stride < 0 and end < -size else end
        taken[axis % t.rank(x)] = np.arange(size)[start:last:stride]
    return taken


def _block(taken: dict[int, np.ndarray]) -> int:
    """Return the step at which both rows and columns are taken, 0 where there is no such step above 1."""
    if taken.keys() != {2, 3} or min(map(len, taken.values())) < 2:
        return 0
    steps = {int(step) for index in taken.values() for step in np.diff(index)}
    return step if len(steps) == 1 and (step := steps.pop()) > 1 else 0


def _gather(t: Tape, node: onnx.NodeProto, y: str, dy: str) -> Pairs:
    x, rank = node.input[0], t.rank(node.input[0])
    axis = attributes(node).get("axis", 0) % rank
    if t.value(node.input[1]) is None:
        yield x, gathered_at_run_time(t, node, y, dy, axis)
        return
    index = t.constant(node, 1)
    size = t.sizes(x, [axis])[0]
    if index.ndim == 0:
        dy = t.op("Unsqueeze", dy, [axis])
    elif index.ndim > 1:
        dy = _merged(t, dy, y, axis, index.ndim)
    yield x, scatter(t, dy, rank, axis, index.reshape(-1) % size, size)


def _gather_nd(t: Tape, node: onnx.NodeProto, y: str, dy: str) -> Pairs:
    """Indices into the first axes of x, all constant: one Gather from these axes taken together."""
    x, index = node.input[0], t.constant(node, 1)
    if attributes(node).get("batch_dims", 0):
        raise ModelError(f"{describe(node)}: has batch_dims, expected none; gather along one axis instead")
    lead = t.sizes(x, range(index.shape[-1]))
    flat = np.ravel_multi_index(
        tuple(np.moveaxis(index, -1, 0) % np.reshape(lead, (-1, *[1] * (index.ndim - 1)))), lead
    )
    dy = _merged(t, dy, y, 0, index.ndim - 1)
    rank = 1 + t.rank(x) - len(lead)
    yield x, t.reshape_like(scatter(t, dy, rank, 0, flat.reshape(-1), math.prod(lead)), x)


def _merged(t: Tape, dy: str, y: str, axis: int, count: int) -> str:
    """Merge `count` axes of dy, from `axis` on, into one."""
    shape = [-1 if size is None else size for size in t.shape(y)]
    size = math.prod(t.sizes(y, range(axis, axis + count)))
    return t.op("Reshape", dy, [*shape[:axis], size, *shape[axis + count :]])


def _pad(t: Tape, node: onnx.NodeProto, y: str, dy: str) -> Pairs:
    x, rank = node.input[0], t.rank(node.input[0])
    mode = attributes(node).get("mode", b"constant").decode()
    pads = t.constant(node, 1)
    axes = t.constant(node, 3, range(rank)) % rank
    for axis, before, after in zip(axes.tolist(), *pads.reshape(2, -1).tolist(), strict=True):
        if (before, after) == (0, 0):
            continue
        size = t.sizes(x, [axis])[0]
        if mode == "constant":
            # Crop what was added; a negative pad cropped the input, whose gradient is zero there.
            dy = t.op(
                "Slice",
                dy,
                [max(before, 0)],
                [max(before, 0) + size - max(-before, 0) - max(-after, 0)],
                [axis],
            )
            if min(before, after) < 0:
                left = max(-before, 0)
                dy = scatter(t, dy, rank, axis, np.arange(left, size - max(-after, 0)), size)
        else:
            source = np.pad(np.arange(size), (max(before, 0), max(after, 0)), mode)
            source = source[max(-before, 0) : len(source) - max(-after, 0)]
            dy = scatter(t, dy, rank, axis, source, size)
    yield x, dy


RULES: dict[str, Rule] = {
    "Concat": _concat,
    "Expand": _expand,
    "Flatten": _reshape,
    "Gather": _gather,
    "GatherND": _gather_nd,
    "Pad": _pad,
    "Reshape": _reshape,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _reshape,
    "Transpose": _transpose,
    "Unsqueeze": _reshape,
}
