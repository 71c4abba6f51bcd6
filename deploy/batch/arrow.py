"""Parquet files: images in, results out."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from runtime.errors import FileError, OptionError
from runtime.files import write_atomically


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


def parquet_row_counts(path: Path) -> list[int]:
    """Return the number of rows of each row group.

    Raises:
        FileError: no Parquet file.
    """
    metadata = _opened(path).metadata
    return [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]


def image_rows(
    path: Path, row_group: int, first: int, count: int, column: str
) -> Iterator[tuple[str, bytes | None]]:
    """Yield name and encoded image of some rows; None where a row has no image.

    Args:
        path: of the file.
        row_group: in which the rows are.
        first: of them.
        count: of rows.
        column: of images: bytes, or structs of `bytes` and `path` as Hugging Face writes them; see `image_column`.

    Raises:
        FileError: the file cannot be read, or holds no such column.
    """
    file = _opened(path)
    before = sum(file.metadata.row_group(index).num_rows for index in range(row_group))
    name = image_column(path, column)
    values = file.read_row_group(row_group, columns=[name]).column(0).slice(first, count)
    for offset, value in enumerate(values):
        found = value.as_py()
        named = found.get("path") if isinstance(found, dict) else None
        encoded = found.get("bytes") if isinstance(found, dict) else found
        number = f"{path}#{before + first + offset}"
        yield f"{number} {named}" if named else number, encoded


def image_column(path: Path, wanted: str = "") -> str:
    """Return the name of the column of images: bytes, or structs with a field `bytes`.

    Args:
        path: of a Parquet file.
        wanted: its name; "" takes the first such column.

    Raises:
        FileError: there is none.
    """
    schema = _opened(path).schema_arrow
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
        raise FileError(
            f"{path}: cannot be read as Parquet ({str(error).splitlines()[0]}); copy it again"
        ) from None
