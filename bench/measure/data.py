"""Labelled images to measure on: a named data set, or a file that needs no torch on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.measure.streams import ImageStream, in_files, in_memory, in_npz
from runtime import command
from runtime.errors import OptionError
from train.data import names, splits
from train.data.splits import Split

HELP = (
    "digits, mnist, fashion-mnist, cifar10, cifar100, pneumoniamnist, folder:PATH, a run's split.json, or an .npz "
    "file"
)


@dataclass(frozen=True)
class LabelledImages:
    """Images uint8 [N, H, W, C], labels int64 [N], and where they came from."""

    name: str
    images: np.ndarray
    labels: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """Height, width and channels of an image."""
        return self.images.shape[1:]


def stream(
    name: str,
    root: str = "data",
    *,
    size: tuple[int, int] = (64, 64),
    classes: Sequence[str] = (),
    trained_on: str = "",
) -> ImageStream:
    """Return the test split of a data set, to be read batch by batch.

    Args:
        name: an .npz file with `images` and `labels` (written by `python -m train.data`); an image folder that
            `python -m train` takes, or the split.json of a run on one, which need Pillow only; or another data set
            that `train.data` knows, which needs torchvision.
        root: folder of the data set's original files.
        size: height and width of the model's images, to which those of a folder are cropped and resized.
        classes: the model's, which the labels number in the result; empty: as the data number theirs.
        trained_on: the data set that the model names as its own.

    Raises:
        FileError: the file is missing or of another kind, or the data set is not there.
        OptionError: no such data set, torchvision is not installed, classes that the model has not, or a folder
            whose split made here would mix training images of the model into the test.
    """
    found = _found(name, root, size, tuple(classes), trained_on)
    _check_classes(name, found.classes, tuple(classes))
    return found.renumbered(tuple(classes)) if classes else found


def _found(name: str, root: str, size: tuple[int, int], classes: tuple[str, ...], trained_on: str) -> ImageStream:
    if name.endswith(".npz"):
        return in_npz(Path(name))
    if names.is_folder(name) or name.endswith(".json"):
        split = splits.read(name) if name.endswith(".json") else splits.find(name, root)
        _check_classes(name, split.classes, classes)
        _check_split(name, split, trained_on)
        return in_files(split, size)
    try:
        from train.data import datasets
    except ImportError as error:
        raise OptionError(
            f"--data {name}: named data sets need {error.name}; pip install 'clearpact[train]', or name an .npz "
            "file that `python -m train.data` wrote elsewhere"
        ) from None
    loaded = datasets.load(name, root)
    images = loaded.test_images[:].permute(0, 2, 3, 1).contiguous().numpy()
    return in_memory(loaded.name, images, loaded.test_labels.numpy(), loaded.classes)


def load(
    name: str,
    root: str = "data",
    *,
    size: tuple[int, int] = (64, 64),
    classes: Sequence[str] = (),
    trained_on: str = "",
) -> LabelledImages:
    """Return the test split of a data set in memory; arguments and errors are those of `stream`."""
    return collected(stream(name, root, size=size, classes=classes, trained_on=trained_on))


def collected(found: ImageStream) -> LabelledImages:
    """Return the images of a stream in memory."""
    images = np.empty((len(found.positions), *found.shape), np.uint8)
    labels = np.empty(len(found.positions), np.int64)
    count = 0
    for part, part_labels in command.progress(found.batches(), label="reading images", total=found.batch_count):
        images[count : count + len(part)], labels[count : count + len(part)] = part, part_labels
        count += len(part)
    return LabelledImages(found.name, images[:count], labels[:count])


def check_fits(data: ImageStream | LabelledImages, size: tuple[int, int], channels: int, classes: int) -> None:
    """Raise OptionError unless the images are of a model's size and the labels among its classes."""
    expected = [*size, channels]
    if list(data.shape) != expected or data.labels.max() >= classes:
        raise OptionError(
            f"--data {data.name}: images {list(data.shape)} of {data.labels.max() + 1} classes, "
            f"expected {expected} of {classes} as the model has; name the data it was trained on"
        )


def _check_classes(name: str, found: tuple[str, ...], classes: tuple[str, ...]) -> None:
    strange = sorted(set(found) - set(classes))
    if classes and strange:
        raise OptionError(
            f"--data {name}: classes {_few(found)}, expected {_few(classes)} as the model has; it has no "
            f"{strange[0]!r}; name the data it was trained on"
        )


def _check_split(name: str, split: Split, trained_on: str) -> None:
    # Another folder with a split of its own is a fair test; a split made here may hold out other images.
    if split.seed is not None and "@" in trained_on and split.name != trained_on:
        raise OptionError(
            f"--data {name}: the split {split.name}, expected {trained_on} as in training; the folder or "
            f"the --split-seed is another: name the {splits.SPLIT_NAME} in the run's folder"
        )


def _few(names: tuple[str, ...]) -> str:
    return ", ".join(names[:3]) + (f" ... ({len(names)})" if len(names) > 3 else "")
