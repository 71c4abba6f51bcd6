"""Parquet files: images in, results out."""

from __future__ import annotations

import functools
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from runtime.errors import FileError, OptionError
from runtime.files import write_atomically

# Rows of a Parquet file that are in memory together, encoded; of large images as many as have so many bytes.
_MOST_ROWS = 1024
_BYTES_AT_ONCE = 2**23


def import_arrow() -> Any:
    """Return pyarrow.

    Raises:
        OptionError: it is not installed.
    """
    try:
        import pyarrow.parquet
    except ImportError:
        raise OptionError(
            "results are Parquet files, which need pyarrow; pip install 'clearpact[batch]'"
        ) from None
    return pyarrow


def parquet_row_count(path: Path) -> int:
    """Return the number of rows.

    Raises:
        FileError: no Parquet file.
    """
    return int(_opened(path).metadata.num_rows)


def image_rows(path: Path, first: int, count: int, column: str) -> Iterator[tuple[str, bytes | None]]:
    """Yield name and encoded image of some rows; None where a row has no image.

    Args:
        path: of the file.
        first: row of the file, whatever its row groups are.
        count: of rows.
        column: of images: bytes, or structs of `bytes` and `path` as Hugging Face writes them; see `image_column`.

    Raises:
        FileError: the file cannot be read, holds no such column, or holds fewer rows.
    """
    arrow = import_arrow()
    try:
        source = _images(path, column, path.stat().st_mtime_ns)
        last = first + count
        groups = np.flatnonzero((source.ends > first) & (source.ends - source.rows < last))
        row = int((source.ends - source.rows)[groups[0]]) if len(groups) else last
        for batch in source.file.iter_batches(source.rows_at_once, groups.tolist(), columns=[source.column]):
            values = batch.column(0)
            wanted = values.slice(max(0, first - row), max(0, last - max(first, row)))
            for index, found in enumerate(wanted.to_pylist(), max(first, row)):
                named = found.get("path") if isinstance(found, dict) else None
                encoded = found.get("bytes") if isinstance(found, dict) else found
                yield f"{path}#{index} {named}" if named else f"{path}#{index}", encoded
            row += len(values)
            if row >= last:
                return
    except (arrow.ArrowException, OSError) as error:
        raise _unreadable(path, error) from None
    raise FileError(f"{path}: holds {row:,} rows, expected {last:,} as when it was listed; name another folder")


@dataclass(frozen=True)
class _Images:
    """An open Parquet file.

    Args:
        file: pyarrow's.
        column: of the images.
        rows: of each row group.
        ends: the row after each row group.
        rows_at_once: so many are in memory, encoded.
    """

    file: Any
    column: str
    rows: np.ndarray
    ends: np.ndarray
    rows_at_once: int


# With thousands of row groups, to open a file takes longer than to read a part of it.
@functools.lru_cache(maxsize=1)
def _images(path: Path, column: str, changed_ns: int) -> _Images:
    file = _opened(path)
    groups = [file.metadata.row_group(index) for index in range(file.metadata.num_row_groups)]
    rows = np.array([group.num_rows for group in groups], int)
    row_bytes = sum(group.total_byte_size for group in groups) // max(1, file.metadata.num_rows)
    at_once = min(_MOST_ROWS, max(1, _BYTES_AT_ONCE // max(1, row_bytes)))
    return _Images(file, _column(path, file.schema_arrow, column), rows, np.cumsum(rows), at_once)


def image_column(path: Path, wanted: str = "") -> str:
    """Return the name of the column of images: bytes, or structs with a field `bytes`.

    Args:
        path: of a Parquet file.
        wanted: its name; "" takes the first such column.

    Raises:
        FileError: there is none.
    """
    return _column(path, _opened(path).schema_arrow, wanted)


def _column(path: Path, schema: Any, wanted: str) -> str:
    found = [str(field.name) for field in schema if _holds_bytes(field.type)]
    if not (wanted in found if wanted else found):
        named = (
            f"column {wanted!r} holds no images"
            if wanted in schema.names
            else f"no column {wanted or 'of images'}"
        )
        raise FileError(f"{path}: {named}, expected bytes; such columns are: {', '.join(found) or 'none'}")
    return wanted or found[0]


def _holds_bytes(kind: Any) -> bool:
    types = import_arrow().types
    if types.is_struct(kind):
        inside = {field.name: field.type for field in (kind.field(index) for index in range(kind.num_fields))}
        return "bytes" in inside and _holds_bytes(inside["bytes"])
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def write_results(
    path: Path,
    names: Sequence[str],
    reasons: Sequence[str | None],
    answers: Mapping[str, np.ndarray],
    *,
    described: dict[str, str],
    map_pixels: int,
) -> None:
    """Write results as one Parquet file, whole or not at all.

    Args:
        path: to write.
        names: of all images.
        reasons: why an image has no answer; None where it has one.
        answers: columns, [N, ...] of the N images that have answers.
        described: the file's metadata.
        map_pixels: number of pixels of a map; 0 where there are none.
    """
    arrow = import_arrow()
    fields = [
        ("path", arrow.string()), ("class", arrow.string()), ("index", arrow.int32()),
        ("probability", arrow.float32()), ("margin", arrow.float32()), ("score", arrow.float32()),
        ("in_distribution", arrow.bool_()),
    ]  # fmt: skip
    if map_pixels:
        fields += [("map", arrow.list_(arrow.uint8(), map_pixels)), ("map_max", arrow.float32())]
    schema = arrow.schema([*fields, ("reason", arrow.string())], metadata=described)
    has_answer = np.array([reason is None for reason in reasons])
    rows = None if has_answer.all() else arrow.array(np.cumsum(has_answer) - 1, mask=~has_answer)  # of `answers`

    def column(name: str, kind: Any) -> Any:
        if name not in answers:
            return arrow.nulls(len(names), kind)
        values = answers[name]
        if values.ndim == 2:
            found = arrow.FixedSizeListArray.from_arrays(arrow.array(values.ravel()), type=kind)
        else:
            found = arrow.array(values, kind)
        return found if rows is None else found.take(rows)

    said = {"path": names, "reason": reasons}
    arrays = [arrow.array(said[f.name], f.type) if f.name in said else column(f.name, f.type) for f in schema]
    buffer = io.BytesIO()
    arrow.parquet.write_table(arrow.table(arrays, schema=schema), buffer, compression="zstd")
    write_atomically(path, buffer.getvalue())


def _opened(path: Path) -> Any:
    arrow = import_arrow()
    try:
        return arrow.parquet.ParquetFile(path, memory_map=True)
    except (arrow.ArrowException, OSError) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> FileError:
    return FileError(f"{path}: cannot be read as Parquet ({str(error).splitlines()[0]}); copy it again")
