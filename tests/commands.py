"""A command run in this process as `python -m ...` runs it in its own: its exit status, and what it prints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest

from runtime import command


@dataclass(frozen=True)
class Done:
    """What a command left behind."""

    status: int
    out: str
    err: str


def run_command(
    main: Callable[[Sequence[str] | None], int | None],
    arguments: Sequence[str],
    capsys: pytest.CaptureFixture[str],
) -> Done:
    """Run a command's main with its arguments to its exit."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as raised:
        command.run(lambda _: main(arguments))
    out, err = capsys.readouterr()
    assert isinstance(raised.value.code, int)
    return Done(raised.value.code, out, err)
