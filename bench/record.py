"""The record of measurements: JSON lines, one result each, with its environment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from runtime.files import write_atomically


def append(path: str | Path, result: dict[str, Any]) -> None:
    """Add one result to a .jsonl file; the lines that are there stay.

    Raises:
        FileError: the file cannot be written.
    """
    path = Path(path)
    before = path.read_text() if path.exists() else ""
    write_atomically(path, before + json.dumps(result) + "\n")
