"""What each ONNX operator with weights, a window or a curve of its own is in PyTorch: a module."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from torch import fx, nn

from export.graph import attributes, describe
from export.sources.torch_reader import REMEDY, Reader
from runtime.errors import ModelError


def _tensor(values: np.ndarray) -> nn.Parameter:
    return nn.Parameter(torch.from_numpy(np.array(values, np.float32)))


def _padded(
    r: Reader, node: onnx.NodeProto, kernel: Sequence[int], fill: float
) -> tuple[fx.Node, tuple[int, int]]:
    """Return a window's input and its symmetric padding; other paddings are made before it."""
    found = attributes(node)
    strides, dilations = found.get("strides", [1, 1]), found.get("dilations", [1, 1])
    pads, automatic = list(found.get("pads", [0, 0, 0, 0])), found.get("auto_pad", b"NOTSET")
    if automatic in (b"SAME_UPPER", b"SAME_LOWER"):
        sizes = r.facts.sizes(node.input[0], (2, 3))
        for axis, (size, stride) in enumerate(zip(sizes, strides, strict=True)):
            whole = max(0, (-(-size // stride) - 1) * stride + (kernel[axis] - 1) * dilations[axis] + 1 - size)
            less = whole // 2
            pads[axis], pads[axis + 2] = (
                (less, whole - less) if automatic == b"SAME_UPPER" else (whole - less, less)
            )
    source = r.value(node.input[0])
    top, left, bottom, right = pads
    # PyTorch's poolings take a border of half a window at most.
    if (top, left) == (bottom, right) and 2 * top <= kernel[0] and 2 * left <= kernel[1]:
        return source, (top, left)
    return r.call(F.pad, source, (left, right, top, bottom), value=fill), (0, 0)


def _conv(r: Reader, node: onnx.NodeProto) -> fx.Node:
    weight, found = r.facts.constant(node, 1), attributes(node)
    if weight.ndim != 4:
        raise ModelError(f"{describe(node)}: has {weight.ndim - 2} spatial axes, expected 2; {REMEDY}")
    bias = r.constant(node, 2)
    added = r.bias_after(node, len(weight), -3) if bias is None else None
    source, padding = _padded(r, node, weight.shape[2:], 0.0)
    layer = nn.Conv2d(
        weight.shape[1] * found.get("group", 1), len(weight), weight.shape[2:],
        stride=tuple(found.get("strides", [1, 1])), padding=padding,
        dilation=tuple(found.get("dilations", [1, 1])), groups=found.get("group", 1),
        bias=bias is not None or added is not None,
    )  # fmt: skip
    return _with_parameters(r, node, layer, weight, bias, added, source)


def _with_parameters(
    r: Reader, node: onnx.NodeProto, layer: Any, weight: np.ndarray, bias: np.ndarray | None,
    added: np.ndarray | None, source: fx.Node,
) -> fx.Node:  # fmt: skip
    layer.weight = _tensor(weight)
    if layer.bias is not None:
        layer.bias = _tensor(added if bias is None else bias)  # type: ignore[arg-type]
    result = r.layer(node, layer, source)
    if added is not None:
        r.values[r.facts.consumers[node.output[0]][0].output[0]] = result
    return result


def _gemm(r: Reader, node: onnx.NodeProto) -> fx.Node:
    found, weight, bias = attributes(node), r.facts.constant(node, 1), r.constant(node, 2)
    if found.get("transA", 0):
        raise ModelError(f"{describe(node)}: transposes its input, expected rows of features; {REMEDY}")
    weight = found.get("alpha", 1.0) * (weight if found.get("transB", 0) else weight.T)
    if bias is not None:
        bias = np.broadcast_to(found.get("beta", 1.0) * bias, (1, len(weight))).reshape(-1)
    added = r.bias_after(node, len(weight), -1) if bias is None else None
    layer = nn.Linear(weight.shape[1], len(weight), bias=bias is not None or added is not None)
    return _with_parameters(r, node, layer, weight, bias, added, r.value(node.input[0]))


def _matmul(r: Reader, node: onnx.NodeProto) -> fx.Node:
    weight = r.facts.value(node.input[1])
    if weight is None or weight.ndim != 2:
        return r.call(torch.matmul, r.value(node.input[0]), r.value(node.input[1]))
    added = r.bias_after(node, weight.shape[1], -1)
    layer = nn.Linear(weight.shape[0], weight.shape[1], bias=added is not None)
    return _with_parameters(r, node, layer, weight.T, None, added, r.value(node.input[0]))


def _batch_norm(r: Reader, node: onnx.NodeProto) -> fx.Node:
    weight, bias, mean, variance = (r.facts.constant(node, index) for index in range(1, 5))
    kind = nn.BatchNorm2d if r.facts.rank(node.input[0]) == 4 else nn.BatchNorm1d
    layer = kind(len(weight), eps=attributes(node).get("epsilon", 1e-5))
    layer.weight, layer.bias = _tensor(weight), _tensor(bias)
    layer.running_mean, layer.running_var = (torch.from_numpy(np.array(v, np.float32)) for v in (mean, variance))
    return r.layer(node, layer, r.value(node.input[0]))


def _max_pool(r: Reader, node: onnx.NodeProto) -> fx.Node:
    found = attributes(node)
    source, padding = _padded(r, node, found["kernel_shape"], -np.inf)
    layer = nn.MaxPool2d(
        tuple(found["kernel_shape"]), tuple(found.get("strides", [1, 1])), padding,
        tuple(found.get("dilations", [1, 1])), ceil_mode=bool(found.get("ceil_mode", 0)),
    )  # fmt: skip
    return r.layer(node, layer, source)


def _average_pool(r: Reader, node: onnx.NodeProto) -> fx.Node:
    found = attributes(node)
    source, padding = _padded(r, node, found["kernel_shape"], 0.0)
    counts = bool(found.get("count_include_pad", 0))
    if source is not r.value(node.input[0]) and not counts:
        raise ModelError(f"{describe(node)}: averages over an uneven border that it does not count; {REMEDY}")
    layer = nn.AvgPool2d(
        tuple(found["kernel_shape"]), tuple(found.get("strides", [1, 1])), padding,
        ceil_mode=bool(found.get("ceil_mode", 0)), count_include_pad=counts,
    )  # fmt: skip
    return r.layer(node, layer, source)


def _clip(r: Reader, node: onnx.NodeProto) -> fx.Node:
    low, high = (r.constant(node, index) for index in (1, 2))
    bounds = (-np.inf if low is None else float(low), np.inf if high is None else float(high))
    layers: dict[tuple[float, float], nn.Module] = {(0.0, 6.0): nn.ReLU6(), (0.0, np.inf): nn.ReLU()}
    return r.layer(node, layers.get(bounds) or nn.Hardtanh(*bounds), r.value(node.input[0]))


def _hard_sigmoid(r: Reader, node: onnx.NodeProto) -> fx.Node:
    found = attributes(node)
    alpha, beta = found.get("alpha", 0.2), found.get("beta", 0.5)
    if abs(alpha - 1 / 6) < 1e-6 and beta == 0.5:
        return r.layer(node, nn.Hardsigmoid(), r.value(node.input[0]))
    line = r.call(operator.add, r.call(operator.mul, r.value(node.input[0]), alpha), beta)
    return r.call(torch.clamp, line, 0.0, 1.0)


def _prelu(r: Reader, node: onnx.NodeProto) -> fx.Node:
    slope = r.facts.constant(node, 1).reshape(-1)
    layer = nn.PReLU(len(slope))
    layer.weight = _tensor(slope)
    return r.layer(node, layer, r.value(node.input[0]))


def _local_response(r: Reader, node: onnx.NodeProto) -> fx.Node:
    found = attributes(node)
    numbers = found.get("alpha", 1e-4), found.get("beta", 0.75), found.get("bias", 1.0)
    return r.layer(node, nn.LocalResponseNorm(found["size"], *numbers), r.value(node.input[0]))


def _layer_norm(r: Reader, node: onnx.NodeProto) -> fx.Node:
    weight, bias, found = r.facts.constant(node, 1), r.constant(node, 2), attributes(node)
    if found.get("axis", -1) not in (-1, r.facts.rank(node.input[0]) - 1):
        raise ModelError(f"{describe(node)}: normalizes several axes, expected the last; {REMEDY}")
    layer = nn.LayerNorm(len(weight), eps=found.get("epsilon", 1e-5), bias=bias is not None)
    return _with_parameters(r, node, layer, weight, bias, None, r.value(node.input[0]))


def _pooled(layer: Callable[[], nn.Module]) -> Callable[[Reader, onnx.NodeProto], fx.Node]:
    return lambda r, node: r.layer(node, layer(), r.value(node.input[0]))


def _activation(make: Callable[[dict[str, Any]], nn.Module]) -> Callable[[Reader, onnx.NodeProto], fx.Node]:
    return lambda r, node: r.layer(node, make(attributes(node)), r.value(node.input[0]))


LAYERS: dict[str, Callable[[Reader, onnx.NodeProto], fx.Node]] = {
    "Conv": _conv, "Gemm": _gemm, "BatchNormalization": _batch_norm,
    "LayerNormalization": _layer_norm, "LRN": _local_response,
    "MaxPool": _max_pool, "AveragePool": _average_pool,
    "GlobalAveragePool": _pooled(lambda: nn.AdaptiveAvgPool2d(1)),
    "GlobalMaxPool": _pooled(lambda: nn.AdaptiveMaxPool2d(1)),
    "MatMul": _matmul, "Clip": _clip, "PRelu": _prelu, "HardSigmoid": _hard_sigmoid,
    "Relu": _activation(lambda a: nn.ReLU()),
    "LeakyRelu": _activation(lambda a: nn.LeakyReLU(a.get("alpha", 0.01))),
    "Elu": _activation(lambda a: nn.ELU(a.get("alpha", 1.0))),
    "Sigmoid": _activation(lambda a: nn.Sigmoid()), "Tanh": _activation(lambda a: nn.Tanh()),
    "HardSwish": _activation(lambda a: nn.Hardswish()),
    "Softplus": _activation(lambda a: nn.Softplus()), "Mish": _activation(lambda a: nn.Mish()),
    "Gelu": _activation(lambda a: nn.GELU(a.get("approximate", b"none").decode())),
    "Softmax": _activation(lambda a: nn.Softmax(a.get("axis", -1))),
}  # fmt: skip
