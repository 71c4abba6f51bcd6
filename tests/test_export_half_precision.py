from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from export.engine.half_precision import cast_image_first, half_precision
from export.engine.layers import layers
from export.gradient.walk import append_input_gradient
from export.reference import reference_run
from runtime.errors import ModelError
from runtime.explanations.agreement import spearman
from tests.qdq_models import conv_model, model


def float_network(bias: float = 0.0) -> onnx.ModelProto:
    """Conv, Relu, mean, Gemm: [N, 3, 8, 8] to logits [N, 4]."""
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["c1"], "conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c1"], ["r1"], "relu"),
        helper.make_node("ReduceMean", ["r1", "axes"], ["m"], "mean", keepdims=0),
        helper.make_node("Gemm", ["m", "w2"], ["logits"], "gemm"),
    ]
    constants = {
        "w1": rng.normal(size=(16, 3, 3, 3)).astype(np.float32),
        "b1": np.full(16, bias, np.float32),
        "w2": rng.normal(size=(16, 4)).astype(np.float32),
        "axes": np.array([2, 3]),
    }
    return model(nodes, constants, {"x": ["N", 3, 8, 8]}, {"logits": ["N", 4]})


def types(graph: onnx.ModelProto) -> dict[str, int]:
    """Return the element type of every tensor by name."""
    inferred = onnx.shape_inference.infer_shapes(graph, check_type=True, strict_mode=True)
    found = {v.name: v.type.tensor_type.elem_type for v in (*inferred.graph.value_info, *inferred.graph.output)}
    return {**found, **{t.name: t.data_type for t in graph.graph.initializer}}


def feeds(graph: onnx.ModelProto, count: int, seed: int) -> dict[str, np.ndarray]:
    shape = [d.dim_value for d in graph.graph.input[0].type.tensor_type.shape.dim][1:]
    rng = np.random.default_rng(seed)
    given = {"image": rng.integers(0, 256, (count, *shape)).astype(np.uint8)}
    if len(graph.graph.input) > 1:
        given["target"] = rng.integers(-1, 10, count)
    return given


def test_classes_are_those_of_the_float32_graph_bit_for_bit_and_maps_nearly(
    digits_models: dict[str, Path],
) -> None:
    before = onnx.load(digits_models["tensorrt"])
    after = half_precision(before)
    assert {layer.precision for layer in layers(after)} == {"INT8", "FP16"}
    given = feeds(before, 32, 0)
    exact, half = (reference_run(graph)[0](given) for graph in (before, after))
    np.testing.assert_array_equal(half["logits"], exact["logits"])
    assert spearman(half["saliency"], exact["saliency"]).min() > 0.999
    np.testing.assert_allclose(half["gradient"], exact["gradient"], atol=2e-3 * np.abs(exact["gradient"]).max())


def test_inputs_and_outputs_keep_their_names_and_types(digits_models: dict[str, Path]) -> None:
    before = onnx.load(digits_models["tensorrt"])
    after = half_precision(before)
    assert list(after.graph.input) == list(before.graph.input)
    assert list(after.graph.output) == list(before.graph.output)
    assert after.metadata_props == before.metadata_props


def test_gates_steeper_than_float16_stay_float32_and_exact() -> None:
    """A Relu's gate multiplies by 2^100, which would be inf in float16, and inf times 0 no number."""
    before = append_input_gradient(float_network(bias=-0.5), outputs=("saliency", "gradient"))
    after = half_precision(before)
    found = types(after)
    steep = [t for t in after.graph.initializer if float(onnx.numpy_helper.to_array(t).max(initial=0)) == 2.0**100]
    assert [t.data_type for t in steep] == [TensorProto.FLOAT]
    (gate,) = (node for node in after.graph.node if steep[0].name in node.input)
    assert found[gate.output[0]] == TensorProto.FLOAT
    x = np.random.default_rng(1).normal(size=(8, 3, 8, 8)).astype(np.float32)
    given = {"x": x, "target": np.full(8, 2)}
    exact, half = (reference_run(graph)[0](given) for graph in (before, after))
    assert np.isfinite(half["gradient"]).all()
    np.testing.assert_allclose(half["gradient"], exact["gradient"], atol=5e-3 * np.abs(exact["gradient"]).max())


