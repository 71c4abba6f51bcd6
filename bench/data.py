"""Labelled images to measure on: a named data set, or a file that needs no torch on the device."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from runtime.errors import ClearpactError, FileError, OptionError
from runtime.files import read_bytes
from train import splits
from train.decoding import Decoder, read_all, worker_count
from train.splits import Split

HELP = "digits, mnist, fashion-mnist, cifar10, cifar100, folder:PATH, a run's split.json, or an .npz file"


@dataclass(frozen=True)
class LabelledImages:
    """Images uint8 [N, H, W, C], labels int64 [N], and where they came from."""

    name: str
    images: np.ndarray
    labels: np.ndarray


def load(
    name: str,
    root: str = "data",
    *,
    size: tuple[int, int] = (64, 64),
    classes: Sequence[str] = (),
    trained_on: str = "",
) -> LabelledImages:
    """Return the test split of a data set.

    Args:
        name: an .npz file with `images` and `labels` (written by `python -m train.data`); an image folder that
            `python -m train` takes, or the split.json of a run on one, which need Pillow only; or another data set
            that `train.data` knows, which needs torchvision.
        root: folder of the data set's original files.
        size: height and width of the model's images, to which those of a folder are cropped and resized.
        classes: the model's, which a folder has to have.
        trained_on: the data set that the model names as its own.

    Raises:
        FileError: the file is missing or of another kind, or the data set is not there.
        OptionError: no such data set, torchvision is not installed, or a folder whose split made here would mix
            training images of the model into the test.
    """
    if name.endswith(".npz"):
        return _load_npz(Path(name))
    if splits.is_folder(name) or name.endswith(".json"):
        split = splits.read(name) if name.endswith(".json") else splits.find(name, root)
        _check_split(name, split, tuple(classes), trained_on)
        return _load_folder(split, size)
    try:
        from train import data
    except ImportError as error:
        raise OptionError(
            f"--data {name}: named data sets need {error.name}; pip install 'clearpact[train]', or name an .npz "
            "file that `python -m train.data` wrote elsewhere"
        ) from None
    loaded = data.load(name, root)
    images = loaded.test_images[:].permute(0, 2, 3, 1).contiguous().numpy()
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


def _check_split(name: str, split: Split, classes: tuple[str, ...], trained_on: str) -> None:
    if classes and split.classes != classes:
        raise OptionError(
            f"--data {name}: classes {_few(split.classes)}, expected {_few(classes)} as the model has; "
            "name the data it was trained on"
        )
    # Another folder with a split of its own is a fair test; a split made here may hold out other images.
    if split.seed is not None and "@" in trained_on and split.name != trained_on:
        raise OptionError(
            f"--data {name}: the split {split.name}, expected {trained_on} as in training; the folder or "
            f"the --split-seed is another: name the {splits.SPLIT_NAME} in the run's folder"
        )


def _few(names: tuple[str, ...]) -> str:
    return ", ".join(names[:3]) + (f" ... ({len(names)})" if len(names) > 3 else "")


def _load_folder(split: Split, size: tuple[int, int]) -> LabelledImages:
    paths, labels = split.part("test")
    decoder = Decoder(size, worker_count(len(paths)))
    images, failures = read_all(paths, decoder, "reading images")
    decoder.close()
    readable = np.setdiff1d(np.arange(len(paths)), list(failures))
    if not len(readable):
        raise FileError(f"{split.root}: no readable test image, expected some; check the folder")
    if failures:
        print(f"skipped {len(failures)} images, such as {next(iter(failures.values()))}", file=sys.stderr)
    return LabelledImages(split.name, images[readable], np.array(labels, np.int64)[readable])


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
