"""Small networks that share nothing with train/models; each holds what quantizing or folding can get wrong."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runtime.errors import OptionError
from train.quantization.quantizers import PACT


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


def move_alphas(network: nn.Module, generator: torch.Generator) -> None:
    """Take every alpha away from the activation that it starts as: the kink of its own gate.

    It is a simple fraction of the grid before it, too: means over the image would lie half-way between codes.
    """
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, PACT):
                module.alpha.mul_(0.85 + 0.1 * torch.rand((), generator=generator))


class _SqueezeExcite(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(channels, 4, 1)
        self.up = nn.Conv2d(4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        share = F.silu(self.down(x.mean((2, 3), keepdim=True)))
        return x * F.hardsigmoid(self.up(share))


class _InvertedResidual(nn.Module):
    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        wide = 2 * channels
        self.expand = nn.Sequential(nn.Conv2d(channels, wide, 1, bias=False), nn.BatchNorm2d(wide))
        self.depthwise = nn.Conv2d(wide, wide, 3, stride, padding=1, groups=wide, bias=False)
        self.norm = nn.BatchNorm2d(wide)
        self.act = nn.Hardswish(inplace=True)
        self.gate = _SqueezeExcite(wide)
        self.project = nn.Sequential(nn.Conv2d(wide, out, 1, bias=False), nn.BatchNorm2d(out))
        self.adds = stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.expand(x))
        y = self.gate(self.act(self.norm(self.depthwise(y))))
        y = self.project(y)
        return x + y if self.adds else y


class MobileNet(nn.Module):
    """Inverted residuals with squeeze and excitation, Hardswish, SiLU, ReLU6; 16 x 16 pixels, 4 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6(inplace=True))
        self.blocks = nn.Sequential(_InvertedResidual(8, 12, 2), _InvertedResidual(12, 12, 1))
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x)).mean([2, 3])
        return self.head(F.dropout(x, 0.1, training=self.training))


class TwoBranches(nn.Module):
    """Two branches joined channel by channel, with a pre-activation norm and pooled and padded codes."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Conv2d(3, 8, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        self.right = nn.Sequential(nn.Conv2d(3, 8, 3), nn.LeakyReLU(0.1), nn.AvgPool2d(3, 2, 1))
        self.norm = nn.BatchNorm2d(16)
        self.squeeze = nn.Conv2d(16, 12, 1)
        self.mix = nn.Conv2d(24, 12, 3, stride=2, groups=4)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.left(x), F.pad(self.right(x), (0, 1, 0, 1))
        y = F.relu(self.squeeze(F.relu(self.norm(torch.cat([left, right], dim=1)))))
        y = torch.cat((y, y * torch.sigmoid(left.mean(1, keepdim=True))), dim=1)
        return self.head(F.max_pool2d(torch.relu(self.mix(y)), 3).flatten(1))


class PatchMLP(nn.Module):
    """An MLP over patches and over features in turn, its patches cut by reshaping; 16 x 16 pixels, 4 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3 * 4 * 4, 24)
        self.position = nn.Parameter(torch.randn(16, 24) * 0.02)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(24), nn.LayerNorm(24), nn.LayerNorm(24)
        self.across = nn.Sequential(nn.Linear(16, 20), nn.GELU(), nn.Dropout(0.1), nn.Linear(20, 16))
        self.within = nn.Sequential(nn.Linear(24, 48), nn.SiLU(), nn.Linear(48, 24))
        self.head = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        assert h == w == 16, "16 x 16 pixels"
        x = x.reshape(n, c, 4, 4, 4, 4).permute(0, 2, 4, 1, 3, 5).reshape(n, 16, -1)
        x = self.embed(x) + self.position
        x = x + self.across(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        x = x + self.within(self.norm2(x))
        return self.head(self.norm3(x).mean(1))


class Attention(nn.Module):
    """One block of a transformer, its attention by function, with one matrix for query, key and value."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.norm = nn.LayerNorm(16)
        self.qkv = nn.Linear(16, 48)
        self.project = nn.Linear(16, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        n, t, c = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(n, t, 3, 2, c // 2).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=0.1 if self.training else 0.0)
        return self.head((x + self.project(y.transpose(1, 2).reshape(n, t, c))).mean(1))


# What `--arch tests.toy_models:NAME` names, and what it must refuse.


def small_convnet(channels: int, size: tuple[int, int], classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3, padding=1), nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes),
    )  # fmt: skip


def makes_features(channels: int, size: tuple[int, int], classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * size[0] * size[1], 5))


def says_it_itself(channels: int, size: tuple[int, int], classes: int) -> nn.Module:
    raise OptionError("8 x 8: expected 16 x 16")


def needs_larger_images(channels: int, size: tuple[int, int], classes: int) -> nn.Module:
    raise ValueError(f"{size[0]} x {size[1]} is too small")


def takes_three_channels(channels: int, size: tuple[int, int], classes: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, classes, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def makes_a_string(channels: int, size: tuple[int, int], classes: int) -> str:
    return "a network"


def takes_nothing() -> nn.Module:
    return nn.Identity()


not_code = "not code"


def mobile_net(channels: int, size: tuple[int, int], classes: int) -> nn.Module:
    return MobileNet()


def two_branches(channels: int, size: tuple[int, int], classes: int) -> nn.Module:
    return TwoBranches()


def patch_mlp(channels: int, size: tuple[int, int], classes: int) -> nn.Module:
    return PatchMLP()


def attention(channels: int, size: tuple[int, int], classes: int) -> nn.Module:
    return Attention()
