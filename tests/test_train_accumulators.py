"""Biases on the grid of the sums they are added to: whole steps, and hardly another network."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from export.deploy_form import deploy_form, folded_layers
from export.passes.keep_float import keep_float
from tests.toy_models import FunctionalNet
from train.input_spec import InputSpec
from train.quantization.accumulators import LARGEST_SUM, accumulators, biases_on_grid, put_biases_on_grid
from train.quantization.quantize import quantize, start_alphas
from train.quantization.spec import QuantSpec

IMAGE = (3, 12, 12)
SPEC = InputSpec(IMAGE[1:], 3, (128 / 255,) * 3, (0.25,) * 3)


def quantized(model: nn.Module, spec: QuantSpec) -> nn.Module:
    torch.manual_seed(0)
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.running_mean, -0.5, 0.5)  # type: ignore[arg-type]
        nn.init.uniform_(norm.running_var, 0.5, 2)  # type: ignore[arg-type]
        if norm.affine:
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.bias, -0.5, 0.5)
    network = quantize(model, spec, input_scale=SPEC.grid_scale).eval()
    start_alphas(network, torch.randn(16, *IMAGE))
    return network


def with_norms() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8, affine=False), nn.ReLU(),
        nn.Conv2d(8, 8, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_every_folded_bias_is_a_whole_number_of_steps(bits: int) -> None:
    network = quantized(with_norms(), QuantSpec(bits))
    before = [call.bias.clone() for call in accumulators(network, IMAGE)]
    put_biases_on_grid(network, IMAGE)
    calls = accumulators(network, IMAGE)
    assert [call.name for call in calls] == ["0", "3", "6", "10"]
    for call, old in zip(calls, before, strict=True):
        steps = call.bias / call.step
        assert torch.allclose(steps, steps.round(), atol=1e-3)
        assert ((call.bias - old).abs() <= 0.501 * call.step).all()
    # They are the biases that the deploy form adds.
    for call, layer in zip(calls, folded_layers(deploy_form(network, SPEC)).values(), strict=True):
        assert torch.allclose(layer.bias.double(), call.bias, rtol=1e-5, atol=1e-6)


def test_biases_are_put_back_after_an_evaluation_in_training() -> None:
    network = quantized(with_norms(), QuantSpec(4)).train()
    state = {name: value.clone() for name, value in network.state_dict().items()}
    with biases_on_grid(network, IMAGE):
        assert not torch.equal(network.state_dict()["1.bias"], state["1.bias"])
        assert network.training
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


def test_a_norm_or_bias_that_lies_on_several_grids_stays() -> None:
    network = quantized(FunctionalNet(), QuantSpec(4))
    shared = network.get_submodule("shared")
    assert sum(call.layer is shared for call in accumulators(network, IMAGE)) == 2
    put_biases_on_grid(network, IMAGE)
    for call in accumulators(network, IMAGE):
        steps = call.bias / call.step
        assert torch.allclose(steps, steps.round(), atol=1e-3), call.name  # each BatchNorm is of one call alone


def test_a_channel_without_codes_gets_a_scale_that_its_bias_fits() -> None:
    network = quantized(with_norms(), QuantSpec(4))
    with torch.no_grad():
        network.get_submodule("1").weight[2] = 0  # type: ignore[index, operator]
        network.get_submodule("1").bias[2] = 0.3  # type: ignore[index, operator]
    put_biases_on_grid(network, IMAGE)
    layer = folded_layers(deploy_form(network, SPEC))["0"]
    assert layer.codes is not None
    assert layer.scale is not None
    assert layer.codes[2].count_nonzero() == 0
    steps = layer.bias[2] / (SPEC.grid_scale * layer.scale[2])
    assert float(layer.bias[2]) == pytest.approx(0.3)
    assert float(steps) == pytest.approx(2**20, rel=1e-5)


class Wide(nn.Module):
    """One linear layer on all of an image's values."""

    def __init__(self, weights: torch.Tensor) -> None:
        super().__init__()
        self.fc = nn.Linear(len(weights), 2)
        with torch.no_grad():
            self.fc.weight.copy_(weights)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x.flatten(1))


def test_sums_that_leave_int32_are_found() -> None:
    weights = torch.ones(150_528)
    (call,) = accumulators(quantize(Wide(weights), QuantSpec(8), input_scale=0.01).eval(), (3, 224, 224))
    assert call.largest.tolist() == [150_528 * 127 * 128] * 2
    assert float(call.largest[0]) > LARGEST_SUM
    assert call.overflows.all()
    weights[1:] = 0
    (small,) = accumulators(quantize(Wide(weights), QuantSpec(8), input_scale=0.01).eval(), (3, 224, 224))
    assert not small.overflows.any()


@pytest.mark.parametrize("product", ["Conv", "Gemm"])
def test_onnx_runtime_leaves_a_float_weight_between_two_grids_in_float(product: str) -> None:
    body = {
        "Conv": "y = Conv<pads=[1,1,1,1]>(x, weight, bias)",
        "Gemm": "y = Gemm<transB=1>(x, weight, bias)",
    }[product]
    sizes = "3,4,5,5" if product == "Conv" else "3,100"
    model = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["": 21]> g (float[{sizes}] image) => (float result)
        <float step = {{0.0213}}, float after = {{0.0391}}, uint8 zero = {{0}}> {{
            codes = QuantizeLinear(image, step, zero) x = DequantizeLinear(codes, step, zero)
            {body}
            y_codes = QuantizeLinear(y, after, zero) result = DequantizeLinear(y_codes, after, zero) }}"""
    )
    rng = np.random.default_rng(0)
    shape = (4, 4, 3, 3) if product == "Conv" else (64, 100)
    constants = {"weight": rng.normal(size=shape) * 0.1, "bias": rng.normal(size=shape[0])}
    model.graph.initializer.extend(
        onnx.numpy_helper.from_array(value.astype(np.float32), name) for name, value in constants.items()
    )
    image = rng.uniform(0, 5, [int(size) for size in sizes.split(",")]).astype(np.float32)

    def run(level: onnxruntime.GraphOptimizationLevel) -> np.ndarray:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = level
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
        return np.asarray(session.run(None, {"image": image})[0])

    levels = onnxruntime.GraphOptimizationLevel
    expected = run(levels.ORT_DISABLE_ALL)
    assert np.abs(run(levels.ORT_ENABLE_ALL) - expected).max() > 0.03  # what the file must be protected from
    keep_float(model)
    assert np.array_equal(run(levels.ORT_DISABLE_ALL), expected)
    assert np.array_equal(run(levels.ORT_ENABLE_ALL), expected)
