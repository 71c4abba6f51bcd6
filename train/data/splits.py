"""Which files of an image folder train, validate and test; written beside the checkpoint as `split.json`.

Two layouts are read: class folders, `PATH/cat/1.jpg`, which are split 80/10/10 here, and folders with a split of
their own, `PATH/train/cat/1.jpg` and `PATH/test/cat/7.jpg`, with or without `val`. Nothing here needs torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

from runtime.errors import FileError
from runtime.files import read_bytes, write_atomically
from runtime.images import is_hidden, is_image_file
from train.data.names import MEDMNIST, NAMED, ORIGINALS, PREFIX, data_name, place_of

SPLIT_NAME = "split.json"
PARTS = ("train", "val", "test")
TEST_SHARE = 0.1  # of a folder without a split of its own
FORMAT, VERSION = "clearpact.split", 1

_OTHER_NAMES = {"valid": "val", "validation": "val", "training": "train", "testing": "test"}
_LAYOUTS = "expected a folder for each class (cat/, dog/, ...), or train/ and test/ (and val/) with such folders"


@dataclass(frozen=True)
class Split:
    """The files of every part and class.

    Args:
        data: "folder:NAME" or one of NAMED.
        root: folder that the names are relative to.
        seed: of the split made here; None where the folder has its own.
        classes: class names, in the order of the logits.
        files: part, then class -> names, with slashes; the unreadable ones are among them.
        skipped: name -> why it could not be read; None before anybody has tried.
    """

    data: str
    root: str
    seed: int | None
    classes: tuple[str, ...]
    files: Mapping[str, Mapping[str, tuple[str, ...]]]
    skipped: Mapping[str, str] | None = None

    @property
    def digest(self) -> str:
        """Twelve hexadecimal digits of the sha256 of classes and files; moving the folder does not change it."""
        listed = json.dumps([self.classes, {p: dict(self.files[p]) for p in PARTS}], sort_keys=True)
        return hashlib.sha256(listed.encode()).hexdigest()[:12]

    @property
    def name(self) -> str:
        """What tells this split from others, in manifests and results."""
        return data_name(self.data, self.digest)

    def part(self, part: str) -> tuple[list[str], list[int]]:
        """Return paths and class numbers of "train", "val" or "test", without the skipped files."""
        chosen = [
            (str(Path(self.root, name)), label)
            for label, of_class in enumerate(self.classes)
            for name in self.files[part].get(of_class, ())
            if name not in (self.skipped or {})
        ]
        return [path for path, _ in chosen], [label for _, label in chosen]


def sources_of(data: str | None, root: str | Path = "data") -> list[Path]:
    """Return the files and folders that are read for a data set's name, whether or not they are there.

    Args:
        data: as `python -m train` and `bench` take it: also an .npz file, a run's split.json, or None.
        root: folder of the data sets' original files.
    """
    if data is None:
        return []
    if data.startswith(PREFIX):
        return [Path(data.removeprefix(PREFIX))]
    if data in NAMED:
        return [Path(root, place) for place in NAMED[data].places]
    if data in ORIGINALS:
        return [Path(root, ORIGINALS[data])]
    if data in MEDMNIST:
        return [Path(root, f"{data}.npz")]
    found = [Path(data)] if data.endswith((".npz", ".json")) else []
    if data.endswith(".json"):
        with contextlib.suppress(FileError):  # which is said when the images are read
            found.append(Path(read(data).root))
    return found


def find(data: str, root: str | Path = "data", *, seed: int = 0, test_share: float = TEST_SHARE) -> Split:
    """Return the split of a folder: its own, or 80/10/10 of every class.

    Which part a file belongs to depends on the seed, the share and the names in its class, on nothing else: the
    same files give the same split on every machine.

    Args:
        data: "folder:PATH" or one of NAMED.
        root: folder below which a named data set lies.
        seed: of the split made here.
        test_share: of every class that the split made here tests on; a tenth validates.

    Raises:
        FileError: the folder is missing or laid out otherwise.
    """
    path = place_of(data, root)
    folders = _class_folders(path)
    parts = {_OTHER_NAMES.get(name.lower(), name.lower()): name for name in folders}
    twice = sorted(name for name in folders if name not in parts.values())
    if twice and data.startswith(PREFIX) and "train" in parts:
        same = parts[_OTHER_NAMES.get(twice[0].lower(), twice[0].lower())]
        raise FileError(f"{path}: {twice[0]}/ and {same}/ are one part; merge them, or move one of them away")
    others = sorted(parts.keys() - {*PARTS})
    if others and {"train", "test"} <= parts.keys():
        raise FileError(f"{path}: {others[0]}/ stands beside train/ and test/, {_LAYOUTS}; move it away")
    if data.startswith(PREFIX) and "train" in parts and not others:  # else it is a class of that name
        return Split(data_name(data, ""), str(path.resolve()), None, *_own_split(path, parts))
    if data in NAMED:
        folders = _checked(data, path, folders)
    if len(folders) < 2:
        found = f"the single folder {folders[0]}/" if folders else "no folder"
        raise FileError(f"{path}: holds {found}, {_LAYOUTS}")
    listed = {name: _images(path, path / name) for name in folders}
    files: dict[str, dict[str, tuple[str, ...]]] = {part: {} for part in PARTS}
    for name, names in listed.items():
        if len(names) < len(PARTS):
            raise FileError(
                f"{path / name}: {len(names)} images, expected {len(PARTS)} at least to split them into train, "
                "val and test; add images or remove the folder"
            )
        for part, chosen in zip(PARTS, _shares(names, seed, test_share), strict=True):
            files[part][name] = chosen
    return Split(data_name(data, ""), str(path.resolve()), seed, tuple(folders), files)


def write(split: Split, path: str | Path) -> None:
    """Write a split atomically.

    Raises:
        FileError: `path` cannot be written.
    """
    contents = {"format": FORMAT, "version": VERSION, **asdict(split)}
    write_atomically(path, json.dumps(contents, indent=1) + "\n")


def read(path: str | Path) -> Split:
    """Read what `write` wrote.

    Raises:
        FileError: missing, or not such a file.
    """
    expected = f"expected the {SPLIT_NAME} of a run folder"
    try:
        contents = json.loads(read_bytes(path))
        if (contents["format"], contents["version"]) != (FORMAT, VERSION):
            raise ValueError
        files = {part: {c: tuple(names) for c, names in contents["files"][part].items()} for part in PARTS}
        for name in (name for part in files.values() for names in part.values() for name in names):
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise ValueError
        return Split(
            str(contents["data"]), str(contents["root"]), contents["seed"], tuple(contents["classes"]), files,
            contents["skipped"],
        )  # fmt: skip
    except (ValueError, KeyError, TypeError, AttributeError):
        raise FileError(f"{path}: no list of training and test images, {expected}; name another file") from None


def _own_split(
    path: Path, parts: Mapping[str, str]
) -> tuple[tuple[str, ...], dict[str, dict[str, tuple[str, ...]]]]:
    if "test" not in parts:
        raise FileError(
            f"{path}: has train/ but no test/; add test/ (or rename val/), or put the class folders into {path}"
        )
    folders = {part: _class_folders(path / parts[part]) for part in PARTS if part in parts}
    classes = tuple(folders["train"])
    if len(classes) < 2:
        raise FileError(f"{path / parts['train']}: {len(classes)} class folders, {_LAYOUTS}")
    for part, names in folders.items():
        unknown = sorted(set(names) - set(classes))
        if unknown:
            raise FileError(
                f"{path / parts[part]}: class folder {unknown[0]!r} is not in {parts['train']}/; rename it"
            )
    files = {
        part: {name: _images(path, path / parts[part] / name) for name in folders.get(part, ())} for part in PARTS
    }
    if not any(files["test"].values()):
        raise FileError(f"{path / parts['test']}: no class folder with images, {_LAYOUTS}")
    return classes, files


def _checked(data: str, path: Path, folders: list[str]) -> list[str]:
    """Return the class folders of a named data set; raises FileError if they are not what they should be."""
    layout = NAMED[data]
    kept = [name for name in folders if name not in layout.dropped]
    wrong = sorted(set(kept) ^ set(layout.names)) if layout.names else []
    if wrong or len(kept) != layout.classes:
        reason = f" ({'unexpected' if wrong[0] in kept else 'missing'}: {wrong[0]})" if wrong else ""
        raise FileError(
            f"{path}: {len(kept)} class folders{reason}, expected the {layout.classes} of {data}; unpack "
            f"{layout.archive} again, or train on {PREFIX}{path}"
        )
    return kept


def _class_folders(path: Path) -> list[str]:
    try:
        inside = list(path.iterdir())
    except FileNotFoundError:
        raise FileError(f"{path}: no such folder, {_LAYOUTS}; check the path") from None
    except OSError as error:
        raise FileError(f"{path}: cannot be listed ({error.strerror}), {_LAYOUTS}") from None
    folders = sorted(entry.name for entry in inside if entry.is_dir() and not is_hidden(entry.name))
    if not folders and any(map(is_image_file, inside)):
        raise FileError(f"{path}: holds images but no class folders, {_LAYOUTS}")
    return folders


def _images(root: Path, folder: Path) -> tuple[str, ...]:
    """Return what is meant as an image in a folder and below it, relative to `root`, sorted.

    Links to folders are followed, each folder once. Hidden files and folders are an editor's or a system's. What
    is meant as an image and cannot be read, a broken link too, is found here and named when it is read.
    """
    found: list[str] = []
    seen: set[str] = set()
    for where, inside, names in os.walk(folder, followlinks=True):
        inside[:] = sorted(name for name in inside if not is_hidden(name))
        real = os.path.realpath(where)
        if real in seen:
            inside.clear()
            continue
        seen.add(real)
        paths = (Path(where, name) for name in names if not is_hidden(name))
        found += [path.relative_to(root).as_posix() for path in paths if is_image_file(path)]
    return tuple(sorted(found))


def _shares(names: tuple[str, ...], seed: int, test_share: float = TEST_SHARE) -> tuple[tuple[str, ...], ...]:
    """Return 80, 10 and 10 % of the files of one class, at least one each, drawn by the hash of seed and name.

    Args:
        names: at least 3.
        seed: of the draw.
        test_share: what the last part gets; the middle one gets a tenth.
    """
    drawn = sorted(names, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())
    val = max(1, round(len(names) / 10))
    test = min(max(1, round(len(names) * test_share)), len(names) - val - 1)
    parts = drawn[test + val :], drawn[test : test + val], drawn[:test]
    return tuple(tuple(sorted(part)) for part in parts)
