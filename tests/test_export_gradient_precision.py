"""INT8 gradients: which products are on codes, on which grids, and what they compute."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import openvino
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch.nn import functional as F

from export.gradient.int8 import HELD_SHARE
from export.gradient.walk import append_input_gradient

SIZE, CLASSES = 8, 5


def network() -> tuple[onnx.ModelProto, dict[str, torch.Tensor]]:
    """Return a classifier of int8 weights (3x3, strided, grouped, matrix) with a float32 head, and its codes."""
    random = np.random.default_rng(0)
    shapes = {"a": (6, 2, 3, 3), "b": (4, 6, 3, 3), "c": (8, 2, 1, 1), "d": (7, 8 * 16)}
    constants = {"head": random.normal(size=(7, CLASSES)).astype(np.float32), "zero": np.zeros((), np.float32)}
    for name, shape in shapes.items():
        constants[f"{name}_codes"] = random.integers(-127, 128, shape, np.int8)
        constants[f"{name}_scale"] = random.uniform(1e-3, 4e-3, shape[0]).astype(np.float32)
    body = " ".join(f"{n} = DequantizeLinear<axis=0>({n}_codes, {n}_scale)" for n in shapes)
    body += """
        y1 = Conv<pads=[1,1,1,1]>(x, a)
        y2 = Conv<strides=[2,2], pads=[1,1,1,1]>(y1, b)
        y3 = Conv<group=2>(y2, c)
        flat = Flatten(y3)
        y4 = Gemm<transB=1>(flat, d)
        logits = MatMul(y4, head)"""
    graph = f"g (float[N,2,{SIZE},{SIZE}] x) => (float[N,{CLASSES}] logits) {{ {body} }}"
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 21]> {graph}')
    model.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in constants.items())
    return model, {name: torch.tensor(value) for name, value in constants.items()}


def feeds(count: int = 8, seed: int = 1) -> dict[str, np.ndarray]:
    x = np.random.default_rng(seed).normal(size=(count, 2, SIZE, SIZE)).astype(np.float32)
    return {"x": x, "target": np.arange(count) % CLASSES}


def steps(model: onnx.ModelProto) -> list[float]:
    """Return the steps of the gradients' grids, from the logits to the image."""
    values = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    return [float(values[n.input[1]]) for n in model.graph.node if n.op_type == "QuantizeLinear"]


def on_grid(dy: torch.Tensor, scale: torch.Tensor, step: float) -> torch.Tensor:
    """Return s dy on its grid, as the module's formula says."""
    scaled = dy * scale.reshape(-1, *[1] * (dy.ndim - 2))
    return step * torch.clamp(torch.round(scaled / step), -128, 127)


def test_every_layer_but_the_head_is_a_product_of_codes_as_written() -> None:
    model, w = network()
    samples = feeds()
    explained = append_input_gradient(model, outputs=["gradient"], int8_samples=samples)
    d, c, b, a = steps(explained)

    dy = w["head"].T[torch.tensor(samples["target"])]
    dy = on_grid(dy, w["d_scale"], d) @ w["d_codes"].float()
    dy = F.conv_transpose2d(on_grid(dy.reshape(-1, 8, 4, 4), w["c_scale"], c), w["c_codes"].float(), groups=2)
    dy = on_grid(dy, w["b_scale"], b)
    dy = F.conv_transpose2d(dy, w["b_codes"].float(), stride=2, padding=1, output_padding=1)
    expected = F.conv_transpose2d(on_grid(dy, w["a_scale"], a), w["a_codes"].float(), padding=1)

    _, gradient = ReferenceEvaluator(explained).run(None, samples)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5 * np.abs(gradient).max())


def test_the_weights_are_the_codes_rearranged_and_nothing_is_stored_as_floats() -> None:
    model, w = network()
    explained = append_input_gradient(model, int8_samples=feeds())
    added = {t.name: t for t in explained.graph.initializer if t.name.startswith("grad/")}
    codes = [numpy_helper.to_array(t) for t in added.values() if t.data_type == TensorProto.INT8 and t.dims]
    expected = [
        w["d_codes"].T.numpy(),
        w["c_codes"].reshape(2, 4, 2, 1, 1).swapaxes(1, 2).reshape(4, 4, 1, 1).numpy(),
        w["a_codes"].flip(2, 3).swapaxes(0, 1).numpy(),
    ]
    for weight in expected:
        assert any(np.array_equal(weight, found) for found in codes)
    floats = [t for t in added.values() if t.data_type == TensorProto.FLOAT]
    # The head's rows, and zeros for a target that is no class.
    assert max(numpy_helper.to_array(t).size for t in floats) == w["head"].numel() + 7


