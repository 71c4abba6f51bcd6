"""The record of measurements: JSON lines, one result each, with its environment.

Every command of bench offers the same options and ends in the same way:

    record.add_options(parser)
    record.check(options, inputs=[options.model])     # before the work
    if record.deliver(options, result):               # after it
        return
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from bench.measure.environment import DIRTY, commit
from runtime.errors import FileError, OptionError
from runtime.files import read_bytes, write_atomically
from runtime.outputs import AnyPath, check_outputs

Record = Mapping[str, Any]
"""One result, as it was recorded."""

_BEFORE_REASONS = "pip install 'clearpact[peers]'"


def add_options(parser: argparse.ArgumentParser, *, json_line: bool = True) -> None:
    """Add --record and --allow-dirty, and --json where a command has it."""
    parser.add_argument("--record", metavar="FILE", help="append the result to a .jsonl file")
    parser.add_argument("--allow-dirty", action="store_true",
                        help="record a result of code that is not committed, too; it is marked")  # fmt: skip
    if json_line:
        parser.add_argument("--json", action="store_true", help="one JSON line, with the environment")


def check(
    options: argparse.Namespace, *, inputs: Iterable[AnyPath | None] = (), outputs: Iterable[AnyPath | None] = ()
) -> None:
    """Raise now what would stop the record after the work.

    Args:
        options: with those of `add_options`.
        inputs: files that the command reads.
        outputs: files that it writes besides the record.

    Raises:
        FileError: see `runtime.outputs.check_outputs`.
        OptionError: the code is not committed, and nobody asked to record it so.
    """
    check_outputs([options.record, *outputs], inputs=inputs)
    if options.record and not options.allow_dirty:
        _refuse_dirty(options.record, commit())


def deliver(options: argparse.Namespace, result: dict[str, Any]) -> bool:
    """Append a result where --record says so, print it where --json does; return whether it is printed.

    Raises:
        FileError, OptionError: see `append`.
    """
    if options.record:
        append(options.record, result, allow_dirty=options.allow_dirty)
    if not getattr(options, "json", False):
        return False
    print(json.dumps(result))
    return True


def append(path: str | Path, result: dict[str, Any], *, allow_dirty: bool = False) -> None:
    """Add one result to a .jsonl file; the lines that are there stay.

    Args:
        path: of the file.
        result: with its environment.
        allow_dirty: also of code that is not committed.

    Raises:
        FileError: the file cannot be read or written.
        OptionError: the result comes from code that is not committed.
    """
    if not allow_dirty:
        _refuse_dirty(path, str(result.get("environment", {}).get("commit", "")))
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


def is_dirty(result: Record) -> bool:
    """Return whether a result comes from code that nobody can check out again."""
    return str((result.get("environment") or {}).get("commit", "")).endswith(DIRTY)


def _refuse_dirty(path: str | Path, found: str) -> None:
    if found.endswith(DIRTY):
        raise OptionError(
            f"--record {path}: the code is not what commit {found.removesuffix(DIRTY)} holds, expected committed "
            "code, which others can measure again; commit it, or add --allow-dirty"
        )
