"""Channels whose bias no int32 sum can hold, since next to no weight is left of them."""

from __future__ import annotations

import copy
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from export.calibration import calibrate_network, spec_of
from export.pipeline import export
from train.input_spec import InputSpec
from train.model import QuantizedModel
from train.post_training.constant_channels import silence_constant_channels
from train.quantization.accumulators import accumulators
from train.quantization.description import warnings_of
from train.quantization.quantize import float_weight, quantize
from train.quantization.spec import QuantSpec

SPEC = InputSpec((8, 8), 3, (0.5,) * 3, (0.25,) * 3)
IMAGE = (3, 8, 8)
BIAS = 2.0


class _Net(nn.Module):
    """A depthwise layer, of which BatchNorm leaves channel 0 `gamma`, and a pointwise one that reads it."""

    def __init__(self, gamma: float, shift: float = BIAS) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.depthwise = nn.Conv2d(3, 3, 3, padding=1, groups=3, bias=False)
        self.norm = nn.BatchNorm2d(3).eval()
        self.pointwise, self.head = nn.Conv2d(3, 8, 1), nn.Linear(8 * 64, 4)
        with torch.no_grad():
            self.norm.weight[0], self.norm.bias[0] = gamma, shift

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.pointwise(torch.relu(self.norm(self.depthwise(x)))))
        return self.head(x.flatten(1))


def _images(count: int = 16) -> torch.Tensor:
    return torch.randint(256, (count, *IMAGE), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("gamma", "shift", "silent"),
    [(1e-8, BIAS, 1), (-1e-8, -BIAS, 1), (1e-3, BIAS, 0), (1e-8, 0.0, 0), (0.0, BIAS, 0)],
)
def test_a_channel_is_silenced_where_its_bias_is_beyond_int32_and_nothing_else(
    gamma: float, shift: float, silent: int
) -> None:
    network = quantize(_Net(gamma, shift), QuantSpec(8), input_scale=SPEC.grid_scale).eval()
    before = copy.deepcopy(network)
    assert silence_constant_channels(network, IMAGE) == silent
    assert not any((call.overflows & (call.largest > 0)).any() for call in accumulators(network, IMAGE))
    weight, kept = (float_weight(n.get_submodule("depthwise")) for n in (network, before))
    assert int((weight != kept).flatten(1).any(1).sum()) == silent
    # The bound of `NEGLIGIBLE`: what went is less than a thousandth of what stays.
    x = SPEC.normalize(_images())
    with torch.no_grad():
        after, first = (n.get_submodule("norm")(n.get_submodule("depthwise")(x)) for n in (network, before))
    assert float((after - first).abs().max()) <= 1e-3 * abs(shift)


def test_a_channel_that_adds_more_than_a_thousandth_of_its_bias_stays() -> None:
    """Its 4,096 products add up to 3 % of what int32 holds, and its bias to all of it."""
    torch.manual_seed(0)
    layers = nn.Conv2d(4096, 2, 1, bias=False), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(2, 2)
    with torch.no_grad():
        layers[0].weight[0] = 1
        layers[1].weight[0], layers[1].bias[0] = 3.7e-6, 1.0
    network = quantize(nn.Sequential(*layers).eval(), QuantSpec(8), input_scale=1 / 64).eval()
    assert accumulators(network, (4096, 1, 1))[0].overflows.tolist() == [True, False]
    assert silence_constant_channels(network, (4096, 1, 1)) == 0


def test_a_network_with_such_a_channel_runs_on_codes_in_onnx_runtime(tmp_path: Path) -> None:
    images = _images(24)
    found = calibrate_network(_Net(1e-8), SPEC, images, spec_of(8, "ort"))
    assert warnings_of(found.network) == []  # it lost nothing
    model = QuantizedModel(found.network, SPEC, tuple("abcd"), images)
    data = export(model, target="ort", saliency=False).data
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3  # that such a file is for this machine is no news
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"image": images.permute(0, 2, 3, 1).contiguous().numpy()})
    with torch.no_grad():
        expected = found.floating(SPEC.normalize(images))
    assert (torch.from_numpy(logits).argmax(1) == expected.argmax(1)).float().mean() > 0.9
    executed = [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]
    assert (executed.count("QLinearConv"), executed.count("Conv")) == (2, 0)
