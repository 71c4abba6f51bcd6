"""The architectures: small ones of our own, torchvision's, and the user's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from runtime.errors import OptionError
from train.factory import find, is_factory
from train.vision_transformer import VisionTransformer


class CNN2(nn.Module):
    """Two 3x3 convolutions, one pooling, two linear layers: the MNIST network of the SGT authors' code.

    Args:
        channels: image channels.
        size: image height and width in pixels, each at least 6.
        classes: number of classes.
    """

    def __init__(self, channels: int, size: tuple[int, int], classes: int) -> None:
        super().__init__()
        pooled = [(side - 4) // 2 for side in size]
        if min(pooled) < 1:
            raise OptionError(f"cnn2: image size {size[0]}x{size[1]}, expected at least 6x6 pixels")
        self.conv1 = nn.Conv2d(channels, 32, 3)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(32, 64, 3)
        self.relu2 = nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.dropout1 = nn.Dropout(0.25)
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(64 * pooled[0] * pooled[1], 128)
        self.relu3 = nn.ReLU()
        self.dropout2 = nn.Dropout(0.5)
        self.fc2 = nn.Linear(128, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [N, classes] of normalized images [N, C, H, W]."""
        x = self.relu2(self.conv2(self.relu1(self.conv1(x))))
        x = self.flatten(self.dropout1(self.pool(x)))
        logits: Tensor = self.fc2(self.dropout2(self.relu3(self.fc1(x))))
        return logits


class _BasicBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut that subsamples and pads with zero channels (option A)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu2 = nn.ReLU()
        self.stride = stride
        self.new_channels = out_channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        if self.stride != 1 or self.new_channels:
            before = self.new_channels // 2
            padding = (0, 0, 0, 0, before, self.new_channels - before)
            x = nn.functional.pad(x[:, :, :: self.stride, :: self.stride], padding)
        out: Tensor = self.relu2(y + x)
        return out


class ResNet20(nn.Module):
    """The CIFAR ResNet of He et al. 2015, section 4.2: n = 3, widths 16, 32, 64, parameter-free shortcuts.

    Args:
        channels: image channels.
        size: image height and width in pixels; any, since the network ends in a global average.
        classes: number of classes.
    """

    def __init__(self, channels: int, size: tuple[int, int], classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu1 = nn.ReLU()
        self.stage1 = nn.Sequential(*(_BasicBlock(16, 16, 1) for _ in range(3)))
        self.stage2 = nn.Sequential(_BasicBlock(16, 32, 2), *(_BasicBlock(32, 32, 1) for _ in range(2)))
        self.stage3 = nn.Sequential(_BasicBlock(32, 64, 2), *(_BasicBlock(64, 64, 1) for _ in range(2)))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [N, classes] of normalized images [N, C, H, W]."""
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.stage3(self.stage2(self.stage1(x)))
        logits: Tensor = self.fc(self.flatten(self.pool(x)))
        return logits


def _of_torchvision(name: str, stem: str) -> Callable[..., nn.Module]:
    """Return what makes a network of torchvision's, its first convolution `stem` made for other channels."""

    def make(channels: int, size: tuple[int, int], classes: int) -> nn.Module:
        import torchvision  # a second that the other networks need not wait

        model: nn.Module = getattr(torchvision.models, name)(num_classes=classes)
        if channels != 3:
            first = model.get_submodule(stem)
            assert isinstance(first, nn.Conv2d)
            kernel, stride, padding = first.kernel_size, first.stride, first.padding
            conv = nn.Conv2d(channels, first.out_channels, kernel, stride, padding, bias=False)  # type: ignore[arg-type]
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            model.set_submodule(stem, conv)
        return model

    return make


ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {
    "cnn2": CNN2,
    "resnet20": ResNet20,
    "resnet18": _of_torchvision("resnet18", "conv1"),
    "mobilenet_v2": _of_torchvision("mobilenet_v2", "features.0.0"),
    "deit_tiny": VisionTransformer,
}


def build(arch: str, **arguments: Any) -> nn.Module:
    """Return a freshly initialized network.

    Args:
        arch: one of ARCHITECTURES, or package.module:factory, a function that returns an nn.Module and that the
            user has named (`train.factory.allow`).
        arguments: channels, size and classes.

    Raises:
        OptionError: no such architecture, a factory that the user has not named, or one that makes something else.
    """
    if is_factory(arch):
        return _own_network(arch, arguments)
    if arch not in ARCHITECTURES:
        raise OptionError(
            f"architecture {arch!r}: expected one of {', '.join(ARCHITECTURES)}, or package.module:factory"
        )
    return ARCHITECTURES[arch](**arguments)


def _own_network(arch: str, arguments: dict[str, Any]) -> nn.Module:
    model = find(arch, arguments)(**arguments)
    if not isinstance(model, nn.Module):
        raise OptionError(f"--arch {arch}: returned {type(model).__name__}, expected a torch.nn.Module")
    mode, images = model.training, torch.zeros(2, arguments["channels"], *arguments["size"])
    with torch.no_grad():
        logits = model.eval()(images)
    if not isinstance(logits, Tensor) or logits.shape != (2, arguments["classes"]):
        found = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise OptionError(
            f"--arch {arch}: of 2 images {list(images.shape)} it returns {found}, expected logits "
            f"{[2, arguments['classes']]}"
        )
    return model.train(mode)
