from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

from train.cpu.convolution import cheap_second_derivatives
from train.losses.saliency import AdaptiveThreshold, sgt_loss
from train.models.resnet20 import ResNet20
from train.quantization.quantize import quantize, start_alphas
from train.quantization.quantizers import WeightQuantizer
from train.quantization.spec import QuantSpec


@st.composite
def layers(draw: st.DrawFn) -> nn.Conv2d:
    groups, torch_seed = draw(st.sampled_from([1, 1, 2, 3])), draw(st.integers(0, 999))
    sizes = {
        name: (draw(st.integers(low, 3)), draw(st.integers(low, 3)))
        for name, low in (("kernel_size", 1), ("stride", 1), ("padding", 0), ("dilation", 1))
    }
    torch.manual_seed(torch_seed)
    channels = [groups * draw(st.integers(1, 3)) for _ in range(2)]
    return nn.Conv2d(*channels, groups=groups, bias=draw(st.booleans()), **sizes)  # type: ignore[arg-type]


def images_of(layer: nn.Conv2d, layout: torch.memory_format = torch.contiguous_format) -> Tensor:
    return torch.randn(3, layer.in_channels, 8, 9).contiguous(memory_format=layout).requires_grad_()


@given(layers(), st.sampled_from([torch.contiguous_format, torch.channels_last]), st.booleans())
def test_values_and_first_gradients_are_those_of_pytorch_bit_for_bit(
    layer: nn.Conv2d, layout: torch.memory_format, frozen: bool
) -> None:
    layer.weight.requires_grad_(not frozen)
    x = images_of(layer, layout)
    found = []
    for cheap in (False, True):
        x.grad, _ = None, layer.zero_grad()
        if cheap:
            with cheap_second_derivatives(layer):
                y = layer(x)
        else:
            y = layer(x)
        y.backward(y.detach().sin())
        found.append([y, x.grad, *(p.grad for p in layer.parameters())])
    for a, b in zip(*found, strict=True):
        assert (a is None and b is None and frozen) or torch.equal(a, b)  # type: ignore[arg-type]


@settings(max_examples=12)  # finite differences take a network's run for each of a thousand numbers
@given(layers(), st.integers(0, 99))
def test_second_derivatives_are_those_of_finite_differences(layer: nn.Conv2d, seed: int) -> None:
    torch.manual_seed(seed)
    layer = layer.double()
    x = torch.randn(2, layer.in_channels, 7, 7, dtype=torch.float64, requires_grad=True)

    def input_gradient(weight: Tensor, upstream: Tensor) -> Tensor:
        with cheap_second_derivatives(layer):
            y: Tensor = torch.func.functional_call(layer, {"weight": weight}, (x,))
        return torch.autograd.grad(y, x, upstream, create_graph=True)[0]

    weight, upstream = layer.weight.detach().requires_grad_(), torch.randn_like(layer(x)).requires_grad_()
    assert torch.autograd.gradcheck(input_gradient, (weight, upstream))


@pytest.mark.parametrize(("bfloat16", "tolerance"), [(False, 1e-5), (True, 0.02)])
def test_a_loss_on_the_input_gradient_moves_weights_as_by_pytorch(bfloat16: bool, tolerance: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(inplace=True), nn.Conv2d(16, 16, 3, padding=1, groups=4), nn.Flatten()
    )
    parametrize.register_parametrization(model[0], "weight", WeightQuantizer(model[0].weight, 4, "absmax"))
    x, found = torch.randn(8, 3, 12, 12).requires_grad_(), []
    for one in (copy.deepcopy(model), model):
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            if one is model:
                with cheap_second_derivatives(one):
                    y = one(x)
            else:
                y = one(x)
        assert y.dtype == (torch.bfloat16 if bfloat16 else torch.float32)
        (gradient,) = torch.autograd.grad(y.float().sin().sum(), x, create_graph=True)
        (gradient.abs().sum() + y.float().square().mean()).backward()
        found.append([p.grad for p in one.parameters()])
    for a, b in zip(*found, strict=True):
        assert a is not None
        assert b is not None
        assert a.abs().max() > 0
        assert (a - b).abs().max() <= tolerance * a.abs().max()


def test_layers_are_pytorchs_again_afterwards_also_after_an_error() -> None:
    layer = nn.Conv2d(1, 1, 3)

    def fails() -> None:
        with cheap_second_derivatives(layer):
            assert "_conv_forward" in vars(layer)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fails()
    assert "_conv_forward" not in vars(layer)


def test_an_image_without_a_batch_is_convolved_as_by_pytorch() -> None:
    layer, image = nn.Conv2d(2, 3, 3, stride=2), torch.randn(2, 7, 8)
    expected = layer(image)
    with cheap_second_derivatives(layer):
        assert torch.equal(layer(image), expected)


def test_layers_that_compute_in_a_way_of_their_own_keep_it() -> None:
    class Doubled(nn.Conv2d):
        def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return super()._conv_forward(2 * x, weight, bias)

    model = nn.ModuleList([
        Doubled(1, 1, 3), nn.Conv2d(1, 1, 3, padding="same"), nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect")
    ])  # fmt: skip
    x = torch.randn(2, 1, 5, 5)
    before = [layer(x) for layer in model]
    with cheap_second_derivatives(model):
        assert all("_conv_forward" not in vars(layer) for layer in model)
        assert all(torch.equal(layer(x), y) for layer, y in zip(model, before, strict=True))


class Counted(TorchDispatchMode):
    """What autograd computes: gradients of inputs and of weights of convolutions, and of alphas."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs = self.weights = self.alphas = self.convolutions = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name == "convolution_backward":
            self.inputs += args[-1][0]
            self.weights += args[-1][1]
        self.alphas += name == "threshold_backward"
        self.convolutions += name == "convolution"
        return func(*args, **(kwargs or {}))


def test_steps_compute_no_more_gradients_than_their_losses_need() -> None:
    """19 convolutions, 19 alphas and one of the last layer; no step needs the first convolution's input twice."""
    torch.manual_seed(0)
    model = quantize(ResNet20(3, (8, 8), 5), QuantSpec(4), input_scale=1 / 64)
    images, labels = torch.randn(6, 3, 8, 8), torch.arange(6) % 5
    start_alphas(model, images)
    alphas = sum(name.endswith("alpha") for name, _ in model.named_parameters())
    parameters = list(model.parameters())
    guided, adaptive = sgt_loss, AdaptiveThreshold(0.01)
    for loss, forward, of_inputs, of_weights in (
        (guided, 38, 19 + 18 + 18, 38),
        (adaptive.loss, 57, 19 + 18 + 19, 57),
    ):
        with Counted() as counted:
            terms = loss(model.train(), images, labels)
            terms.loss.backward(inputs=[*parameters, *adaptive.parameters()])
        assert counted.alphas == 2 * alphas
        assert (counted.convolutions, counted.inputs, counted.weights) == (forward, of_inputs, of_weights)
