"""Networks of torchvision, for images of any number of channels."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn


def of_torchvision(name: str, stem: str) -> Callable[..., nn.Module]:
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
