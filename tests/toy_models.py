"""Small networks that share nothing with train.models; each holds what quantizing or folding can get wrong."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FunctionalNet(nn.Module):
    """Every way to call a ReLU, one ReLU module used twice, and a shared convolution under two BatchNorms."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.shared = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(8)
        self.norm2 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = self.relu(self.norm1(self.shared(x)))
        x = self.relu(self.norm2(self.shared(x)) + x)
        x = F.adaptive_avg_pool2d(torch.relu(x), 1).flatten(1)
        return self.head(x.relu())


class DepthwiseNet(nn.Module):
    """Grouped, dilated and strided convolutions, and a branch that ends in a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.depthwise = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.ReLU())
        self.dilated = nn.Sequential(nn.Conv2d(8, 8, 3, padding=2, dilation=2), nn.ReLU())
        self.pool = nn.MaxPool2d(2)
        self.mix = nn.Conv2d(16, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.pool(torch.cat([self.depthwise(x), self.dilated(x)], 1))
        return self.head(F.relu(self.mix(x)).mean((2, 3)))


def randomize_norms(model: nn.Module, *, seed: int = 0) -> nn.Module:
    """Give every BatchNorm statistics as if trained, with negative gammas and one that is 0."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            n = module.num_features
            with torch.no_grad():
                module.weight.copy_(torch.randn(n, generator=generator) + 0.5)
                module.weight[0], module.weight[1] = 0.0, -1.0
                module.bias.copy_(torch.randn(n, generator=generator) * 0.3)
                module.running_mean.copy_(torch.randn(n, generator=generator) * 0.2)
                module.running_var.copy_(torch.rand(n, generator=generator) + 0.5)
    return model
