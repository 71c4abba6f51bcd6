"""Errors a user can act on: one line that says what was given, what was expected and what to do."""

from __future__ import annotations


class ClearpactError(Exception):
    """A mistake in the input or the set-up, not in the program.

    The text is one line: what was given, what was expected, and the remedy.
    Command lines print it without a traceback and exit with status 2.
    """


class FileError(ClearpactError):
    """A file is missing, unreadable, unwritable, truncated or of another kind."""


class ModelError(ClearpactError):
    """A model file was read but cannot be used: no manifest, wrong target, missing output."""


class ImageError(ClearpactError):
    """An image has a shape, dtype or encoding that the model cannot take."""


class EngineError(ClearpactError):
    """An inference engine or one of its devices is not there."""


class TrainingError(ClearpactError):
    """Training cannot go on: the loss is not a number or explodes."""


class OptionError(ClearpactError):
    """An option's value is outside what the command accepts."""
