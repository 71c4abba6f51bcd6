"""A folder that is written as a whole or not at all."""

from __future__ import annotations

import contextlib
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from runtime.errors import FileError


@contextlib.contextmanager
def folder_at_once(folder: Path, *, replace: bool = False) -> Iterator[Path]:
    """Give a temporary folder beside `folder` that takes its name where nothing goes wrong.

    Args:
        folder: the folder to write.
        replace: put it in the place of one that is there.

    Raises:
        FileError: the folder cannot be written.
    """
    temporary, old = (folder.with_name(f".clearpact-{secrets.token_hex(8)}.tmp") for _ in range(2))
    try:
        yield temporary
        if replace and folder.exists():
            folder.replace(old)
        temporary.replace(folder)
    except OSError as error:
        raise FileError(f"{folder}: cannot be written ({error.strerror}); choose another folder") from None
    finally:
        for leftover in (temporary, old):
            shutil.rmtree(leftover, ignore_errors=True)
