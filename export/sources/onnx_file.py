"""Anyone's ONNX classifier as it is: pixels in front, the softmax at its end left out, its batch opened."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from export.gradient.joining import NORMALIZED, channel_axis, find_source, prepare_model
from export.gradient.tape import Tape
from export.graph import infer_shapes
from export.image_size import fix_size
from export.model_file import read_model
from export.plain_graph import as_rows
from export.sources.onnx_ends import IntegerImage, find_output, take_floats
from export.sources.pair_quantizers import pair_quantizers
from export.sources.q_operators import has_q_operators, to_pairs
from runtime.errors import ModelError
from runtime.manifest import INPUT_NAME

_LAYOUTS = {1: "NCHW", 3: "NHWC"}


@dataclass(frozen=True)
class OnnxClassifier:
    """An ONNX classifier, read and understood.

    Args:
        model: at an opset that the gradient's rules know, with shapes.
        input: name of its image of floats.
        output: name of its logits; what a softmax at the end is given.
        layout: "NCHW" or "NHWC".
        size: height and width of its image; None where the file leaves them open.
        channels: 1 or 3.
        classes: number of logits.
        kinds: element types of image and logits, of onnx.TensorProto.
        result: name of the file's own output.
        gives_probabilities: whether that is the softmax of the logits.
        integers: how the file takes an image of integers; None where it takes floats.
    """

    model: onnx.ModelProto
    input: str
    output: str
    layout: str
    size: tuple[int, int] | None
    channels: int
    classes: int
    kinds: tuple[int, int]
    result: str
    gives_probabilities: bool
    integers: IntegerImage | None


def read_classifier(path: str | Path, size: tuple[int, int] | None = None) -> OnnxClassifier:
    """Read an ONNX file of anyone's.

    Args:
        path: of the file.
        size: height and width, for a file that leaves them open.

    Raises:
        FileError: it, or a file that holds its weights, is not there, or no whole ONNX file.
        ModelError: it is no classifier of one image.
    """
    path = Path(path)
    original, _ = read_model(path)
    try:
        return _understood(original, size)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None


def _understood(original: onnx.ModelProto, given: tuple[int, int] | None) -> OnnxClassifier:
    model = prepare_model(to_pairs(original) if has_q_operators(original) else original)
    integers = take_floats(model)
    pair_quantizers(model)
    _open_batch(model)
    if given is not None:
        fix_size(model, given)
    inferred = infer_shapes(model)
    tape = Tape(inferred, "code", int8=False)
    source = find_source(inferred, tape, None)
    if tape.rank(source) != 4:
        raise ModelError(f"input {source!r}: has {tape.rank(source)} axes, expected an image [N, C, H, W]")
    shape = tape.shape(source)
    if shape[0] is not None:
        raise ModelError(
            f"input {source!r}: takes {shape[0]} images at a time, expected one or any number; export it with an "
            "open batch"
        )
    axis = channel_axis(inferred, tape, source)
    channels = shape[axis]
    if channels not in (1, 3):
        raise ModelError(
            f"input {source!r}: has {channels} channels, expected 1 (grey) or 3 (RGB); put what makes them of RGB "
            "into the network"
        )
    height, width = (side for i, side in enumerate(shape) if i not in (0, axis))
    size = (height, width) if isinstance(height, int) and isinstance(width, int) else None
    result, output, softmax = find_output(model, tape)
    if not isinstance(tape.shape(output)[1], int):
        remedy = "export it with a fixed number of classes" if size else "give its image's size with --size"
        raise ModelError(
            f"output {output!r}: has shape {list(tape.shape(output))}, expected logits [N, K]; {remedy}"
        )
    kinds, classes = (tape.type(source), tape.type(output)), int(tape.shape(output)[1] or 0)
    output = as_rows(model, tape, output)
    return OnnxClassifier(
        model, source, output, _LAYOUTS[axis], size, channels, classes, kinds, result, softmax, integers
    )


def with_pixels(
    found: OnnxClassifier,
    size: tuple[int, int],
    mean: np.ndarray,
    std: np.ndarray,
) -> onnx.ModelProto:
    """Return the graph behind the normalization of its image: uint8 [N, H, W, C] in, `logits` [N, K] out.

    Args:
        found: the classifier.
        size: height and width of the image.
        mean: by channel, on the scale where 255 is 1.
        std: likewise; the network gets (p / 255 - mean) / std.
    """
    model = onnx.ModelProto()
    model.CopyFrom(found.model)
    graph = model.graph
    taken = {name for node in graph.node for name in (*node.input, *node.output)}
    for name in (INPUT_NAME, NORMALIZED, "logits"):
        if name in taken and name not in (found.input, found.output):
            _rename(graph, name, f"{name}/own")
    source = found.input
    if source == INPUT_NAME:
        source = f"{source}/own"
        _rename(graph, found.input, source)
    front = _normalizing(graph, mean, std)
    if source == NORMALIZED:
        source = f"{source}/own"
        _rename(graph, found.input, source)
    typed = source if found.layout == "NCHW" else "pixels_typed"
    front.append(helper.make_node("Cast", [NORMALIZED], [typed], to=found.kinds[0]))
    if found.layout == "NHWC":
        front.append(helper.make_node("Transpose", [typed], [source], perm=[0, 2, 3, 1]))
    nodes = [*front, *graph.node]
    del graph.node[:], graph.input[:], graph.output[:], graph.value_info[:]
    graph.node.extend(nodes)
    output = found.output
    if output == "logits":
        output = "logits/own"
        _rename(graph, "logits", output)
    graph.node.append(helper.make_node("Cast", [output], ["logits"], to=TensorProto.FLOAT))
    shape: list[str | int | None] = ["N", *size, found.channels]
    graph.input.append(helper.make_tensor_value_info(INPUT_NAME, TensorProto.UINT8, shape))
    graph.output.append(helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", found.classes]))
    return model


def _normalizing(graph: onnx.GraphProto, mean: np.ndarray, std: np.ndarray) -> list[onnx.NodeProto]:
    """Return what makes the normalized image [N, C, H, W] of pixels, whose constants are added to the graph."""
    constants = {
        "pixel_mean": (255 * mean).astype(np.float32).reshape(1, -1, 1, 1),
        "pixel_std": (255 * std).astype(np.float32).reshape(1, -1, 1, 1),
    }
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    return [
        helper.make_node("Transpose", [INPUT_NAME], ["pixels"], perm=[0, 3, 1, 2]),
        helper.make_node("Cast", ["pixels"], ["pixels_float"], to=TensorProto.FLOAT),
        helper.make_node("Sub", ["pixels_float", "pixel_mean"], ["pixels_centred"]),
        helper.make_node("Div", ["pixels_centred", "pixel_std"], [NORMALIZED]),
    ]


def _open_batch(model: onnx.ModelProto) -> None:
    """Let a graph for one image take any number, in place: input and reshapes that begin with 1.

    A reshape to [1, K] of what has more than one image would mix them; the export compares images one by one.
    """
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            constants[node.output[0]] = node.attribute[0].t
    for value in (*graph.input, *graph.output):
        dims = value.type.tensor_type.shape.dim
        if value.name not in constants and dims and (dims[0].dim_value == 1 or dims[0].dim_param):
            dims[0].Clear()
            dims[0].dim_param = "N"
    del graph.value_info[:]
    weights = set(constants)
    for node in graph.node:
        if node.op_type != "Reshape" or node.input[1] not in constants or node.input[0] in weights:
            continue
        shape = numpy_helper.to_array(constants[node.input[1]]).copy()
        if not shape.size or shape[0] != 1:
            continue
        shape[0] = 0 if (shape[1:] == -1).any() else -1
        name = f"{node.output[0]}/shape"
        graph.initializer.append(numpy_helper.from_array(shape, name))
        node.input[1] = name


def _rename(graph: onnx.GraphProto, name: str, new: str) -> None:
    for node in graph.node:
        node.input[:] = [new if value == name else value for value in node.input]
        node.output[:] = [new if value == name else value for value in node.output]
    for tensor in graph.initializer:
        tensor.name = new if tensor.name == name else tensor.name
