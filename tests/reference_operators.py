"""Operators for onnx's reference evaluator, exact in float64 and true to the specification.

Its own Erf, Gelu and GroupNormalization work in float32, its Pad refuses to crop, its pooling reads `pads` in
the wrong order, its ConvTranspose slices the weights of groups along the wrong axis, its LRN takes the images for
the channels, its LpNormalization takes no magnitudes, and it has no GlobalLpPool (onnx 1.23).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from onnx.reference.op_run import OpRun

Window = dict[str, Any]


def _slide(x: np.ndarray, kernel: tuple[int, ...], window: Window, fill: float) -> np.ndarray:
    """Return [N, C, *steps, *kernel]: every window's elements, `fill` where it lies outside the image."""
    count = len(kernel)
    strides, dilations = window["strides"] or [1] * count, window["dilations"] or [1] * count
    spans = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    auto, pads = window["auto_pad"], window["pads"] or [0] * 2 * count
    ends = []
    for i, (size, span, stride) in enumerate(zip(x.shape[2:], spans, strides, strict=True)):
        before, after = (pads[i], pads[i + count]) if auto == "NOTSET" else (0, 0)
        if auto.startswith("SAME"):
            total = max((-(-size // stride) - 1) * stride + span - size, 0)
            before, after = (total // 2, total - total // 2)[:: 1 if auto == "SAME_UPPER" else -1]
        if window.get("ceil_mode"):
            steps = -(-(size + before + after - span) // stride) + 1
            if (steps - 1) * stride >= size + before:  # a window must start in the image or the padding before it
                steps -= 1
            after = max(after, (steps - 1) * stride + span - size - before)
        ends.append((before, after))
    padded = np.pad(x, [(0, 0), (0, 0), *ends], constant_values=fill)
    views = sliding_window_view(padded, spans, axis=tuple(range(2, 2 + count)))
    every = [slice(None, None, step) for step in (*strides, *dilations)]
    return views[(slice(None), slice(None), *every)]


def _grouped(x: np.ndarray, groups: int, axis: int) -> np.ndarray:
    return x.reshape(*x.shape[:axis], groups, -1, *x.shape[axis + 1 :])


class Conv(OpRun):
    def _run(
        self, x: Any, w: Any, b: Any = None, group: Any = None, kernel_shape: Any = None, **window: Any
    ) -> Any:
        # One product of matrices for each group: what lies under the kernel at every step, times the kernels.
        views = _grouped(_slide(x, w.shape[2:], window, 0.0), group, 1)
        n, _, _, *steps = views.shape[: w.ndim + 1]
        rows = np.moveaxis(views, (1, 2), (0, w.ndim)).reshape(group, n * math.prod(steps), -1)
        y = rows @ _grouped(w, group, 0).reshape(group, len(w) // group, -1).swapaxes(1, 2)
        y = np.moveaxis(y.reshape(group, n, *steps, -1), (0, -1), (1, 2)).reshape(n, len(w), *steps)
        return (y if b is None else y + b.reshape(-1, *[1] * (w.ndim - 2)),)


class ConvTranspose(OpRun):
    def _run(self, x: Any, w: Any, b: Any = None, group: Any = None, **at: Any) -> Any:
        count = w.ndim - 2
        strides, dilations = at["strides"] or [1] * count, at["dilations"] or [1] * count
        extra, pads = at["output_padding"] or [0] * count, at["pads"] or [0] * 2 * count
        x, w = _grouped(x, group, 1), _grouped(w, group, 0)
        full = [
            (steps - 1) * s + (k - 1) * d + 1 + e
            for steps, k, s, d, e in zip(x.shape[3:], w.shape[3:], strides, dilations, extra, strict=True)
        ]
        y = np.zeros((len(x), group, w.shape[2], *full))
        for tap in np.ndindex(*w.shape[3:]):
            place = tuple(
                slice(t * d, t * d + (steps - 1) * s + 1, s)
                for t, d, s, steps in zip(tap, dilations, strides, x.shape[3:], strict=True)
            )
            y[(..., *place)] += np.einsum("ngi...,gio->ngo...", x, w[(..., *tap)])
        y = y.reshape(len(x), -1, *full)
        if at["auto_pad"].startswith("SAME"):
            totals = [size - steps * s for size, steps, s in zip(full, x.shape[3:], strides, strict=True)]
            pads = [total // 2 for total in totals] + [total - total // 2 for total in totals]
            pads = pads if at["auto_pad"] == "SAME_UPPER" else pads[count:] + pads[:count]
        crop = tuple(slice(pads[i], size - pads[i + count]) for i, size in enumerate(full))
        return (y[(..., *crop)],)


class MaxPool(OpRun):
    def _run(self, x: Any, kernel_shape: Any = None, storage_order: Any = None, **window: Any) -> Any:
        views = _slide(x, tuple(kernel_shape), window, -np.inf)
        return (views.max(tuple(range(-len(kernel_shape), 0))),)


class AveragePool(OpRun):
    def _run(self, x: Any, kernel_shape: Any = None, count_include_pad: Any = None, **window: Any) -> Any:
        kernel, axes = tuple(kernel_shape), tuple(range(-len(kernel_shape), 0))
        counted = np.ones_like(x)
        if count_include_pad and window["auto_pad"] == "NOTSET":
            pads = window["pads"] or [0] * 2 * len(kernel)
            ends = list(zip(pads[: len(kernel)], pads[len(kernel) :], strict=True))
            counted = np.pad(counted, [(0, 0), (0, 0), *ends], constant_values=1)
            views = _slide(counted, kernel, {**window, "pads": None}, 0.0)
        else:
            views = _slide(counted, kernel, window, float(count_include_pad))
        return (_slide(x, kernel, window, 0.0).sum(axes) / views.sum(axes),)


class Pad(OpRun):
    def _run(self, x: Any, pads: Any, value: Any = None, axes: Any = None, mode: Any = None) -> Any:
        for axis, before, after in zip(
            axes if axes is not None else range(x.ndim), *pads.reshape(2, -1), strict=True
        ):
            ends = [(max(before, 0), max(after, 0)) if a == axis % x.ndim else (0, 0) for a in range(x.ndim)]
            fill = {"constant_values": 0 if value is None else value} if mode == "constant" else {}
            x = np.pad(x, ends, mode, **fill)
            kept = slice(max(-before, 0), x.shape[axis] - max(-after, 0))
            x = np.moveaxis(np.moveaxis(x, axis, 0)[kept], 0, axis)
        return (x,)


class Erf(OpRun):
    def _run(self, x: Any) -> Any:
        return (np.vectorize(math.erf, otypes=[x.dtype])(x),)


class Gelu(OpRun):
    def _run(self, x: Any, approximate: Any = None) -> Any:
        if approximate == "tanh":
            return (x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),)
        return (x / 2 * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),)


class GroupNormalization(OpRun):
    def _run(self, x: Any, scale: Any, bias: Any, epsilon: Any = None, num_groups: Any = None, **_: Any) -> Any:
        rows, channels = x.reshape(len(x), num_groups, -1), (-1, *[1] * (x.ndim - 2))
        z = (rows - rows.mean(2, keepdims=True)) / np.sqrt(rows.var(2, keepdims=True) + epsilon)
        return (z.reshape(x.shape) * scale.reshape(channels) + bias.reshape(channels),)


class LRN(OpRun):
    def _run(self, x: Any, alpha: Any = None, beta: Any = None, bias: Any = None, size: Any = None) -> Any:
        channels, before, after = range(x.shape[1]), (size - 1) // 2, size // 2
        sums = [np.square(x[:, max(c - before, 0) : c + after + 1]).sum(1) for c in channels]
        return (x / (bias + alpha / size * np.stack(sums, 1)) ** beta,)


class LpNormalization(OpRun):
    def _run(self, x: Any, axis: Any = None, p: Any = None) -> Any:
        return (x / (np.abs(x) ** p).sum(axis, keepdims=True) ** (1 / p),)


class GlobalLpPool(OpRun):
    def _run(self, x: Any, p: Any = None) -> Any:
        return ((np.abs(x) ** p).sum(tuple(range(2, x.ndim)), keepdims=True) ** (1 / p),)


EXACT = [
    AveragePool, Conv, ConvTranspose, Erf, Gelu, GlobalLpPool, GroupNormalization, LpNormalization, LRN, MaxPool,
    Pad,
]  # fmt: skip
