"""Gates: the 0 or 1 that an activation multiplies the gradient by.

Every gate is arithmetic, never a comparison: engines fuse Mul and Clip into one pass over memory and treat
Greater, And and Where as separate ones.
"""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from export.gradient.tape import Tape

# What hands on some of its elements, and a scale with them.
_HANDING_ON = {
    "Concat", "Flatten", "Identity", "MaxPool", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze",
}  # fmt: skip


def step(t: Tape, x: str, *sources: str) -> str:
    """Return 1 where x > 0, else 0, of x's shape; `sources` are forward tensors that x is the difference of.

    Exact down to 2^-100, which no activation resolves (2^-15 in half precision, whose range ends there).
    """
    return t.op("Clip", steep(t, x, *sources), 0.0, 1.0)


def steep(t: Tape, x: str, *sources: str) -> str:
    """Return x times 2^100, for a Clip to make 0 or 1 of.

    OpenVINO 2026.4 moves the scale of codes past such a Mul and a Clip, and then clips the codes at 2^-100: all
    are 0. It does not past a maximum with the lowest float, which changes nothing.
    """
    if any(is_dequantized(t, source) for source in sources or (x,)):
        x = t.op("Max", x, float(np.finfo(t.numpy_type(x)).min))
    return t.op("Mul", x, _steepness(t, x))


def is_dequantized(t: Tape, x: str) -> bool:
    """Return whether a tensor holds dequantized codes, perhaps moved."""
    node = t.producer.get(x)
    while node is not None and node.op_type in _HANDING_ON:
        node = t.producer.get(node.input[0])
    return node is not None and node.op_type == "DequantizeLinear"


def inside(t: Tape, y: str, low: float, high: float) -> str:
    """Return 1 where low < y < high, else 0, for y already clipped to [low, high].

    The parabola (high - y)(y - low) is exactly 0 at both ends and positive between; steep enough, it is 1.
    """
    above = t.op("Sub", y, low) if low else y
    parabola = t.op("Mul", t.op("Sub", t.array(high, y), y), above)
    return t.op("Clip", t.op("Mul", parabola, _steepness(t, y)), 0.0, 1.0)


def _steepness(t: Tape, x: str) -> float:
    return 2.0**15 if t.type(x) == TensorProto.FLOAT16 else 2.0**100
