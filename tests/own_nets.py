"""Networks as a user of `python -m export.onnx MODULE:FACTORY` may have them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SameConv(nn.Conv2d):
    """Pads unevenly, then calls the convolution as a function."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride)


class Residual(nn.Module):
    """Drops its branch at random in training, and ends in a softmax, as published classifiers do."""

    def __init__(self, channels: int = 3, classes: int = 10) -> None:
        super().__init__()
        self.stem = SameConv(channels, 8, 3, stride=2)
        self.norm = nn.BatchNorm2d(8)
        self.branch = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.norm(self.stem(x)))
        branch = self.branch(x)
        if self.training:
            branch = branch * (torch.rand(len(x), 1, 1, 1) > 0.2)
        x = F.relu(x + branch)
        return F.softmax(self.head(x.mean((2, 3))), dim=1)


def colored() -> Residual:
    """Return one for ten classes of colour images."""
    torch.manual_seed(0)
    return Residual()


def grey() -> Residual:
    """Return one for ten classes of grey images."""
    torch.manual_seed(1)
    return Residual(channels=1)


def no_network() -> str:
    """Return what is no network."""
    return "weights"


def square() -> nn.Module:
    """Return one for grey images of 8 x 8 alone."""
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 10))
