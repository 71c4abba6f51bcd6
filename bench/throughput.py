"""`python -m bench.throughput MODEL IMAGES`: images a second of `deploy.batch`, beside `Classifier` alone.

Each reads the same image files from disk and answers all of them: a loop of this process on one thread, and the
command with so many processes, in turns. The system's cache is warm for all of them. A core's rate is by processor
time, from which other work on the machine takes nothing. What a process takes until it is ready, imports and
compiling, is the same for ten images and for a million: it is told beside the rate.
"""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module: python -m bench.throughput")

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

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


def alone(model: Path, files: Sequence[Path], *, explain: bool) -> Work:
    """Let a classifier on one thread answer all files."""
    with Classifier(model, threads=1) as classifier:
        first = np.stack([load_image(files[0])] * _BATCH)
        for count in {
            min(len(files), _BATCH),
            len(files) % _BATCH or _BATCH,
        }:  # compiled, the last one's size, too
            classifier.predict(first[:count])
            if explain:
                classifier.explain(first[:count])
        began, cpu_began = time.perf_counter(), time.process_time()
        for start in range(0, len(files), _BATCH):
            images = [load_image(path) for path in files[start : start + _BATCH]]
            if explain:
                classifier.explain(np.stack(images))
            else:
                classifier.predict(images, top_k=1)
        return Work(time.perf_counter() - began, time.process_time() - cpu_began)


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
    if not files:
        raise FileError(f"{options.images}: no image in it")
    counts = {f"deploy.batch, {n} processes": (n, False) for n in map(int, options.processes.split(","))}
    if options.ray:
        counts |= {f"{name} of Ray": (n, True) for name, (n, _) in counts.items()}
    taken: dict[str, list[Work]] = {name: [] for name in (ALONE, *counts)}
    for _ in command.progress(range(options.rounds), label="rounds"):
        taken[ALONE].append(alone(options.model, files, explain=options.explain))
        for name, (processes, ray) in counts.items():
            given = {"explain": options.explain, "processes": processes, "ray": ray}
            taken[name].append(by_command(options.model, options.images, len(files), **given))
    with Classifier(options.model, threads=1) as classifier:
        manifest, engine = classifier.manifest, f"{classifier.session.engine} {classifier.session.version}"
    where = environment()
    rates = {name: [len(files) / work.seconds for work in each] for name, each in taken.items()}
    core_rates = {name: [len(files) / work.cpu_seconds for work in each] for name, each in taken.items()}
    starts = {name: [work.start_cpu_seconds for work in each] for name, each in taken.items() if name != ALONE}
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
        "result_bytes": {name: each[-1].result_bytes for name, each in taken.items() if name != ALONE},
        "environment": where,
    }
    if record.deliver(options, result):
        return
    print(f"{len(files):,} images, {options.model} on {engine}; medians of {options.rounds} rounds")
    for name, each in core_rates.items():
        share = float(np.median(np.divide(each, core_rates[ALONE])))
        clock, core = np.median(rates[name]), np.median(each)
        print(f"{name:32}{clock:7.0f} a second by the clock{core:8.0f} a second of a core{share:8.1%}")
    for name, start in starts.items():
        print(f"{name:32}{np.median(start):7.1f} s of a core until its workers are ready")
    print(describe(where))


if __name__ == "__main__":
    command.run(main)
