"""The model on both sides of differentiation: what may come in, and how the gradient is joined to it."""

from __future__ import annotations

from collections.abc import Sequence

import onnx
import onnx.checker
import onnx.inliner
import onnx.shape_inference
import onnx.version_converter
from onnx import TensorProto, helper

from export.gradient.cam import Cam
from export.gradient.tape import Tape
from export.graph import describe, graphs_inside, prune
from export.plain_graph import sort_nodes, take_constant_branches
from runtime.errors import ModelError

# The tensor our own files differentiate by: the image after preprocessing, float32 [N, C, H, W].
NORMALIZED = "normalized"

# The oldest opset whose operators the rules read and write, and the one that older files are converted to.
_OLDEST, _CURRENT = 18, 21
# The IR version since which constants need not be inputs, too.
_CONSTANTS_APART = 4
# What differentiation adds to a graph.
_ADDED = ("target", "saliency", "gradient")
_CHANNELS = (1, 3, 4)
# By what an image's first transposition tells: NHWC to NCHW, and the way back.
_CHANNEL_AXES = {(0, 3, 1, 2): 3, (0, 2, 3, 1): 1}


def prepare_model(model: onnx.ModelProto, added: Sequence[str] = ()) -> onnx.ModelProto:
    """Return a checked copy without functions, in order and at an opset that the rules know.

    Args:
        model: a classifier.
        added: names of the outputs that are to be added besides those of the gradient.

    Raises:
        ModelError: the model is not valid ONNX, has control flow that its input decides, or is differentiated
            already.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    write_as_today(copy)
    try:
        onnx.checker.check_model(copy)
        if copy.functions:
            copy = onnx.inliner.inline_local_functions(copy)
        take_constant_branches(copy)
        opset = next((o.version for o in copy.opset_import if o.domain == ""), 0)
        if opset < _OLDEST:
            copy = onnx.version_converter.convert_version(copy, _CURRENT)
    except (onnx.checker.ValidationError, RuntimeError, ValueError) as error:
        raise ModelError(f"the model is not valid ONNX ({first_line(error)}); export it again") from None
    graph = copy.graph
    _make_room(graph, added)
    for node in graph.node:
        if any(True for _ in graphs_inside(node)):
            raise ModelError(
                f"{describe(node)}: control flow that the image decides cannot be differentiated; export a graph "
                "without If, Loop and Scan, as by torch.onnx.export(..., dynamo=True)"
            )
    return copy


def write_as_today(model: onnx.ModelProto) -> None:
    """Write, in place, as today what old or careless writers wrote otherwise: names, order, domains, constants."""
    graph = model.graph
    graph.name = graph.name or "classifier"
    if model.ir_version < _CONSTANTS_APART:  # when constants had to be inputs, too
        model.ir_version = _CONSTANTS_APART
        constants = {tensor.name for tensor in graph.initializer}
        inputs = [value for value in graph.input if value.name not in constants]
        del graph.input[:]
        graph.input.extend(inputs)
    for own in (*model.opset_import, *graph.node):
        if own.domain == "ai.onnx":
            own.domain = ""
    outputs = {value.name: value for value in graph.output}
    if len(outputs) < len(graph.output):  # one named twice
        kept = [onnx.ValueInfoProto.FromString(value.SerializeToString()) for value in outputs.values()]
        del graph.output[:]
        graph.output.extend(kept)
    sort_nodes(graph)


def _make_room(graph: onnx.GraphProto, added: Sequence[str]) -> None:
    """Rename, in place, tensors inside the graph that have the names of what the gradient adds.

    Raises:
        ModelError: an input or output has one, or the gradient is there already.
    """
    inside = {name for node in graph.node for name in node.output}
    inputs, outputs = ({value.name for value in values} for values in (graph.input, graph.output))
    ours = {*_ADDED, *added}
    if any(name.startswith("grad/") for name in inside) or ("target" in inputs and outputs & ours):
        raise ModelError(
            "the model has an input 'target' and its gradient, or tensors 'grad/...': it is differentiated "
            "already; start from the file without saliency"
        )
    taken = sorted((inputs | outputs) & ours)
    if taken:
        raise ModelError(
            f"the model has an input or output of its own named {taken[0]!r}, which its gradient adds; rename it"
        )
    constants = {tensor.name for tensor in graph.initializer}
    for name in sorted((inside | constants) & ours):
        new = f"{name}/own"
        for node in graph.node:
            node.input[:] = [new if i == name else i for i in node.input]
            node.output[:] = [new if o == name else o for o in node.output]
        for tensor in (*graph.initializer, *graph.value_info):
            tensor.name = new if tensor.name == name else tensor.name


def channel_axis(model: onnx.ModelProto, tape: Tape, source: str) -> int:
    """Return the axis of an image's channels: 3 where the graph first transposes NHWC to NCHW, else 1.

    Raises:
        ModelError: neither a convolution nor such a transposition tells, and the last axis looks like channels.
    """
    name, seen = source, 0
    while seen < len(model.graph.node):
        readers = tape.consumers[name]
        for node in readers:
            if node.op_type == "Transpose" and node.input[0] == name:
                perm = next((tuple(a.ints) for a in node.attribute if a.name == "perm"), None)
                if perm in _CHANNEL_AXES:
                    return _CHANNEL_AXES[perm]
            if node.op_type in ("Conv", "ConvInteger", "QLinearConv", "MaxPool", "AveragePool"):
                return 1
        if len(readers) != 1 or not readers[0].output or tape.rank(readers[0].output[0]) != 4:
            break
        name, seen = readers[0].output[0], seen + 1
    _, first, *_, last = tape.shape(source)
    if last in _CHANNELS and first not in _CHANNELS:
        raise ModelError(
            f"input {source!r}: its last axis of {last} looks like channels, and the graph does not tell; "
            "name with --input a tensor [N, C, H, W], or ask for the raw gradient"
        )
    return 1


def find_source(model: onnx.ModelProto, tape: Tape, name: str | None) -> str:
    """Return the name of the float tensor to differentiate by: `name`, or the default.

    Raises:
        ModelError: there is no such float tensor, or no one input to choose.
    """
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = [i.name for i in model.graph.input if i.name not in constants]
    if name is None and NORMALIZED in tape.producer:
        name = NORMALIZED
    if name is None and len(inputs) != 1:
        raise ModelError(
            f"the model has {len(inputs)} inputs ({', '.join(inputs)}), expected one image; "
            "name the one to differentiate by"
        )
    name = name or inputs[0]
    if name not in inputs and name not in tape.producer:
        raise ModelError(f"input {name!r}: no such tensor; the model's inputs are {', '.join(inputs)}")
    if not tape.is_float(name):
        kind = TensorProto.DataType.Name(tape.type(name)).lower()
        raise ModelError(
            f"input {name!r}: is {kind}, expected floats; name the float tensor that is computed from it"
        )
    return name


def find_logits(model: onnx.ModelProto, tape: Tape, name: str | None) -> str:
    """Return the name of the float [N, K] tensor to differentiate: `name`, or the default.

    Raises:
        ModelError: there is no such tensor, or no one output to choose.
    """
    outputs = [o.name for o in model.graph.output]
    if name is None:
        found = [o for o in outputs if tape.is_float(o) and tape.rank(o) == 2]
        if len(found) != 1:
            raise ModelError(
                f"the model has {len(found)} float outputs [N, K] among {', '.join(outputs)}, expected "
                "one; name the logits"
            )
        name = found[0]
    if name not in tape.producer:
        raise ModelError(f"logits {name!r}: no such tensor; the model's outputs are {', '.join(outputs)}")
    if not tape.is_float(name) or tape.rank(name) != 2:
        raise ModelError(f"logits {name!r}: has {tape.rank(name)} axes or is no float, expected float [N, K]")
    return name


def join_gradient(
    model: onnx.ModelProto,
    inferred: onnx.ModelProto,
    tape: Tape,
    source: str,
    result: str,
    outputs: Sequence[str],
    channels: int = 1,
    cams: Sequence[Cam] = (),
) -> None:
    """Join both graphs into the first, name the outputs, and drop what no output needs.

    Args:
        model: the forward graph; changed.
        inferred: the same with shapes.
        tape: the gradient, whose last nodes compute `outputs`.
        source: the tensor differentiated by, which lends its shape to the gradient.
        result: the tensor differentiated.
        outputs: which of `saliency` and `gradient` the tape computes.
        channels: axis of the source over which the map is the maximum.
        cams: the maps of layers that the tape computes.

    Raises:
        ModelError: another tensor is named `logits`, or the model contradicts itself.
    """
    graph = model.graph
    values = {v.name: v for v in (*inferred.graph.input, *inferred.graph.value_info, *inferred.graph.output)}
    shape = [d.dim_param or d.dim_value or None for d in values[source].type.tensor_type.shape.dim]
    size = [size for axis, size in enumerate(shape) if axis not in (0, channels)]
    # One target a row of logits. Where inference lost their batch, it is the image's.
    rows, *_ = values[result].type.tensor_type.shape.dim
    batch = rows.dim_param or rows.dim_value or next(iter(shape), None)
    graph.input.append(helper.make_tensor_value_info("target", TensorProto.INT64, [batch]))
    if result not in [o.name for o in graph.output]:
        graph.output.insert(0, values[result])
    forms = {"saliency": (TensorProto.FLOAT, [*shape[:1], *size]), "gradient": (tape.type(source), shape)}
    graph.output.extend(helper.make_tensor_value_info(name, *forms[name]) for name in outputs)
    graph.output.extend(
        helper.make_tensor_value_info(cam.output.output, TensorProto.FLOAT,
                                      [batch, *tape.sizes(cam.activation, (2, 3))])
        for cam in cams
    )  # fmt: skip
    graph.node.extend(tape.nodes)
    graph.initializer.extend(tape.initializers)
    _rename(graph, result, "logits")
    prune(graph)
    try:
        onnx.checker.check_model(model, full_check=True)
    except onnx.shape_inference.InferenceError as error:
        raise ModelError(
            f"the model's shapes contradict each other ({first_line(error)}); export it again"
        ) from None
    except ValueError as error:
        raise ModelError(f"with its gradient the model is too large ({first_line(error)})") from None


def _rename(graph: onnx.GraphProto, old: str, new: str) -> None:
    if old == new:
        return
    if any(new in node.output for node in graph.node) or new in [i.name for i in graph.input]:
        raise ModelError(
            f"the model has a tensor named {new!r} that is not its logits {old!r}; rename one of them"
        )
    for node in graph.node:
        node.input[:] = [new if name == old else name for name in node.input]
        node.output[:] = [new if name == old else name for name in node.output]
    for value in (*graph.output, *graph.value_info):
        value.name = new if value.name == old else value.name


def first_line(error: Exception) -> str:
    """Return the first line of an error's text, for messages of one line."""
    return str(error).strip().split("\n")[0]
