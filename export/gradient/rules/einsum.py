"""The gradient of Einsum: an Einsum with the output in the place of the operand."""

from __future__ import annotations

import string

import numpy as np
import onnx

from export.gradient.rules.pointwise import Pairs, Rule
from export.gradient.tape import Tape
from export.graph import attributes, describe
from runtime.errors import ModelError


def _einsum(t: Tape, node: onnx.NodeProto, y: str, dy: str) -> Pairs:
    """Sum dy times the other operands over what they share; what an operand alone was summed over is repeated."""
    operands, result = _labels(t, node)
    if any(len(set(labels)) < len(labels) for labels in operands):
        raise ModelError(
            f"{describe(node)}: reads a diagonal, expected different letters; multiply by a mask instead"
        )
    # An operand of size 1 where the others have more was repeated.
    known = {
        label: size
        for name, labels in zip(node.input, operands, strict=True)
        for label, size in zip(labels, t.shape(name), strict=True)
        if size != 1
    }
    for i, (x, labels) in enumerate(zip(node.input, operands, strict=True)):
        if x not in t.active:
            continue
        # Constants as copies: OpenVINO 2026.4 goes wrong where both directions read one square matrix.
        others = [
            name if t.value(name) is None else t.rearranged(name, np.copy)
            for j, name in enumerate(node.input)
            if j != i
        ]
        given = [result, *(text for j, text in enumerate(operands) if j != i)]
        kept = "".join(label for label in labels if any(label in text for text in given))
        dx = t.op("Einsum", dy, *others, equation=f"{','.join(given)}->{kept}")
        repeated = [a for a, label in enumerate(kept) if t.shape(x)[labels.index(label)] == 1 and label in known]
        if repeated:
            dx = t.op("ReduceSum", dx, repeated, keepdims=1)
        alone = [a for a, label in enumerate(labels) if label not in kept]
        if alone:
            shape = [1] * len(labels)
            for axis, size in zip(alone, t.sizes(x, alone), strict=True):
                shape[axis] = size
            dx = t.op("Expand", t.op("Unsqueeze", dx, alone), shape)
        yield x, dx


def _labels(t: Tape, node: onnx.NodeProto) -> tuple[list[str], str]:
    """Return the letters of every operand's axes and of the output's; an ellipsis becomes letters of its own."""
    equation = attributes(node)["equation"].decode().replace(" ", "")
    left, arrow, result = equation.partition("->")
    operands = left.split(",")
    free = [letter for letter in string.ascii_letters if letter not in equation]
    ranks = [
        t.rank(name) - len(text.replace("...", "")) if "..." in text else 0
        for name, text in zip(node.input, operands, strict=True)
    ]
    shared = "".join(free[: max(ranks)])
    if not arrow:  # what occurs once, in the alphabet's order, behind the ellipsis
        once = sorted(letter for letter in set(left) if letter.isalpha() and left.count(letter) == 1)
        result = ("..." if "..." in left else "") + "".join(once)
    written = [
        text.replace("...", shared[len(shared) - rank :]) for text, rank in zip(operands, ranks, strict=True)
    ]
    return written, result.replace("...", shared)


RULES: dict[str, Rule] = {"Einsum": _einsum}
