"""One place decides what a command may write: nothing that it reads, and nothing twice."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from runtime.engines.tensorrt.plan import sidecar_path
from runtime.errors import FileError
from runtime.files import check_writable

AnyPath = str | os.PathLike[str]


def check_outputs(outputs: Iterable[AnyPath | None], *, inputs: Iterable[AnyPath | None] = ()) -> None:
    """Raise FileError now if one of the files that a command will write must not be: call it before any work.

    Two names are of one file if they lead to the same place, through links, in another spelling, or as hard links.
    Outputs that differ by nothing but case count as one too, since on many file systems they are.

    Args:
        outputs: files that will be written; None for those that will not. Parent folders are made.
        inputs: files that are read, and folders of images, into which nothing is written; None for those that are
            not. Of a plan, its sidecar is read too.

    Raises:
        FileError: an output is an input, lies in a folder that is read, is another output, or cannot be written.
    """
    wanted = [Path(path) for path in outputs if path]
    read = [Path(path) for path in inputs if path]
    read += [sidecar_path(path) for path in read]
    files = {identity: path for path in read for identity in _identities(path)}
    folders = {os.path.realpath(path): path for path in read if path.is_dir()}
    written: dict[object, Path] = {}
    for output in wanted:
        given = next((files[identity] for identity in _identities(output) if identity in files), None)
        if given is not None:
            called = "an input" if given == output else f"the input {given}"
            raise FileError(f"{output}: is {called}, which is read; name another file to write")
        inside = next((folders[str(p)] for p in Path(os.path.realpath(output)).parents if str(p) in folders), None)
        if inside is not None:
            raise FileError(f"{output}: lies in {inside}, whose files are read; name a file outside of it")
        for identity in (*_identities(output), _folded(output)):
            if identity in written:
                also = f", also as {written[identity]}" if written[identity] != output else ""
                raise FileError(f"{output}: would be written twice{also}; name another file or folder")
        written |= dict.fromkeys((*_identities(output), _folded(output)), output)
    for output in wanted:
        check_writable(output)


def _identities(path: Path) -> list[object]:
    """Return what a file is known by: where its name leads, and of one that is there also its number."""
    real = os.path.realpath(path)
    try:
        found = Path(real).stat()
    except OSError:
        return [real]
    return [real, (found.st_dev, found.st_ino)]


def _folded(path: Path) -> str:
    return unicodedata.normalize("NFC", os.path.realpath(path)).casefold()
