"""A quantized network in exact arithmetic, nearly as fast as float32: codes are multiplied, and floats come after.

Float32 holds every whole number up to 2^24, so a layer of codes whose products add up to less is exact in it, in
whatever order they are added. What comes after, scales, biases, BatchNorm and sums, is in float64. Convolutions
in float64 take several times as long, and their weights would be products of scale and code rounded to float32,
which no engine that multiplies codes has.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from train.quantization.accumulators import accumulators
from train.quantization.quantize import float_weight, weight_quantizer
from train.quantization.quantizers import PACT

LARGEST_EXACT = 2**24


class _Constant(nn.Module):
    """Stands for a weight's quantizer and returns the weight that the quantizer gave."""

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)

    def forward(self, original: Tensor) -> Tensor:
        return self.weight


@torch.no_grad()
def in_float64(network: nn.Module) -> nn.Module:
    """Return a copy that computes in float64, with the weights and steps that the network has in float32."""
    copied = copy.deepcopy(network)
    for module in copied.modules():
        if weight_quantizer(module) is not None:
            weight: Any = module.weight
            quantizers: Any = module.parametrizations
            quantizers["weight"][0] = _Constant(weight.detach())
    steps = {name: pact.scale.double() for name, pact in copied.named_modules() if isinstance(pact, PACT)}
    copied.double()
    for name, step in steps.items():
        pact: Any = copied.get_submodule(name)
        pact.alpha.copy_(step * pact.qmax)  # which divided by qmax is the step again, in float64
    return copied


@torch.no_grad()
def on_codes(network: nn.Module, image: tuple[int, int, int]) -> nn.Module:
    """Return a copy in float64 whose layers multiply codes, where their sums are exact in float32.

    Args:
        network: from `train.quantization.quantize.quantize`, in evaluation mode; it takes and gives float64 then.
        image: channels, height and width.
    """
    exact = in_float64(network)
    calls = accumulators(network, image)
    times = Counter(call.name for call in calls)
    for call in calls:
        if times[call.name] > 1 or call.largest.max() > LARGEST_EXACT:
            continue  # it stays in float64
        quantizer, weight = weight_quantizer(call.layer), float_weight(call.layer)
        assert quantizer is not None
        layer: Any = exact.get_submodule(call.name)
        bias = layer.bias
        layer.bias = None
        layer.parametrizations["weight"][0].weight = quantizer.codes(weight).float()
        input_scale = call.inputs.scale.double()
        layer.register_forward_pre_hook(_to_codes(input_scale))
        step = input_scale * quantizer.scale(weight).double()
        layer.register_forward_hook(_to_values(step, bias))
    return exact


def _to_codes(scale: Tensor) -> Callable[[nn.Module, tuple[Tensor]], Tensor]:
    """Return a hook that gives a layer the codes of its input, which lies on a grid of this scale, float64 []."""
    steps = scale.reciprocal()

    def hook(layer: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        return (inputs[0] * steps).float().round_()

    return hook


def _to_values(step: Tensor, bias: Tensor | None) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    """Return a hook that makes a layer's sums of codes its values, float64: step and bias are float64 [O]."""

    def hook(layer: nn.Module, inputs: Any, sums: Tensor) -> Tensor:
        shape = [-1] if isinstance(layer, nn.Linear) else [-1, *[1] * (sums.ndim - 2)]
        values = sums.double().mul_(step.reshape(shape))
        return values if bias is None else values.add_(bias.reshape(shape))

    return hook
