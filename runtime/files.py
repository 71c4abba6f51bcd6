"""Reading and writing whole files such that no reader ever sees half of one."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from runtime.errors import FileError


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """Return the contents of a file.

    Raises:
        FileError: the file is missing, a folder, or not readable.
    """
    path = Path(path)
    try:
        return path.read_bytes()
    except IsADirectoryError:
        raise FileError(f"{path}: is a folder, expected a file; name the file inside it") from None
    except FileNotFoundError:
        raise FileError(f"{path}: no such file; check the path") from None
    except OSError as error:
        raise FileError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise FileError now if `path` could not be written later: call it before long work.

    Creates the parent folder where it is missing, and leaves an existing file as it is.
    """
    path = Path(path)
    try:
        _check_kind(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise _unwritable(path, error) from None


def write_atomically(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Write `data` to `path` through a temporary file, fsync and rename.

    After a crash, a full disk or Ctrl-C the old file, or none, is there; never half of the new one.

    Raises:
        FileError: the folder is not writable, the disk is full, or `path` is a folder or a device.
    """
    path = Path(path)
    if isinstance(data, str):
        data = data.encode(errors="surrogateescape")  # names of files that are no text come out as they were
    # Not tempfile: its files are private, and what is shipped gets the permissions any new file would have.
    temporary = path.with_name(f".clearpact-{os.urandom(8).hex()}.tmp")
    try:
        _check_kind(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise _unwritable(path, error) from None
    finally:
        with contextlib.suppress(OSError):  # gone where all went well
            temporary.unlink()


def remove_leftovers(folder: str | os.PathLike[str]) -> None:
    """Delete the temporary files that a killed process left in a folder to which nobody else writes now."""
    for leftover in Path(folder).glob(".clearpact-*.tmp"):
        with contextlib.suppress(OSError):
            leftover.unlink()


def _check_kind(path: Path) -> None:
    if path.is_dir():
        raise FileError(f"{path}: is a folder, expected the name of a file to write; add a file name")
    if path.exists() and not path.is_file():
        raise FileError(f"{path}: is no regular file and would be replaced by one; name another file")


def _unwritable(path: Path, error: OSError) -> FileError:
    return FileError(
        f"{path}: cannot be written ({error.strerror}); free space or choose a folder you may write to"
    )
