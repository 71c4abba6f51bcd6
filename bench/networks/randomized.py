"""Exported files whose weights are random from the head down: what a map must not survive.

Adebayo et al. 2018 ("Sanity checks for saliency maps", section 3): a map that stays the same where the parameters
are random explains the image and not the network. Here the codes of a weight (or its floats) change places: their
distribution, their grid and the graph stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx
from onnx import numpy_helper

from export.gradient.cam import find_cams
from export.gradient.joining import NORMALIZED
from export.gradient.walk import OUTPUTS, append_input_gradient
from export.graph import GraphFacts
from export.passes.barrier import take_barriers_away
from export.passes.keep_rounding import keep_rounding
from runtime.errors import ModelError
from runtime.manifest import METADATA_KEY, read_manifest
from runtime.onnx_bytes import without_gradient

_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


@dataclass(frozen=True)
class WeightedLayer:
    """A layer with constants: its name, and the names of its weight and bias in the graph."""

    name: str
    tensors: tuple[str, ...]


def layers_from_the_head(data: bytes) -> list[WeightedLayer]:
    """Return the layers of a file, that of the logits first.

    Raises:
        ModelError: it has none with constant weights.
    """
    model = onnx.load_model_from_string(without_gradient(data))
    facts = GraphFacts(model)
    constants = {tensor.name for tensor in model.graph.initializer}
    found = []
    for node in reversed(model.graph.node):
        if node.op_type not in _LAYERS:
            continue
        weight, *bias = node.input[1:]
        dequantized = facts.producer.get(weight)
        if dequantized is not None:
            weight = dequantized.input[0]
        if weight in constants:
            tensors = (weight, *(name for name in bias if name in constants))
            found.append(WeightedLayer(node.name or node.output[0], tensors))
    if not found:
        raise ModelError("no layer with constant weights was found in the file, expected one to randomize")
    return found


def randomized(data: bytes, layers: Sequence[WeightedLayer], *, seed: int = 0) -> bytes:
    """Return a file with the constants of some layers in a random order, and the maps of what it then computes.

    Its gradients are float32, since those of a file are products with the weights it was made of.

    Args:
        data: contents of an exported file; its maps of layers are made anew, too.
        layers: among `layers_from_the_head`.
        seed: of the order.

    Raises:
        ModelError: an operator of the lowered graph has no gradient.
    """
    manifest = read_manifest(data, "model")
    model = onnx.load_model_from_string(without_gradient(data))
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for layer in layers:
        for name in layer.tensors:
            values = numpy_helper.to_array(tensors[name])
            generator = np.random.default_rng([seed, *name.encode()])
            shuffled = generator.permutation(values.ravel()).reshape(values.shape)
            tensors[name].CopyFrom(numpy_helper.from_array(shuffled, name))
    take_barriers_away(model.graph)
    cams = find_cams(model, [(cam.method, cam.layer) for cam in manifest.cams])
    model = append_input_gradient(model, input=NORMALIZED, logits="logits", outputs=OUTPUTS, cams=cams)
    if manifest.target == "openvino" and manifest.precision == "int8":
        keep_rounding(model)
    manifest = replace(manifest, cams=tuple(cam.output for cam in cams))
    onnx.helper.set_model_props(model, {METADATA_KEY: manifest.to_json()})
    return bytes(model.SerializeToString())
