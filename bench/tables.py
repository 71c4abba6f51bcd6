"""`python -m bench.tables`: write the tables of the README and of docs/ anew from the recorded results.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module: python -m bench.tables")

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.evidence import accuracy_tables as summary
from bench.evidence import explanation_tables, quantization_tables, target_tables, trust_tables
from bench.evidence import speed_tables as speed_summary
from bench.measure import record
from bench.measure.record import Record
from runtime import command
from runtime.errors import FileError
from runtime.files import read_bytes, write_atomically

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/results.md", "docs/embed.md", "docs/your-model.md")
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
    "explanation-cost": explanation_tables.cost,
    "sanity": trust_tables.sanity,
    "drift": trust_tables.drift,
    "calibration": trust_tables.calibration,
    "outliers": trust_tables.outliers,
    "robustness": trust_tables.robustness,
    "latency": speed_summary.latency,
    "against-ptq": speed_summary.against_ptq,
    "frames": speed_summary.frames,
    "startup": speed_summary.startup,
    "throughput": speed_summary.throughput,
    "arm64": speed_summary.arm64,
    "training-step": speed_summary.training_step,
    "compiled-step": speed_summary.compiled_step,
    "targets": target_tables.targets,
    "million": target_tables.million,
    "native-start": target_tables.native_start,
    "browser": target_tables.browser,
    "after-training": quantization_tables.after_training,
    "moved-classes": quantization_tables.moved_classes,
    "map-limits": quantization_tables.map_limits,
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
    parser.add_argument("--page", type=Path, action="append", default=[],
                        help="may be repeated (default: README.md, three of docs/)")  # fmt: skip
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results",
                        help="folder of .jsonl files (default: bench/results)")  # fmt: skip
    parser.add_argument("--check", action="store_true", help="change nothing; status 1 where a table is stale")
    options = parser.parse_args(argv)
    records = record.read(options.results)
    pages = options.page or [ROOT / name for name in PAGES]
    found = {page: rewritten(read_bytes(page).decode(), records, str(page)) for page in pages}
    for page, (text, stale) in found.items():
        if stale and options.check:
            print(f"{page}: stale: {', '.join(stale)}; run python -m bench.tables")
            continue
        if stale:
            write_atomically(page, text)
        print(f"{page}: " + (f"rewritten: {', '.join(stale)}" if stale else "its tables are up to date"))
    return STALE if options.check and any(stale for _, stale in found.values()) else 0


if __name__ == "__main__":
    command.run(main)
