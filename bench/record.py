"""The record of measurements: JSON lines, one result each, with its environment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from runtime.files import read_bytes, write_atomically


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
