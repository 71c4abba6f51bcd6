"""What each ONNX operator is in PyTorch: a module for a layer, a call for the rest."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from torch import fx, nn

from export.graph import GraphFacts, attributes, describe
from runtime.errors import ModelError

REMEDY = (
    "export the network itself (module:factory --int8), or quantize the file elsewhere (onnxruntime, NNCF) and "
    "export it as it is"
)


class Reader(Protocol):
    """What a form asks of `export.sources.torch_from_onnx`."""

    facts: GraphFacts
    graph: fx.Graph
    values: dict[str, fx.Node]

    def value(self, name: str) -> fx.Node:
        """Return a value of the graph, a constant as a buffer."""

    def constant(self, node: onnx.NodeProto, index: int) -> np.ndarray | None:
        """Return a constant input, None where it is absent."""

    def layer(self, node: onnx.NodeProto, module: nn.Module, source: fx.Node) -> fx.Node:
        """Add a module under the node's name and return what it gives."""

    def call(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> fx.Node:
        """Add the call of a function."""

    def bias_after(self, node: onnx.NodeProto, count: int, axis: int) -> np.ndarray | None:
        """Return the constant that alone is added to a layer's result, float [count]."""


def as_float32(values: np.ndarray) -> np.ndarray:
    """Return a constant of the file, floats as float32."""
    return np.array(values, np.float32 if np.issubdtype(values.dtype, np.floating) else values.dtype)


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


def _pooled(layer: Callable[[], nn.Module]) -> Callable[[Reader, onnx.NodeProto], fx.Node]:
    return lambda r, node: r.layer(node, layer(), r.value(node.input[0]))


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


def _activation(make: Callable[[dict[str, Any]], nn.Module]) -> Callable[[Reader, onnx.NodeProto], fx.Node]:
    return lambda r, node: r.layer(node, make(attributes(node)), r.value(node.input[0]))


SHAPED = {"Reshape", "Flatten", "Squeeze", "Unsqueeze"}
FORMS: dict[str, Callable[[Reader, onnx.NodeProto], fx.Node]] = {
    "Conv": _conv, "Gemm": _gemm, "MatMul": _matmul, "BatchNormalization": _batch_norm,
    "LayerNormalization": _layer_norm, "LRN": _local_response,
    "MaxPool": _max_pool, "AveragePool": _average_pool,
    "GlobalAveragePool": _pooled(lambda: nn.AdaptiveAvgPool2d(1)),
    "GlobalMaxPool": _pooled(lambda: nn.AdaptiveMaxPool2d(1)),
    "ReduceMean": _mean, "ReduceMax": _reduction(torch.amax), "ReduceMin": _reduction(torch.amin),
    "ReduceSum": _reduction(torch.sum), "Max": _folded(torch.maximum), "Min": _folded(torch.minimum),
    "Sum": _folded(operator.add),
    "Abs": _unary(torch.abs),
    "Relu": _activation(lambda a: nn.ReLU()), "Clip": _clip, "PRelu": _prelu,
    "LeakyRelu": _activation(lambda a: nn.LeakyReLU(a.get("alpha", 0.01))),
    "Elu": _activation(lambda a: nn.ELU(a.get("alpha", 1.0))),
    "Sigmoid": _activation(lambda a: nn.Sigmoid()), "Tanh": _activation(lambda a: nn.Tanh()),
    "HardSigmoid": _hard_sigmoid, "HardSwish": _activation(lambda a: nn.Hardswish()),
    "Softplus": _activation(lambda a: nn.Softplus()), "Mish": _activation(lambda a: nn.Mish()),
    "Gelu": _activation(lambda a: nn.GELU(a.get("approximate", b"none").decode())),
    "Softmax": _activation(lambda a: nn.Softmax(a.get("axis", -1))),
    "Add": _binary(operator.add), "Sub": _binary(operator.sub), "Mul": _binary(operator.mul),
    "Div": _binary(operator.truediv), "Pow": _binary(torch.pow),
    "Erf": _unary(torch.erf), "Exp": _unary(torch.exp), "Sqrt": _unary(torch.sqrt), "Neg": _unary(operator.neg),
    "Slice": _slice, "Split": _split,
    "Concat": _concat,
    "Transpose": lambda r, node: r.graph.call_method(
        "permute", (r.value(node.input[0]), *attributes(node).get("perm", ()))
    ),
    "Flatten": _reshape, "Reshape": _reshape, "Squeeze": _reshape, "Unsqueeze": _reshape, "Pad": _pad,
    "Identity": _same, "Dropout": _same, "Cast": _same,
}  # fmt: skip
