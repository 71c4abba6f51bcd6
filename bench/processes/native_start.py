"""`python -m bench.processes.native_start MODEL PICTURE`: one picture in C++ and in Python, start to end.

That is what a caller waits for when nothing runs yet: start, libraries, loading and compiling the file, the
answer, the end. The processes are started in turns, on one thread, without a cache of compiled models.
"""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module: python -m bench.processes.native_start")

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from bench.measure import record
from bench.measure.environment import describe, environment
from bench.measure.programs import ProgramRun, start
from bench.measure.ratios import ratio
from bench.measure.statistics import Percentiles
from runtime import command
from runtime.errors import FileError
from runtime.files import read_bytes
from runtime.images import load_image, to_batch
from runtime.manifest import read_manifest

EXAMPLES = """
  make cpp && python -m bench.processes.native_start model.onnx photo.png
  python -m bench.processes.native_start model.onnx photo.png --explain --record bench/results/cpu.jsonl
"""

BUILT = Path(__file__).parents[2] / "build" / "cpp"
NATIVE, PYTHON = "C++", "Python"


def main(argv: Sequence[str] | None = None) -> None:
    """Print medians of time and peak memory of both, and their ratios."""
    parser = command.parser("bench.processes.native_start", "Measure the C++ program beside Python.", EXAMPLES)
    parser.add_argument("model", type=Path, help="ONNX file of python -m export.onnx")
    parser.add_argument("picture", type=Path, help="image file")
    parser.add_argument(
        "--programs", type=Path, default=BUILT, help="where make cpp built them (default: build/cpp)"
    )
    parser.add_argument("--explain", action="store_true", help="class and map, each written to a file")
    parser.add_argument("--starts", type=int, default=15, help="processes of each kind (default: 15)")
    record.add_options(parser)
    options = parser.parse_args(argv)
    command.check_counts(options, starts=2)
    record.check(options, inputs=[options.model, options.picture])
    manifest = read_manifest(read_bytes(options.model), str(options.model))
    to_batch(load_image(options.picture), manifest.input)
    program = options.programs / f"classify-{manifest.target}"
    if not program.is_file():
        raise FileError(f"{program}: no such program; make cpp builds those for openvino and ort")
    found: dict[str, list[ProgramRun]] = {NATIVE: [], PYTHON: []}
    with tempfile.TemporaryDirectory() as folder:
        given = [options.model.resolve(), options.picture.resolve()]
        commands = {
            NATIVE: [program, *given, *(("--maps", folder) if options.explain else ())],
            PYTHON: [sys.executable, "-m", "runtime.classify", *given, "--threads", "1",
                     *(("--explain", f"{folder}/heat.png") if options.explain else ())],
        }  # fmt: skip
        for each in commands.values():
            start(each)  # files into the system's cache
        for _ in command.progress(range(options.starts), label="starts"):
            for name, each in commands.items():
                found[name].append(start(each))
    times = {name: np.array([run.wall_ms for run in runs]) for name, runs in found.items()}
    peaks = {name: np.array([float(run.peak_memory_bytes) for run in runs]) for name, runs in found.items()}
    # Every process is an instance of its own, of one round.
    wall, memory = (ratio(list(each[PYTHON][:, None]), list(each[NATIVE][:, None])) for each in (times, peaks))
    where = environment()
    result = {
        "bench": "native start",
        "model": options.model.name,
        "arch": manifest.arch,
        "data": manifest.data,
        "precision": manifest.precision,
        "engine": manifest.target,
        "explain": options.explain,
        "threads": 1,
        "wall": {name: asdict(Percentiles.of(each)) for name, each in times.items()},
        "peak_memory_bytes": {name: float(np.median(each)) for name, each in peaks.items()},
        "ratio": {"wall": asdict(wall), "peak_memory": asdict(memory)},
        "environment": where,
    }
    if record.deliver(options, result):
        return
    answer = "map" if options.explain else "class"
    print(f"{options.model}, one picture to its {answer} on {manifest.target}; medians of {options.starts} "
          "processes each, in turns")  # fmt: skip
    for name, walls in times.items():
        print(f"{name:8}{np.median(walls):8.0f} ms{np.median(peaks[name]) / 1e6:8.0f} MB at the most")
    print(f"Python takes {wall.told(1)} times as long")
    print(describe(where))


if __name__ == "__main__":
    command.run(main)
