"""Every rule against central differences: ONNX's own cases, every version, every way to broadcast."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.backend.test.case.node import collect_testcases

from export.gradient.walk import RULES, append_input_gradient
from runtime.errors import ModelError

FLOAT = TensorProto.FLOAT


def with_logits(model: onnx.ModelProto, size: int, constants: dict[str, np.ndarray]) -> onnx.ModelProto:
    """Return a model of one input whose logits [1, 2] are two random sums of its first output's elements."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph, y = result.graph, model.graph.output[0].name
    del graph.input[1:], graph.output[:]
    sums = np.random.default_rng(size).standard_normal((size, 2)).astype(np.float32)
    for name, value in {**constants, "sums": sums, "flat": np.array([1, -1])}.items():
        graph.initializer.append(numpy_helper.from_array(value, name))
    graph.node.append(helper.make_node("Reshape", [y, "flat"], ["flattened"]))
    graph.node.append(helper.make_node("MatMul", ["flattened", "sums"], ["logits"]))
    graph.output.append(helper.make_tensor_value_info("logits", FLOAT, [1, 2]))
    return result


def open_session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def error_of(model: onnx.ModelProto, x: np.ndarray) -> float:
    """Return by how much the gradient along four random directions differs from central differences, relatively.

    Of three step sizes the best counts: a large one crosses kinks, a small one drowns in rounding. In large inputs
    a direction has about 20 elements: with more of them some step always crosses one.
    """
    session = open_session(append_input_gradient(model, outputs=("gradient",)))
    name, rng, target = session.get_inputs()[0].name, np.random.default_rng(0), np.zeros(1, np.int64)
    (gradient,) = session.run(["gradient"], {name: x, "target": target})
    assert gradient.shape == x.shape, f"a gradient of shape {gradient.shape} for an input of {x.shape}"

    def logit(at: np.ndarray) -> float:
        return float(session.run(["logits"], {name: at.astype(np.float32), "target": target})[0][0, 0])

    worst = 0.0
    for direction in rng.standard_normal((4, *x.shape)):
        direction *= rng.random(x.shape) < 20 / x.size
        found = float((gradient * direction).sum())
        errors = []
        for step in (1e-2, 1e-3, 3e-4):
            expected = (logit(x + step * direction) - logit(x - step * direction)) / (2 * step)
            errors.append(abs(expected - found) / (abs(expected) + abs(found) + 1e-2))
        worst = max(worst, min(errors))
    return worst


# ONNX's own cases.

# Cases in which the graph itself says that it is trained, not run.
TRAINING = ("training_mode", "training_dropout")
# How ONNX Runtime says that it has no such operator, or not of this opset.
NOT_RUN = (
    onnxruntime.capi.onnxruntime_pybind11_state.NotImplemented,
    onnxruntime.capi.onnxruntime_pybind11_state.Fail,
    onnxruntime.capi.onnxruntime_pybind11_state.InvalidGraph,
)


# What ONNX defines by other operators.
WRITTEN_OUT = {
    "Attention",
    "CastLike",
    "Celu",
    "CenterCropPad",
    "MeanVarianceNormalization",
    "Mish",
    "RMSNormalization",
    "ReduceL1",
    "ReduceL2",
    "ReduceLogSum",
    "ReduceLogSumExp",
    "ReduceSumSquare",
    "RotaryEmbedding",
    "Selu",
    "Shrink",
    "Softsign",
    "SwiGLU",
    "Swish",
    "ThresholdedRelu",
}
JUDGED = set(RULES) | WRITTEN_OUT
# ONNX has no case of these from float32 to float32 that ONNX Runtime runs; other tests have.
NOT_JUDGED = {
    "Celu",
    "CumSum",
    "DepthToSpace",
    "DequantizeLinear",
    "Einsum",
    "GlobalLpPool",
    "Mod",
    "QuantizeLinear",
    "ReduceLogSum",
    "ReduceLogSumExp",
    "ReverseSequence",
    "SpaceToDepth",
    "SwiGLU",
    "Trilu",
    "Where",
}
# An Attention with past keys or lengths leaves inputs out that ONNX's own body asks for; the rest says so.
REFUSED = (
    "past",
    "nonpad",
    "padded_kv",
    "ext_cache",
    "_mul",
    "_max",
    "_min",
    "_multiply",
    "not_larger",
    "not_smaller",
)
# The norm of two zeros, which bends within every step.
BENT = {"test_l2normalization_axis_0"}
SCATTERED_OR_RESIZED = ("test_scatter", "test_resize")


