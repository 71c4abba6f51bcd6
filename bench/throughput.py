"""`python -m bench.throughput MODEL IMAGES`: images a second of `deploy.batch`, beside `Classifier` alone.

Each reads the same image files from disk and answers all of them: a loop over `Classifier` on one thread, in a
process of its own, and the command with so many processes; in turns, every other round backwards. Neither lists
the files in its time, and the system's cache is warm for all of them. A core's rate is by processor time, from
which other work on the machine takes nothing. What a process takes until it is ready, imports and compiling, is
the same for ten images and for a million: it is told beside the rate.

Processes that run at once share caches, memory and often a core's units. So the command with several is compared
with one `Classifier`, and with as many that run at once: the difference of the two is the machine's.
"""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module: python -m bench.throughput")

import functools
import json
import multiprocessing
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.measure import record
from bench.measure.environment import describe, environment
from runtime import Classifier, command
from runtime.errors import FileError, OptionError
from runtime.images import is_image_file, load_image

EXAMPLES = """
  python -m bench.throughput model.onnx photos/
  python -m bench.throughput model.onnx photos/ --explain --processes 1,2 --record bench/results/cpu.jsonl
"""

ALONE = "Classifier alone"
_BATCH = 32  # images in one call, as the command takes them
_MOST_WAIT_S = 600.0  # of a process for the others


@dataclass(frozen=True)
class Work:
    """All files answered once.

    Args:
        seconds: by the clock; of the command with its workers' start.
        cpu_seconds: of the processor, from the first image on.
        start_cpu_seconds: of the processor before, all workers together.
        result_bytes: of the files that the command wrote.
    """

    seconds: float
    cpu_seconds: float
    start_cpu_seconds: float = 0.0
    result_bytes: int = 0


def by_classifiers(model: Path, files: Sequence[Path], *, explain: bool, processes: int) -> Work:
    """Let classifiers on one thread each, in so many processes at once, answer all files among them."""
    context = multiprocessing.get_context("spawn")
    shares = [files[index::processes] for index in range(processes)]
    with ProcessPoolExecutor(processes, context, _start, (context.Barrier(processes),)) as pool:
        done = list(pool.map(functools.partial(_answer, model, explain=explain), shares))
    return Work(
        max(work.seconds for work in done),
        sum(work.cpu_seconds for work in done),
        sum(work.start_cpu_seconds for work in done),
    )


_ready: Any = None  # barrier of the processes that begin at once, where this is one of them


def _start(ready: Any) -> None:
    global _ready
    _ready = ready


def _answer(model: Path, files: Sequence[Path], *, explain: bool) -> Work:
    with Classifier(model, threads=1) as classifier:

        def answer(images: list[np.ndarray]) -> None:
            if explain:  # greys as [N, H, W, 1]: without the 1, three of them could be one picture's channels
                classifier.explain(np.stack(images).reshape(len(images), *images[0].shape[:2], -1))
            else:
                classifier.predict(images, top_k=1)

        first = load_image(files[0])
        for count in {min(len(files), _BATCH), len(files) % _BATCH or _BATCH}:  # the last one's size, too
            answer([first] * count)  # compiles
        _ready.wait(_MOST_WAIT_S)
        start, began = time.process_time(), time.perf_counter()
        for place in range(0, len(files), _BATCH):
            answer([load_image(path) for path in files[place : place + _BATCH]])
        return Work(time.perf_counter() - began, time.process_time() - start, start)


def by_command(model: Path, folder: Path, count: int, *, explain: bool, processes: int, ray: bool) -> Work:
    """Let `deploy.batch` answer all files.

    Raises:
        FileError: it fails, or answers more or fewer than `count` images, so that the rates would be of others.
    """
    with tempfile.TemporaryDirectory() as results:
        arguments = [str(model), str(folder), "-o", results, "--json", "--processes", str(processes)]
        arguments += ["--explain"] if explain else []
        arguments += ["--ray", "local"] if ray else []
        done = subprocess.run(
            [sys.executable, "-m", "deploy.batch", *arguments], capture_output=True, text=True, check=False
        )
        written = sum(path.stat().st_size for path in Path(results).glob("*.parquet"))
    if done.returncode:
        raise FileError(f"{folder}: {done.stderr.strip().splitlines()[-1]}")
    said = json.loads(done.stdout.splitlines()[-1])
    if said["images"] != count or said["unreadable"]:
        raise FileError(
            f"{folder}: deploy.batch found {said['images']:,} images, {said['unreadable']:,} of them unreadable, "
            f"expected the {count:,} that lie there as files; name a folder of images alone"
        )
    return Work(said["seconds"], said["cpu_seconds"], said["start_cpu_seconds"], written)


