from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from export.engine.rules import check_qdq
from runtime.errors import ModelError
from tests.qdq_models import conv_model, model

BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "uint8": ({"code_type": np.uint8}, r"QuantizeLinear node 'quantize': has uint8 codes"),
    "asymmetric": ({"zero_point": -3}, r"QuantizeLinear node 'quantize': has the zero point -3, expected 0"),
    "int32 bias": ({"int32_bias": True}, r"DequantizeLinear node 'bias_grid': has int32 codes"),
    "int16": ({"code_type": np.int16}, r"QuantizeLinear node 'quantize': has int16 codes"),
    "scale 0": ({"scale": 0.0}, r"QuantizeLinear node 'quantize': its scale is not above 0"),
    "scale inf": ({"scale": np.inf}, r"QuantizeLinear node 'quantize': its scale is not above 0"),
    "scales": ({"scales_per_channel": True}, r"QuantizeLinear node 'quantize': has 32 scales for an activation"),
    "axis": (
        {"weight_axis": 1},
        r"DequantizeLinear node 'weight_grid': has scales along axis 1 .* expected axis 0",
    ),
}


def residual(*, quantized_branch: bool, relu: bool = False) -> onnx.ModelProto:
    """conv(x) + x with x on a grid, and the convolution's result on one, too, if asked for."""
    base = conv_model()
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in base.graph.initializer}
    constants["weight"] = np.zeros((32, 32, 1, 1), np.float32)
    del constants["codes"], constants["steps"]
    grid = ["scale", "zero_point"]
    nodes = [*base.graph.node[:2], helper.make_node("Conv", ["x_grid", "weight"], ["branch"], "conv")]
    branch = "branch"
    if relu:
        nodes.append(helper.make_node("Relu", [branch], ["active"], "relu"))
        branch = "active"
    if quantized_branch:
        nodes.append(helper.make_node("QuantizeLinear", [branch, *grid], ["branch_codes"], "branch_quantize"))
        nodes.append(helper.make_node("DequantizeLinear", ["branch_codes", *grid], ["branch_grid"], "branch_grid"))
        branch = "branch_grid"
    nodes.append(helper.make_node("Add", [branch, "x_grid"], ["y"], "add"))
    return model(nodes, constants, {"x": ["N", 32, 8, 8]}, {"y": ["N", 32, 8, 8]})


def test_our_tensorrt_files_keep_the_rules(digits_models: dict[str, Path]) -> None:
    check_qdq(onnx.load(digits_models["tensorrt"]))
    check_qdq(onnx.load(digits_models["float"]))
    check_qdq(conv_model())


@pytest.mark.parametrize("name", ["openvino", "ort"])
def test_a_file_for_another_engine_is_refused_with_the_export_that_mends_it(
    digits_models: dict[str, Path], name: str
) -> None:
    with pytest.raises(ModelError, match=r"has uint8 codes.*--target tensorrt`$"):
        check_qdq(onnx.load(digits_models[name]))


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_rule_is_one_line_that_names_the_node(name: str) -> None:
    arguments, told = BROKEN[name]
    with pytest.raises(ModelError, match=told) as error:
        check_qdq(conv_model(**arguments))
    assert "\n" not in str(error.value)


def test_codes_that_something_computes_on_are_refused() -> None:
    base = conv_model()
    clip = helper.make_node("Clip", ["x_codes", "low"], ["clipped"], "clip")
    base.graph.node[1].input[0] = "clipped"
    base.graph.node.insert(1, clip)
    base.graph.initializer.append(onnx.numpy_helper.from_array(np.array(0, np.int8), "low"))
    with pytest.raises(ModelError, match="'quantize': its codes are used by Clip node 'clip'"):
        check_qdq(base)


def test_a_scale_that_is_computed_is_refused() -> None:
    base = conv_model()
    base.graph.node[0].input[1] = "computed"
    base.graph.node.insert(0, helper.make_node("ReduceMax", ["x"], ["computed"], "max", keepdims=0))
    with pytest.raises(ModelError, match="'quantize': its scale is computed at run time"):
        check_qdq(base)


def test_a_residual_sum_has_a_grid_on_its_identity_branch_only() -> None:
    check_qdq(residual(quantized_branch=False))
    check_qdq(residual(quantized_branch=True, relu=True))  # a layer and its Relu end in a grid of their own
    with pytest.raises(ModelError, match="Add node 'add': its addend from Conv node 'conv' is quantized"):
        check_qdq(residual(quantized_branch=True))


@pytest.mark.parametrize(("transposed", "axis"), [(0, 1), (1, 0)])
def test_the_scales_of_a_matrix_lie_along_its_outputs(transposed: int, axis: int) -> None:
    def gemm(scales_axis: int) -> onnx.ModelProto:
        constants = {
            "codes": np.ones((4, 4), np.int8),
            "steps": np.full(4, 0.5, np.float32),
        }
        nodes = [
            helper.make_node("DequantizeLinear", ["codes", "steps"], ["weight"], "weight_grid", axis=scales_axis),
            helper.make_node("Gemm", ["x", "weight"], ["y"], "gemm", transB=transposed),
        ]
        return model(nodes, constants, {"x": ["N", 4]}, {"y": ["N", 4]})

    check_qdq(gemm(axis))
    with pytest.raises(ModelError, match=f"expected axis {axis}"):
        check_qdq(gemm(1 - axis))
