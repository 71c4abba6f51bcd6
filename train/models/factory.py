"""A user's own network, by the name of what makes it: `package.module:factory`.

A name is a command to import and run code. It is obeyed where the user gives it, on a command line or to `allow`,
and never because a file holds it: a checkpoint of such a network is opened only for those who name its factory.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from runtime.errors import OptionError
from train.choices import ARCHITECTURES

_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
_allowed: set[str] = set()


def is_factory(arch: str) -> bool:
    """Return whether an architecture's name is that of a factory, not one of ours."""
    return ":" in arch


def allow(*names: str) -> None:
    """Let factories of these names be imported from now on.

    Raises:
        OptionError: one is no name of a factory.
    """
    for name in names:
        if not _NAME.fullmatch(name):
            raise OptionError(f"--arch {name}: expected package.module:factory, as in my_project.nets:small_net")
        _allowed.add(name)


def check_named(arch: str) -> None:
    """Raise OptionError where the user has not named this factory."""
    if arch not in _allowed:
        raise OptionError(
            f"architecture {arch!r}: is code of its own, which a file alone never runs; if you trust it, name it: "
            f"--arch {arch} (in Python: train.models.factory.allow)"
        )


def add_option(parser: argparse.ArgumentParser) -> None:
    """Let a command that reads checkpoints take names of factories, a list to be given to `allow`."""
    parser.add_argument("--arch", metavar="MODULE:FACTORY", action="append", default=[],
                        help="the factory of your own network, as given to train")  # fmt: skip


def named(arch: str) -> str:
    """Return the name of an architecture as a command line gives it: one of ours, or a factory, now allowed.

    Raises:
        OptionError: it is neither.
    """
    if is_factory(arch):
        allow(arch)
    elif arch not in ARCHITECTURES:
        raise OptionError(
            f"--arch {arch}: expected one of {', '.join(ARCHITECTURES)}, or package.module:factory of your own"
        )
    return arch


def find(arch: str, arguments: dict[str, Any]) -> Callable[..., Any]:
    """Import and return a factory that the user has named.

    Args:
        arch: package.module:factory.
        arguments: what it will be called with, by keyword.

    Raises:
        OptionError: the user has not named it, it is not there, or it takes other arguments.
    """
    check_named(arch)
    module_name, _, name = arch.partition(":")
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)  # behind all others, so that nothing of the user's stands in another's place
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise OptionError(
            f"--arch {arch}: {error}; run where {module_name} can be imported, such as your project's folder"
        ) from None
    factory = getattr(module, name, None)
    if not callable(factory):
        raise OptionError(f"--arch {arch}: {module_name} has no function {name!r}; check the name")
    try:
        inspect.signature(factory).bind(**arguments)
    except TypeError as error:
        raise OptionError(f"--arch {arch}: {error}; expected one that takes {', '.join(arguments)}") from None
    return factory
