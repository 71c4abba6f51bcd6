"""Gradients of sines, cosines and tangents, of angles and of hyperbolas, and of their inverses."""

from __future__ import annotations

from collections.abc import Callable

import onnx

from export.gradient.rules.pointwise import Pairs, Rule
from export.gradient.tape import Tape

Slope = Callable[[Tape, str, str], str]


def _rule(slope: Slope) -> Rule:
    def rule(t: Tape, node: onnx.NodeProto, y: str, dy: str) -> Pairs:
        x = node.input[0]
        yield x, t.op("Mul", dy, slope(t, x, y))

    return rule


def _one(t: Tape, x: str, sign: int) -> str:
    """Return 1 + sign x^2."""
    return t.op("Add" if sign > 0 else "Sub", t.array(1.0, x), t.op("Mul", x, x))


def _inverse_root(t: Tape, value: str) -> str:
    return t.op("Reciprocal", t.op("Sqrt", value))


SLOPES: dict[str, Slope] = {
    "Sin": lambda t, x, y: t.op("Cos", x),
    "Cos": lambda t, x, y: t.op("Neg", t.op("Sin", x)),
    "Tan": lambda t, x, y: _one(t, y, 1),
    "Asin": lambda t, x, y: _inverse_root(t, _one(t, x, -1)),
    "Acos": lambda t, x, y: t.op("Neg", _inverse_root(t, _one(t, x, -1))),
    "Atan": lambda t, x, y: t.op("Reciprocal", _one(t, x, 1)),
    "Sinh": lambda t, x, y: t.op("Cosh", x),
    "Cosh": lambda t, x, y: t.op("Sinh", x),
    "Asinh": lambda t, x, y: _inverse_root(t, _one(t, x, 1)),
    "Acosh": lambda t, x, y: _inverse_root(t, t.op("Sub", t.op("Mul", x, x), 1.0)),
    "Atanh": lambda t, x, y: t.op("Reciprocal", _one(t, x, -1)),
}
RULES: dict[str, Rule] = {kind: _rule(slope) for kind, slope in SLOPES.items()}
