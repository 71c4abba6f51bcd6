"""How every command line of the project starts and ends."""

from __future__ import annotations

import argparse
import io
import os
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from typing import NoReturn, TypeVar
from unicodedata import category

from runtime.errors import ClearpactError, OptionError

_HELP_COLUMNS = 78  # argparse breaks the options' help itself, but leaves descriptions and examples as they are

USER_ERROR = 2
INTERRUPTED = 130

# Unicode's categories of control characters, lone surrogates, and ends of lines and paragraphs.
_STEERING = ("Cc", "Cs", "Zl", "Zp")
# Embeddings, overrides and isolates of the direction: they can make one name look like another.
_TURNING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")

T = TypeVar("T")


class _Parser(argparse.ArgumentParser):
    """Reports a wrong option like any other user error: in one line."""

    def error(self, message: str) -> NoReturn:
        raise OptionError(f"{message}; see {self.prog} --help")


class _Version(argparse.Action):
    """Prints the version, which is looked up only then."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        try:
            version = metadata.version("clearpact")
        except metadata.PackageNotFoundError:
            version = "of a folder that is not installed"
        print(f"clearpact {version}")
        raise SystemExit(0)


def parser(module: str, description: str, examples: str) -> argparse.ArgumentParser:
    """Return an argument parser for `python -m MODULE` with --version, whose help ends with examples."""
    made = _Parser(
        prog=f"python -m {module}",
        description="\n".join(textwrap.fill(line, _HELP_COLUMNS) for line in description.splitlines()),
        epilog=f"examples:\n{examples.strip(chr(10))}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--version", action=_Version, nargs=0, help="print the version")
    return made


def check_counts(options: argparse.Namespace, **least: int) -> None:
    """Refuse an option below its least value; one that was not given, None, passes.

    Args:
        options: as parsed.
        least: by the option's name in `options`: images=1 for --images.

    Raises:
        OptionError: names the first such option, its value and the least.
    """
    for name, smallest in least.items():
        value = getattr(options, name)
        if value is not None and value < smallest:
            option = name.replace("_", "-")
            raise OptionError(f"--{option} {value}: expected a whole number from {smallest}")


def run(main: Callable[[Sequence[str] | None], int | None]) -> None:
    """Run a command's `main` and leave the process with its exit status.

    User errors become one line on standard error and status 2; Ctrl-C becomes status 130.
    Anything else is a defect and keeps its traceback. What the terminal cannot encode, as names of files and
    classes may be, is written as an escape.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = main(None) or 0
        sys.stdout.flush()
    except ClearpactError as error:
        status("")
        print(f"error: {printable(str(error))}", file=sys.stderr)
        code = USER_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = INTERRUPTED
    except BrokenPipeError:
        # The reader (head, less) has gone: leave quietly, without Python's complaint at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    raise SystemExit(code)


def printable(text: str) -> str:
    """Return a text from a file, such as a class's name, for a terminal: what would steer one becomes an escape.

    Control characters, line ends and what turns the direction of writing are escaped as Python writes them.
    """
    return "".join(
        char.encode("unicode_escape").decode() if category(char) in _STEERING or char in _TURNING else char
        for char in text
    )


def status(text: str) -> None:
    """Show what is being done on standard error where that is a terminal, over the status before; "" clears it."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{text}")
        sys.stderr.flush()


def progress(items: Iterable[T], *, label: str, total: int | None = None) -> Iterable[T]:
    """Iterate with a progress bar on standard error where that is a terminal.

    Raises:
        OptionError: tqdm is not installed.
    """
    try:
        from tqdm import tqdm
    except ImportError:
        raise OptionError(
            "the progress bar needs tqdm, which is not installed; pip install 'clearpact[tools]'"
        ) from None
    # disable=None: silent in pipes and logs, so scripts read clean output.
    bar: Iterable[T] = tqdm(items, desc=label, total=total, disable=None, leave=False, dynamic_ncols=True)
    return bar
