"""Gradients of the operators that multiply by weights: Conv, Gemm, MatMul.

The gradient of a linear map is its transpose. What can be rearranged in the weight is rearranged at export.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import onnx

from export.gradient_pointwise import Pairs, Rule, unbroadcast
from export.gradient_tape import Tape, attributes, describe
from runtime.errors import ModelError

# How the gradient of a strided convolution is spread over the input: "transpose" is one ConvTranspose,
# "insert" puts zeros between the gradients and convolves them at stride 1. The same numbers; which is faster
# depends on the engine.
STRIDED = "transpose"


class Axis(NamedTuple):
    """How a window slides along one spatial axis. `before` and `after` are the zeros padded at its ends."""

    size: int
    kernel: int
    stride: int
    dilation: int
    before: int
    after: int
    steps: int

    @property
    def span(self) -> int:
        """How many inputs the dilated window covers."""
        return (self.kernel - 1) * self.dilation + 1


def sliding(t: Tape, node: onnx.NodeProto, kernel: Sequence[int]) -> list[Axis]:
    """Return how a Conv's or a pooling operator's window slides, with auto_pad and ceil_mode resolved.

    Raises:
        ModelError: a spatial size is not known at export.
    """
    at, count = attributes(node), len(kernel)
    strides, dilations = at.get("strides", [1] * count), at.get("dilations", [1] * count)
    pads, auto = list(at.get("pads", [0] * 2 * count)), at.get("auto_pad", b"NOTSET").decode()
    sizes = t.sizes(node.input[0], range(2, 2 + count))
    steps = t.sizes(node.output[0], range(2, 2 + count))
    axes = []
    for i, (size, k, s, d) in enumerate(zip(sizes, kernel, strides, dilations, strict=True)):
        before, after = (pads[i], pads[i + count]) if auto == "NOTSET" else (0, 0)
        if auto in ("SAME_UPPER", "SAME_LOWER"):
            total = max((math.ceil(size / s) - 1) * s + (k - 1) * d + 1 - size, 0)
            before = total // 2 if auto == "SAME_UPPER" else total - total // 2
            after = total - before
        axes.append(Axis(size, k, s, d, before, after, steps[i]))
    return axes


def _conv(t: Tape, node: onnx.NodeProto, y: str, dy: str) -> Pairs:
    """A convolution at stride 1 with the kernel turned around; strided, what `STRIDED` says."""
    x, weight = node.input[:2]
    at, shape = attributes(node), t.sizes(weight, range(t.rank(weight)))
    axes, groups = sliding(t, node, shape[2:]), at.get("group", 1)
    # Inputs beyond the last window that fits: they get no gradient, but they do get a place in it.
    rests = [a.size + a.before + a.after - (a.steps - 1) * a.stride - a.span for a in axes]
    if all(a.stride == 1 for a in axes):
        yield x, _correlate(t, dy, weight, axes, rests, groups)
    elif STRIDED == "insert":
        # The zeros after the last gradient are part of the padding that it needs anyway.
        spread = _insert_zeros(t, dy, shape[0], axes)
        rests = [rest - (a.stride - 1) for a, rest in zip(axes, rests, strict=True)]
        yield x, _correlate(t, spread, weight, axes, rests, groups)
    else:
        pads = [a.before for a in axes] + [a.after for a in axes]
        slide = {"strides": [a.stride for a in axes], "dilations": [a.dilation for a in axes]}
        yield x, t.op("ConvTranspose", dy, weight, group=groups, pads=pads, output_padding=rests, **slide)


def _correlate(t: Tape, dy: str, weight: str, axes: list[Axis], rests: list[int], groups: int) -> str:
    """Convolve a gradient at stride 1 with the flipped weight, its channels exchanged within each group."""

    def turn(w: np.ndarray) -> np.ndarray:
        out, inner, *kernel = w.shape
        w = w.reshape(groups, out // groups, inner, *kernel).swapaxes(1, 2)
        return np.flip(w, tuple(range(3, w.ndim))).reshape(groups * inner, out // groups, *kernel)

    before = [a.span - 1 - a.before for a in axes]
    after = [a.span - 1 - a.after + rest for a, rest in zip(axes, rests, strict=True)]
    pads, dilations = [max(p, 0) for p in before + after], [a.dilation for a in axes]
    dx = t.op("Conv", dy, t.rearranged(weight, turn), group=groups, pads=pads, dilations=dilations)
    if min(before + after) >= 0:
        return dx
    # The forward padding is wider than the kernel: its gradients fall outside the image.
    starts = [max(-p, 0) for p in before]
    stops = [start + a.size for start, a in zip(starts, axes, strict=True)]
    return t.op("Slice", dx, starts, stops, list(range(2, 2 + len(axes))))


def _insert_zeros(t: Tape, dy: str, channels: int, axes: list[Axis]) -> str:
    """Follow every gradient by stride - 1 zeros: [.., h, w] -> [.., h, 1, w, 1] -> pad -> [.., h s, w s]."""
    columns = t.op("Reshape", dy, [-1, channels, *(n for a in axes for n in (a.steps, 1))])
    pads = [0, 0] * (1 + len(axes)) + [0, 0, *(n for a in axes for n in (0, a.stride - 1))]
    padded = t.op("Pad", columns, pads)
    return t.op("Reshape", padded, [-1, channels, *(a.steps * a.stride for a in axes)])


def _gemm(t: Tape, node: onnx.NodeProto, y: str, dy: str) -> Pairs:
    """Y = alpha A' B' + beta C, where ' transposes on demand."""
    at = attributes(node)
    a, b = node.input[:2]
    turn_a, turn_b = at.get("transA", 0), at.get("transB", 0)
    alpha, beta = at.get("alpha", 1.0), at.get("beta", 1.0)
    if a in t.active:
        # A constant gets its own, transposed copy: where both directions of a vision transformer read one
        # square weight, OpenVINO 2026.4 computed the gradient wrongly.
        other, turned = (_transposed(t, b), turn_b) if t.value(b) is not None else (b, 1 - turn_b)
        if turn_a:
            yield a, t.op("Gemm", other, dy, transA=1 - turned, transB=1, alpha=alpha)
        else:
            yield a, t.op("Gemm", dy, other, transB=turned, alpha=alpha)
    if b in t.active:
        if turn_b:
            yield b, t.op("Gemm", dy, a, transA=1, transB=turn_a, alpha=alpha)
        else:
            yield b, t.op("Gemm", a, dy, transA=1 - turn_a, alpha=alpha)
    if len(node.input) > 2 and node.input[2] in t.active:
        c = node.input[2]
        yield c, unbroadcast(t, t.op("Mul", dy, float(beta)), c, y)


def _matmul(t: Tape, node: onnx.NodeProto, y: str, dy: str) -> Pairs:
    """dA = dY B^T and dB = A^T dY, summed over the batch axes that were broadcast."""
    a, b = node.input
    if min(t.rank(a), t.rank(b)) < 2:
        raise ModelError(
            f"{describe(node)}: multiplies a vector, expected matrices; reshape it to a row or a column"
        )
    if a in t.active:
        yield a, unbroadcast(t, t.op("MatMul", dy, _transposed(t, b)), a, y)
    if b in t.active:
        yield b, unbroadcast(t, t.op("MatMul", _transposed(t, a), dy), b, y)


def _transposed(t: Tape, name: str) -> str:
    value = t.value(name)
    if value is not None:
        # As floats, also where the weight is stored in codes: OpenVINO 2026.4 multiplies up to four rows of floats
        # by a matrix of codes with errors of up to 20 %, and crashes on it in bfloat16.
        return t.array(value.swapaxes(-1, -2), name)
    *lead, rows, columns = range(t.rank(name))
    return t.op("Transpose", name, perm=[*lead, columns, rows])


RULES: dict[str, Rule] = {"Conv": _conv, "Gemm": _gemm, "MatMul": _matmul}
