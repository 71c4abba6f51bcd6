"""What each ONNX operator is in PyTorch: a module for a layer, a call for the rest."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from torch import fx

from export.graph import attributes, describe
from export.sources.torch_layers import LAYERS
from export.sources.torch_reader import REMEDY, Reader
from runtime.errors import ModelError


def _refuse_images_as(r: Reader, node: onnx.NodeProto, axes: Sequence[int], what: str) -> None:
    """Raise ModelError where an operator works along the axis of the images, which stay apart here."""
    rank = r.facts.rank(node.input[0])
    if 0 in [axis % rank for axis in axes]:
        raise ModelError(f"{describe(node)}: {what} along the first axis, of the images; {REMEDY}")


def _concat(r: Reader, node: onnx.NodeProto) -> fx.Node:
    axis = attributes(node)["axis"]
    _refuse_images_as(r, node, [axis], "joins")
    return r.call(torch.cat, [r.value(name) for name in node.input], axis)


def _reshape(r: Reader, node: onnx.NodeProto) -> fx.Node:
    shape = r.facts.shape(node.output[0])
    if not shape or shape[0] not in (1, None):
        raise ModelError(f"{describe(node)}: mixes the axis of the images with another; {REMEDY}")
    source = r.value(node.input[0])
    if len(shape) == 2:
        return r.call(torch.flatten, source, 1)
    sizes = r.facts.sizes(node.output[0], range(1, len(shape)))
    return r.graph.call_method("reshape", (source, -1, *sizes))


def _pad(r: Reader, node: onnx.NodeProto) -> fx.Node:
    pads, fill, axes = (r.constant(node, index) for index in (1, 2, 3))
    if attributes(node).get("mode", b"constant") != b"constant" or axes is not None or pads is None:
        raise ModelError(f"{describe(node)}: pads with something else than a constant; {REMEDY}")
    count = len(pads) // 2
    pairs = [int(side) for axis in reversed(range(count)) for side in (pads[axis], pads[axis + count])]
    return r.call(F.pad, r.value(node.input[0]), tuple(pairs), value=float(fill or 0.0))


def _slice(r: Reader, node: onnx.NodeProto) -> fx.Node:
    starts, ends, axes, steps = (r.constant(node, index) for index in (1, 2, 3, 4))
    if starts is None or ends is None:
        raise ModelError(f"{describe(node)}: cuts at places that are not told; {REMEDY}")
    rank = r.facts.rank(node.input[0])
    cuts = [slice(None)] * rank
    for index, start in enumerate(starts.tolist()):
        axis = index if axes is None else int(axes[index]) % rank
        step = 1 if steps is None else int(steps[index])
        _refuse_images_as(r, node, [axis], "cuts")
        if step < 1:
            raise ModelError(f"{describe(node)}: turns an axis round; {REMEDY}")
        cuts[axis] = slice(int(start), min(int(ends[index]), np.iinfo(np.int32).max), step)
    return r.call(operator.getitem, r.value(node.input[0]), tuple(cuts))


def _split(r: Reader, node: onnx.NodeProto) -> fx.Node:
    axis = attributes(node).get("axis", 0) % r.facts.rank(node.input[0])
    _refuse_images_as(r, node, [axis], "cuts")
    sizes = [r.facts.sizes(name, [axis])[0] for name in node.output]
    parts = r.call(torch.split, r.value(node.input[0]), sizes, axis)
    for index, name in enumerate(node.output):
        r.values[name] = r.call(operator.getitem, parts, index)
    return r.values[node.output[0]]


def _mean(r: Reader, node: onnx.NodeProto) -> fx.Node:
    found, axes = attributes(node), r.constant(node, 1)
    chosen = found.get("axes") if axes is None else axes.tolist()
    if chosen is None:
        raise ModelError(f"{describe(node)}: averages over all axes, the images too; {REMEDY}")
    _refuse_images_as(r, node, chosen, "averages")
    return r.call(torch.mean, r.value(node.input[0]), tuple(chosen), keepdim=bool(found.get("keepdims", 1)))


def _reduction(function: Callable[..., Any]) -> Callable[[Reader, onnx.NodeProto], fx.Node]:
    """Return the form of a reduction over axes other than the images'."""

    def form(r: Reader, node: onnx.NodeProto) -> fx.Node:
        found, axes = attributes(node), r.constant(node, 1)
        chosen = found.get("axes") if axes is None else axes.tolist()
        if chosen is None:  # all of one image's, where there is one at a time
            chosen = list(range(1, r.facts.rank(node.input[0])))
        _refuse_images_as(r, node, chosen, "reduces")
        return r.call(function, r.value(node.input[0]), tuple(chosen), keepdim=bool(found.get("keepdims", 1)))

    return form


def _same(r: Reader, node: onnx.NodeProto) -> fx.Node:
    return r.value(node.input[0])


def _unary(function: Callable[[Any], Any]) -> Callable[[Reader, onnx.NodeProto], fx.Node]:
    return lambda r, node: r.call(function, r.value(node.input[0]))


def _binary(function: Callable[[Any, Any], Any]) -> Callable[[Reader, onnx.NodeProto], fx.Node]:
    return lambda r, node: r.call(function, r.value(node.input[0]), r.value(node.input[1]))


def _folded(function: Callable[[Any, Any], Any]) -> Callable[[Reader, onnx.NodeProto], fx.Node]:
    """Return the form of an operator that takes any number of inputs, from the left."""

    def form(r: Reader, node: onnx.NodeProto) -> fx.Node:
        return functools.reduce(lambda left, right: r.call(function, left, right), map(r.value, node.input))

    return form


SHAPED = {"Reshape", "Flatten", "Squeeze", "Unsqueeze"}
FORMS: dict[str, Callable[[Reader, onnx.NodeProto], fx.Node]] = {
    **LAYERS,
    "ReduceMean": _mean, "ReduceMax": _reduction(torch.amax), "ReduceMin": _reduction(torch.amin),
    "ReduceSum": _reduction(torch.sum), "Max": _folded(torch.maximum), "Min": _folded(torch.minimum),
    "Sum": _folded(operator.add), "Abs": _unary(torch.abs),
    "Add": _binary(operator.add), "Sub": _binary(operator.sub), "Mul": _binary(operator.mul),
    "Div": _binary(operator.truediv), "Pow": _binary(torch.pow),
    "Erf": _unary(torch.erf), "Exp": _unary(torch.exp), "Sqrt": _unary(torch.sqrt), "Neg": _unary(operator.neg),
    "Slice": _slice, "Split": _split, "Concat": _concat,
    "Transpose": lambda r, node: r.graph.call_method(
        "permute", (r.value(node.input[0]), *attributes(node).get("perm", ()))
    ),
    "Flatten": _reshape, "Reshape": _reshape, "Squeeze": _reshape, "Unsqueeze": _reshape, "Pad": _pad,
    "Identity": _same, "Dropout": _same, "Cast": _same,
}  # fmt: skip
