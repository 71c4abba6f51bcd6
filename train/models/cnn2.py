"""The MNIST network of the SGT authors' code."""

from __future__ import annotations

from torch import Tensor, nn

from runtime.errors import OptionError


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