def own_cases() -> Iterator[Any]:
    """Yield ONNX's cases of operators that all have rules, from float32 to float32."""
    cases: list[Any] = collect_testcases(None)
    attentions = [case.name for case in cases if case.name.startswith("test_attention_")]
    skipped = {name for i, name in enumerate(attentions) if i % 16 or name.endswith("_expanded")}  # of 200
    for case in cases:
        refused = any(word in case.name for word in REFUSED)
        if case.name in skipped | BENT or (
            refused and case.name.startswith(("test_attention", *SCATTERED_OR_RESIZED))
        ):
            continue
        values = (*case.model.graph.input[:1], *case.model.graph.output[:1])
        types = [value.type.tensor_type.elem_type for value in values]
        if types != [FLOAT, FLOAT] or not {n.op_type for n in case.model.graph.node} <= JUDGED:
            continue
        if all(np.size(data[0]) for data in case.data_sets[0]):
            yield case


@pytest.mark.slow  # 12 s; the rules have fast tests of their own in test_export_gradient_rules.py
@pytest.mark.filterwarnings("ignore")
def test_onnx_own_cases() -> None:
    judged, wrong, not_run = collections.Counter[str](), {}, []
    for case in own_cases():
        inputs, outputs = case.data_sets[0]
        names = [value.name for value in case.model.graph.input]
        constants = {n: np.asarray(a) for n, a in zip(names[1:], inputs[1:], strict=True)}
        model = with_logits(case.model, np.size(outputs[0]), constants)
        if any(word in case.name for word in TRAINING):
            with pytest.raises(ModelError, match="expected an inference graph"):
                append_input_gradient(model, outputs=("gradient",))
            continue
        x = np.asarray(inputs[0], np.float32)
        # Away from ties and whole numbers, in a range that float32 resolves, and where a power is a number.
        x = x * min(1, 4 / np.abs(x).max()) + np.random.default_rng(1).uniform(-0.01, 0.01, x.shape)
        x = np.abs(x) + 0.5 if np.isnan(outputs[0]).any() else x
        try:
            open_session(model)
        except NOT_RUN:
            not_run.append(case.name)
            continue
        error = error_of(model, x.astype(np.float32))
        judged.update({node.op_type for node in case.model.graph.node})
        if not error < 0.02:
            wrong[case.name] = error
    assert not wrong
    assert JUDGED - judged.keys() == NOT_JUDGED
    assert judged.total() >= 430
    assert len(not_run) <= 60, "of operators or opsets that ONNX Runtime itself has not"


# Every version of a file, over graphs whose operators changed with it.

Nodes = list[onnx.NodeProto]
Constants = dict[str, Any]
WEIGHT = np.random.default_rng(2).standard_normal((4, 3, 3, 3)).astype(np.float32)
NORM = {n: np.linspace(0.5, 1.5, 4, dtype=np.float32) for n in ("scale", "bias", "mean", "var")}
MATRIX = np.random.default_rng(3).standard_normal((192, 5)).astype(np.float32)
BIAS = np.linspace(-1, 1, 5, dtype=np.float32)
ONES = np.ones(3, np.float32)


