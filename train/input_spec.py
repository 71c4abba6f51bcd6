"""What a network expects of its image, and how pixels become that."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# How far a mean may lie from a whole pixel: a grid of whole pixels moves by that, half of what any grid rounds by.
_FROM_A_PIXEL = 0.25


@dataclass(frozen=True)
class InputSpec:
    """What a network expects: size, channels and normalization of its image.

    The normalized image is (p / 255 - mean) / std, p the uint8 pixel.

    Args:
        size: height and width in pixels.
        channels: 1 or 3.
        mean: per channel, on the scale where 255 is 1.
        std: per channel, likewise.
    """

    size: tuple[int, int]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def exact(self) -> bool:
        """Whether the int8 codes p - 128 are the normalized image, without any rounding."""
        return len(set(self.std)) == 1 and set(self.mean) == {128 / 255}

    @property
    def grid_scale(self) -> float:
        """Step of the int8 grid of the normalized image: its pixels' own where that grid is exact."""
        if self.exact:
            return self.pixel_scale
        ends = [abs(end - m) / s for m, s in zip(self.mean, self.std, strict=True) for end in (0, 1)]
        return max(ends) / 127

    @property
    def pixel_codes(self) -> tuple[int, int] | None:
        """Smallest and largest code of the grid whose codes are the pixels themselves, less the one that is 0.

        None where there is no such grid: each channel has a mean or a std of its own, or the mean lies near the
        middle of two pixels, so that rounding would make one code of both.
        """
        if len(set(self.mean)) > 1 or len(set(self.std)) > 1:
            return None
        zero = 255 * self.mean[0]
        if not 0 <= round(zero) <= 255 or abs(zero - round(zero)) > _FROM_A_PIXEL:
            return None
        return -round(zero), 255 - round(zero)

    @property
    def pixel_scale(self) -> float:
        """Step of that grid: one pixel, normalized."""
        return 1 / (255 * self.std[0])

    def normalize(self, images: Tensor) -> Tensor:
        """Return float32 [N, C, H, W] of uint8 [N, C, H, W], by the arithmetic that the exported graph uses."""
        if self.exact:
            return (images.float() - 128) * torch.tensor(self.grid_scale, dtype=torch.float32)
        mean = _of_channels(self.mean, images)
        std = _of_channels(self.std, images)
        return (images.float() - 255 * mean) / (255 * std)


def _of_channels(values: tuple[float, ...], images: Tensor) -> Tensor:
    """Return a value of each channel, float32 [C, 1, 1], or of all of them where they agree, [1, 1, 1].

    Behind its change of layout ONNX Runtime takes one value several times as fast as a value of each channel.
    """
    given = values if len(set(values)) > 1 else values[:1]
    return torch.tensor(given, device=images.device).reshape(-1, 1, 1)
