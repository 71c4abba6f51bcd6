"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]], align: str) -> str:
    """Return a table; `align` has one letter a column, l or r."""
    rules = ["---" if letter == "l" else "---:" for letter in align]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rules, *rows))
