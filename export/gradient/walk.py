"""Append the input gradient to an ONNX classifier: reverse-mode differentiation, ONNX in and ONNX out.

Inference engines have no autograd, so the gradient becomes part of the graph. The forward graph is walked
backwards from the logits to the image, and each node's rule appends the nodes of its gradient; see README.md
in this folder.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import reduce

import numpy as np
import onnx
from onnx import TensorProto

from export.choices import GATES
from export.gradient.cam import Cam, append_map
from export.gradient.int8 import calibrate
from export.gradient.joining import channel_axis, find_logits, find_source, join_gradient, prepare_model
from export.gradient.remedies import remedy_of
from export.gradient.rules import (
    choosing,
    einsum,
    layout,
    linear,
    normalization,
    pointwise,
    pooling,
    quantized,
    reductions,
    resampling,
    trigonometry,
)
from export.gradient.rules.pointwise import Rule
from export.gradient.tape import TARGET_SCOPE, Tape
from export.graph import GraphFacts, describe, infer_shapes
from export.plain_graph import as_rows, expand_functions, hold_shapes, is_flat
from runtime.errors import ModelError, OptionError

_FAMILIES = (
    choosing, einsum, layout, linear, normalization, pointwise, pooling, quantized, reductions, resampling,
    trigonometry,
)  # fmt: skip
RULES: dict[str, Rule] = {kind: rule for family in _FAMILIES for kind, rule in family.RULES.items()}

OUTPUTS = ("saliency", "gradient")

# Operators whose result does not change with small changes of their input: no gradient, and none needed.
_LOCALLY_CONSTANT = {
    "ArgMax",
    "ArgMin",
    "Ceil",
    "Equal",
    "Floor",
    "Greater",
    "GreaterOrEqual",
    "IsInf",
    "IsNaN",
    "Less",
    "LessOrEqual",
    "NonZero",
    "Round",
    "Shape",
    "Sign",
    "Size",
}

# Operators whose other outputs are places in their input, which a small change of it leaves as they are.
_WITH_PLACES = {"Dropout", "MaxPool", "TopK"}


def append_input_gradient(
    model: onnx.ModelProto,
    *,
    input: str | None = None,
    logits: str | None = None,
    outputs: Sequence[str] = ("saliency",),
    cams: Sequence[Cam] = (),
    gate: str = "code",
    int8_samples: Mapping[str, np.ndarray] | None = None,
) -> onnx.ModelProto:
    """Return a copy of a classifier that also computes the gradient of one logit by the image.

    The result has one more input, `target` int64 [N]: the class whose logit is differentiated, -1 for the
    predicted one. Its logits are named `logits` [N, K], and more outputs are, as asked for: `gradient`,
    d logits[n, target[n]] / d input, of the input's own shape and type; `saliency` float32 [N, H, W], the
    maximum over the channels of its magnitude; and the class activation maps of layers, float32 [N, h, w]. A
    target that is no class gives a map of zeros. All else in the model stays as it was.

    Args:
        model: any ONNX classifier whose operators have rules (`RULES`); not changed.
        input: the tensor to differentiate by, float [N, C, H, W] or, where the graph transposes it first,
            [N, H, W, C], inside the graph or an input of it.
            Default: the tensor named "normalized" where there is one, else the model's only input.
        logits: the tensor to differentiate, float [N, K]. Default: the model's only 2-D float output.
        outputs: some of OUTPUTS. Engines compute all of them unless told otherwise.
        cams: maps of layers, from `export.gradient.cam.find_cams`; without `outputs`, only what lies behind these
            layers is differentiated.
        gate: where a quantized activation lets the gradient through: "code", where its code is strictly
            inside its range, or "ste", where the float before it is (0 <= x < alpha, as in the PACT paper).
        int8_samples: the result's inputs, real images and their targets [n, ...]. Where a layer's weight is one of
            int8 codes, its gradient is then a product of codes too, on a grid that holds these images' gradients
            (gradient_precision.py). None: all gradients are computed in the model's own floats.

    Raises:
        ModelError: an operator has no rule, the model has control flow, several inputs or no logits, is
            already differentiated, or a shape or weight that must be known at export is not.
        OptionError: `gate` or an output is not one of the two, or nothing is asked for.
    """
    if gate not in GATES:
        raise OptionError(f"gate: got {gate!r}, expected one of {', '.join(GATES)}")
    if not (outputs or cams) or not set(outputs) <= set(OUTPUTS):
        raise OptionError(f"outputs: got {list(outputs)}, expected one or both of {', '.join(OUTPUTS)}")
    model = expand_functions(
        prepare_model(model, [cam.output.output for cam in cams]), RULES.keys() | _LOCALLY_CONSTANT
    )
    hold_shapes(model)
    inferred = infer_shapes(model)
    rows = _logits_in_rows(model, GraphFacts(inferred), logits)
    if rows != logits:
        logits, inferred = rows, infer_shapes(model)
    tape = Tape(inferred, gate, int8=int8_samples is not None)
    source, result = find_source(inferred, tape, input), find_logits(inferred, tape, logits)
    if "saliency" in outputs and tape.rank(source) != 4:
        raise ModelError(
            f"input {source!r}: has {tape.rank(source)} axes, expected [N, C, H, W]; ask for the raw gradient"
        )
    tape.source = source
    tape.wanted = {*([source] if outputs else []), *(cam.activation for cam in cams)}
    _mark_active(inferred, tape)
    gradients = _backward(inferred, tape, result)
    channels = channel_axis(inferred, tape, source) if "saliency" in outputs else 1

    for cam in cams:
        append_map(tape, cam, gradients[cam.activation])
    tape.scope = "saliency"
    if "gradient" in outputs:
        tape.op("Identity", gradients[source])
        tape.nodes[-1].output[0] = "gradient"
    if "saliency" in outputs:
        strongest = tape.op("ReduceMax", tape.op("Abs", gradients[source]), [channels], keepdims=0)
        if tape.type(strongest) != TensorProto.FLOAT:
            tape.op("Cast", strongest, to=TensorProto.FLOAT)
        tape.nodes[-1].output[0] = "saliency"
    join_gradient(model, inferred, tape, source, result, outputs, channels, cams)
    if int8_samples is not None:
        calibrate(model, int8_samples)
    return model


def _logits_in_rows(model: onnx.ModelProto, facts: GraphFacts, name: str | None) -> str | None:
    """Return the logits' name as [N, K], where the only float output, or the named one, is [N, K, 1, 1]."""
    outputs = [value.name for value in model.graph.output]
    floats = [output for output in outputs if facts.is_float(output)]
    found = str(name if name is not None else floats[0] if len(floats) == 1 else "")
    if found in facts.producer and facts.has_rank(found) and facts.rank(found) > 2 and is_flat(facts, found):
        return as_rows(model, facts, found)
    return name


