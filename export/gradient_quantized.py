"""Gradients through QuantizeLinear and DequantizeLinear: PACT's straight-through estimator.

Rounding has no useful gradient, so the gradient passes a quantizer unchanged where the value was
representable and is 0 where it was clipped. The gate that decides is one of two:

- `code`: qmin < code < qmax, what the deployed network did. Code 0 of a ReLU contributed nothing; the last
  code was clipped. It needs only the dequantized value, which the engine has.
- `ste`: low <= x < high on the float before the quantizer, the paper's gate (Choi et al. 2018, with low = 0
  and high = alpha). It keeps the pre-activation in float, which ends the INT8 fusion of the convolution
  before it.

A Relu or Clip just before a QuantizeLinear, and a Clip of its codes just after, narrow the range of the same
gate: the three are one activation, and differentiated as one.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnx

from export.gradient_pointwise import Pairs, Rule, inside
from export.gradient_tape import Tape, attributes, describe
from runtime.errors import ModelError

# Operators that hand on some of their inputs as they are: on a grid before, on the same grid after.
_SELECTING = {
    "Concat",
    "Flatten",
    "Gather",
    "Identity",
    "MaxPool",
    "Reshape",
    "Slice",
    "Split",
    "Squeeze",
    "Transpose",
    "Unsqueeze",
}


class _Grid(NamedTuple):
    """The values scale * (code - zero_point) of a quantizer; arrays broadcast over its tensor."""

    scale: np.ndarray
    zero_point: np.ndarray


def _quantize(t: Tape, node: onnx.NodeProto, y: str, dy: str) -> Pairs:
    x, grid = node.input[0], _grid(t, node)
    if _on_grid(t, x, grid):
        yield x, dy
        return
    kind = t.numpy_type(y)
    codes, limits = y, np.iinfo(kind)
    low, high = np.asarray(limits.min, np.int64), np.asarray(limits.max, np.int64)
    after = t.consumers[y]
    if len(after) == 1 and after[0].op_type == "Clip":
        low = np.maximum(low, t.constant(after[0], 1, limits.min))
        high = np.minimum(high, t.constant(after[0], 2, limits.max))
        codes = after[0].output[0]
    before = t.producer.get(x)
    if before is not None and before.op_type in ("Clip", "Relu"):
        floor, ceiling = (
            (0.0, np.inf)
            if before.op_type == "Relu"
            else (float(t.constant(before, 1, -np.inf)), float(t.constant(before, 2, np.inf)))
        )
        low = np.maximum(low, _code(floor, grid, limits.min))
        high = np.minimum(high, _code(ceiling, grid, limits.max))
        x = before.input[0]
    if np.any(high <= low):
        raise ModelError(
            f"{describe(node)}: its Clip leaves no code between {low.min()} and {high.max()}, expected "
            "a range; check the clip's bounds against the scale"
        )
    values = [((code - grid.zero_point) * grid.scale).astype(t.numpy_type(x)) for code in (low, high)]
    gate = _code_gate(t, codes, grid, *values) if t.gate == "code" else _ste_gate(t, x, *values)
    yield x, t.op("Mul", dy, gate)


def _code_gate(t: Tape, codes: str, grid: _Grid, low: np.ndarray, high: np.ndarray) -> str:
    """Return 1 where the code is strictly inside its range, else 0."""
    value = next((n.output[0] for n in t.consumers[codes] if n.op_type == "DequantizeLinear"), None)
    if value is None:
        raise ModelError(
            f"tensor {codes!r}: its codes are used without a DequantizeLinear, expected a pair; "
            "keep QuantizeLinear and DequantizeLinear together"
        )
    # Codes strictly inside are a step or more away from both ends: (high - y)(y - low) >= step * (high - low
    # - step).
    least = np.maximum((high - low - grid.scale) * grid.scale, grid.scale**2)
    return inside(t, value, low, high, (2 / least).astype(low.dtype))


def _ste_gate(t: Tape, x: str, low: np.ndarray, high: np.ndarray) -> str:
    """Return 1 where low <= x < high, else 0."""
    within = t.op("And", t.op("GreaterOrEqual", x, low), t.op("Less", x, high))
    return t.op("Cast", within, to=t.type(x))


def _dequantize(t: Tape, node: onnx.NodeProto, y: str, dy: str) -> Pairs:
    """Pass on: the gradient by a code is kept in the unit of its value, so that no scale is needed."""
    yield node.input[0], dy


def _grid(t: Tape, node: onnx.NodeProto) -> _Grid:
    scale = t.constant(node, 1)
    zero_point = t.constant(node, 2, np.zeros(())).astype(np.int64)
    if attributes(node).get("block_size"):
        raise ModelError(
            f"{describe(node)}: quantizes in blocks, expected one scale for each tensor or channel"
        )
    layout = [1] * t.rank(node.input[0])
    if scale.size > 1:
        layout[attributes(node).get("axis", 1)] = -1
        return _Grid(scale.reshape(layout), np.broadcast_to(zero_point, scale.shape).reshape(layout))
    return _Grid(scale.reshape(()), zero_point.reshape(()))


def _code(value: float, grid: _Grid, infinite: int) -> np.ndarray:
    """Return the code that `value` rounds to, without saturating; `infinite` for infinities."""
    if np.isinf(value):
        return np.asarray(infinite)
    return np.rint(np.clip(value / grid.scale, -(2.0**31), 2.0**31)).astype(np.int64) + grid.zero_point


def _on_grid(t: Tape, x: str, grid: _Grid) -> bool:
    """Return whether quantizing x cannot clip it: it is the input itself, or comes from the same grid."""
    node = t.producer.get(x)
    if x == t.source:
        return True
    if node is None or node.op_type not in _SELECTING | {"DequantizeLinear"}:
        return False
    if node.op_type != "DequantizeLinear":
        sources = node.input if node.op_type == "Concat" else node.input[:1]
        return grid.scale.ndim == 0 and all(_on_grid(t, source, grid) for source in sources)
    other = _grid(t, node)
    return np.array_equal(other.scale, grid.scale) and np.array_equal(other.zero_point, grid.zero_point)


RULES: dict[str, Rule] = {"DequantizeLinear": _dequantize, "QuantizeLinear": _quantize}
