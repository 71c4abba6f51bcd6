"""The record of measurements: JSON lines, one result each, with its environment."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from runtime.errors import FileError
from runtime.files import read_bytes, write_atomically

Record = Mapping[str, Any]
"""One result, as it was recorded."""

_BEFORE_REASONS = "pip install 'clearpact[peers]'"


def append(path: str | Path, result: dict[str, Any]) -> None:
    """Add one result to a .jsonl file; the lines that are there stay.

    Raises:
        FileError: the file cannot be read or written.
    """
    path = Path(path)
    before = read_bytes(path) if path.exists() else b""
    if before and not before.endswith(b"\n"):
        before += b"\n"
    write_atomically(path, before + json.dumps(result).encode() + b"\n")


def missing_by_reason(comparison: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return what a comparison lacks: the reason, with what to do, and the contenders it holds for.

    Before there were reasons, a record had the names alone; only packages of others were missing then.
    """
    given = comparison.get("missing") or {}
    reasons = given if isinstance(given, dict) else dict.fromkeys(given, _BEFORE_REASONS)
    found: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        found.setdefault(reason, []).append(name)
    return found


def read(folder: str | Path) -> list[dict[str, Any]]:
    """Return the results in all .jsonl files of a folder: by file name, then as they were appended.

    Raises:
        FileError: a file cannot be read, or a line of it is no result.
    """
    return [result for path in sorted(Path(folder).glob("*.jsonl")) for _, result in numbered(path)]


def numbered(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the results of one .jsonl file with the numbers of their lines, from 1; empty lines are passed over.

    Raises:
        FileError: the file cannot be read, or a line of it is no result.
    """
    for number, line in enumerate(read_bytes(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            result = json.loads(line)
        except (ValueError, RecursionError):
            result = None
        if not isinstance(result, dict) or not isinstance(result.get("bench"), str):
            raise FileError(f"{path}, line {number}: expected one result of a bench command; remove the line")
        yield number, result
