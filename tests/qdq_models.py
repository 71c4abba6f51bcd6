"""One-layer graphs with Q/DQ, as a rule of TensorRT wants them or as it does not."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def model(
    nodes: list[onnx.NodeProto],
    constants: dict[str, np.ndarray],
    inputs: dict[str, list[Any]],
    outputs: dict[str, list[Any]],
    kind: int = TensorProto.FLOAT,
) -> onnx.ModelProto:
    """Return a checked model of opset 21 with float inputs and outputs of these shapes."""
    graph = helper.make_graph(
        nodes,
        "toy",
        [helper.make_tensor_value_info(name, kind, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(made, full_check=True)
    return made


def conv_model(
    *,
    channels: int = 32,
    filters: int = 32,
    kernel: tuple[int, int] = (3, 3),
    group: int = 1,
    code_type: Any = np.int8,
    zero_point: int = 0,
    scale: float = 0.02,
    scales_per_channel: bool = False,
    weight_axis: int = 0,
    float_weight: bool = False,
    float_input: bool = False,
    int32_bias: bool = False,
) -> onnx.ModelProto:
    """Return x float32 [N, C, 8, 8] -> Q -> DQ -> Conv `conv`, weight codes -> DQ, or as the arguments say."""
    rng = np.random.default_rng(0)
    shape = (filters, channels // group, *kernel)
    steps = np.full(shape[weight_axis], 0.01, np.float32)
    scales = np.full(channels, scale, np.float32) if scales_per_channel else np.array(scale, np.float32)
    constants = {
        "scale": scales,
        "zero_point": np.full(scales.shape, zero_point, code_type),
        "codes": rng.integers(-127, 128, shape).astype(np.int8),
        "steps": steps,
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero_point"], ["x_codes"], "quantize"),
        helper.make_node("DequantizeLinear", ["x_codes", "scale", "zero_point"], ["x_grid"], "dequantize"),
    ]
    weight = helper.make_node("DequantizeLinear", ["codes", "steps"], ["weight"], "weight_grid", axis=weight_axis)
    inputs = ["x" if float_input else "x_grid", "weight"]
    if float_input:
        nodes = []
        del constants["scale"], constants["zero_point"]
    if float_weight:
        constants["weight"] = rng.normal(size=shape).astype(np.float32)
        del constants["codes"], constants["steps"]
    else:
        nodes.append(weight)
    if int32_bias:
        constants.update(bias_codes=np.ones(filters, np.int32), bias_steps=np.full(filters, 2e-4, np.float32))
        nodes.append(
            helper.make_node("DequantizeLinear", ["bias_codes", "bias_steps"], ["bias"], "bias_grid", axis=0)
        )
        inputs.append("bias")
    nodes.append(helper.make_node("Conv", inputs, ["y"], "conv", group=group, kernel_shape=kernel))
    size = [8 - k + 1 for k in kernel]
    return model(nodes, constants, {"x": ["N", channels, 8, 8]}, {"y": ["N", filters, *size]})
