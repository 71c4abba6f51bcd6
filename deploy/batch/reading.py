"""The images of a part: each with its name, or the reason why there is none."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from deploy.batch.arrow import image_rows
from deploy.batch.parts import Part
from runtime.errors import ClearpactError, FileError
from runtime.images import load_image, to_array


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
    except (ClearpactError, OSError, tarfile.TarError, EOFError) as error:
        reason = (
            error if isinstance(error, ClearpactError) else FileError(f"{part.source}: cannot be read ({error})")
        )
        for index in range(done, part.count):
            yield _name(part, index), reason


def _encoded(part: Part, column: str) -> Iterator[tuple[str, bytes | None]]:
    if part.kind == "parquet":
        yield from image_rows(Path(part.source), part.row_group, part.first, part.count, column)
        return
    if part.source.endswith(".tar"):  # what is not compressed is read where it stands
        with Path(part.source).open("rb") as file:
            for index, (_, offset, size) in enumerate(part.members):
                file.seek(offset)
                yield _name(part, index), file.read(size)
        return
    wanted = {offset: index for index, (_, offset, _) in enumerate(part.members)}
    with tarfile.open(part.source) as tar:
        for member in tar:
            if member.offset_data in wanted:
                content = tar.extractfile(member)
                yield _name(part, wanted[member.offset_data]), None if content is None else content.read()


def _name(part: Part, index: int) -> str:
    if part.kind == "parquet":
        return f"{part.source}#row group {part.row_group}, row {part.first + index}"
    return f"{part.source}/{part.members[index][0]}"


def _decoded(name: str, encoded: bytes | None) -> np.ndarray | ClearpactError:
    if not encoded:
        return FileError(f"{name}: empty, expected an image")
    from PIL import Image

    try:
        with Image.open(io.BytesIO(encoded)) as image:
            return to_array(image)
    except ClearpactError as error:
        return FileError(f"{name}: {error}")
    except Exception as error:  # Pillow's plugins let anything through that damaged bytes make them do
        said = "not an image" if isinstance(error, Image.UnidentifiedImageError) else str(error).split("\n")[0]
        return FileError(f"{name}: cannot be read as an image ({said}); expected PNG, JPEG or the like")
