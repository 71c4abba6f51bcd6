"""Channels that are constant to every grid behind them, and whose bias an engine's int32 sums cannot hold.

BatchNorm leaves some channels of a trained network with next to no weight. Their steps are so small that the bias
is beyond int32 in them, and ONNX Runtime has to compute their whole layer in float.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from train.quantization.accumulators import accumulators
from train.quantization.quantize import float_weight

# The most that such a channel adds to its bias, as a share of it: a quarter of a step where the bias is 255 steps.
NEGLIGIBLE = 1e-3


@torch.no_grad()
def silence_constant_channels(network: nn.Module, image: tuple[int, int, int]) -> int:
    """Make the weights of such channels 0, in place; their step is then free, and their layer runs on codes.

    Args:
        network: from `quantize`, with its scales chosen.
        image: channels, height and width.

    Returns:
        how many channels.
    """
    silent: dict[nn.Module, Tensor] = {}
    for call in accumulators(network, image):
        adds_nothing = call.largest * call.step <= NEGLIGIBLE * call.bias.abs()
        found = call.overflows & (call.largest > 0) & adds_nothing
        silent[call.layer] = silent.get(call.layer, found) & found  # of a layer called twice, in both calls
    for layer, channels in silent.items():
        float_weight(layer)[channels] = 0
    return sum(int(channels.sum()) for channels in silent.values())
