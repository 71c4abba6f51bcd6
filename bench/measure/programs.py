"""What a program costs from its start to its end: the time that a caller waits, and the most memory it held."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike

from runtime.errors import EngineError

# Linux counts as a process's own what the process it was forked from held. So a bare interpreter, of 10 MB, is
# what starts it.
_LAUNCH = """
import os, sys, time
quiet = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
began = time.perf_counter()
_, status, usage = os.wait4(os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ, file_actions=quiet), 0)
print(time.perf_counter() - began, usage.ru_maxrss, os.waitstatus_to_exitcode(status))
"""


@dataclass(frozen=True)
class ProgramRun:
    """One run of a program.

    Args:
        wall_ms: from its start to its end, by the clock.
        peak_memory_bytes: the largest resident size that it has had.
    """

    wall_ms: float
    peak_memory_bytes: int


def start(arguments: Sequence[str | PathLike[str]]) -> ProgramRun:
    """Run a program to its end; what it prints on standard output is dropped. On Linux.

    Args:
        arguments: path of the program, and what it is given.

    Raises:
        EngineError: it ends with a status other than 0; the text is the last line on its standard error.
    """
    given = [str(argument) for argument in arguments]
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", _LAUNCH, *given], capture_output=True, text=True, check=False
    )
    seconds, kibibytes, status = done.stdout.split() if done.returncode == 0 else ("0", "0", "1")
    if int(status):
        reason = (done.stderr.strip() or f"exit status {status}").splitlines()[-1]
        raise EngineError(f"{given[0]}: ended with an error ({reason}); run it alone")
    return ProgramRun(1000 * float(seconds), 1024 * int(kibibytes))
