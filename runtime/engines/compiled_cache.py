"""Compiled models kept in a folder, so that an app that starts again does not compile again.

A file holds what the engine exported, behind the SHA-256 of it: one that is cut off or altered by accident is not
given to the engine. That protects from accidents only: an engine file is trusted as a program is. So the folder is
one that nobody else may write to, nor to the folders above it, where one could be put in its place.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import warnings
from collections.abc import Iterable
from pathlib import Path

from runtime.errors import FileError, OptionError
from runtime.files import write_atomically

SUFFIX = ".compiled"
MAX_BYTES = 2**30

_MAGIC = b"clearpact compiled model 1\n"


class CompiledCache:
    """Engine files by key in one folder.

    Args:
        folder: made when the first model is kept, for its owner alone.
        max_bytes: what was used longest ago is deleted where the files take more; the newest one always stays.

    Raises:
        FileError: it is no folder.
        OptionError: another user may write to it or to a folder above it, or owns it.
    """

    def __init__(self, folder: str | os.PathLike[str], *, max_bytes: int = MAX_BYTES) -> None:
        self._folder = Path(folder)
        self._max_bytes = max_bytes
        if self._folder.exists() and not self._folder.is_dir():
            raise FileError(f"cache {folder}: is a file, expected a folder; name another")
        self._check()

    def _check(self) -> None:
        """Raise OptionError where another user could put a file into the folder: also after it was opened."""
        if os.name != "posix":
            return
        real = Path(os.path.realpath(self._folder))
        for place in (real, *real.parents):
            reason = _why_others_may_write(place, inside=place != real)
            if reason is not None:
                reason = reason.format("it" if place == real else place)
                raise OptionError(
                    f"cache {self._folder}: {reason}, expected a folder of your own, since the engine trusts what "
                    "is in it; chmod go-w, or name another"
                )

    def own_folder(self) -> Path:
        """Return the folder, made where it is missing, for an engine that keeps its files there itself.

        Raises:
            FileError: it cannot be made.
            OptionError: another user may write to it.
        """
        self._check()
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise FileError(f"cache {self._folder}: cannot be made ({error.strerror}); name another") from None
        return self._folder

    def load(self, key: str) -> bytes | None:
        """Return what was kept under a key; None where there is nothing, or it is damaged."""
        self._check()
        try:
            data = self._path(key).read_bytes()
        except OSError:
            return None
        with contextlib.suppress(OSError):  # a folder to read only
            os.utime(self._path(key))  # it was used now
        start = len(_MAGIC) + hashlib.sha256().digest_size
        contents = data[start:]
        return contents if data[:start] == _MAGIC + hashlib.sha256(contents).digest() else None

    def store(self, key: str, contents: bytes) -> None:
        """Keep contents under a key; where that fails, warn, since a model can run without."""
        self._check()
        try:
            with contextlib.suppress(OSError):  # where it cannot be made, writing says so
                self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_atomically(self._path(key), _MAGIC + hashlib.sha256(contents).digest() + contents)
        except FileError as error:
            warnings.warn(f"compiled model not kept: {error}", RuntimeWarning, stacklevel=2)
            return
        self._make_room(self._path(key))

    def _make_room(self, newest: Path) -> None:
        """Delete what was used longest ago until the files are small enough; another process may do the same."""
        files: list[tuple[float, int, Path]] = []
        for path in self._folder.glob(f"*{SUFFIX}"):
            with contextlib.suppress(OSError):
                found = path.stat()
                files.append((found.st_mtime, found.st_size, path))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= self._max_bytes:
                return
            if path != newest:
                with contextlib.suppress(OSError):
                    path.unlink()
                total -= size

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}{SUFFIX}"


def _why_others_may_write(place: Path, *, inside: bool) -> str | None:
    """Return why others than this user and root may put files into a folder; None where they may not.

    Args:
        place: the folder, without links on the way to it; one that is not there yet is nobody's.
        inside: what lies in it is asked for; in a folder such as /tmp (sticky) only its owner may replace that.
    """
    try:
        found = place.stat()
    except OSError:
        return None
    if found.st_uid not in (0, os.geteuid()):
        return "{} belongs to another user"
    if inside and found.st_mode & stat.S_ISVTX:
        return None
    if found.st_mode & stat.S_IWOTH:
        return "every user may write to {}"
    if found.st_mode & stat.S_IWGRP and not _is_private(found.st_gid):
        return "a group may write to {}"
    return None


def _is_private(group: int) -> bool:
    """Return whether a group is root's or has this user alone, as many systems make one for each."""
    if group == 0:
        return True
    try:
        import grp
        import pwd

        user, found = pwd.getpwuid(os.geteuid()), grp.getgrgid(group)
    except (ImportError, KeyError):
        return False
    return found.gr_name == user.pw_name and set(found.gr_mem) <= {user.pw_name}


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
