"""Class activation maps inside the graph: where in a layer's activations the class lies.

A map is made of a layer's activations A [N, C, h, w] and of the gradient G of the chosen logit by them:

    gradcam   relu(sum_c mean_hw(G_c) A_c)   Selvaraju et al. 2017, equations 1 and 2
    hirescam  relu(sum_c G_c A_c)            Draelos and Carin 2020; the relu is that of the package grad-cam
    layercam  relu(sum_c relu(G_c) A_c)      Jiang et al. 2021, equations 4 to 6

Only what lies behind the layer is differentiated. Behind the last convolution that is the head, at nearly no cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx
from onnx import TensorProto

from export.gradient.tape import Tape
from export.graph import GraphFacts, infer_shapes
from export.layer_names import find_layer
from runtime.errors import ModelError, OptionError
from runtime.manifest import CamOutput

# What follows a convolution and still belongs to its layer: each value becomes one value.
_ELEMENTWISE = {
    "Add", "BatchNormalization", "Clip", "DequantizeLinear", "Elu", "Gelu", "HardSwish", "Identity", "LeakyRelu",
    "Max", "Min", "Mul", "PRelu", "QuantizeLinear", "Relu", "Sigmoid", "Softplus", "Sub", "Tanh",
}  # fmt: skip
_PREFIXES, _SUFFIXES = ("network.", "model."), (".codes", ".weight", ".weight_quantized", ".kernel")


@dataclass(frozen=True)
class Cam:
    """One map of a graph.

    Args:
        output: name of the output, its method and its layer.
        activation: tensor [N, C, h, w] that it is made of.
    """

    output: CamOutput
    activation: str


def find_cams(model: onnx.ModelProto, asked: Sequence[tuple[str, str]]) -> tuple[Cam, ...]:
    """Return the maps that are asked for, each with its activation and the name of its output.

    A layer is a convolution, by the name of its weight, of its node or of its output; or what such names begin
    with, whose last convolution is then meant. Its activation is what the next layer reads: behind normalization,
    residual sum, activation function and quantizer. An output is `cam_<layer>`, and `cam_<layer>_<method>` where
    several methods explain one layer.

    Args:
        model: a classifier; not changed.
        asked: pairs of method and layer, from `export.choices.explanations`; the layer "" is the last.

    Raises:
        ModelError: no such layer, or none with a map of more than one pixel.
    """
    if not asked:
        return ()
    facts = GraphFacts(infer_shapes(model))
    layers = _convolutions(model, facts)
    if not layers:
        raise ModelError("no convolution has an output of several pixels, which a class activation map needs")
    found = [(method, *_layer(layers, layer)) for method, layer in asked]
    names = [name for _, name, _ in found]
    cams = []
    for method, name, node in found:
        activation = _activation(facts, node.output[0])
        height, width = facts.sizes(activation, (2, 3))
        output = f"cam_{name}_{method}" if names.count(name) > 1 else f"cam_{name}"
        cams.append(Cam(CamOutput(output, method, name, (height, width)), activation))
    if len({cam.output.output for cam in cams}) < len(cams):
        raise OptionError(f"--explain: a map twice, {', '.join(cam.output.output for cam in cams)}; leave one out")
    return tuple(cams)


def append_map(tape: Tape, cam: Cam, gradient: str) -> None:
    """Append the nodes of one map, whose output is float32 [N, h, w].

    Args:
        tape: the backward graph.
        cam: the map.
        gradient: of the chosen logit by its activation.
    """
    tape.scope = cam.output.output
    weights = _by_channel(tape, gradient)
    if cam.output.method == "gradcam" and weights == gradient:
        weights = tape.op("ReduceMean", gradient, [2, 3], keepdims=1)
    elif cam.output.method == "layercam":
        weights = tape.op("Relu", weights)
    summed = tape.op("ReduceSum", tape.op("Mul", cam.activation, weights), [1], keepdims=0)
    summed = tape.op("Relu", summed)
    if tape.type(summed) != TensorProto.FLOAT:
        tape.op("Cast", summed, to=TensorProto.FLOAT)
    tape.nodes[-1].output[0] = cam.output.output


def _by_channel(tape: Tape, gradient: str) -> str:
    """Return the gradient as [N, C, 1, 1] where all pixels have the same, as before a mean; else itself."""
    for node in reversed(tape.nodes):
        if gradient in node.output:
            # Emitted by the rules of means; what they spread has one pixel a channel.
            return str(node.input[0]) if node.op_type == "Expand" else gradient
    return gradient


def _convolutions(model: onnx.ModelProto, facts: GraphFacts) -> dict[str, onnx.NodeProto]:
    """Return the convolutions with an output of several pixels, by the layer's name, in the graph's order."""
    found: dict[str, onnx.NodeProto] = {}
    for node in model.graph.node:
        if node.op_type in ("Conv", "ConvTranspose") and facts.has_rank(node.output[0]):
            shape = facts.shape(node.output[0])
            if len(shape) == 4 and None not in shape[2:] and shape[2:] != (1, 1):
                name = _name_of(node, facts)
                found[name if name not in found else node.name or node.output[0]] = node
    return found


def _name_of(node: onnx.NodeProto, facts: GraphFacts) -> str:
    """Return a layer's name: that of its weight, as the network calls it, else that of its node."""
    weight = node.input[1]
    dequantized = facts.producer.get(weight)
    if dequantized is not None and dequantized.input:
        weight = dequantized.input[0]
    for suffix in _SUFFIXES:
        if weight.endswith(suffix):
            name = weight.removesuffix(suffix)
            for prefix in _PREFIXES:
                name = name.removeprefix(prefix)
            return name
    return node.name or str(node.output[0])


def _layer(layers: dict[str, onnx.NodeProto], asked: str) -> tuple[str, onnx.NodeProto]:
    """Return the name and the convolution that is meant by a layer's name."""
    if not asked:
        return list(layers.items())[-1]
    for name, node in layers.items():
        if asked in (name, node.name, node.output[0]):
            return asked, node
    return asked, layers[find_layer(list(layers), asked)]


def _activation(facts: GraphFacts, tensor: str) -> str:
    """Return what the next layer reads of a convolution's output."""
    while True:
        readers = facts.consumers[tensor]
        # x * sigmoid(x) and its kin read the value twice, and are one function of it.
        gate = [r for r in readers if r.op_type in ("Sigmoid", "HardSigmoid", "Tanh", "Erf", "Softplus")]
        product = [r for r in readers if r.op_type == "Mul" and len(readers) == 2 and gate]
        last = product[0] if product and gate[0].output[0] in product[0].input else readers[0] if readers else None
        if last is None or (len(readers) > 1 and last not in product) or last.op_type not in _ELEMENTWISE:
            return tensor
        if not facts.has_rank(last.output[0]) or facts.shape(last.output[0])[1:] != facts.shape(tensor)[1:]:
            return tensor
        if last.op_type == "QuantizeLinear" and not _dequantized(facts, last):
            return tensor
        if last.op_type == "Mul" and not product and not _is_elementwise_product(facts, last, tensor):
            return tensor
        tensor = last.output[0]


def _dequantized(facts: GraphFacts, node: onnx.NodeProto) -> bool:
    readers = facts.consumers[node.output[0]]
    return bool(readers) and all(r.op_type in ("DequantizeLinear", "Clip", "Max", "Min") for r in readers)


def _is_elementwise_product(facts: GraphFacts, node: onnx.NodeProto, tensor: str) -> bool:
    """Return whether a product is with a constant, and not the gate of another branch."""
    return all(name == tensor or facts.value(name) is not None for name in node.input)
