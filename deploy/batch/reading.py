"""The images of a part: each with its name, or the reason why there is none."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from deploy.batch.arrow import image_rows
from deploy.batch.parts import COMPRESSED, Part
from runtime.errors import ClearpactError, FileError
from runtime.images import decode_image, load_image


def images_of(part: Part, column: str) -> Iterator[tuple[str, np.ndarray | ClearpactError]]:
    """Yield name and pixels, uint8 [H, W] or [H, W, 3], of every image of a part, in order.

    What goes wrong with the part as a whole goes wrong with each of its images: every one is yielded.

    Args:
        part: of a plan.
        column: of Parquet files; see `deploy.batch.arrow.image_rows`.
    """
    if part.kind == "files":
        for path, *_ in part.members:
            try:
                yield path, load_image(path)
            except ClearpactError as error:
                yield path, error
        return
    done = 0
    try:
        for name, encoded in _encoded(part, column):
            done += 1
            yield name, _decoded(name, encoded)
    except (ClearpactError, OSError, EOFError, zlib.error) as error:
        reason = (
            error if isinstance(error, ClearpactError) else FileError(f"{part.source}: cannot be read ({error})")
        )
        for index in range(done, part.count):
            yield _name(part, index), reason


def _encoded(part: Part, column: str) -> Iterator[tuple[str, bytes | None]]:
    if part.kind == "parquet":
        yield from image_rows(Path(part.source), part.first, part.count, column)
        return
    # Where the plan says that an image stands: to list a compressed tar once more, as tarfile does to reach a
    # member, takes longer than to decompress small images.
    compressed = part.source.endswith(COMPRESSED)
    with gzip.open(part.source) if compressed else Path(part.source).open("rb") as file:
        for index, (_, offset, size) in enumerate(part.members):
            file.seek(offset)
            yield _name(part, index), file.read(size)


def _name(part: Part, index: int) -> str:
    if part.kind == "parquet":
        return f"{part.source}#{part.first + index}"
    return f"{part.source}/{part.members[index][0]}"


def _decoded(name: str, encoded: bytes | None) -> np.ndarray | ClearpactError:
    if not encoded:
        return FileError(f"{name}: empty, expected an image")
    try:
        return decode_image(encoded, name)
    except ClearpactError as error:
        return error
