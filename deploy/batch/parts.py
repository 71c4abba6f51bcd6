"""What there is to do, cut into parts: written down once, so that a run that was interrupted continues it.

A part is done when its result is there. Names, offsets and row groups are those of the first run, so that images
that come or go meanwhile shift nothing: none is lost, and none is done twice.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from deploy.batch.arrow import image_column, parquet_row_count
from runtime.errors import FileError
from runtime.files import read_bytes, write_atomically
from runtime.images import RARE_SUFFIXES, SUFFIXES, is_hidden, is_image_file

PLAN_NAME = "plan.jsonl"
PARQUET_SUFFIXES = (".parquet", ".pq")
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
COMPRESSED = (".gz", ".tgz")  # which can be read from the start only


@dataclass(frozen=True)
class Settings:
    """What all results of a folder have in common.

    Args:
        model: sha256 of the model file.
        inputs: as they were named.
        explain: method of the maps, or "".
        map_size: height and width of a map, in pixels.
        column: of Parquet files, or "" for the first that holds images.
        images_in_part: most images in one part.
    """

    model: str
    inputs: tuple[str, ...]
    explain: str
    map_size: int
    column: str
    images_in_part: int


@dataclass(frozen=True)
class Part:
    """Some images that one worker does in one go.

    Args:
        number: of the part; its result is named by it.
        kind: "files", "tar" or "parquet".
        source: the tar or Parquet file; the folder of the files.
        members: of a tar, as (name, offset in bytes, size in bytes); files, as (path, 0, 0).
        first: row of the Parquet file that the part begins with.
        count: number of images.
    """

    number: int
    kind: str
    source: str
    count: int
    members: tuple[tuple[str, int, int], ...] = ()
    first: int = 0

    def to_json(self) -> str:
        """Return the line of the plan that `from_json` reads."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Part:
        """Read a line of a plan; raises ValueError, TypeError or KeyError where it is none."""
        values = json.loads(text)
        return cls(
            **{**values, "members": tuple((name, offset, size) for name, offset, size in values["members"])}
        )

    def result(self, folder: Path) -> Path:
        """Return the path of its result."""
        return folder / f"part-{self.number:06d}.parquet"


def plan(settings: Settings, folder: Path) -> list[Part]:
    """Return all parts: those of the plan in the folder, or of a new one that is written there.

    Raises:
        FileError: an input is missing or holds no image, or the folder holds results of other settings.
    """
    where = folder / PLAN_NAME
    if where.exists():
        return _read(where, settings)
    if folder.is_dir() and any(folder.glob("part-*.parquet")):
        raise FileError(f"{folder}: holds results without their {PLAN_NAME}; name another folder")
    parts = list(_numbered(settings))
    if not parts:
        raise FileError(f"{', '.join(settings.inputs)}: no image in it; expected images, *.tar or *.parquet")
    lines = [json.dumps(asdict(settings)), *(part.to_json() for part in parts)]
    write_atomically(where, "\n".join(lines) + "\n")
    return parts


def sha256_of(model: Path) -> str:
    """Return the sha256 of a file, hexadecimal."""
    return hashlib.sha256(read_bytes(model)).hexdigest()


def _read(where: Path, settings: Settings) -> list[Part]:
    try:
        first, *rest = read_bytes(where).decode().splitlines()
        values = json.loads(first)
        found = Settings(**{**values, "inputs": tuple(values["inputs"])})
        parts = [Part.from_json(line) for line in rest]
    except (ValueError, TypeError, KeyError):
        raise FileError(f"{where}: cannot be read as a plan; name another folder") from None
    for name, value in asdict(found).items():
        wanted = asdict(settings)[name]
        if value != wanted:
            raise FileError(
                f"{where.parent}: holds results with {name} {value!r}, not {wanted!r}; name another folder, or "
                "continue with what it was begun with"
            )
    return parts


def _numbered(settings: Settings) -> Iterator[Part]:
    number = 0
    for given in map(Path, settings.inputs):
        for part in _parts_of(given, settings.images_in_part, settings.column):
            yield replace(part, number=number)
            number += 1


def _parts_of(given: Path, most: int, column: str) -> Iterator[Part]:
    """Yield the parts of one input, not yet numbered."""
    if given.is_dir():
        yield from _parts_of_folder(given, most, column)
    elif not given.exists():
        raise FileError(f"{given}: no such file; check the path")
    elif given.name.endswith(TAR_SUFFIXES):
        yield from _parts_of_tar(given, most)
    elif given.name.endswith(PARQUET_SUFFIXES):
        image_column(given, column)
        rows = parquet_row_count(given)
        for first in range(0, rows, most):
            yield Part(0, "parquet", str(given), min(most, rows - first), first=first)
    else:
        yield Part(0, "files", str(given.parent), 1, members=((str(given), 0, 0),))


def _parts_of_folder(folder: Path, most: int, column: str) -> Iterator[Part]:
    files: list[tuple[str, int, int]] = []
    for path in _walk(folder):
        if path.name.endswith((*TAR_SUFFIXES, *PARQUET_SUFFIXES)):
            yield from _parts_of(path, most, column)
        elif is_image_file(path):
            files.append((str(path), 0, 0))
            if len(files) == most:
                yield Part(0, "files", str(folder), most, members=tuple(files))
                files = []
    if files:
        yield Part(0, "files", str(folder), len(files), members=tuple(files))


def _walk(folder: Path) -> Iterator[Path]:
    """Yield the files in a folder and in the folders in it, sorted, without those of systems and editors."""
    try:
        entries = sorted(entry for entry in folder.iterdir() if not is_hidden(entry.name))
    except OSError as error:
        raise FileError(f"{folder}: cannot be listed ({error.strerror}); check its permissions") from None
    for entry in entries:
        if entry.is_dir() and not entry.is_symlink():  # a link may lead back up
            yield from _walk(entry)
        else:
            yield entry


def _parts_of_tar(path: Path, most: int) -> Iterator[Part]:
    try:
        with tarfile.open(path, "r:gz" if path.name.endswith(COMPRESSED) else "r:") as tar:
            found = [
                (member.name, member.offset_data, member.size)
                for member in tar
                if member.isfile() and _is_image_name(member.name)
            ]
    except (tarfile.TarError, OSError, EOFError) as error:
        raise FileError(f"{path}: cannot be read as a tar file ({error}); copy it again") from None
    size = max(1, len(found)) if path.name.endswith(COMPRESSED) else most
    for start in range(0, len(found), size):
        some = tuple(found[start : start + size])
        yield Part(0, "tar", str(path), len(some), members=some)


def _is_image_name(name: str) -> bool:
    """Return whether a member of a tar is meant as an image: by its suffix, and not hidden."""
    path = Path(name)
    return not any(is_hidden(part) for part in path.parts) and path.suffix.lower() in (*SUFFIXES, *RARE_SUFFIXES)
