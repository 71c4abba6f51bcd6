"""ResNet-20 for 32x32 images (He et al. 2016, section 4.2)."""

from __future__ import annotations

from torch import Tensor, nn


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