def main(argv: Sequence[str] | None = None) -> None:
    """Print images a second and a core of each contender, medians of several rounds."""
    parser = command.parser("bench.throughput", "Measure deploy.batch beside Classifier alone.", EXAMPLES)
    parser.add_argument("model", type=Path, help="ONNX file of python -m export.onnx")
    parser.add_argument("images", type=Path, help="folder of image files of one size")
    parser.add_argument("--explain", action="store_true", help="class and map")
    parser.add_argument("--processes", default="1", help="of the command, comma-separated (default: 1)")
    parser.add_argument("--ray", action="store_true", help="a local Ray cluster as well, of as many workers")
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    record.add_options(parser)
    options = parser.parse_args(argv)
    command.check_counts(options, rounds=1)
    if not all(part.isdecimal() and int(part) > 0 for part in options.processes.split(",")):
        raise OptionError(f"--processes {options.processes}: expected whole numbers from 1, comma-separated")
    record.check(options, inputs=[options.model, options.images])
    files = sorted(path for path in options.images.rglob("*") if is_image_file(path))
    counts = list(dict.fromkeys(map(int, options.processes.split(","))))
    if len(files) < max(counts):
        raise FileError(f"{options.images}: {len(files)} images in it, expected one for each process at least")
    measured: dict[str, Callable[[], Work]] = {}
    beside: dict[str, str] = {}  # command -> as many classifiers at once
    given: dict[str, Any] = {"explain": options.explain}
    for n in sorted({1, *counts}):
        alike = ALONE if n == 1 else f"Classifier, {n} at once"
        measured[alike] = functools.partial(by_classifiers, options.model, files, processes=n, **given)
        for ray in ([False, True] if options.ray else [False]) if n in counts else []:
            name = f"deploy.batch, {n} processes{' of Ray' if ray else ''}"
            given_too = {"count": len(files), "processes": n, "ray": ray, **given}
            measured[name] = functools.partial(by_command, options.model, options.images, **given_too)
            beside[name] = alike
    taken: dict[str, list[Work]] = {name: [] for name in measured}
    for index in command.progress(range(options.rounds), label="rounds"):
        for name in list(measured)[:: -1 if index % 2 else 1]:
            taken[name].append(measured[name]())
    with Classifier(options.model, threads=1) as classifier:
        manifest, engine = classifier.manifest, f"{classifier.session.engine} {classifier.session.version}"
    where = environment()
    rates = {name: [len(files) / work.seconds for work in each] for name, each in taken.items()}
    core_rates = {name: [len(files) / work.cpu_seconds for work in each] for name, each in taken.items()}
    starts = {name: [work.start_cpu_seconds for work in each] for name, each in taken.items()}
    result = {
        "bench": "throughput",
        "model": options.model.name,
        "arch": manifest.arch,
        "precision": manifest.precision,
        "engine": engine,
        "explain": options.explain,
        "images": len(files),
        "images_per_second": rates,
        "data": manifest.data,
        "images_per_cpu_second": core_rates,
        "start_cpu_seconds": starts,
        "beside": beside,
        "result_bytes": {name: taken[name][-1].result_bytes for name in beside},
        "environment": where,
    }
    if record.deliver(options, result):
        return
    print(f"{len(files):,} images, {options.model} on {engine}; medians of {options.rounds} rounds")
    print(f"{'images a second':30}{'by the clock':>13}{'of a core':>11}{'of alone':>10}{'of n at once':>14}")
    for name, each in core_rates.items():
        shares = [np.median(np.divide(each, core_rates[other])) for other in (ALONE, beside.get(name, name))]
        print(
            f"{name:30}{np.median(rates[name]):13,.0f}{np.median(each):11,.0f}{shares[0]:10.1%}{shares[1]:14.1%}"
        )
    for name, start in starts.items():
        print(f"{name:30}{np.median(start):13.1f} s of a core until ready")
    print(describe(where))


if __name__ == "__main__":
    command.run(main)
