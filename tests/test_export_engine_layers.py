from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper

from export.engine.layers import layers, set_precision
from export.reference import reference_run
from runtime.errors import OptionError
from tests.qdq_models import conv_model, model


def behind_a_layer(tail: onnx.ModelProto, channels: int) -> onnx.ModelProto:
    """Put a float 1x1 convolution before a conv_model, so that its own is no longer the first layer."""
    tail.graph.node[0].input[0] = "before"
    weight = np.ones((channels, channels, 1, 1), np.float32)
    tail.graph.initializer.append(onnx.numpy_helper.from_array(weight, "first_weight"))
    tail.graph.node.insert(0, helper.make_node("Conv", ["x", "first_weight"], ["before"], "first"))
    return tail


def precisions(graph: onnx.ModelProto) -> dict[str, str]:
    return {layer.name: layer.precision for layer in layers(graph)}


@pytest.mark.parametrize(
    ("channels", "filters", "kernel", "group", "first", "precision"),
    [
        (16, 16, (3, 3), 1, False, "INT8"),
        (17, 19, (3, 3), 1, False, "INT8"),  # 16 and more on both sides: whatever the alignment
        (8, 16, (3, 3), 1, False, "INT8"),  # few on one side, a multiple of 8 and 16 on the other
        (8, 8, (3, 3), 1, False, "FP32"),
        (8, 8, (3, 3), 1, True, "INT8"),  # as a first layer
        (3, 7, (3, 3), 1, True, "FP32"),  # no multiple of 8
        (8, 16, (1, 3), 1, False, "FP32"),  # not square
        (16, 16, (3, 3), 16, False, "INT8"),  # depthwise, its inputs are 1
        (16, 16, (1, 1), 16, False, "FP32"),
        (12, 12, (3, 3), 12, False, "FP32"),
    ],
)
def test_small_convolutions_stay_float_by_the_documented_rule(
    channels: int, filters: int, kernel: tuple[int, int], group: int, first: bool, precision: str
) -> None:
    graph = conv_model(channels=channels, filters=filters, kernel=kernel, group=group)
    if not first:
        graph = behind_a_layer(graph, channels)
    assert precisions(set_precision(graph, "mixed"))["conv"] == precision
    assert precisions(set_precision(graph, "int8"))["conv"] == "INT8"
    assert precisions(set_precision(graph, "fp16"))["conv"] == "FP32"


def test_a_weight_alone_on_a_grid_is_a_float_layer() -> None:
    graph = conv_model(float_input=True)
    assert precisions(graph) == {"conv": "FP32"}
    assert [node.op_type for node in set_precision(graph, "mixed").graph.node] == ["Conv"]


@given(channels=st.integers(1, 20), filters=st.integers(1, 20), seed=st.integers(0, 99))
def test_float_weights_compute_what_the_codes_did(channels: int, filters: int, seed: int) -> None:
    graph = conv_model(channels=channels, filters=filters)
    x = np.random.default_rng(seed).normal(size=(2, channels, 8, 8)).astype(np.float32)
    codes, floats = (reference_run(g)[0]({"x": x})["y"] for g in (graph, set_precision(graph, "fp16")))
    np.testing.assert_array_equal(floats, codes)


def test_the_layers_of_an_exported_file(digits_models: dict[str, Path]) -> None:
    names = precisions(set_precision(onnx.load(digits_models["tensorrt"]), "mixed"))
    assert [p for name, p in names.items() if not name.startswith("grad/")] == ["INT8"] * 4
    assert [p for name, p in names.items() if name.startswith("grad/")] == ["FP32"] * 3
    assert set(precisions(onnx.load(digits_models["float"])).values()) == {"FP32"}


def test_codes_that_are_only_moved_are_still_codes() -> None:
    grid = ["scale", "zero_point"]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", *grid], ["codes"], "quantize"),
        helper.make_node("DequantizeLinear", ["codes", *grid], ["values"], "dequantize"),
        helper.make_node("MaxPool", ["values"], ["pooled"], "pool", kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Flatten", ["pooled"], ["flat"], "flatten"),
        helper.make_node("DequantizeLinear", ["weight_codes", "scale", "zero_point"], ["weight"], "weight_grid"),
        helper.make_node("Gemm", ["flat", "weight"], ["y"], "gemm"),
    ]
    constants = {
        "scale": np.array(0.1, np.float32),
        "zero_point": np.array(0, np.int8),
        "weight_codes": np.ones((8, 3), np.int8),
    }
    graph = model(nodes, constants, {"x": ["N", 2, 4, 4]}, {"y": ["N", 3]})
    assert precisions(graph) == {"gemm": "INT8"}
    nodes[2] = helper.make_node("AveragePool", ["values"], ["pooled"], "pool", kernel_shape=[2, 2], strides=[2, 2])
    graph = model(nodes, constants, {"x": ["N", 2, 4, 4]}, {"y": ["N", 3]})
    assert precisions(graph) == {"gemm": "FP32"}


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(OptionError, match="precision 'int4': expected one of mixed, int8, fp16"):
        set_precision(conv_model(), "int4")
