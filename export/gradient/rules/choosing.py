"""Gradients of the operators that choose elements: by their size, or by indices that another tensor holds.

A choice does not change with small changes of the image. What was chosen gets its gradient, the rest nothing.
"""

from __future__ import annotations

import numpy as np
import onnx

from export.gradient.rules.gates import step
from export.gradient.rules.pointwise import Pairs, Rule, unbroadcast
from export.gradient.tape import Tape
from export.graph import attributes, describe
from runtime.errors import ModelError


def gathered_at_run_time(t: Tape, node: onnx.NodeProto, y: str, dy: str, axis: int) -> str:
    """Return the gradient of a Gather whose indices are not known at export: added up at the places they name."""
    x, (before, after) = node.input[0], (t.rank(node.input[0]), t.rank(y))
    places = after - before + 1  # axes of the indices, which take the place of one
    # x with that axis first, dy with the indices' axes first.
    first = [axis, *(a for a in range(before) if a != axis)]
    moved = [*range(axis, axis + places), *(a for a in range(after) if not axis <= a < axis + places)]
    zeros, updates = t.op("Mul", x, 0.0), dy
    if axis:
        zeros, updates = t.op("Transpose", zeros, perm=first), t.op("Transpose", dy, perm=moved)
    index = t.op("Unsqueeze", t.op("Cast", node.input[1], to=onnx.TensorProto.INT64), [-1])
    dx = t.op("ScatterND", zeros, index, updates, reduction="add")
    return t.op("Transpose", dx, perm=np.argsort(first).tolist()) if axis else dx


def _extreme(t: Tape, node: onnx.NodeProto, y: str, dy: str) -> Pairs:
    """The input that is y gets the gradient: of equal ones a constant, as at Relu's kink, else the first."""
    inputs = list(dict.fromkeys(node.input))
    ordered = sorted(inputs, key=lambda x: x in t.active)  # constants first
    if len(inputs) == 2:
        first, second = ordered
        over = (second, first) if node.op_type == "Max" else (first, second)
        chosen = step(t, t.op("Sub", *over), *ordered)
        yield second, unbroadcast(t, t.op("Mul", dy, chosen), second, y)
        if first in t.active:
            other = t.op("Sub", t.array(1.0, dy), chosen)
            yield first, unbroadcast(t, t.op("Mul", dy, other), first, y)
        return
    left = t.array(1.0, dy)
    for x in ordered:
        here = t.op("Mul", t.op("Cast", t.op("Equal", x, y), to=t.type(dy)), left)
        left = t.op("Sub", left, here)
        if x in t.active:
            yield x, unbroadcast(t, t.op("Mul", dy, here), x, y)


def _mean(t: Tape, node: onnx.NodeProto, y: str, dy: str) -> Pairs:
    share = t.op("Mul", dy, 1 / len(node.input))
    for x in filter(t.active.__contains__, node.input):
        yield x, unbroadcast(t, share, x, y)


def _top_k(t: Tape, node: onnx.NodeProto, y: str, dy: str) -> Pairs:
    x, at = node.input[0], attributes(node)
    chosen = node.output[1] if len(node.output) > 1 else ""
    if not chosen:
        again = {name: at[name] for name in ("axis", "largest", "sorted") if name in at}
        t.op("TopK", x, node.input[1], **again)
        chosen = f"{t.nodes[-1].output[0]}/places"
        t.nodes[-1].output.append(chosen)
    yield x, t.op("ScatterElements", t.op("Mul", x, 0.0), chosen, dy, axis=at.get("axis", -1))


def _gather_elements(t: Tape, node: onnx.NodeProto, y: str, dy: str) -> Pairs:
    x, axis = node.input[0], attributes(node).get("axis", 0)
    yield x, t.op("ScatterElements", t.op("Mul", x, 0.0), node.input[1], dy, axis=axis, reduction="add")


def _scatter_elements(t: Tape, node: onnx.NodeProto, y: str, dy: str) -> Pairs:
    axis = attributes(node).get("axis", 0)
    yield from _scattered(t, node, dy, "ScatterElements", "GatherElements", {"axis": axis})


def _scatter_nd(t: Tape, node: onnx.NodeProto, y: str, dy: str) -> Pairs:
    yield from _scattered(t, node, dy, "ScatterND", "GatherND", {})


def _scattered(t: Tape, node: onnx.NodeProto, dy: str, scatter: str, gather: str, at: dict[str, int]) -> Pairs:
    """Data that stays and updates that were put there, or added, at constant places or at those of run time."""
    x, places, updates = node.input
    how = attributes(node).get("reduction", b"none").decode()
    if how not in ("none", "add"):
        raise ModelError(f"{describe(node)}: its reduction is {how!r}, expected none or add; write it with Where")
    if x in t.active:
        yield x, dy if how == "add" else t.op(scatter, dy, places, t.op("Mul", updates, 0.0), **at)
    if updates in t.active:
        yield updates, t.op(gather, dy, places, **at)


def _reverse_sequence(t: Tape, node: onnx.NodeProto, y: str, dy: str) -> Pairs:
    yield node.input[0], t.op("ReverseSequence", dy, node.input[1], **attributes(node))


RULES: dict[str, Rule] = {
    "GatherElements": _gather_elements,
    "Max": _extreme,
    "Mean": _mean,
    "Min": _extreme,
    "ReverseSequence": _reverse_sequence,
    "ScatterElements": _scatter_elements,
    "ScatterND": _scatter_nd,
    "TopK": _top_k,
}