def test_a_float_network_is_float16_up_to_its_last_layer() -> None:
    after = half_precision(float_network())
    assert [(layer.name, layer.precision) for layer in layers(after)] == [("conv", "FP16"), ("gemm", "FP32")]
    assert [node.op_type for node in after.graph.node] == ["Cast", "Conv", "Relu", "ReduceMean", "Cast", "Gemm"]
    assert types(after)["logits"] == TensorProto.FLOAT


@given(bias=st.sampled_from([0.0, 1.0, 65504.0, 65505.0, 1e30]))
def test_a_layer_whose_constants_float16_cannot_hold_stays_float32(bias: float) -> None:
    precision = {layer.name: layer.precision for layer in layers(half_precision(float_network(bias)))}
    assert precision["conv"] == ("FP16" if bias <= 65504 else "FP32")


def test_what_is_quantized_next_is_computed_in_float32() -> None:
    """Between an INT8 layer and a quantizer nothing is rounded to float16; behind a float16 layer all is."""
    for float_weight, kind in ((False, TensorProto.FLOAT), (True, TensorProto.FLOAT16)):
        graph = conv_model(float_weight=float_weight)
        del graph.graph.output[:]
        graph.graph.node.extend(
            [
                helper.make_node("Relu", ["y"], ["active"], "relu"),
                helper.make_node("QuantizeLinear", ["active", "scale", "zero_point"], ["codes2"], "quantize2"),
                helper.make_node("DequantizeLinear", ["codes2", "scale", "zero_point"], ["z"], "dequantize2"),
            ]
        )
        graph.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, ["N", 32, 6, 6]))
        assert types(half_precision(graph))["active"] == kind


def test_candidates_for_a_maximum_are_compared_as_they_are(digits_models: dict[str, Path]) -> None:
    """Equal of a rounded and an exact number would place no gradient at all."""
    after = half_precision(onnx.load(digits_models["tensorrt"]))
    producer = {name: node for node in after.graph.node for name in node.output}
    compared = [node for node in after.graph.node if node.op_type == "Equal" and "max_pool" in node.name]
    assert len(compared) == 4  # the places of a 2x2 maximum
    for node in compared:
        before = {producer[name].op_type for name in node.input}
        behind = {producer[producer[name].input[0]].op_type for name in node.input}
        assert (before, behind) == ({"Slice", "MaxPool"}, {"DequantizeLinear"})


def image_model(*middle: onnx.NodeProto, result: str) -> onnx.ModelProto:
    nodes = [*middle, helper.make_node("Identity", [result], ["y"], "end")]
    graph = helper.make_graph(
        nodes,
        "image",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["N", 4, 4, 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", "A", "B", "C"])],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def test_uint8_pixels_are_cast_before_they_are_rearranged() -> None:
    """TensorRT's Transpose takes no uint8."""
    graph = image_model(
        helper.make_node("Transpose", ["image"], ["t"], "transpose", perm=[0, 3, 1, 2]),
        helper.make_node("Transpose", ["t"], ["u"], "again", perm=[0, 1, 3, 2]),
        helper.make_node("Cast", ["u"], ["f"], "cast", to=TensorProto.FLOAT),
        result="f",
    )
    given = feeds(graph, 2, 0)
    expected = reference_run(graph)[0](given)["y"]
    cast_image_first(graph)
    onnx.checker.check_model(graph, full_check=True)
    assert [node.op_type for node in graph.graph.node] == ["Cast", "Transpose", "Transpose", "Identity"]
    assert graph.graph.node[0].input == ["image"]
    np.testing.assert_array_equal(reference_run(graph)[0](given)["y"], expected)
    cast_image_first(graph)
    assert [node.op_type for node in graph.graph.node] == ["Cast", "Transpose", "Transpose", "Identity"]


def test_arithmetic_on_uint8_pixels_is_refused() -> None:
    graph = image_model(
        helper.make_node("Add", ["image", "image"], ["sum"], "double"),
        helper.make_node("Cast", ["sum"], ["f"], "cast", to=TensorProto.FLOAT),
        result="f",
    )
    with pytest.raises(ModelError, match="its uint8 pixels go to Add node 'double'"):
        cast_image_first(graph)
