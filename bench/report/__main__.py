"""`python -m bench.report`: one HTML file with what was trained, exported and measured."""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module: python -m bench.report")

from collections.abc import Sequence

from bench.environment import environment
from bench.report.page import document
from bench.report.provenance import commands_section, environment_section
from bench.report.sources import read
from bench.report.speed import front_section, latency_section
from bench.report.training import training_section
from runtime import command
from runtime.files import check_writable, write_atomically

EXAMPLES = """
  python -m bench.report runs/mnist-cnn2-8bit-sgt -o report.html
  python -m bench.report runs/mnist-cnn2-8bit-sgt results.jsonl --data mnist -o report.html
  python -m bench.report bench/results -o report.html
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Write the report and say where it is."""
    parser = command.parser("bench.report", "Write one HTML file with all that is known of runs.", EXAMPLES)
    parser.add_argument("sources", nargs="+", metavar="source", help="run folder, ckpt.pt, .onnx or .jsonl file")
    parser.add_argument("-o", "--output", required=True, help="HTML file to write")
    options = parser.parse_args(argv)
    check_writable(options.output)
    sources = read(options.sources)
    here = environment()
    page = document("clearpact report", "", [
        front_section(sources), latency_section(sources), training_section(sources),
        environment_section(sources, here), commands_section(sources, here),
    ])  # fmt: skip
    write_atomically(options.output, page)
    print(options.output)


if __name__ == "__main__":
    command.run(main)
