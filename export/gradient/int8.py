"""INT8 gradients: the products of the backward pass on integer codes, as those of the forward pass.

A layer with the weight s[o] W[o] (codes W, one scale s for each output channel o) has the gradient
dx = W' (s dy). The scales move from the weight to the gradient, which is then rounded to a grid of its own,

    dx = W' (step * round(clip(s dy / step, -128, 127)))

so that an engine multiplies int8 by int8. The step is fixed for each layer, by the gradients of real images. What
is rounded is the gradient of that layer alone: gates, sums and the map stay in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import onnx
from onnx import numpy_helper

from export.gradient.tape import Tape
from export.graph import attributes
from export.reference import images_at_once, reference_run

# Share of a layer's gradients that the grid is to hold unclipped. Most gradients are small: of the shares 0.9995,
# 0.9999, 0.99999 and 1, this one gave the maps that agree best with float32's (bench/results/README.md).
HELD_SHARE = 0.9999
_LARGEST_CODE = 127


def factors(
    t: Tape, dy: str, weight: str, turn: Callable[[np.ndarray], np.ndarray], *, out_axis: int, channel_axis: int
) -> tuple[str, str]:
    """Return the two factors of a product with a weight in the backward pass: a gradient and a turned weight.

    On an int8 tape both are on grids, where the weight is one of int8 codes; else they are dy and floats.

    Args:
        t: the tape.
        dy: gradient of the layer's output.
        weight: of the layer, a constant.
        turn: rearranges the weight for the product.
        out_axis: the weight's axis of output channels.
        channel_axis: the same channels' axis in dy.
    """
    node = t.producer.get(weight)
    # A one-hot gradient is exact as it is, and its product too small to be worth a grid.
    if not t.int8 or t.is_one_hot(dy) or node is None or node.op_type != "DequantizeLinear":
        return dy, t.rearranged(weight, turn)
    codes, scale, zero_point = t.constant(node, 0), t.constant(node, 1), t.constant(node, 2, 0)
    axis = attributes(node).get("axis", 1) % codes.ndim
    if codes.dtype != np.int8 or zero_point.any() or (scale.size > 1 and (scale.ndim > 1 or axis != out_axis)):
        return dy, t.rearranged(weight, turn)
    if scale.size > 1:
        layout = [1] * codes.ndim
        layout[channel_axis] = -1
        # A channel without weights has a scale all the same, and must not take the grid from the others.
        alive = codes.any(axis=tuple(a for a in range(codes.ndim) if a != axis))
        dy, scale = t.op("Mul", dy, (scale * alive).reshape(layout)), np.ones((), scale.dtype)
    zero = np.zeros((), np.int8)
    step = t.parameter("step", np.ones((), t.numpy_type(dy)))
    quantized = t.op("DequantizeLinear", t.op("QuantizeLinear", dy, step, zero), step, zero)
    return quantized, t.op("DequantizeLinear", t.array(turn(codes), weight), scale.reshape(()), zero)


def calibrate(model: onnx.ModelProto, samples: Mapping[str, np.ndarray]) -> None:
    """Set the step of every gradient on a grid, in place, so that it holds HELD_SHARE of the samples' gradients.

    Args:
        model: differentiated on an int8 tape.
        samples: the model's inputs, real images and their targets.
    """
    graph = model.graph
    steps = {node.input[1]: node.input[0] for node in _quantizers(model)}
    if not steps:
        return
    run, _ = reference_run(_without_grids(model), list(steps.values()))
    images = max(samples.values(), key=lambda value: value.size)
    count, size = len(images), images_at_once(images[0].size // 3)
    largest: dict[str, np.ndarray] = {step: np.empty(0) for step in steps}
    for start in range(0, count, size):
        found = run({name: value[start : start + size] for name, value in samples.items()})
        for step, gradient in steps.items():
            sizes = np.abs(found[gradient]).reshape(-1)
            # Of all images together, only so many can be beyond the grid.
            beyond = int((1 - HELD_SHARE) * sizes.size / min(size, count - start) * count) + 1
            both = np.concatenate([largest[step], sizes])
            largest[step] = np.partition(both, len(both) - min(beyond, len(both)))[-beyond:]
    for tensor in graph.initializer:
        if tensor.name in steps:
            kind = numpy_helper.to_array(tensor).dtype
            held = float(largest[tensor.name].min())
            # A layer without gradient on any sample: the grid of the others' unit is as good as any.
            value = np.asarray(held / _LARGEST_CODE if held > 0 else 1.0, kind)
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))


def _quantizers(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    return (n for n in model.graph.node if n.op_type == "QuantizeLinear" and n.output[0].startswith("grad/"))


def _without_grids(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy whose gradients are not rounded."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    rounded = {node.output[0]: node.input[0] for node in _quantizers(copy)}
    exact = {n.output[0]: rounded[n.input[0]] for n in copy.graph.node if n.input and n.input[0] in rounded}
    for node in copy.graph.node:
        node.input[:] = [exact.get(name, name) for name in node.input]
    return copy
