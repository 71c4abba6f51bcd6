"""Frames and maps in another size: Pillow's BILINEAR, a triangle filter with antialiasing, as matrix products.

A pixel of the result needs few of the source, so the matrix of weights is a band. It is cut into blocks of a few
pixels of the result and the part of the source that they need, and each block is one small matrix product.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

# Source pixels that the results of one block lie apart from first to last. More would multiply more zeros, fewer
# would make more products than their number of calls is worth.
_REACH = 32
_MOST_IN_BLOCK = 16
# Multiplications of one product. OpenBLAS gives larger ones to several threads, and a product of some microseconds
# must not wait for another core, which may be busy.
_MOST_MULTIPLICATIONS = 2**18
_MOST_LINES = 128


def middle(frame: tuple[int, ...], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return top, left, height and width of the largest middle part of a frame that has the shape of `size`."""
    height, width = frame
    if width * size[0] > height * size[1]:
        kept = height, max(1, round(height * size[1] / size[0]))
    else:
        kept = max(1, round(width * size[0] / size[1])), width
    return (height - kept[0]) // 2, (width - kept[1]) // 2, *kept


def crop_to_shape(images: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return the largest middle part of images [N, H, W, C] that has the shape of `size`, height and width."""
    top, left, height, width = middle(images.shape[1:3], size)
    return images[:, top : top + height, left : left + width]


def resize(images: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return uint8 [N, H', W', C] of uint8 [N, H, W, C], Pillow's BILINEAR within one level.

    That is bilinear with antialiasing: what networks are trained on, when Pillow or torchvision resized.
    """
    if min(images.strides) < 0:  # BGR read as RGB, or mirrored: numpy converts such pixels one by one
        turned = tuple(slice(None, None, -1 if stride < 0 else 1) for stride in images.strides)
        return resize(images[turned], size)[turned]
    n, height, width, channels = images.shape
    columns, rows = _blocks(width, size[1], channels), _blocks(height, size[0], 1)
    lines = max(8, min(height, _MOST_LINES, _MOST_MULTIPLICATIONS // max(block.weights.size for block in columns)))
    part = np.empty((lines, width, channels), np.float32)
    narrowed = np.empty((height, size[1] * channels), np.float32)
    resized = np.empty((n, *size, channels), np.uint8)
    for image, out in zip(images, resized, strict=True):
        # Width first and rounded in between, halves up, as Pillow does. Sums of float32 move a pixel by one level
        # at a near tie; float64 in the shorter pass adds no second level. A few lines at a time: as floats they
        # stay in the processor's cache.
        for top in range(0, height, lines):
            taken = image[top : top + lines]
            np.copyto(part[: len(taken)], taken)
            _along_columns(part[: len(taken)].reshape(len(taken), -1), columns, narrowed[top : top + lines])
        np.floor(np.add(narrowed, np.float32(0.5), out=narrowed), out=narrowed)
        out[...] = (_along_rows(narrowed, rows, size[0], np.float64) + 0.5).reshape(out.shape)
    return resized


def resize_maps(maps: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return float32 [N, H', W'] of float32 maps [N, H, W], bilinear with antialiasing."""
    rows, columns = _blocks(maps.shape[1], size[0], 1), _blocks(maps.shape[2], size[1], 1)
    # All maps in one call of numpy, which makes the products one by one: those of a small map are done sooner than
    # Python comes to the next one.
    lowered = _along_rows(maps.astype(np.float32, copy=False), rows, size[0], np.float32)
    resized = np.empty((len(maps), *size), np.float32)
    _along_columns(lowered, columns, resized)
    return resized


@dataclass(frozen=True)
class _Block:
    """Weights float32 [stop - start, values] of the source's values start:stop in the result's first:last."""

    start: int
    stop: int
    first: int
    last: int
    weights: np.ndarray


def _along_columns(values: np.ndarray, blocks: tuple[_Block, ...], out: np.ndarray) -> None:
    """Resize float32 [..., H, W * C] to `out` [..., H, W' * C]."""
    for block in blocks:
        np.matmul(values[..., block.start : block.stop], block.weights, out=out[..., block.first : block.last])


def _along_rows(values: np.ndarray, blocks: tuple[_Block, ...], height: int, dtype: type) -> np.ndarray:
    """Return float32 [..., H, W] resized to [..., H', W], computed in float32 or float64."""
    out: np.ndarray = np.empty((*values.shape[:-2], height, values.shape[-1]), dtype)
    for block in blocks:
        taken: np.ndarray = values[..., block.start : block.stop, :].astype(dtype, copy=False)
        np.matmul(block.weights.T, taken, out=out[..., block.first : block.last, :])
    return out


@functools.lru_cache(maxsize=32)
def _blocks(source: int, target: int, channels: int) -> tuple[_Block, ...]:
    """Return the weights of a triangle filter as wide as one target pixel, for values that lie side by side.

    The weights are multiples of 2**-22, as in Pillow: float32 holds them exactly.
    """
    ratio = source / target
    support = max(ratio, 1.0)
    centers = (np.arange(target) + 0.5) * ratio
    nearest = np.maximum(np.floor(centers - support + 0.5), 0).astype(int)
    taps = nearest[:, None] + np.arange(min(source, int(2 * support) + 2))  # [target, K]
    weights = np.clip(1 - np.abs(taps + 0.5 - centers[:, None]) / support, 0, None) * (taps < source)
    weights *= 1 / weights.sum(1, keepdims=True)
    weights = np.floor(weights * 2**22 + 0.5) / 2**22
    step = min(_MOST_IN_BLOCK, max(1, round(_REACH / ratio)))
    found = []
    for first in range(0, target, step):
        last = min(first + step, target)
        start, stop = nearest[first], min(source, taps[last - 1, -1] + 1)
        row, tap = np.nonzero(weights[first:last])
        dense = np.zeros((stop - start, last - first), np.float32)
        dense[taps[first + row, tap] - start, row] = weights[first + row, tap]
        each = np.zeros((stop - start, channels, last - first, channels), np.float32)
        for channel in range(channels):
            each[:, channel, :, channel] = dense
        ends = [int(end) * channels for end in (start, stop, first, last)]
        found.append(_Block(ends[0], ends[1], ends[2], ends[3], each.reshape(len(dense) * channels, -1)))
    return tuple(found)
