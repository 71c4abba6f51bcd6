"""Random changes of training images, on the device where the images lie, from random numbers of the CPU."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# An erased square holds the pixel whose code is 0: the network reads nothing there.
_ERASED = 128
# ITU-R BT.601 luma, as in Pillow and torchvision.
_LUMA = (0.2989, 0.587, 0.114)
# Control points of the elastic field along each side; between them it is interpolated.
_CONTROL_POINTS = 5


@dataclass(frozen=True)
class Augmentation:
    """What is done to an image before each step that shows it; all zero: nothing.

    Args:
        flip: left to right, half the time.
        crop_padding: pixels of black border, before a random crop of the image's size.
        rotate_degrees: largest rotation to either side.
        zoom: largest share by which width and height, each on its own, grow or shrink.
        elastic_pixels: standard deviation of a smooth random displacement (Simard et al. 2003, section 2).
        erase_pixels: side of a grey square at a random place (DeVries and Taylor 2017).
        color_jitter: largest share by which brightness, contrast and saturation, each on its own, grow or shrink.
    """

    flip: bool = False
    crop_padding: int = 0
    rotate_degrees: float = 0.0
    zoom: float = 0.0
    elastic_pixels: float = 0.0
    erase_pixels: int = 0
    color_jitter: float = 0.0

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return images uint8 [N, C, H, W], changed by random numbers that are the same on every device."""
        if self.rotate_degrees or self.zoom or self.elastic_pixels:
            images = warp(images, self.rotate_degrees, self.zoom, self.elastic_pixels, generator)
        if self.flip or self.crop_padding:
            images = crop(images, self.crop_padding, flip=self.flip, generator=generator)
        if self.color_jitter:
            images = jitter(images, self.color_jitter, generator)
        if self.erase_pixels:
            images = erase(images, self.erase_pixels, generator)
        return images


def crop(images: Tensor, padding: int, *, flip: bool, generator: torch.Generator) -> Tensor:
    """Return images [N, C, H, W] cropped from a border of `padding` zeros; `flip` mirrors half of them."""
    N, _, H, W = images.shape
    rows = torch.randint(2 * padding + 1, (N, 1), generator=generator) + torch.arange(H)
    columns = torch.randint(2 * padding + 1, (N, 1), generator=generator) + torch.arange(W)
    if flip:
        flipped = torch.rand(N, 1, generator=generator) < 0.5
        columns = torch.where(flipped, columns.flip(1), columns)
    device = images.device
    padded = F.pad(images, (padding,) * 4)
    index = torch.arange(N, device=device).reshape(N, 1, 1)
    # Advanced indices around a slice put the indexed axes first: [N, H, W, C].
    chosen = padded[index, :, rows.to(device).unsqueeze(2), columns.to(device).unsqueeze(1)]
    return chosen.permute(0, 3, 1, 2)


def warp(
    images: Tensor, rotate_degrees: float, zoom: float, elastic_pixels: float, generator: torch.Generator
) -> Tensor:
    """Return images uint8 [N, C, H, W] rotated, zoomed and bent at random by one bilinear resampling."""
    N, _, H, W = images.shape
    angle, width, height = (torch.rand(3, N, generator=generator) * 2 - 1).unbind()
    angle = angle * math.radians(rotate_degrees)
    width, height = torch.exp(width * zoom), torch.exp(height * zoom)
    cosine, sine, zero = torch.cos(angle), torch.sin(angle), torch.zeros(N)
    # Where each output pixel is read, in halves of width and height: pixels that are not square turn squarely.
    first = torch.stack([cosine / width, -sine * (H / W) / width, zero], 1)
    second = torch.stack([sine * (W / H) / height, cosine / height, zero], 1)
    grid = F.affine_grid(torch.stack([first, second], 1), [N, 1, H, W], align_corners=False)
    if elastic_pixels:
        bend = torch.randn(N, 2, _CONTROL_POINTS, _CONTROL_POINTS, generator=generator) * elastic_pixels
        bend = F.interpolate(bend, (H, W), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
        grid = grid + bend * torch.tensor([2 / W, 2 / H])
    read = F.grid_sample(images.float(), grid.to(images.device), align_corners=False)
    return read.round_().to(torch.uint8)


def jitter(images: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Return images uint8 [N, C, H, W] whose brightness, contrast and saturation change, in this order.

    Each is a blend, by a factor of its own from 1 - share to 1 + share: with black, with the image's mean grey,
    with its grey form. They are torchvision's definitions, whose functions take one factor for a whole batch.
    """
    factors = 1 + share * (torch.rand(3, len(images), 1, 1, 1, generator=generator) * 2 - 1)
    brightness, contrast, saturation = factors.to(images.device).unbind()
    x = (images.float() * brightness).clamp_(0, 255)
    x = _blend(x, _grey(x).mean((2, 3), keepdim=True), contrast)
    x = _blend(x, _grey(x), saturation)
    return x.round_().to(torch.uint8)


def _grey(x: Tensor) -> Tensor:
    return x if x.shape[1] == 1 else (x * x.new_tensor(_LUMA).reshape(3, 1, 1)).sum(1, keepdim=True)


def _blend(x: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    return (x * factor + other * (1 - factor)).clamp_(0, 255)


def erase(images: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """Return images [N, C, H, W] with a grey square of `side` pixels, which may reach over the edge."""
    N, _, H, W = images.shape
    rows = torch.arange(H) - torch.randint(H, (N, 1), generator=generator) + side // 2
    columns = torch.arange(W) - torch.randint(W, (N, 1), generator=generator) + side // 2
    inside = (rows.ge(0) & rows.lt(side)).unsqueeze(2) & (columns.ge(0) & columns.lt(side)).unsqueeze(1)
    return images.masked_fill(inside.unsqueeze(1).to(images.device), _ERASED)
