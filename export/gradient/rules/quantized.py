"""Gradients through QuantizeLinear and DequantizeLinear: PACT's straight-through estimator.

Rounding has no useful gradient, so the gradient passes a quantizer unchanged where the value was
representable and is 0 where it was clipped. The gate that decides is one of two:

- `code`: qmin < code < qmax, what the deployed network did. Code 0 of a ReLU contributed nothing; the last
  code was clipped. It needs only the dequantized value, which the engine has.
- `ste`: low <= x < high on the float before the quantizer, the paper's gate (Choi et al. 2018, with low = 0
  and high = alpha); a low of 0 is 2^-10 steps below it, as in training, so that float rounding of a sum that is
  0 decides nothing. It keeps the pre-activation in float, which ends the INT8 fusion of the convolution
  before it.

A Relu or Clip just before a QuantizeLinear, and a Clip of its codes just after, narrow the range of the same
gate: the three are one activation, and differentiated as one.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnx
from onnx import TensorProto

from export.gradient.rules.pointwise import Pairs, Rule
from export.gradient.tape import Tape
from export.graph import attributes, describe
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


# As train.quantization.straight_through has it; foreign graphs are differentiated without torch.
BELOW_ZERO_STEPS = 2.0**-10

_CODES = {TensorProto.INT8, TensorProto.UINT8, TensorProto.INT16, TensorProto.UINT16}


class _Grid(NamedTuple):
    """The values scale * (code - zero_point) of a quantizer; arrays broadcast over its tensor."""

    scale: np.ndarray
    zero_point: np.ndarray


class _Activation(NamedTuple):
    """A quantizer with the clips around it: from the float `x` to `codes`, integers in [low, high]."""

    x: str
    codes: str
    low: np.ndarray
    high: np.ndarray


def _quantize(t: Tape, node: onnx.NodeProto, y: str, dy: str) -> Pairs:
    x, grid = node.input[0], _grid(t, node)
    unit = _activation(t, node, grid)
    if unit.x == x and unit.codes == y and _on_grid(t, x, grid):
        yield x, dy
        return
    if t.gate == "code":
        gate = _code_gate(t, unit)
    else:
        low, high = ((code - grid.zero_point) * grid.scale.astype(np.float64) for code in (unit.low, unit.high))
        low = np.where(unit.low == grid.zero_point, -BELOW_ZERO_STEPS * grid.scale, low)
        gate = _ste_gate(t, unit.x, low, high)
    dx = t.op("Mul", dy, gate)
    # Of a pair with two scales, the value that is given is a multiple of the one that was rounded.
    factor = _value_grid(t, unit)[1].scale / grid.scale
    yield unit.x, t.op("Mul", dx, factor.astype(t.numpy_type(unit.x))) if np.any(factor != 1) else dx


def _activation(t: Tape, node: onnx.NodeProto, grid: _Grid) -> _Activation:
    """Return the quantizer with the Relu or Clip before it and the Clip of its codes after it."""
    x, codes = node.input[0], node.output[0]
    if t.type(codes) not in _CODES:
        kind = TensorProto.DataType.Name(t.type(codes)).lower()
        raise ModelError(f"{describe(node)}: quantizes to {kind}, expected integers of 8 or 16 bits")
    limits = np.iinfo(t.numpy_type(codes))
    low, high = np.asarray(limits.min, np.int64), np.asarray(limits.max, np.int64)
    after = t.consumers[codes]
    if len(after) == 1 and after[0].op_type == "Clip":
        low = np.maximum(low, t.constant(after[0], 1, limits.min))
        high = np.minimum(high, t.constant(after[0], 2, limits.max))
        codes = after[0].output[0]
    before = t.producer.get(x)
    # GradientGraph by the clipped value itself, the clip is not on the way.
    if before is not None and before.op_type in ("Clip", "Relu") and x not in t.wanted:
        relu = before.op_type == "Relu"
        low = np.maximum(low, _code(0.0 if relu else float(t.constant(before, 1, -np.inf)), grid))
        high = np.minimum(high, _code(np.inf if relu else float(t.constant(before, 2, np.inf)), grid))
        x = before.input[0]
    if np.any(high <= low):
        raise ModelError(
            f"{describe(node)}: the clips around it leave codes from {low.min()} to {high.max()}, expected a "
            "range; check the bounds of its Clip against its scale"
        )
    return _Activation(x, codes, low, high)


def _value_grid(t: Tape, unit: _Activation) -> tuple[str, _Grid]:
    """Return the value that codes stand for, and its grid: a quantizer's own, unless its pair has two scales."""
    node = next((n for n in t.consumers[unit.codes] if n.op_type == "DequantizeLinear"), None)
    if node is None:
        raise ModelError(
            f"tensor {unit.codes!r}: its codes are used without a DequantizeLinear, expected a pair; "
            "keep QuantizeLinear and DequantizeLinear together, or export a checkpoint with its saliency at once"
        )
    return node.output[0], _grid(t, node)


def _code_gate(t: Tape, unit: _Activation) -> str:
    """Return 1 where the code is strictly inside its range, else 0, from its value."""
    y, grid = _value_grid(t, unit)
    low, high = ((code - grid.zero_point) * grid.scale for code in (unit.low, unit.high))
    # A tent over the range with slopes of 4 a code: -2 at the first and the last code, 2 or more at all
    # between. Clipped to [0, 1] it is exact, however the values before were rounded. (OpenVINO 2026.4 clips
    # first and scales then, which leaves 4e-5.)
    kind, slope, middle = t.numpy_type(y), 4 / grid.scale.astype(np.float64), (low + high) / 2
    centred = t.op("Sub", y, middle.astype(kind)) if np.any(middle) else y
    fall = t.op("Mul", t.op("Abs", centred), slope.astype(kind))
    peak = (slope * (high - low) / 2 - 2).astype(kind)
    return t.op("Clip", t.op("Sub", t.array(peak, y), fall), 0.0, 1.0)


def _ste_gate(t: Tape, x: str, low: np.ndarray, high: np.ndarray) -> str:
    """Return 1 where low <= x < high, else 0."""
    kind = t.numpy_type(x)
    within = t.op("And", t.op("GreaterOrEqual", x, low.astype(kind)), t.op("Less", x, high.astype(kind)))
    return t.op("Cast", within, to=t.type(x))


def _dequantize(t: Tape, node: onnx.NodeProto, y: str, dy: str) -> Pairs:
    """Pass on: the gradient by a code is kept in the unit of its value, so that no scale is needed."""
    yield node.input[0], dy


def _grid(t: Tape, node: onnx.NodeProto) -> _Grid:
    scale = t.constant(node, 1)
    zero_point = t.constant(node, 2, np.zeros(())).astype(np.int64)
    if attributes(node).get("block_size"):
        raise ModelError(f"{describe(node)}: quantizes in blocks, expected one scale for each tensor or channel")
    layout = [1] * t.rank(node.input[0])
    if scale.size > 1:
        layout[attributes(node).get("axis", 1)] = -1
        return _Grid(scale.reshape(layout), np.broadcast_to(zero_point, scale.shape).reshape(layout))
    return _Grid(scale.reshape(()), zero_point.reshape(()))


def _code(value: float, grid: _Grid) -> np.ndarray:
    """Return the code that `value` rounds to, without saturating at the type's limits."""
    return (
        np.rint(np.clip(value / grid.scale.astype(np.float64), -(2.0**31), 2.0**31)).astype(np.int64)
        + grid.zero_point
    )


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