def node(kind: str, inputs: str, outputs: str = "y", **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(kind, inputs.split(), outputs.split(), **attributes)


def listed(
    opset: int, since: int, kind: str, name: str, values: list[int], **more: Any
) -> tuple[Nodes, Constants]:
    """Return an operator whose attribute of integers became an input."""
    if opset < since:
        return [node(kind, "x", **{name: values, **more})], {}
    return [node(kind, f"x {name}", **more)], {name: np.array(values)}


def clip(opset: int) -> tuple[Nodes, Constants]:
    if opset < 11:
        return [node("Clip", "x", min=-0.5, max=0.5)], {}
    return [node("Clip", "x low high")], {"low": np.float32(-0.5), "high": np.float32(0.5)}


def pad(opset: int) -> tuple[Nodes, Constants]:
    return listed(opset, 11, "Pad", "pads", [0, 0, 1, 1, 0, 0, 0, 2])


def cut(opset: int) -> tuple[Nodes, Constants]:
    if opset < 10:
        return [node("Slice", "x", axes=[2, 3], starts=[1, 2], ends=[5, 6])], {}
    constants = {"starts": np.array([1, 2]), "ends": np.array([5, 6]), "axes": np.array([2, 3])}
    return [node("Slice", "x starts ends axes")], constants


def batch_norm(opset: int) -> tuple[Nodes, Constants]:
    nodes = [node("Conv", "x w", "c"), node("BatchNormalization", "c scale bias mean var")]
    return nodes, {"w": WEIGHT, **NORM}


def pools(opset: int) -> tuple[Nodes, Constants]:
    return [
        node("MaxPool", "x", "p", kernel_shape=[2, 2], strides=[2, 2]),
        node("AveragePool", "p", kernel_shape=[2, 2]),
    ], {}


def split(opset: int) -> tuple[Nodes, Constants]:
    nodes, constants = listed(opset, 13, "Split", "split", [1, 2], axis=1)
    nodes[0].output[:] = ["a", "b"]
    return [*nodes, node("Mul", "a b")], constants


def squeeze(opset: int) -> tuple[Nodes, Constants]:
    nodes, constants = listed(opset, 13, "Unsqueeze", "axes", [1])
    return [*nodes, node("Tanh", "y", "z")], constants


FAMILIES: dict[str, tuple[int, Callable[[int], tuple[Nodes, Constants]]]] = {
    "clip": (7, clip),
    "pad": (7, pad),
    "slice": (7, cut),
    "batch norm": (9, batch_norm),
    "pooling": (7, pools),
    "split": (7, split),
    "unsqueeze": (7, squeeze),
    "mean": (7, lambda opset: listed(opset, 18, "ReduceMean", "axes", [2, 3])),
    "maximum": (7, lambda opset: listed(opset, 18, "ReduceMax", "axes", [3], keepdims=0)),
    "sum": (7, lambda opset: listed(opset, 13, "ReduceSum", "axes", [1])),
    "dropout": (7, lambda opset: ([node("Dropout", "x", "d"), node("Sigmoid", "d")], {})),
    "softmax": (7, lambda opset: ([node("Softmax", "x", axis=3)], {})),
    "flatten": (7, lambda opset: ([node("Flatten", "x", "f"), node("Gemm", "f m c")], {"m": MATRIX, "c": BIAS})),
    "group norm": (
        21,
        lambda opset: ([node("GroupNormalization", "x g b", num_groups=3)], {"g": ONES, "b": ONES}),
    ),
}


@pytest.mark.parametrize("ir", [3, 4, 8, 10, 11])
@pytest.mark.parametrize("opset", [7, 8, 9, 10, 11, 12, 13, 15, 17, 18, 19, 20, 21, 22, 23])
def test_every_opset_in_every_kind_of_file(opset: int, ir: int) -> None:
    # 192 values, 0.02 apart: no step comes to where a maximum or a clip changes.
    x = np.random.default_rng(opset).permutation(np.linspace(-1.91, 1.91, 192, dtype=np.float32))
    x = x.reshape(1, 3, 8, 8)
    for name, (since, family) in FAMILIES.items():
        if opset < since:
            continue
        nodes, constants = family(opset)
        values = [helper.make_tensor_value_info("x", FLOAT, x.shape)]
        result = helper.make_tensor_value_info(nodes[-1].output[0], FLOAT, None)
        opsets = [helper.make_opsetid("", opset)]
        model = helper.make_model(helper.make_graph(nodes, name, values, [result]), opset_imports=opsets)
        model.ir_version = ir
        plain = onnx.ModelProto()
        plain.CopyFrom(model)
        plain.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), n) for n, v in constants.items())
        plain.ir_version = max(ir, 4)
        size = open_session(plain).run(None, {"x": x})[0].size
        model = with_logits(model, size, {n: np.asarray(v) for n, v in constants.items()})
        if ir == 3:  # where every constant is an input as well
            for tensor in model.graph.initializer:
                model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        assert error_of(model, x) < 0.02, name


# Broadcasting.

BINARY = {"Add", "Sub", "Mul", "Div", "Max", "Mean", "Min", "Pow", "PRelu", "Sum", "Where"}


@st.composite
def broadcast_shapes(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Return two shapes that broadcast: each axis may be 1, and either may lack leading axes."""
    full = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    shapes = []
    for _ in range(2):
        shape = [size if draw(st.booleans()) else 1 for size in full]
        shapes.append(shape[draw(st.integers(0, len(shape) - 1)) :])
    return shapes[0], shapes[1]


@settings(max_examples=25)
@given(shapes=broadcast_shapes(), first=st.booleans())
@pytest.mark.parametrize("kind", sorted(BINARY))
def test_the_gradient_has_its_inputs_shape(kind: str, shapes: tuple[list[int], list[int]], first: bool) -> None:
    shape, other_shape = shapes
    if kind in ("Pow", "PRelu"):
        first = True  # an exponent or slope that the image changes is refused
    if kind == "PRelu":  # whose slope is broadcast to the input, never the other way round
        shape = list(np.broadcast_shapes(tuple(shape), tuple(other_shape)))
    rng = np.random.default_rng(sum(shape))
    x = rng.uniform(0.5, 2, shape).astype(np.float32)
    other = rng.uniform(0.5, 2, other_shape).astype(np.float32)
    if kind in ("Max", "Min"):  # no step comes to where the two are equal
        x, other = x.round(1), other.round(1) + np.float32(0.05)
    pair = "x other" if first else "other x"
    inputs = f"condition {pair}" if kind == "Where" else pair
    constants: dict[str, np.ndarray] = {"other": other}
    if kind == "Where":
        constants["condition"] = rng.random(np.broadcast_shapes(x.shape, other.shape)) < 0.5
    graph = helper.make_graph(
        [node(kind, inputs)],
        kind,
        [helper.make_tensor_value_info("x", FLOAT, shape)],
        [helper.make_tensor_value_info("y", FLOAT, None)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    size = int(np.prod(np.broadcast_shapes(x.shape, other.shape)))
    assert error_of(with_logits(model, size, constants), x) < 0.02
