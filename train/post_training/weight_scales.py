"""Weight scales of a network that is not trained on its grid: the least squared error, channel by channel.

A regression over whole distributions (SAWB) leaves its domain on trained 8-bit layers beside low-bit ones, and the
largest weight is too large a clip at few bits.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import parametrize

from train.quantization.quantizers import WeightQuantizer

# Clips that are tried, as shares of a channel's largest weight.
_SHARES = torch.linspace(0.2, 1.0, 81)


def search_weight_scales(model: nn.Module) -> int:
    """Set, in place, every learned weight scale of a quantized network; return how many layers there are.

    The clip of each output channel is the one of 81 candidates whose grid changes the channel's weights least, in
    squares (Banner et al. 2019 derive it for distributions; here it is measured).
    """
    layers = 0
    for layer in model.modules():
        quantizer = learned_scale_of(layer)
        if quantizer is None:
            continue
        weight = layer.parametrizations.weight.original.detach().flatten(1)  # type: ignore[operator,union-attr]
        largest = weight.abs().amax(1, keepdim=True)
        best, scales = torch.full_like(largest, torch.inf), torch.ones_like(largest)
        for share in _SHARES:
            scale = (share * largest / quantizer.qmax).clamp_min(torch.finfo(torch.float32).tiny)
            rounded = (weight / scale).round().clamp(-quantizer.qmax, quantizer.qmax) * scale
            error = (rounded - weight).square().sum(1, keepdim=True)
            scales = torch.where(error < best, scale, scales)
            best = torch.minimum(best, error)
        with torch.no_grad():
            quantizer.learned_scale.copy_(scales.squeeze(1))
        layers += 1
    return layers


def learned_scale_of(layer: nn.Module) -> WeightQuantizer | None:
    """Return a layer's weight quantizer, if its scale is a parameter."""
    if not parametrize.is_parametrized(layer, "weight"):
        return None
    quantizer = layer.parametrizations.weight[0]  # type: ignore[index,union-attr]
    return quantizer if isinstance(quantizer, WeightQuantizer) and quantizer.method == "lsq" else None
