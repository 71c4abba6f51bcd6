"""Image data sets as uint8 tensors, on whichever device trains, or as files that are decoded in time."""

from __future__ import annotations

import io
import urllib.error
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from runtime.errors import FileError
from runtime.files import read_bytes
from train.data import folders
from train.data.folders import Reading
from train.data.images import ImageData, channels_first
from train.data.names import MEDMNIST, check_name, is_folder
from train.data.splits import PARTS

# Pixels that the normalization is measured on.
_DIGITS_TEST_SHARE = 5  # every fifth image; the set has no split of its own


def load(name: str, root: str | Path = "data", reading: Reading | None = None) -> ImageData:
    """Return a data set, downloading it into `root` where it is absent and torchvision can.

    Args:
        name: one of DATA_SETS, or "folder:PATH".
        root: folder that torchvision's data sets read, or that MedMNIST's files, `kvasir` and `caltech101` lie in.
        reading: how image folders are read.

    Raises:
        OptionError: no data set of that name.
        FileError: it is not in `root` and cannot be downloaded, or is laid out otherwise.
    """
    check_name(name)
    if name == "digits":
        return _digits()
    if name in MEDMNIST:
        return _medmnist(name, Path(root))
    if is_folder(name):
        return folders.load(name, root, reading or folders.Reading())
    from torchvision import datasets as torchvision_data

    # The CIFAR files are pickles: torchvision opens those alone whose MD5 it knows.
    kind = {
        "mnist": torchvision_data.MNIST, "fashion-mnist": torchvision_data.FashionMNIST,
        "cifar10": torchvision_data.CIFAR10, "cifar100": torchvision_data.CIFAR100,
    }[name]  # fmt: skip
    parts: list[Tensor] = []
    for train in (True, False):
        part = _open(kind, name, Path(root), train)
        images = torch.as_tensor(part.data)
        images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2)
        parts += [images.contiguous(), torch.as_tensor(part.targets, dtype=torch.int64)]
    # torchvision names MNIST's classes "0 - zero".
    classes = tuple(str(c).split(" - ")[0] for c in part.classes)
    return ImageData(name, classes, parts[0], parts[1], parts[2], parts[3])


def _digits() -> ImageData:
    from sklearn.datasets import load_digits

    digits = load_digits()
    # 17 grey levels, 0..16, onto 0..255.
    images = torch.from_numpy((digits.images * (255 / 16)).round().astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(digits.target.astype(np.int64))
    test = torch.arange(len(images)) % _DIGITS_TEST_SHARE == 0
    classes = tuple(str(c) for c in digits.target_names)
    return ImageData("digits", classes, images[~test], labels[~test], images[test], labels[test])


def _medmnist(name: str, root: Path) -> ImageData:
    """Return one of MEDMNIST: images uint8 [N, H, W] or [N, H, W, 3] and labels [N, 1] of three parts.

    Raises:
        FileError: the file is missing, or holds something else.
    """
    path, classes = root / f"{name}.npz", MEDMNIST[name]
    expected = f"expected MedMNIST's {name}.npz"
    parts: dict[str, tuple[Tensor, Tensor]] = {}
    try:
        with np.load(io.BytesIO(read_bytes(path)), allow_pickle=False) as arrays:
            for part in PARTS:
                images, labels = arrays[f"{part}_images"], arrays[f"{part}_labels"].reshape(-1)
                if images.dtype != np.uint8 or len(images) != len(labels) or labels.max() >= len(classes):
                    raise ValueError
                pixels = images[..., None] if images.ndim == 3 else images
                parts[part] = channels_first(pixels), torch.from_numpy(labels.astype(np.int64))
    except (ValueError, KeyError, OSError, zipfile.BadZipFile):
        raise FileError(f"{path}: not what it should be, {expected}; download it again") from None
    return ImageData(name, classes, *parts["train"], *parts["test"], *parts["val"])


def _open(kind: Any, name: str, root: Path, train: bool) -> Any:
    try:
        return kind(root, train=train, download=False)
    except RuntimeError:
        pass
    try:
        return kind(root, train=train, download=True)
    except (urllib.error.URLError, RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise FileError(
            f"{root}: holds no {name} and it could not be downloaded ({reason}); "
            "put the original files there or name their folder with --data-root"
        ) from None
