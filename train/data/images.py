"""One data set: its images, in memory or in files that are decoded in time, and its labels."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from runtime.errors import FileError, OptionError
from train.data.decoding import Decoder
from train.data.splits import Split
from train.input_spec import InputSpec

_SAMPLED_VALUES = 1 << 25


class FileImages:
    """Image files that behave like a tensor uint8 [N, 3, H, W]: what is asked for is decoded then.

    Args:
        paths: N files, known to be readable.
        decoder: gives their pixels.
        device: where the pixels are put.
    """

    def __init__(self, paths: list[str], decoder: Decoder, device: str | torch.device = "cpu") -> None:
        self.paths, self.decoder, self.device = paths, decoder, torch.device(device)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[N, 3, H, W]."""
        return (len(self.paths), 3, *self.decoder.size)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: slice | Tensor) -> Tensor:
        if isinstance(index, slice):
            index = torch.arange(len(self))[index]
        return next(self.batches([index]))

    def to(self, device: str | torch.device) -> FileImages:
        """Return the same images, whose pixels come to another device."""
        return FileImages(self.paths, self.decoder, device)

    def batches(self, indices: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield the images uint8 [n, 3, H, W] of each index int64 [n], decoded some batches ahead.

        Raises:
            FileError: a file that could be read before cannot any more.
        """
        for pixels, failures in self.decoder.batches([self.paths[i] for i in index.tolist()] for index in indices):
            for reason in failures.values():
                raise FileError(f"{reason}; it could be read when the run began")
            yield channels_first(pixels).to(self.device)


Images: TypeAlias = Tensor | FileImages


@dataclass(frozen=True)
class ImageData:
    """One data set: images uint8 [N, C, H, W], in memory or in files, and labels int64 [N].

    Data sets of files have a `split`, and may have images for validation.
    """

    name: str
    classes: tuple[str, ...]
    train_images: Images
    train_labels: Tensor
    test_images: Images
    test_labels: Tensor
    val_images: Images | None = None
    val_labels: Tensor | None = None
    split: Split | None = None

    def input_spec(self) -> InputSpec:
        """Return the normalization whose int8 grid is exact: mean 128 / 255 and one standard deviation."""
        n, channels, *size = self.train_images.shape
        count = min(10_000, max(1, _SAMPLED_VALUES // (channels * size[0] * size[1])))
        sample = self.train_images[:: max(1, n // count)].float() / 255
        # Two digits: the value travels through JSON and a command line without loss.
        std = max(round(sample.std().item(), 2), 0.01)
        return InputSpec((size[0], size[1]), channels, (128 / 255,) * channels, (std,) * channels)


def hold_out(data: ImageData, count: int) -> ImageData:
    """Return the data set with `count` of its training images as its validation split; 0: as it is.

    The choice is random, the same at every call, and does not depend on the seed of a run.

    Raises:
        OptionError: there are no more training images than that.
    """
    if not count:
        return data
    images, labels = data.train_images, data.train_labels
    if count >= len(labels):
        raise OptionError(
            f"validation {count}: expected fewer than the {len(labels)} training images of {data.name}"
        )
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    held, kept = order[:count].sort().values, order[count:].sort().values
    return replace(
        data,
        train_images=images[kept], train_labels=labels[kept], val_images=images[held], val_labels=labels[held],
    )  # fmt: skip


def stream(images: Images, indices: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each index int64 [n] with its images uint8 [n, C, H, W], both on the images' device.

    Images in files are decoded ahead, by worker processes.
    """
    if isinstance(images, Tensor):
        for index in indices:
            index = index.to(images.device)
            yield index, images[index]
        return
    given: deque[Tensor] = deque()  # handed to the decoder, which runs ahead

    def noted() -> Iterator[Tensor]:
        for index in indices:
            given.append(index)
            yield index

    for pixels in images.batches(noted()):
        yield given.popleft().to(pixels.device), pixels


def batches(n: int, size: int, *, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield a random permutation of 0..n-1 in batches of `size`; the last, incomplete one is dropped."""
    order = torch.randperm(n, generator=generator)
    for start in range(0, n - n % min(size, n), size):
        yield order[start : start + size]


def channels_first(pixels: np.ndarray) -> Tensor:
    """Return pixels [N, H, W, C] as a tensor [N, C, H, W]."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