def _mark_active(model: onnx.ModelProto, tape: Tape) -> None:
    """Mark the tensors that change with what is differentiated by."""
    tape.active.update(tape.wanted)
    for node in model.graph.node:
        if node.op_type not in _LOCALLY_CONSTANT and not tape.active.isdisjoint(node.input):
            changing = node.output[:1] if node.op_type in _WITH_PLACES else node.output
            tape.active.update(filter(None, changing))


def _backward(model: onnx.ModelProto, tape: Tape, result: str) -> dict[str, str]:
    """Emit the gradients of the chosen logit by the wanted tensors, and return their names by these tensors."""
    parts: dict[str, list[str]] = defaultdict(list)
    parts[result] = [_one_hot(tape, result)]
    gradients: dict[str, str] = {}
    for node in _path(model, tape, result):
        for y in filter(parts.__contains__, node.output):
            if y != node.output[0] and node.op_type != "Split":
                raise ModelError(f"{describe(node)}: its output {y!r} has no gradient rule, only its first has")
            tape.scope = node.name or y
            dy = _summed(tape, parts.pop(y))
            if y in tape.wanted:
                gradients[y] = dy
            pairs = list(RULES[node.op_type](tape, node, y, dy))
            for x, dx in pairs:
                if x in tape.active:
                    parts[x].append(dx)
            _check_complete(tape, node, {x for x, _ in pairs})
    tape.scope = "saliency"
    for source in sorted(tape.wanted - gradients.keys()):
        if result not in tape.active or result == source:
            raise ModelError(f"logits {result!r} do not depend on input {source!r}; name another tensor")
        if source not in parts:
            raise ModelError(
                f"logits {result!r} have no gradient by input {source!r}: only comparisons and shapes lie "
                "between them; name another tensor"
            )
        gradients[source] = _summed(tape, parts[source])
    return gradients


def _summed(tape: Tape, parts: list[str]) -> str:
    return reduce(lambda a, b: tape.op("Add", a, b), parts)


def _path(model: onnx.ModelProto, tape: Tape, result: str) -> list[onnx.NodeProto]:
    """Return the nodes between what is differentiated by and the result, last first; refuse one without a rule."""
    path, reached = [], {result}
    for node in reversed(model.graph.node):
        if reached.isdisjoint(node.output) or tape.active.isdisjoint(node.input):
            continue
        if node.op_type not in RULES or node.domain:
            raise ModelError(f"{describe(node)}: has no gradient rule; {remedy_of(node)}")
        reached.update(tape.active.intersection(node.input))
        path.append(node)
    return path


def _check_complete(tape: Tape, node: onnx.NodeProto, reached: set[str]) -> None:
    """Refuse a node with an input, such as a weight, that the image changes and its rule holds constant."""
    # The gradient of a quantizer may skip the Clip before it, a Slice's the Slice before: both are accounted for.
    left = [x for x in node.input if x in tape.active and x not in reached]
    if left and not (node.op_type in ("QuantizeLinear", "Slice") and left == [node.input[0]]):
        raise ModelError(
            f"{describe(node)}: its input {left[0]!r} is computed from the image, expected a constant; "
            "it has no gradient rule"
        )


def _one_hot(tape: Tape, logits: str) -> str:
    """Return 1 at each image's target class and 0 elsewhere, of the logits' shape and type."""
    tape.scope = TARGET_SCOPE
    (classes,) = tape.sizes(logits, [1])
    wanted = tape.op("Unsqueeze", "target", [1])
    predicted = tape.op("ArgMax", logits, axis=1, keepdims=1)
    tape.target = tape.op("Where", tape.op("Less", wanted, np.asarray(0, np.int64)), predicted, wanted)
    return tape.op("Cast", tape.op("Equal", tape.target, np.arange(classes)[None]), to=tape.type(logits))