def test_the_error_is_that_of_eight_bits() -> None:
    model, _ = network()
    samples = feeds(64)
    _, exact = ReferenceEvaluator(append_input_gradient(model)).run(None, samples)
    _, rounded = ReferenceEvaluator(append_input_gradient(model, int8_samples=samples)).run(None, samples)
    error = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
    assert 1e-4 < error < 0.02


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.integers(1, 100))
def test_a_step_holds_the_share_of_all_the_samples_together(count: int) -> None:
    """Samples are run in parts: the grid must come out as if they were run at once."""
    model, w = network()
    samples = feeds(count, seed=count)
    samples["x"] *= 1e-3  # a linear network: its gradients are those of the targets alone
    found = steps(append_input_gradient(model, int8_samples=samples))
    dy = w["head"].T[torch.tensor(samples["target"])] * w["d_scale"]
    assert found[0] * 127 == pytest.approx(float(np.quantile(dy.abs(), HELD_SHARE, method="higher")), rel=1e-5)
    assert found[0] * 127 <= float(dy.abs().max()) * (1 + 1e-6)


@pytest.mark.parametrize("layer", ["a", "b", "c", "d"])
def test_a_channel_without_weights_leaves_the_grid_to_the_others(layer: str) -> None:
    model, _ = network()
    given = {t.name: t for t in model.graph.initializer}
    for part, value in (("codes", 0), ("scale", 100)):  # as a dead channel's scale may be anything
        changed = numpy_helper.to_array(given[f"{layer}_{part}"]).copy()
        changed[1] = value
        given[f"{layer}_{part}"].CopyFrom(numpy_helper.from_array(changed, f"{layer}_{part}"))
    samples = feeds(64)
    _, exact = ReferenceEvaluator(append_input_gradient(model)).run(None, samples)
    _, rounded = ReferenceEvaluator(append_input_gradient(model, int8_samples=samples)).run(None, samples)
    assert np.linalg.norm(rounded - exact) < 0.02 * np.linalg.norm(exact)


def test_a_layer_without_gradient_gets_a_grid_all_the_same() -> None:
    model, _ = network()
    for tensor in model.graph.initializer:
        if tensor.name == "head":
            tensor.CopyFrom(numpy_helper.from_array(np.zeros((7, CLASSES), np.float32), "head"))
    explained = append_input_gradient(model, int8_samples=feeds())
    assert steps(explained) == [1.0] * 4
    assert not ReferenceEvaluator(explained).run(None, feeds())[1].any()


@pytest.mark.parametrize("grid", ["uint8", "zero point", "input channels", "float"])
def test_weights_on_other_grids_stay_in_floats(grid: str) -> None:
    codes = np.random.default_rng(2).integers(1, 100, (3, 2, 1, 1), np.int8)
    zero_point, scale, axis = np.zeros(3, np.int8), np.full(3, 0.1, np.float32), 0
    if grid == "uint8":
        codes, zero_point = codes.astype(np.uint8), zero_point.astype(np.uint8)
    elif grid == "zero point":
        zero_point = np.full(3, 4, np.int8)
    elif grid == "input channels":
        zero_point, scale, axis = np.zeros(2, np.int8), np.full(2, 0.1, np.float32), 1
    body = f"w = DequantizeLinear<axis={axis}>(c, s, z)" if grid != "float" else "w = Cast<to=1>(c)"
    body += " y = Conv(x, w) r = Tanh(y) logits = ReduceMean<keepdims=0>(r, axes)"
    graph = f"g (float[N,2,{SIZE},{SIZE}] x) => (float[N,3] logits) {{ {body} }}"
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 21]> {graph}')
    constants = {"c": codes, "s": scale, "z": zero_point, "axes": np.array([2, 3])}
    model.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in constants.items())
    samples = {"x": feeds(3)["x"], "target": np.arange(3)}
    explained = append_input_gradient(model, outputs=["gradient"], int8_samples=samples)
    assert "QuantizeLinear" not in {node.op_type for node in explained.graph.node}
    same = append_input_gradient(model, outputs=["gradient"])
    found, expected = (ReferenceEvaluator(m).run(None, samples)[1] for m in (explained, same))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_openvino_computes_the_same(batch: int) -> None:
    model, _ = network()
    explained = append_input_gradient(model, outputs=["gradient"], int8_samples=feeds())
    samples = feeds(batch)
    _, expected = ReferenceEvaluator(explained).run(None, samples)
    core = openvino.Core()
    compiled = core.compile_model(
        core.read_model(explained.SerializeToString()), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    gradient = compiled(samples)["gradient"]
    # A gradient on the border of two codes may fall to either side.
    error = np.linalg.norm(gradient - expected) / np.linalg.norm(expected)
    assert error < 5e-3
