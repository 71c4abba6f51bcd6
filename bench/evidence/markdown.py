"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bench.measure.record import Record, is_dirty


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]], align: str) -> str:
    """Return a table; `align` has one letter a column, l or r."""
    rules = ["---" if letter == "l" else "---:" for letter in align]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rules, *rows))


def marked(text: str, *records: Record) -> str:
    """Return a cell's text, with a dagger where one of the records that it tells of is of code not committed."""
    return f"{text} †" if any(map(is_dirty, records)) else text
