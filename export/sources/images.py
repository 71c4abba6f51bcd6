"""The images of a network that nobody trained here: a data set, class folders, or a folder of photos."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from runtime.errors import FileError, OptionError
from runtime.images import folders_in, list_images, to_batch
from runtime.manifest import ImageInput
from train.data import datasets, splits
from train.data.decoding import Decoder, read_all, worker_count
from train.data.images import channels_first
from train.data.names import PREFIX, is_folder, place_of, short_name
from train.input_spec import InputSpec

# Labelled images that accuracy is measured on, at most.
TEST_IMAGES = 2_000
_VALIDATION_IMAGES = 5_000


@dataclass(frozen=True)
class RealImages:
    """Images in a network's size.

    Args:
        name: of where they came from.
        calibration: uint8 [n, C, H, W], to choose grids by.
        test: uint8 [m, C, H, W], other ones, to verify and to measure on.
        labels: classes of the test images, int64 [m]; None where nobody told.
        classes: their names; empty where nobody told.
    """

    name: str
    calibration: Tensor
    test: Tensor
    labels: Tensor | None = None
    classes: tuple[str, ...] = ()


def real_images(
    data: str,
    root: str | Path,
    input_spec: InputSpec,
    count: int,
    *,
    test_count: Callable[[Sequence[str]], int] = lambda classes: TEST_IMAGES,
    seed: int = 0,
) -> RealImages:
    """Read images for a network.

    Args:
        data: a data set's name or "folder:PATH"; a folder needs no classes: photos may lie in it as they are.
        root: folder of the data sets' files.
        input_spec: size and channels; other images are cropped to its shape and resized.
        count: images to calibrate on, at most; drawn at random.
        test_count: gives how many other files of a folder are worth reading, by the names of their classes, which
            are none where nobody told.
        seed: of the draw.

    Raises:
        FileError: no image there, or one that cannot be read.
        OptionError: `count` is below 2.
    """
    if count < 2:
        raise OptionError(f"--samples {count}: expected a whole number from 2")
    if not is_folder(data):
        found = datasets.load(data, root)
        return RealImages(
            data,
            _sized(_drawn(found.train_images, count, seed), input_spec),
            _sized(found.test_images[:TEST_IMAGES], input_spec),
            found.test_labels[:TEST_IMAGES],
            found.classes,
        )
    place = place_of(data, root)
    if data.startswith(PREFIX) and not folders_in([str(place)]):
        paths = [str(path) for path in list_images([str(place)])]
        if len(paths) < 4:
            raise FileError(f"{place}: {len(paths)} images, expected four at least, a few hundred for good grids")
        random.Random(seed).shuffle(paths)
        kept = min(count, len(paths) * 4 // 5)
        test = paths[kept : kept + TEST_IMAGES][: test_count(())]
        return RealImages(short_name(data), _read(paths[:kept], input_spec), _read(test, input_spec))
    split = splits.find(data, root, seed=seed)
    paths, _ = split.part("train")
    random.Random(seed).shuffle(paths)
    test, labels = split.part("test")
    order = random.Random(seed).sample(range(len(test)), min(TEST_IMAGES, len(test)))
    order = order[: test_count(split.classes)]
    return RealImages(
        short_name(data),
        _read(paths[:count], input_spec),
        _read([test[i] for i in order], input_spec),
        torch.tensor([labels[i] for i in order]),
        split.classes,
    )


def _drawn(images: object, count: int, seed: int) -> Tensor:
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))  # type: ignore[arg-type]
    drawn: Tensor = images[order[:count]]  # type: ignore[index]
    return drawn


def _read(paths: list[str], input_spec: InputSpec) -> Tensor:
    decoder = Decoder(input_spec.size, worker_count(len(paths)))
    try:
        pixels, failures = read_all(paths, decoder, "reading images")
    finally:
        decoder.close()
    for reason in failures.values():
        raise FileError(f"{reason}; remove it")
    return _sized(channels_first(pixels), input_spec)


def _sized(images: Tensor, input_spec: InputSpec) -> Tensor:
    """Return images uint8 [n, C, H, W] with the channels and the size that a network takes."""
    expected = ImageInput(input_spec.size, input_spec.channels, input_spec.mean, input_spec.std, "crop")
    pixels = np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy())
    if pixels.shape[1:] == (*input_spec.size, input_spec.channels):
        return images
    return channels_first(to_batch(pixels, expected))


@dataclass(frozen=True)
class ValidationImages:
    """Labelled images that a network was not trained on, in its size: some to fit on, others to measure on.

    Args:
        part: what was fitted on, for texts.
        classes: their names.
        fitted: uint8 [n, C, H, W].
        fitted_labels: int64 [n].
        measured: uint8 [m, C, H, W].
        measured_labels: int64 [m].
    """

    part: str
    classes: tuple[str, ...]
    fitted: Tensor
    fitted_labels: Tensor
    measured: Tensor
    measured_labels: Tensor


def validation_images(data: str, root: str | Path, input_spec: InputSpec) -> ValidationImages:
    """Return the validation split to fit on and the test split to measure on; without it, halves of the latter.

    Args:
        data: a data set's name or "folder:PATH", with class folders.
        root: folder of the data sets' files.
        input_spec: size and channels; other images are cropped to its shape and resized.

    Raises:
        FileError: no images there, or one that cannot be read.
        OptionError: a folder without classes.
    """
    parts: list[Any] = []
    if is_folder(data):
        split = splits.find(data, root)
        for name in ("val", "test"):
            paths, numbers = split.part(name)
            order = random.Random(0).sample(range(len(paths)), min(TEST_IMAGES, len(paths)))
            parts += [_read([paths[i] for i in order], input_spec), torch.tensor([numbers[i] for i in order])]
        return ValidationImages("validation images", split.classes, *parts)
    found = datasets.load(data, root)
    if found.val_images is not None and found.val_labels is not None:
        parts = [found.val_images, found.val_labels, found.test_images, found.test_labels]
        part = "validation images"
    else:
        part = "test images, every second one,"
        parts = [images[start::2] for start in (0, 1) for images in (found.test_images, found.test_labels)]
    for i in (0, 2):
        parts[i] = _sized(parts[i][:_VALIDATION_IMAGES], input_spec)
        parts[i + 1] = parts[i + 1][:_VALIDATION_IMAGES]
    return ValidationImages(part, found.classes, *parts)
