"""What a command line says of the image that a network takes: its size, and what its pixels are normalized by."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from export.image_size import size_of
from runtime.errors import OptionError


def add_options(parser: argparse._ActionsContainer) -> None:
    """Add --size, --mean, --std and --pixels to a command that takes anyone's network."""
    parser.add_argument("--size", type=size_of, metavar="PIXELS",
                        help="side of its image, or HxW (default: the data set's, of photos 224)")  # fmt: skip
    for name, text in (("--mean", "of pixels from 0 to 1 (default: ImageNet's; grey: 0)"),
                       ("--std", "likewise (default: ImageNet's; grey: 1)")):  # fmt: skip
        parser.add_argument(name, action=_Numbers, nargs="+", metavar="NUMBER", help=text)
    parser.add_argument("--pixels", type=int, choices=(1, 255), default=1,
                        help="of a .onnx file: it takes pixels from 0 to 1, or to 255 (default: 1)")  # fmt: skip


class _Numbers(argparse.Action):
    """Numbers with spaces or commas between them, as a list."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:  # fmt: skip
        text = " ".join(values or ())
        try:
            setattr(namespace, self.dest, [float(part) for part in text.replace(",", " ").split()])
        except ValueError:
            raise OptionError(
                f"--{self.dest} {text}: expected numbers, one or one a channel, as in 0.485 0.456 0.406"
            ) from None
