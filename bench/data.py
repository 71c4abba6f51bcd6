"""Labelled images to measure on: a named data set, or a file that needs no torch on the device."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from runtime.errors import ClearpactError, FileError, OptionError
from runtime.files import read_bytes


@dataclass(frozen=True)
class LabelledImages:
    """Images uint8 [N, H, W, C], labels int64 [N], and where they came from."""

    name: str
    images: np.ndarray
    labels: np.ndarray


def load(name: str, root: str = "data") -> LabelledImages:
    """Return the test split of a data set.

    Args:
        name: an .npz file with `images` and `labels` (written by `python -m train.data`), or a data set that
            `train.data` knows; the latter needs torchvision.
        root: folder of the data set's original files.

    Raises:
        FileError: the file is missing or of another kind, or the data set is not there.
        OptionError: no such data set, or torchvision is not installed.
    """
    if name.endswith(".npz"):
        return _load_npz(Path(name))
    try:
        from train import data
    except ImportError as error:
        raise OptionError(
            f"--data {name}: named data sets need {error.name}; pip install 'clearpact[train]', or name an .npz "
            "file that `python -m train.data` wrote elsewhere"
        ) from None
    loaded = data.load(name, root)
    images = loaded.test_images.permute(0, 2, 3, 1).contiguous().numpy()
    return LabelledImages(loaded.name, images, loaded.test_labels.numpy())


def evenly_spaced(data: LabelledImages, count: int) -> LabelledImages:
    """Return `count` of the images, evenly spaced over the split.

    Raises:
        OptionError: there are not as many.
    """
    if not 1 <= count <= len(data.labels):
        raise OptionError(f"--images {count}: expected a whole number from 1 to {len(data.labels)}")
    chosen = np.arange(count) * len(data.labels) // count
    return LabelledImages(data.name, data.images[chosen], data.labels[chosen])


def check_fits(data: LabelledImages, size: tuple[int, int], channels: int, classes: int) -> None:
    """Raise OptionError unless the images are of a model's size and the labels among its classes."""
    expected = [*size, channels]
    if list(data.images.shape[1:]) != expected or data.labels.max() >= classes:
        raise OptionError(
            f"--data {data.name}: images {list(data.images.shape[1:])} of {data.labels.max() + 1} classes, "
            f"expected {expected} of {classes} as the model has; name the data it was trained on"
        )


def _load_npz(path: Path) -> LabelledImages:
    expected = "expected an .npz file written by `python -m train.data`"
    try:
        # allow_pickle stays off: nothing in the file is executed.
        with np.load(io.BytesIO(read_bytes(path)), allow_pickle=False) as archive:
            images, labels = archive["images"], archive["labels"]
    except ClearpactError:
        raise
    except Exception:  # numpy, zipfile and zlib each have errors of their own for damaged files
        raise FileError(f"{path}: holds no images and labels, {expected}; write it again") from None
    if images.dtype != np.uint8 or images.ndim != 4 or labels.shape != images.shape[:1] or not len(labels):
        raise FileError(
            f"{path}: images {images.dtype} {list(images.shape)} and labels {list(labels.shape)}, {expected}: "
            "images uint8 [N, H, W, C] and labels [N]"
        )
    if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
        raise FileError(f"{path}: labels {labels.dtype}, {expected}: class numbers from 0; write it again")
    return LabelledImages(path.name, images, labels.astype(np.int64))
