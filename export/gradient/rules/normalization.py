"""Gradients of softmax and the normalizations: each output depends on a whole group of inputs."""

from __future__ import annotations

import math

import numpy as np
import onnx

from export.gradient.rules.gates import step
from export.gradient.rules.pointwise import Pairs, Rule
from export.gradient.tape import Tape
from export.graph import attributes, describe
from runtime.errors import ModelError


def _softmax(t: Tape, node: onnx.NodeProto, y: str, dy: str) -> Pairs:
    """dx = y (dy - sum(y dy)), the sum over the axis of the softmax."""
    axis = attributes(node).get("axis", -1)
    weighted = t.op("Mul", dy, y)
    total = t.op("ReduceSum", weighted, [axis], keepdims=1)
    yield node.input[0], t.op("Sub", weighted, t.op("Mul", y, total))


def _log_softmax(t: Tape, node: onnx.NodeProto, y: str, dy: str) -> Pairs:
    """dx = dy - e^y sum(dy)."""
    axis = attributes(node).get("axis", -1)
    total = t.op("ReduceSum", dy, [axis], keepdims=1)
    yield node.input[0], t.op("Sub", dy, t.op("Mul", t.op("Exp", y), total))


def _standardize(t: Tape, x: str, dy: str, axes: list[int], epsilon: float) -> str:
    """Differentiate z = (x - mean) / sqrt(variance + epsilon), both over `axes`.

    dx = (dz - mean(dz) - z mean(dz z)) / sqrt(variance + epsilon): what is left of dz once its parts along
    the constant and along z, which standardizing removes, are taken out.
    """

    def mean(name: str) -> str:
        return t.op("ReduceMean", name, axes, keepdims=1)

    centred = t.op("Sub", x, mean(x))
    variance = mean(t.op("Mul", centred, centred))
    scale = t.op("Reciprocal", t.op("Sqrt", t.op("Add", variance, epsilon)))
    z = t.op("Mul", centred, scale)
    rest = t.op("Sub", t.op("Sub", dy, mean(dy)), t.op("Mul", z, mean(t.op("Mul", dy, z))))
    return t.op("Mul", rest, scale)


def _batch_normalization(t: Tape, node: onnx.NodeProto, y: str, dy: str) -> Pairs:
    """In inference, a constant factor for each channel."""
    x, epsilon = node.input[0], attributes(node).get("epsilon", 1e-5)
    if attributes(node).get("training_mode", 0):
        raise ModelError(
            f"{describe(node)}: normalizes by the batch (training_mode), expected an inference graph; "
            "export the model in evaluation mode"
        )
    factor = t.constant(node, 1) / np.sqrt(t.constant(node, 4) + epsilon)
    yield x, t.op("Mul", dy, _by_channel(t, x, factor).astype(t.numpy_type(x)))


def _layer_normalization(t: Tape, node: onnx.NodeProto, y: str, dy: str) -> Pairs:
    at, x = attributes(node), node.input[0]
    axes = list(range(at.get("axis", -1) % t.rank(x), t.rank(x)))
    dz = t.op("Mul", dy, t.constant(node, 1))
    yield x, _standardize(t, x, dz, axes, at.get("epsilon", 1e-5))


def _instance_normalization(t: Tape, node: onnx.NodeProto, y: str, dy: str) -> Pairs:
    x = node.input[0]
    dz = t.op("Mul", dy, _by_channel(t, x, t.constant(node, 1)))
    yield x, _standardize(t, x, dz, list(range(2, t.rank(x))), attributes(node).get("epsilon", 1e-5))


def _group_normalization(t: Tape, node: onnx.NodeProto, y: str, dy: str) -> Pairs:
    at, x = attributes(node), node.input[0]
    groups, sizes = at["num_groups"], t.sizes(x, range(1, t.rank(x)))
    scale = t.constant(node, 1)
    # Before opset 21 the operator had one scale for each group.
    scale = np.repeat(scale, sizes[0] // len(scale))
    rows = [-1, groups, math.prod(sizes) // groups]
    dz = t.op("Reshape", t.op("Mul", dy, _by_channel(t, x, scale)), rows)
    dx = _standardize(t, t.op("Reshape", x, rows), dz, [2], at.get("epsilon", 1e-5))
    yield x, t.reshape_like(dx, x)


def _local_response(t: Tape, node: onnx.NodeProto, y: str, dy: str) -> Pairs:
    """y = x S^-beta, S = bias + alpha / size * (squares of the channels around).

    dx = dy S^-beta - 2 alpha beta / size * x * (dy y / S of the channels that x is around).
    """
    x, at = node.input[0], attributes(node)
    alpha, beta, bias, size = at.get("alpha", 1e-4), at.get("beta", 0.75), at.get("bias", 1.0), at["size"]
    (channels,) = t.sizes(x, [1])
    distance = np.arange(channels)[:, None] - np.arange(channels)  # of the square from the channel
    around = ((distance >= -((size - 1) // 2)) & (distance <= size // 2)).astype(t.numpy_type(x))

    def gathered(values: str, taken: np.ndarray) -> str:
        # A convolution 1x1 adds channels up where they lie.
        kernel = np.ascontiguousarray(taken.T).reshape(channels, channels, *[1] * (t.rank(x) - 2))
        return t.op("Conv", values, kernel)

    squares = gathered(t.op("Mul", x, x), around)
    total = t.op("Add", t.op("Mul", squares, alpha / size), float(bias))
    direct = t.op("Mul", dy, t.op("Pow", total, float(-beta)))
    through = gathered(t.op("Div", t.op("Mul", dy, y), total), np.ascontiguousarray(around.T))
    yield x, t.op("Sub", direct, t.op("Mul", t.op("Mul", x, through), 2 * alpha * beta / size))


def _lp_normalization(t: Tape, node: onnx.NodeProto, y: str, dy: str) -> Pairs:
    """y = x / |x|_p: dx = (dy - d|x|_p / dx sum(dy y)) / |x|_p; where the norm is 0 there is no gradient."""
    x, at = node.input[0], attributes(node)
    axis, power = at.get("axis", -1), at.get("p", 2)
    norm = t.op("ReduceL1" if power == 1 else "ReduceL2", x, [axis], keepdims=1)
    norm = t.op("Add", norm, t.op("Sub", t.array(1.0, x), step(t, norm)))
    along = t.op("ReduceSum", t.op("Mul", dy, y), [axis], keepdims=1)
    slope = t.op("Sign", x) if power == 1 else y
    yield x, t.op("Div", t.op("Sub", dy, t.op("Mul", slope, along)), norm)


def _by_channel(t: Tape, x: str, values: np.ndarray) -> np.ndarray:
    """Shape one value for each channel so that it broadcasts over x, [N, C, ...]."""
    return values.reshape(-1, *[1] * (t.rank(x) - 2))


RULES: dict[str, Rule] = {
    "BatchNormalization": _batch_normalization,
    "GroupNormalization": _group_normalization,
    "InstanceNormalization": _instance_normalization,
    "LayerNormalization": _layer_normalization,
    "LRN": _local_response,
    "LogSoftmax": _log_softmax,
    "LpNormalization": _lp_normalization,
    "Softmax": _softmax,
}
