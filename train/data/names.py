"""The names of data sets, what they stand for, and where their files lie. Nothing here needs torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from runtime.errors import FileError, OptionError

PREFIX = "folder:"
_KVASIR_CLASSES = (
    "dyed-lifted-polyps", "dyed-resection-margins", "esophagitis", "normal-cecum", "normal-pylorus",
    "normal-z-line", "polyps", "ulcerative-colitis",
)  # fmt: skip


@dataclass(frozen=True)
class NamedFolder:
    """A published data set that comes as class folders.

    Args:
        archive: what to unpack below the data root.
        places: folders below the data root where its class folders may lie, the first that is there.
        classes: number of class folders.
        names: of the class folders, where all are known.
        dropped: class folders that are left out.
    """

    archive: str
    places: tuple[str, ...]
    classes: int
    names: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()


NAMED = {
    # Pogorelov et al. 2017, version 2.
    "kvasir": NamedFolder(
        "kvasir-dataset-v2.zip", ("kvasir-dataset-v2", "kvasir-dataset", "kvasir"), 8, _KVASIR_CLASSES
    ),
    # Li et al. 2004; the clutter class belongs to detection, not to classification.
    "caltech101": NamedFolder(
        "101_ObjectCategories.tar.gz of caltech-101.zip",
        ("caltech101/101_ObjectCategories", "caltech-101/101_ObjectCategories", "101_ObjectCategories"),
        101,
        dropped=("BACKGROUND_Google",),
    ),
}

# Where torchvision keeps the others, below the data root.
ORIGINALS = {
    "mnist": "MNIST", "fashion-mnist": "FashionMNIST", "cifar10": "cifar-10-batches-py",
    "cifar100": "cifar-100-python",
}  # fmt: skip

# Yang et al. 2023, MedMNIST v2, 28 pixels: one file with a split of its own, by the names of its classes.
MEDMNIST = {"pneumoniamnist": ("normal", "pneumonia")}

DATA_SETS = ("digits", *ORIGINALS, *MEDMNIST, *NAMED)
EXPECTED = f"{', '.join(DATA_SETS)} or {PREFIX}PATH"


def check_name(name: str) -> str:
    """Return the name of a data set; raise OptionError if there is none of that name."""
    if name not in DATA_SETS and not is_folder(name):
        raise OptionError(f"data set {name!r}: expected one of {EXPECTED}")
    return name


def is_folder(data: str) -> bool:
    """Return whether a data set's name means class folders."""
    return data.startswith(PREFIX) or data in NAMED


def short_name(data: str) -> str:
    """Return a data set's name without the path of its folder: "folder:/home/me/mine" is "mine"."""
    return Path(data.removeprefix(PREFIX)).resolve().name if data.startswith(PREFIX) else data


def data_name(data: str, digest: str) -> str:
    """Return the name of a data set and, where it has one, its split, without the path of its folder."""
    prefix = PREFIX if data.startswith(PREFIX) else ""
    return f"{prefix}{short_name(data)}" + (f"@{digest}" if digest else "")


def place_of(data: str, root: str | Path = "data") -> Path:
    """Return the folder of "folder:PATH" or, below `root`, of one of NAMED; FileError if that is not there."""
    return Path(data.removeprefix(PREFIX)) if data.startswith(PREFIX) else _named_path(data, Path(root))


def _named_path(data: str, root: Path) -> Path:
    if data not in NAMED:
        raise OptionError(f"data set {data!r}: expected {PREFIX}PATH or one of {', '.join(NAMED)}")
    for place in NAMED[data].places:
        if (root / place).is_dir():
            return root / place
    raise FileError(
        f"{root}: holds no {data}, expected the folder {NAMED[data].places[0]}; unpack {NAMED[data].archive} "
        "there, or name another folder with --data-root"
    )
