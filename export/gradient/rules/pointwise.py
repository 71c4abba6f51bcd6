"""Gradients of elementwise operators: activations, arithmetic with broadcasting."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import onnx

from export.gradient.rules.gates import inside, is_dequantized, steep, step
from export.gradient.tape import Tape
from export.graph import attributes, describe
from runtime.errors import ModelError

Pairs = Iterator[tuple[str, str]]
Rule = Callable[[Tape, onnx.NodeProto, str, str], Pairs]
"""rule(tape, node, y, dy) yields (input tensor, gradient) pairs; y is a node's output, dy its gradient."""

Derivative = Callable[[Tape, onnx.NodeProto, str, str], str]


def unbroadcast(t: Tape, gradient: str, x: str, y: str) -> str:
    """Sum a gradient of y's shape over the axes along which x was repeated to give y.

    An open size (the batch) counts as not repeated: only a size of 1 known at export is.
    """
    shape, result = t.shape(x), t.shape(y)
    lead = len(result) - len(shape)
    repeated = [a for a, size in enumerate(shape, lead) if size == 1 and result[a] != 1]
    if repeated:
        gradient = t.op("ReduceSum", gradient, repeated, keepdims=1)
    if lead:
        gradient = t.op("ReduceSum", gradient, list(range(lead)), keepdims=0)
    return gradient


def _unary(derivative: Derivative) -> Rule:
    """Return the rule dx = dy * derivative(x, y) of an operator that works element by element.

    An operator's second input, a power or a slope, may repeat the first: PRelu's does not, Pow's does.
    """

    def rule(t: Tape, node: onnx.NodeProto, y: str, dy: str) -> Pairs:
        x = node.input[0]
        yield x, unbroadcast(t, t.op("Mul", dy, derivative(t, node, x, y)), x, y)

    return rule


# Activations. The gate of a piecewise linear one is read from its output, so that the engine may fuse it into
# the convolution before it; at a kink the gradient is 0, as in torch.


def _relu(t: Tape, node: onnx.NodeProto, x: str, y: str) -> str:
    return step(t, y)


def _leaky_relu(t: Tape, node: onnx.NodeProto, x: str, y: str) -> str:
    slope = attributes(node).get("alpha", 0.01)
    return t.op("Add", t.op("Mul", step(t, x), 1.0 - slope), slope)


def _prelu(t: Tape, node: onnx.NodeProto, x: str, y: str) -> str:
    slope = t.constant(node, 1)
    return t.op("Add", t.op("Mul", step(t, x), 1 - slope), slope)


def _elu(t: Tape, node: onnx.NodeProto, x: str, y: str) -> str:
    alpha, positive = float(attributes(node).get("alpha", 1.0)), step(t, x)
    slope = t.op("Add", y, alpha)  # alpha e^x, right where x <= 0
    return t.op("Add", positive, t.op("Mul", slope, t.op("Sub", t.array(1.0, x), positive)))


def _clip(t: Tape, node: onnx.NodeProto, y: str, dy: str) -> Pairs:
    x = node.input[0]
    if not t.is_float(x):  # a clip of codes: its bounds are part of the gate of the QuantizeLinear before it
        yield x, dy
        return
    low, high = (float(t.constant(node, i, default)) for i, default in ((1, -np.inf), (2, np.inf)))
    if is_dequantized(t, x):
        # OpenVINO moves the clip to the codes, so that what is clipped is not exactly at the bound.
        for bound, pair in ((low, (x, low)), (high, (t.array(high, x), x))):
            if np.isfinite(bound):
                dy = t.op("Mul", dy, step(t, t.op("Sub", *pair), x))
        yield x, dy
    elif np.isinf(low) and np.isinf(high):
        yield x, dy
    elif np.isinf(high):
        yield x, t.op("Mul", dy, step(t, t.op("Sub", y, low)))
    elif np.isinf(low):
        yield x, t.op("Mul", dy, step(t, t.op("Sub", t.array(high, y), y)))
    else:
        yield x, t.op("Mul", dy, inside(t, y, low, high))


def _sigmoid(t: Tape, node: onnx.NodeProto, x: str, y: str) -> str:
    return t.op("Mul", y, t.op("Sub", t.array(1.0, y), y))


def _tanh(t: Tape, node: onnx.NodeProto, x: str, y: str) -> str:
    return t.op("Sub", t.array(1.0, y), t.op("Mul", y, y))


def _softplus(t: Tape, node: onnx.NodeProto, x: str, y: str) -> str:
    return t.op("Sigmoid", x)


def _hard_sigmoid(t: Tape, node: onnx.NodeProto, x: str, y: str) -> str:
    return t.op("Mul", inside(t, y, 0.0, 1.0), float(attributes(node).get("alpha", 0.2)))


def _hard_swish(t: Tape, node: onnx.NodeProto, x: str, y: str) -> str:
    sixth = t.op("Mul", x, 1 / 6)
    factor = t.op("Clip", t.op("Add", sixth, 0.5), 0.0, 1.0)
    return t.op("Add", factor, t.op("Mul", sixth, inside(t, factor, 0.0, 1.0)))


def _gelu(t: Tape, node: onnx.NodeProto, x: str, y: str) -> str:
    square = t.op("Mul", x, x)
    if attributes(node).get("approximate", b"none") == b"tanh":
        c, k = math.sqrt(2 / math.pi), 0.044715
        cubic = t.op("Mul", x, t.op("Add", t.op("Mul", square, c * k), c))
        bend = t.op("Tanh", cubic)
        slope = t.op("Mul", _tanh(t, node, cubic, bend), t.op("Add", t.op("Mul", square, 3 * c * k), c))
        return t.op("Mul", t.op("Add", t.op("Add", bend, 1.0), t.op("Mul", x, slope)), 0.5)
    share = t.op("Add", t.op("Mul", t.op("Erf", t.op("Mul", x, math.sqrt(0.5))), 0.5), 0.5)
    density = t.op("Mul", t.op("Exp", t.op("Mul", square, -0.5)), 1 / math.sqrt(2 * math.pi))
    return t.op("Add", share, t.op("Mul", x, density))


