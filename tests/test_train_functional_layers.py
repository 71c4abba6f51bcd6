"""Layers that a network calls as functions of its own parameters are quantized like any other."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.quantization.description import describe
from train.quantization.quantize import quantize, quantizers, weight_quantizer
from train.quantization.spec import QuantSpec
from train.quantization.tracing import trace

SHAPE = (3, 9, 9)


class SameConv(nn.Conv2d):
    """Pads on one side more than on the other where the stride asks for it, as TensorFlow does."""

    def __init__(self, *arguments: int, **named: int) -> None:
        super().__init__(*arguments, **named)  # type: ignore[arg-type]
        self.pad = nn.ZeroPad2d((0, 1, 0, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(self.pad(x), self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Functional(nn.Module):
    """A subclass's convolution, bare parameters, one weight called twice, and a linear function."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = SameConv(3, 4, 2, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.kernel = nn.Parameter(torch.randn(4, 1, 3, 3) * 0.3)
        self.head = nn.Module()
        self.head.weight = nn.Parameter(torch.randn(5, 4))
        self.head.bias = nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        for _ in range(2):
            x = F.relu(F.conv2d(x, self.kernel, padding=1, groups=4))
        return F.linear(x.mean((2, 3)), self.head.weight, self.head.bias)


def test_functions_of_own_parameters_become_layers_of_the_same_names() -> None:
    network = Functional().eval()
    traced = trace(network, SHAPE)
    layers = {name: type(m) for name, m in traced.named_modules() if hasattr(m, "weight") and name != "norm"}
    assert layers == {"stem": nn.Conv2d, "kernel_layer": nn.Conv2d, "head": nn.Linear}
    assert {"stem.weight", "head.weight", "head.bias"} <= set(traced.state_dict())
    assert traced.get_submodule("stem").weight is network.stem.weight
    assert isinstance(traced.get_submodule("stem.pad"), nn.ZeroPad2d)
    x = torch.randn(3, *SHAPE)
    torch.testing.assert_close(traced.eval()(x), network(x), rtol=0, atol=1e-6)


def test_they_are_quantized_and_the_function_of_a_weight_called_twice_has_one_quantizer() -> None:
    torch.manual_seed(0)
    network = Functional().eval()
    quantized = quantize(network, QuantSpec(8), image_shape=SHAPE).eval()
    bits = {row.name: row.bits for row in describe(quantized) if row.kind in ("Conv2d", "Linear")}
    assert bits == {"stem": 8, "kernel_layer": 8, "head": 8}
    found = [name for name, m in quantized.named_modules() if weight_quantizer(m) is not None]
    assert sorted(found) == ["head", "kernel_layer", "stem"]
    for quantizer in quantizers(quantized).values():
        quantizer.alpha.data.fill_(4.0) if hasattr(quantizer, "alpha") else None
    x = torch.rand(16, *SHAPE)
    with torch.no_grad():
        difference = (quantized(x) - network(x)).abs().max() / network(x).abs().max()
    assert 0 < difference < 0.05


def test_they_train() -> None:
    quantized = quantize(Functional(), QuantSpec(4), image_shape=SHAPE)
    quantized(torch.rand(4, *SHAPE)).square().sum().backward()
    for name in ("stem", "kernel_layer", "head"):
        original = quantized.get_submodule(name).parametrizations["weight"].original  # type: ignore[index, union-attr]
        assert original.grad.abs().max() > 0
