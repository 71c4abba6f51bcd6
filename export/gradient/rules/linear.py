"""Gradients of the operators that multiply by weights: Conv, ConvTranspose, Gemm, MatMul.

The gradient of a linear map is its transpose. What can be rearranged in the weight is rearranged at export.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import onnx

from export.gradient.int8 import factors
from export.gradient.rules.layout import Places, lay_out, place_on_grid
from export.gradient.rules.pointwise import Pairs, Rule, unbroadcast
from export.gradient.tape import Tape
from export.graph import attributes


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
    """A convolution at stride 1 with the kernel turned around; strided, one at the outputs' resolution."""
    x, weight = node.input[:2]
    at, shape = attributes(node), t.sizes(weight, range(t.rank(weight)))
    axes, groups = sliding(t, node, shape[2:]), at.get("group", 1)
    # Inputs beyond the last window that fits: they get no gradient, but they do get a place in it.
    rests = [a.size + a.before + a.after - (a.steps - 1) * a.stride - a.span for a in axes]
    if all(a.stride == 1 for a in axes):
        yield x, _correlate(t, dy, weight, axes, rests, groups)
    elif len(axes) == 2 and axes[0].stride == axes[1].stride and all(_Phases.of(a).fit for a in axes):
        yield x, _sub_pixel(t, dy, weight, axes, groups)
    else:
        pads = [a.before for a in axes] + [a.after for a in axes]
        slide = {"strides": [a.stride for a in axes], "dilations": [a.dilation for a in axes]}
        # A copy, since OpenVINO 2026.4 runs the forward convolution in float where the two share their codes.
        dy, own = factors(t, dy, weight, np.copy, out_axis=0, channel_axis=1)
        yield x, t.op("ConvTranspose", dy, own, group=groups, pads=pads, output_padding=rests, **slide)


