"""`python -m deploy.batch`: classify and explain folders, tar shards and Parquet files of any size."""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module: python -m deploy.batch")

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

from deploy.batch import cluster, processes
from deploy.batch.parts import PLAN_NAME, Settings, plan, sha256_of
from deploy.batch.work import Job
from runtime import command
from runtime.errors import ModelError, OptionError
from runtime.explanations.attribution import METHODS
from runtime.files import remove_leftovers
from runtime.outputs import check_outputs
from runtime.session import ENGINES, open_session

EXAMPLES = """
  python -m deploy.batch model.onnx photos/ -o results
  python -m deploy.batch model.onnx shards/*.tar -o results --explain gradient --processes 8
  python -m deploy.batch model.onnx images.parquet -o results --column image
  python -m deploy.batch model.onnx /mnt/photos -o /mnt/results --ray auto
  python -m deploy.batch model.onnx photos/ -o results       # the same again: continues what was interrupted
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Do what is left of the plan; unreadable images are rows with a reason."""
    parser = command.parser(
        "deploy.batch",
        "Classify and explain images of any number. The files part-*.parquet hold a row an image: path, class, "
        "index, probability, margin, score, map, and the reason where it cannot be read.",
        EXAMPLES,
    )
    parser.add_argument("model", type=Path, help="ONNX file of python -m export.onnx")
    parser.add_argument(
        "images", nargs="+", help="images, folders with all folders in them, .tar, .tar.gz, .parquet"
    )
    parser.add_argument(
        "-o", "--output", type=Path, required=True, help="folder of results; one that is begun continues"
    )
    parser.add_argument("--explain", nargs="?", const="gradient", choices=METHODS, default="", metavar="METHOD",
                        help=f"a map of every image: {', '.join(METHODS)} (default: gradient)")  # fmt: skip
    parser.add_argument("--map-size", type=int, default=16, help="pixels on a side of a map (default: 16)")
    parser.add_argument("--column", default="", help="of Parquet files (default: the first that holds images)")
    parser.add_argument("--part", type=int, default=1024, help="images in one part, and file (default: 1024)")
    parser.add_argument("--engine", choices=tuple(ENGINES), help="default: the one the model was exported for")
    parser.add_argument("--processes", type=int, help="workers (default: one for every core)")
    parser.add_argument("--ray", metavar="ADDRESS", help="work on a Ray cluster: auto, local, ray://HOST:10001")
    parser.add_argument("--json", action="store_true", help="one JSON line in the end")
    options = parser.parse_args(argv)
    command.check_counts(options, map_size=1, part=1, processes=1)
    if len(set(options.images)) < len(options.images):
        raise OptionError("an input is named twice; name it once")
    check_outputs([options.output / PLAN_NAME], inputs=[options.model, *map(Path, options.images)])
    session = open_session(options.model, engine=options.engine, threads=1)
    session.close()
    if options.explain and "gradient" not in session.outputs:
        raise ModelError(
            f"{options.model}: gives classes only; leave --explain out, or export it with its gradient"
        )
    remove_leftovers(options.output)
    inputs = tuple(str(Path(path).absolute()) for path in options.images)
    settings = Settings(
        sha256_of(options.model), inputs, options.explain, options.map_size, options.column, options.part
    )
    command.status("listing images")
    parts = plan(settings, options.output)
    command.status("")
    left = [part for part in parts if not part.result(options.output).exists()]
    job = Job(str(options.model.absolute()), options.engine, str(options.output.absolute()), settings)
    began, done, unreadable, cpu_seconds, start_cpu_seconds = time.perf_counter(), 0, 0, 0.0, 0.0
    if left:
        if options.ray:
            found = cluster.run(job, left, options.ray, options.processes)
        else:
            found = processes.run(job, left, min(options.processes or _cores(), len(left)))
        for part_done in command.progress(found, label="parts", total=len(left)):
            done, unreadable = done + part_done.images, unreadable + part_done.unreadable
            cpu_seconds += part_done.cpu_seconds
            start_cpu_seconds += part_done.start_cpu_seconds
    seconds = time.perf_counter() - began
    total = sum(part.count for part in parts)
    if options.json:
        print(
            json.dumps(
                {
                    "images": total,
                    "now": done,
                    "unreadable": unreadable,
                    "seconds": seconds,
                    "cpu_seconds": cpu_seconds,
                    "start_cpu_seconds": start_cpu_seconds,
                }
            )
        )
        return
    before = f", {total - done:,} were done before" if total > done else ""
    now = f" in {seconds:.1f} s, {done / seconds:,.0f} a second, {unreadable:,} of them unreadable" if done else ""
    print(f"{options.output}: {total:,} images, {done:,} now{now}{before}")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    command.run(main)