def _erf(t: Tape, node: onnx.NodeProto, x: str, y: str) -> str:
    return t.op("Mul", t.op("Exp", t.op("Neg", t.op("Mul", x, x))), 2 / math.sqrt(math.pi))


def _abs(t: Tape, node: onnx.NodeProto, x: str, y: str) -> str:
    return t.op("Clip", steep(t, x), -1.0, 1.0)


def _sqrt(t: Tape, node: onnx.NodeProto, x: str, y: str) -> str:
    return t.op("Div", t.array(0.5, y), y)


def _exp(t: Tape, node: onnx.NodeProto, x: str, y: str) -> str:
    return y


def _log(t: Tape, node: onnx.NodeProto, x: str, y: str) -> str:
    return t.op("Reciprocal", x)


def _reciprocal(t: Tape, node: onnx.NodeProto, x: str, y: str) -> str:
    return t.op("Neg", t.op("Mul", y, y))


def _pow(t: Tape, node: onnx.NodeProto, x: str, y: str) -> str:
    power = t.constant(node, 1).astype(t.numpy_type(x))
    if np.all(power == 2):
        return t.op("Mul", x, 2.0)
    return t.op("Mul", t.op("Pow", x, power - 1), power)


# Arithmetic, with NumPy's broadcasting.


def _add(t: Tape, node: onnx.NodeProto, y: str, dy: str) -> Pairs:
    for x in filter(t.active.__contains__, node.input):
        yield x, unbroadcast(t, dy, x, y)


def _sub(t: Tape, node: onnx.NodeProto, y: str, dy: str) -> Pairs:
    a, b = node.input
    if a in t.active:
        yield a, unbroadcast(t, dy, a, y)
    if b in t.active:
        yield b, unbroadcast(t, t.op("Neg", dy), b, y)


def _mul(t: Tape, node: onnx.NodeProto, y: str, dy: str) -> Pairs:
    for x, other in (node.input, reversed(node.input)):
        if x in t.active:
            yield x, unbroadcast(t, t.op("Mul", dy, other), x, y)


def _div(t: Tape, node: onnx.NodeProto, y: str, dy: str) -> Pairs:
    a, b = node.input
    quotient = t.op("Div", dy, b)
    if a in t.active:
        yield a, unbroadcast(t, quotient, a, y)
    if b in t.active:
        yield b, unbroadcast(t, t.op("Neg", t.op("Mul", quotient, y)), b, y)


def _neg(t: Tape, node: onnx.NodeProto, y: str, dy: str) -> Pairs:
    yield node.input[0], t.op("Neg", dy)


def _mod(t: Tape, node: onnx.NodeProto, y: str, dy: str) -> Pairs:
    """A remainder grows as what is divided; a divisor that changes with the image has no rule."""
    yield node.input[0], unbroadcast(t, dy, node.input[0], y)


def _where(t: Tape, node: onnx.NodeProto, y: str, dy: str) -> Pairs:
    condition, a, b = node.input
    chosen = t.op("Cast", condition, to=t.type(y))
    if a in t.active:
        yield a, unbroadcast(t, t.op("Mul", dy, chosen), a, y)
    if b in t.active:
        yield b, unbroadcast(t, t.op("Mul", dy, t.op("Sub", t.array(1.0, y), chosen)), b, y)


# What passes its input on.


def _identity(t: Tape, node: onnx.NodeProto, y: str, dy: str) -> Pairs:
    yield node.input[0], dy


def _dropout(t: Tape, node: onnx.NodeProto, y: str, dy: str) -> Pairs:
    if t.constant(node, 2, False):
        raise ModelError(
            f"{describe(node)}: drops at random (training_mode), expected an inference graph; "
            "export the model in evaluation mode"
        )
    yield node.input[0], dy


def _cast(t: Tape, node: onnx.NodeProto, y: str, dy: str) -> Pairs:
    x = node.input[0]
    if not (t.is_float(x) and t.is_float(y)):
        raise ModelError(
            f"{describe(node)}: the path from input to logits passes through integers here, which have "
            "no gradient; expected floats or a QuantizeLinear/DequantizeLinear pair"
        )
    yield x, t.op("Cast", dy, to=t.type(x))


RULES: dict[str, Rule] = {
    "Abs": _unary(_abs),
    "Elu": _unary(_elu),
    "Erf": _unary(_erf),
    "Exp": _unary(_exp),
    "Gelu": _unary(_gelu),
    "HardSigmoid": _unary(_hard_sigmoid),
    "HardSwish": _unary(_hard_swish),
    "LeakyRelu": _unary(_leaky_relu),
    "Log": _unary(_log),
    "Pow": _unary(_pow),
    "PRelu": _unary(_prelu),
    "Reciprocal": _unary(_reciprocal),
    "Relu": _unary(_relu),
    "Sigmoid": _unary(_sigmoid),
    "Softplus": _unary(_softplus),
    "Sqrt": _unary(_sqrt),
    "Tanh": _unary(_tanh),
    "Add": _add,
    "Cast": _cast,
    "Clip": _clip,
    "Div": _div,
    "Dropout": _dropout,
    "Identity": _identity,
    "Mod": _mod,
    "Mul": _mul,
    "Neg": _neg,
    "Sub": _sub,
    "Sum": _add,
    "Where": _where,
}