def _correlate(t: Tape, dy: str, weight: str, axes: list[Axis], rests: list[int], groups: int) -> str:
    """Convolve a gradient at stride 1 with the flipped weight, its channels exchanged within each group."""

    def turn(w: np.ndarray) -> np.ndarray:
        out, inner, *kernel = w.shape
        w = w.reshape(groups, out // groups, inner, *kernel).swapaxes(1, 2)
        return np.flip(w, tuple(range(3, w.ndim))).reshape(groups * inner, out // groups, *kernel)

    before = [a.span - 1 - a.before for a in axes]
    after = [a.span - 1 - a.after + rest for a, rest in zip(axes, rests, strict=True)]
    pads, dilations = [max(p, 0) for p in before + after], [a.dilation for a in axes]
    dy, turned = factors(t, dy, weight, turn, out_axis=0, channel_axis=1)
    dx = t.op("Conv", dy, turned, group=groups, pads=pads, dilations=dilations)
    if min(before + after) >= 0:
        return dx
    # The forward padding is wider than the kernel: its gradients fall outside the image.
    starts = [max(-p, 0) for p in before]
    stops = [start + a.size for start, a in zip(starts, axes, strict=True)]
    return t.op("Slice", dx, starts, stops, list(range(2, 2 + len(axes))))


class _Phases(NamedTuple):
    """How inputs at a distance of one stride, which meet the same taps of the kernel, gather their gradient.

    dx[stride i + phase] is the sum over `taps[phase]`, pairs (k, u), of w[k] dy[i + u - before]; `size` is 1 + the
    largest u. `after` zeros follow the last dy, so that there is an i for every input.
    """

    taps: list[list[tuple[int, int]]]
    size: int
    before: int
    after: int

    @classmethod
    def of(cls, a: Axis) -> _Phases:
        """Return the phases of an axis."""
        reached = [[(k, p + a.before - k * a.dilation) for k in range(a.kernel)] for p in range(a.stride)]
        steps = [[(k, n // a.stride) for k, n in phase if n % a.stride == 0] for phase in reached]
        first, last = (f(u for phase in steps for _, u in phase) for f in (min, max))
        taps = [[(k, u - first) for k, u in phase] for phase in steps]
        cells = -(-a.size // a.stride)
        return cls(taps, last - first + 1, -first, cells - a.steps + last)

    @property
    def fit(self) -> bool:
        """Return whether the padding is one that ONNX has: where no input is padded far beyond the kernel."""
        return self.before >= 0 and self.after >= 0


def _sub_pixel(t: Tape, dy: str, weight: str, axes: list[Axis], groups: int) -> str:
    """Compute the stride^2 phases of the gradient as channels of one convolution, and lay them out."""
    stride, (rows, columns) = axes[0].stride, (_Phases.of(a) for a in axes)
    live = [(r, c) for r, c in itertools.product(range(stride), repeat=2) if rows.taps[r] and columns.taps[c]]
    # The phases are the slow axis of the channels; in groups they cannot be, since each group's channels adjoin.
    one = len(live) == 1
    mode = "DCR" if groups == 1 else "CRD"
    wanted = live if one else list(itertools.product(range(stride), repeat=2))

    def turn(w: np.ndarray) -> np.ndarray:
        out, inner, *_ = w.shape
        kernels = np.zeros((groups, len(wanted), inner, out // groups, rows.size, columns.size), w.dtype)
        w = w.reshape(groups, out // groups, inner, *w.shape[2:]).swapaxes(1, 2)
        for phase, (r, c) in enumerate(wanted):
            for (i, u), (j, v) in itertools.product(rows.taps[r], columns.taps[c]):
                kernels[:, phase, :, :, u, v] = w[..., i, j]
        kernels = kernels if mode == "DCR" else kernels.swapaxes(1, 2)
        return kernels.reshape(-1, *kernels.shape[3:])

    pads = [rows.before, columns.before, rows.after, columns.after]
    dy, turned = factors(t, dy, weight, turn, out_axis=0, channel_axis=1)
    cells = t.op("Conv", dy, turned, group=groups, pads=pads)
    places = [Places(a.size, p, -(-a.size // stride)) for a, p in zip(axes, live[0], strict=True)]
    if one:
        return place_on_grid(t, cells, groups * t.sizes(weight, [1])[0], stride, places)
    return lay_out(t, cells, stride, places, mode)


def _conv_transpose(t: Tape, node: onnx.NodeProto, y: str, dy: str) -> Pairs:
    """A convolution with the weight as it is, over the output and what was cropped of it."""
    x, weight = node.input[:2]
    at, (_, _, *kernel) = attributes(node), t.sizes(weight, range(t.rank(weight)))
    axes, groups = list(range(2, t.rank(weight))), at.get("group", 1)
    count = len(axes)
    strides, dilations = at.get("strides", [1] * count), at.get("dilations", [1] * count)
    steps, sizes, extra = t.sizes(x, axes), t.sizes(y, axes), at.get("output_padding", [0] * count)
    spans = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    # What the windows cover, without output_padding: it begins `before` ahead of the output.
    covered = [(n - 1) * s + span for n, s, span in zip(steps, strides, spans, strict=True)]
    before = list(at.get("pads", [0] * 2 * count))[:count]
    if at.get("auto_pad", b"NOTSET") in (b"SAME_UPPER", b"SAME_LOWER") or "output_shape" in at:
        totals = [c + e - size for c, e, size in zip(covered, extra, sizes, strict=True)]
        upper = at.get("auto_pad") == b"SAME_UPPER"
        before = [total // 2 if upper else total - total // 2 for total in totals]
    after = [c - b - size for c, b, size in zip(covered, before, sizes, strict=True)]
    if min(before + after) < 0:  # the output reaches beyond them
        cut = [max(-b, 0) for b in before], [size - max(-a, 0) for size, a in zip(sizes, after, strict=True)]
        dy = t.op("Slice", dy, *cut, axes)
    dy, own = factors(t, dy, weight, np.copy, out_axis=1 if groups == 1 else -1, channel_axis=1)
    pads = [max(p, 0) for p in before + after]
    yield x, t.op("Conv", dy, own, group=groups, pads=pads, strides=strides, dilations=dilations)


def _gemm(t: Tape, node: onnx.NodeProto, y: str, dy: str) -> Pairs:
    """Y = alpha A' B' + beta C, where ' transposes on demand."""
    at = attributes(node)
    a, b = node.input[:2]
    turn_a, turn_b = at.get("transA", 0), at.get("transB", 0)
    alpha, beta = at.get("alpha", 1.0), at.get("beta", 1.0)
    if a in t.active and not turn_a and _chooses_rows(t, dy, b):
        yield a, _chosen_rows(t, b, t.sizes(y, [1])[0], lambda w: alpha * (w if turn_b else w.T))
    elif a in t.active:
        other, turned, by = b, 1 - turn_b, dy
        if t.value(b) is not None:
            by, other, turned = *_factors(t, dy, b, turn_b), turn_b
        if turn_a:
            yield a, t.op("Gemm", other, by, transA=1 - turned, transB=1, alpha=alpha)
        else:
            yield a, t.op("Gemm", by, other, transB=turned, alpha=alpha)
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
        yield from _vector_product(t, a, b, dy)
        return
    if a in t.active and t.rank(a) == 2 and _chooses_rows(t, dy, b):
        yield a, _chosen_rows(t, b, t.sizes(y, [1])[0], np.transpose)
    elif a in t.active:
        by, other = _factors(t, dy, b, 0) if t.value(b) is not None else (dy, _transposed(t, b))
        yield a, unbroadcast(t, t.op("MatMul", by, other), a, y)
    if b in t.active:
        yield b, unbroadcast(t, t.op("MatMul", _transposed(t, a), dy), b, y)


def _vector_product(t: Tape, a: str, b: str, dy: str) -> Pairs:
    """The same where a is a vector [I], taken as a row, or b is one, taken as a column."""
    row, column = t.rank(a) == 1, t.rank(b) == 1
    dy = t.op("Unsqueeze", dy, [0, 1] if row and column else [-1 if column else -2])
    if a in t.active:
        turned = t.op("Unsqueeze", b, [0]) if column else _transposed(t, b)
        da = t.op("MatMul", dy, turned)
        yield a, t.op("ReduceSum", t.op("Reshape", da, [-1, *t.sizes(a, [0])]), [0], keepdims=0) if row else da
    if b in t.active:
        turned = t.op("Unsqueeze", a, [1]) if row else _transposed(t, a)
        db = t.op("MatMul", turned, dy)
        yield b, t.op("ReduceSum", t.op("Reshape", db, [-1, *t.sizes(b, [0])]), [0], keepdims=0) if column else db


def _chooses_rows(t: Tape, dy: str, matrix: str) -> bool:
    """Return whether the product of a gradient and a transposed weight is one row of it for each image."""
    return t.is_one_hot(dy) and t.rank(matrix) == 2 and t.value(matrix) is not None


def _chosen_rows(t: Tape, matrix: str, classes: int, turn: Callable[[np.ndarray], np.ndarray]) -> str:
    """Return the target's row of a weight that `turn` makes [K, I], for each image: [N, I].

    This is the product with the one-hot gradient. With a thousand classes the product reads megabytes for one
    row (0.25 of 3.5 ms of an EfficientNet-Lite0 on OpenVINO). A target that is no class reads a row of zeros.
    """
    rows = t.rearranged(matrix, lambda w: np.pad(turn(w), ((0, 1), (0, 0))))
    behind = np.asarray(classes, np.int64)
    row = t.op("Where", t.op("Less", t.target, behind), t.target, behind)
    return t.op("Gather", rows, t.op("Reshape", row, [-1]), axis=0)


def _factors(t: Tape, dy: str, matrix: str, turned: int) -> tuple[str, str]:
    """Return the factors of dY B^T, where B is a constant matrix [I, O], or [O, I] if turned.

    B^T is a copy: where both directions of a vision transformer read one square weight, OpenVINO 2026.4 computed
    the gradient wrongly.
    """
    last = t.rank(matrix) - 1
    return factors(t, dy, matrix, lambda w: w.swapaxes(-1, -2), out_axis=last - turned, channel_axis=last)


def _transposed(t: Tape, name: str) -> str:
    if t.value(name) is not None:
        return t.rearranged(name, lambda w: w.swapaxes(-1, -2))
    *lead, rows, columns = range(t.rank(name))
    return t.op("Transpose", name, perm=[*lead, columns, rows])


RULES: dict[str, Rule] = {"Conv": _conv, "ConvTranspose": _conv_transpose, "Gemm": _gemm, "MatMul": _matmul}
