"""`python -m bench.tables`: write the tables of docs/results.md anew from the recorded results.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module: python -m bench.tables")

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.evidence import accuracy_tables as summary
from bench.evidence import explanation_tables
from bench.evidence import speed_tables as speed_summary
from bench.measure import record
from bench.measure.record import Record
from runtime import command
from runtime.errors import FileError
from runtime.files import read_bytes, write_atomically

ROOT = Path(__file__).parents[1]
STALE = 1

EXAMPLES = """
  python -m bench.tables                  # after a result was recorded
  python -m bench.tables --check          # changes nothing; status 1 where a table is stale
"""

TABLES: dict[str, Callable[[Sequence[Record]], str]] = {
    "environment": speed_summary.environment,
    "results": summary.results,
    "two-classes": summary.two_classes,
    "engines": summary.engines,
    "saliency": summary.saliency,
    "mask-shares": explanation_tables.mask_shares,
    "methods": explanation_tables.methods,
    "latency": speed_summary.latency,
    "against-ptq": speed_summary.against_ptq,
    "frames": speed_summary.frames,
    "startup": speed_summary.startup,
    "arm64": speed_summary.arm64,
    "training-step": speed_summary.training_step,
}

_BLOCK = re.compile(r"(?P<start><!-- table: (?P<name>[\w-]+) -->\n)(?P<body>.*?)(?P<end><!-- end -->)", re.DOTALL)
_MARKER = re.compile(r"<!-- (?:table: .*?|end) -->")


def rewritten(text: str, records: Sequence[Record], source: str) -> tuple[str, list[str]]:
    """Return a text with its tables written anew, and the names of those that were stale.

    Args:
        text: Markdown with marked tables.
        records: from `bench.measure.record.read`.
        source: name of the text, for messages.

    Raises:
        FileError: a marker without its counterpart, or a table nobody knows.
    """
    stale = []

    def replace(block: re.Match[str]) -> str:
        name = block["name"]
        if name not in TABLES:
            raise FileError(f"{source}: table {name!r}, expected one of {', '.join(TABLES)}; mend its marker")
        body = f"{TABLES[name](records)}\n"
        if body != block["body"]:
            stale.append(name)
        return block["start"] + body + block["end"]

    found, blocks = _BLOCK.subn(replace, text)
    if len(_MARKER.findall(text)) != 2 * blocks:
        raise FileError(f"{source}: a marker without its counterpart, expected <!-- table: NAME --> and then "
                        "<!-- end --> for each table; mend it")  # fmt: skip
    return found, stale


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrite the tables that are stale and name them, or only name them."""
    parser = command.parser("bench.tables", "Write the tables of results anew from the records.", EXAMPLES)
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "results.md", help="default: docs/results.md")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results",
                        help="folder of .jsonl files (default: bench/results)")  # fmt: skip
    parser.add_argument("--check", action="store_true", help="change nothing; status 1 where a table is stale")
    options = parser.parse_args(argv)
    text = read_bytes(options.page).decode()
    found, stale = rewritten(text, record.read(options.results), str(options.page))
    if stale and options.check:
        print(f"{options.page}: stale: {', '.join(stale)}; run python -m bench.tables")
        return STALE
    if stale:
        write_atomically(options.page, found)
    print(f"{options.page}: " + (f"rewritten: {', '.join(stale)}" if stale else "its tables are up to date"))
    return 0


if __name__ == "__main__":
    command.run(main)
