"""Compiled models kept in a folder, so that an app that starts again does not compile again.

A file holds what the engine exported, behind the SHA-256 of it: one that is cut off or altered by accident is not
given to the engine. That protects from accidents only: an engine file is trusted as a program is, so the folder is
the one that the user named, and it must not be writable for everybody.
"""

from __future__ import annotations

import hashlib
import os
import stat
import warnings
from collections.abc import Iterable
from pathlib import Path

from runtime.errors import FileError, OptionError
from runtime.files import write_atomically

SUFFIX = ".compiled"

_MAGIC = b"clearpact compiled model 1\n"


class CompiledCache:
    """Engine files by key in one folder.

    Args:
        folder: made when the first model is kept.

    Raises:
        FileError: it is no folder.
        OptionError: every user of the machine may write to it.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = Path(folder)
        if not self._folder.exists():
            return
        if not self._folder.is_dir():
            raise FileError(f"cache {folder}: is a file, expected a folder; name another")
        if os.name == "posix" and self._folder.stat().st_mode & stat.S_IWOTH:
            raise OptionError(
                f"cache {folder}: every user may write to it, expected a folder of your own, since the engine "
                "trusts what is in it; name another"
            )

    def load(self, key: str) -> bytes | None:
        """Return what was kept under a key; None where there is nothing, or it is damaged."""
        try:
            data = self._path(key).read_bytes()
        except OSError:
            return None
        start = len(_MAGIC) + hashlib.sha256().digest_size
        contents = data[start:]
        return contents if data[:start] == _MAGIC + hashlib.sha256(contents).digest() else None

    def store(self, key: str, contents: bytes) -> None:
        """Keep contents under a key; where that fails, warn, since a model can run without."""
        try:
            write_atomically(self._path(key), _MAGIC + hashlib.sha256(contents).digest() + contents)
        except FileError as error:
            warnings.warn(f"compiled model not kept: {error}", RuntimeWarning, stacklevel=2)

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}{SUFFIX}"


def cache_key(parts: Iterable[object]) -> str:
    """Return a name for all that decides what a compiled model is, as 64 hexadecimal digits."""
    return hashlib.sha256("\0".join(map(repr, parts)).encode()).hexdigest()


def processor_features() -> str:
    """Return what the processor can do, as Linux names it; "" elsewhere."""
    try:
        with Path("/proc/cpuinfo").open() as info:
            lines = info.read(1 << 14).splitlines()  # the first core is like the others
    except OSError:
        return ""
    return next((line.partition(":")[2] for line in lines if line.startswith(("flags", "Features"))), "")
