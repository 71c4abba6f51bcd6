"""A run's folder belongs to one process at a time: two would each replace what the other has trained."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from runtime.errors import FileError, OptionError

LOCK_NAME = ".clearpact-run.lock"


@contextlib.contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Own a run's folder, which is made where it is missing, until the block ends.

    The system's lock on a file in it decides, not that the file is there: the lock of a process that was killed,
    or whose machine lost power, is gone with it, and the next one takes the file over.

    Raises:
        OptionError: another process owns the folder.
        FileError: nothing can be written there.
    """
    path = folder / LOCK_NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _locked(path)
    except OSError as error:
        raise FileError(
            f"{folder}: cannot be written ({error.strerror}); choose a folder you may write to"
        ) from None
    if descriptor is None:
        raise OptionError(
            f"{folder}: another process trains there{_owner(path)}; wait for its end, or choose another --name"
        )
    try:
        os.truncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield
    finally:
        # Removed before it is given up: who opened it meanwhile finds that it is no longer the file of that name.
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(descriptor)


def _owner(path: Path) -> str:
    with contextlib.suppress(OSError):
        return f" ({path.read_text(errors='replace').strip()})"
    return ""


def _locked(path: Path) -> int | None:
    """Return the descriptor of the file at `path`, locked; None where another process has locked it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        if not _lock(descriptor):
            os.close(descriptor)
            return None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        os.close(descriptor)  # the owner before removed it between the two lines above


def _lock(descriptor: int) -> bool:
    """Lock an open file for this process and return whether that was possible."""
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined, unused-ignore]
        except OSError:
            return False
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks: there the runs have to look after themselves
        return True
    return True
