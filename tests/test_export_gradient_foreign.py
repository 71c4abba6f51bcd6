"""ONNX files that others wrote, differentiated: layouts, old files, names, and what takes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import GraphOptimizationLevel

from export.gradient.__main__ import main
from export.gradient.walk import OUTPUTS, append_input_gradient
from runtime.errors import ModelError

rng = np.random.default_rng(0)
WEIGHT = rng.standard_normal((10, 3, 8, 8)).astype(np.float32)
HEAD = [helper.make_node("Conv", ["before", "weight"], ["c"]), helper.make_node("Flatten", ["c"], ["logits"])]


def made(
    nodes: list[onnx.NodeProto],
    constants: dict[str, Any] | None = None,
    *,
    shape: tuple[Any, ...] = ("N", 3, 8, 8),
    opset: int = 21,
    ir: int = 10,
) -> onnx.ModelProto:
    tensors = [
        numpy_helper.from_array(np.asarray(v), n) for n, v in {"weight": WEIGHT, **(constants or {})}.items()
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 10])],
        tensors,
    )
    return helper.make_model(graph, ir_version=ir, opset_imports=[helper.make_opsetid("", opset)])


def run(model: onnx.ModelProto, x: np.ndarray, target: int = 0) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(None, {"x": x, "target": np.full(len(x), target)}), strict=True))


def node(kind: str, inputs: str, outputs: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(kind, inputs.split(), outputs.split(), **attributes)


@pytest.mark.parametrize(
    "before",
    [
        [node("Transpose", "x", "before", perm=[0, 3, 1, 2])],
        [node("Mul", "x two", "y"), node("Transpose", "y", "before", perm=[0, 3, 1, 2])],
        [node("Sub", "x two", "y"), node("Relu", "y", "z"), node("Transpose", "z", "before", perm=[0, 3, 1, 2])],
    ],
)
def test_the_map_of_rows_columns_channels_is_the_maximum_over_channels(before: list[onnx.NodeProto]) -> None:
    model = made([*before, *HEAD], {"two": np.float32(2)}, shape=("N", 8, 8, 3))
    x = 3 + rng.random((2, 8, 8, 3)).astype(np.float32)
    found = run(append_input_gradient(model, outputs=OUTPUTS), x, target=4)
    factor = 2 if before[0].op_type == "Mul" else 1
    assert found["gradient"].shape == (2, 8, 8, 3)
    assert np.allclose(found["gradient"], factor * WEIGHT[4].transpose(1, 2, 0))
    assert np.array_equal(found["saliency"], np.abs(found["gradient"]).max(3))


def test_a_graph_that_transposes_channels_last_has_them_first() -> None:
    matrix = rng.standard_normal((192, 10)).astype(np.float32)
    last = node("Transpose", "x", "t", perm=[0, 2, 3, 1])
    model = made([last, node("Flatten", "t", "f"), node("MatMul", "f matrix", "logits")], {"matrix": matrix})
    found = run(append_input_gradient(model, outputs=OUTPUTS), np.ones((2, 3, 8, 8), np.float32), target=1)
    assert np.allclose(found["gradient"], matrix[:, 1].reshape(8, 8, 3).transpose(2, 0, 1))
    assert np.array_equal(found["saliency"], np.abs(found["gradient"]).max(1))


def test_a_layout_that_nothing_tells_is_refused() -> None:
    matrix = rng.standard_normal((192, 10)).astype(np.float32)
    nodes = [node("Flatten", "x", "f"), node("MatMul", "f matrix", "logits")]
    model = made(nodes, {"matrix": matrix}, shape=("N", 8, 8, 3))
    with pytest.raises(ModelError, match=r"its last axis of 3 looks like channels, .* name with --input"):
        append_input_gradient(model, outputs=OUTPUTS)
    raw = append_input_gradient(model, outputs=("gradient",))
    assert run(raw, np.ones((2, 8, 8, 3), np.float32), 3)["gradient"].shape == (2, 8, 8, 3)
    plain = append_input_gradient(made(nodes, {"matrix": matrix}))
    assert run(plain, np.ones((2, 3, 8, 8), np.float32))["saliency"].shape == (2, 8, 8)


@pytest.mark.parametrize("as_inputs", [True, False])
@pytest.mark.parametrize(("opset", "ir"), [(8, 3), (11, 3), (13, 7), (18, 8), (21, 10), (22, 10)])
def test_files_of_every_age(opset: int, ir: int, as_inputs: bool) -> None:
    model = made([node("Relu", "x", "before"), *HEAD], opset=opset, ir=ir)
    if as_inputs:
        model.graph.input.append(helper.make_tensor_value_info("weight", TensorProto.FLOAT, WEIGHT.shape))
    before = model.SerializeToString(deterministic=True)
    differentiated = append_input_gradient(model, outputs=OUTPUTS)
    found = run(differentiated, np.ones((2, 3, 8, 8), np.float32), target=7)
    assert np.allclose(found["gradient"], WEIGHT[7])
    assert model.SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("opset", [13, 18, 19, 21])
def test_qdq_of_every_opset(opset: int) -> None:
    model = made(
        [
            node("QuantizeLinear", "x scale zero", "q"), node("DequantizeLinear", "q scale zero", "before"),
            node("DequantizeLinear", "codes wscale", "w", axis=0), node("Conv", "before w", "c"),
            node("Flatten", "c", "logits"),
        ],
        {
            "scale": np.float32(0.05), "zero": np.int8(0), "codes": np.round(WEIGHT * 30).astype(np.int8),
            "wscale": np.full(10, 0.025, np.float32),
        },
        opset=opset, ir=8 if opset < 21 else 10,
    )  # fmt: skip
    codes = numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == "codes"))
    found = run(append_input_gradient(model, outputs=OUTPUTS), np.ones((2, 3, 8, 8), np.float32), target=5)
    assert np.allclose(found["gradient"], 0.025 * codes[5].astype(np.float32), rtol=1e-5)


@pytest.mark.parametrize("own", ["target", "gradient", "saliency"])
def test_tensors_inside_may_have_our_names(own: str) -> None:
    model = made([node("Relu", "x", own), node("Mul", f"{own} two", "before"), *HEAD], {"two": np.float32(2)})
    found = run(append_input_gradient(model, outputs=OUTPUTS), np.ones((2, 3, 8, 8), np.float32), target=1)
    assert np.allclose(found["gradient"], 2 * WEIGHT[1])


def test_an_output_of_our_name_is_told_as_what_it_is() -> None:
    model = made([node("Relu", "x", "before"), *HEAD])
    model.graph.node.append(node("Identity", "before", "target"))
    model.graph.output.append(helper.make_tensor_value_info("target", TensorProto.FLOAT, ["N", 3, 8, 8]))
    with pytest.raises(ModelError, match=r"has an input or output of its own named 'target', .* rename it"):
        append_input_gradient(model, outputs=OUTPUTS)


def test_twice_is_told() -> None:
    once = append_input_gradient(made([node("Relu", "x", "before"), *HEAD]))
    with pytest.raises(ModelError, match="it is differentiated already"):
        append_input_gradient(once)


def test_a_slice_that_takes_nothing_adds_nothing() -> None:
    nodes = [node("Slice", "x zero zero axis", "empty"), node("Concat", "x empty", "before", axis=2), *HEAD]
    model = made(nodes, {"zero": np.array([0]), "axis": np.array([2])})
    found = run(append_input_gradient(model, outputs=OUTPUTS), np.ones((2, 3, 8, 8), np.float32), target=2)
    assert np.allclose(found["gradient"], WEIGHT[2])


@pytest.mark.parametrize("gate", ["code", "ste"])
@pytest.mark.parametrize("clip", ["Clip", "Relu"])
def test_differentiated_by_what_a_quantizer_clipped(clip: str, gate: str) -> None:
    nodes = [
        node(clip, "x low high" if clip == "Clip" else "x", "clipped"),
        node("QuantizeLinear", "clipped scale zero", "q"), node("DequantizeLinear", "q scale zero", "before"),
        *HEAD,
    ]  # fmt: skip
    constants = {"low": np.float32(0), "high": np.float32(6), "scale": np.float32(6 / 127), "zero": np.int8(0)}
    model = made(nodes, constants)
    found = run(
        append_input_gradient(model, input="clipped", gate=gate, outputs=OUTPUTS),
        np.ones((2, 3, 8, 8), np.float32),
        3,
    )
    assert np.allclose(found["gradient"], WEIGHT[3])


def test_an_input_of_one_axis() -> None:
    matrix = rng.standard_normal((8, 10)).astype(np.float32)
    nodes = [node("Unsqueeze", "x axis", "row"), node("MatMul", "row matrix", "logits")]
    model = made(nodes, {"matrix": matrix, "axis": np.array([0])}, shape=(8,))
    model.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 1
    differentiated = append_input_gradient(model, outputs=("gradient",))
    session = onnxruntime.InferenceSession(differentiated.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {"x": np.ones(8, np.float32), "target": np.array([6])}
    (gradient,) = session.run(["gradient"], feeds)
    assert np.allclose(gradient, matrix[:, 6])


@pytest.mark.parametrize("opset", [13, 18, 21, 22])
@pytest.mark.parametrize("kind", [np.int8, np.uint8])
@pytest.mark.parametrize("pooling", [{"kernel_shape": [2, 2], "strides": [2, 2]}, {"kernel_shape": [3, 3]}])
@pytest.mark.parametrize("quantized", [False, True])
def test_pooled_codes_run_with_every_optimization(
    opset: int, kind: type, pooling: dict[str, Any], quantized: bool, tmp_path: Path
) -> None:
    """ONNX Runtime moves signed codes past a pooling or a slice and then refuses what it made."""
    pooled = [node("QuantizeLinear", "p scale zero", "pq"), node("DequantizeLinear", "pq scale zero", "before")]
    kernel = WEIGHT[:, :, :4, :4] if "strides" in pooling else WEIGHT[:, :, :6, :6]
    model = made(
        [
            node("QuantizeLinear", "x scale zero", "q"), node("DequantizeLinear", "q scale zero", "d"),
            node("MaxPool", "d", "p" if quantized else "before", **pooling), *(pooled if quantized else ()),
            node("Conv", "before kernel", "c"), node("Flatten", "c", "logits"),
        ],
        {"scale": np.float32(0.05), "zero": kind(0), "kernel": kernel},
        opset=opset, ir=8 if opset < 21 else 10,
    )  # fmt: skip
    onnx.save(model, tmp_path / "model.onnx")
    main([str(tmp_path / "model.onnx"), "--raw"])
    differentiated = onnx.load(tmp_path / "model_saliency.onnx")
    x = np.random.default_rng(3).standard_normal((2, 3, 8, 8)).astype(np.float32)
    feeds = {"x": x, "target": np.array([1, 2])}
    found = []
    for level in (GraphOptimizationLevel.ORT_DISABLE_ALL, GraphOptimizationLevel.ORT_ENABLE_ALL):
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = level
        session = onnxruntime.InferenceSession(
            differentiated.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        found.append(session.run(["logits", "gradient"], feeds))
    assert np.abs(found[0][1]).max() > 0.1
    for plain, optimized in zip(*found, strict=True):
        assert np.allclose(plain, optimized, atol=1e-4)
