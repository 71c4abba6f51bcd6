"""`python -m bench.latency`: how long one exported model takes, and in which environment."""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module: python -m bench.latency")

import functools
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from bench.environment import describe, environment, peak_memory_bytes
from bench.statistics import Latency, check_seconds, measure, summarize
from runtime import command
from runtime.classifier import Classifier
from runtime.errors import ModelError, OptionError
from runtime.manifest import INPUT_NAME, TARGET_NAME
from runtime.session import ENGINES

EXAMPLES = """
  python -m bench.latency model.onnx
  python -m bench.latency model.onnx --batch 1,8,32 --threads 1
  python -m bench.latency model.onnx --explain               # class, and class with map, in turns
  python -m bench.latency model.onnx --engine ort --json >> results.jsonl
"""

# Runs in a process of its own: what a user waits for is import, load, compile and the first answer together.
_COLD_START = """
import sys, time
began = time.perf_counter()
import numpy as np
from runtime import Classifier
imported = time.perf_counter()
model, engine, device, threads = sys.argv[1:]
with Classifier(model, engine=engine, device=device, threads=int(threads) or None) as classifier:
    height, width = classifier.manifest.input.size
    classifier.predict(np.zeros((height, width, classifier.manifest.input.channels), np.uint8))
    print(imported - began, time.perf_counter() - began)
"""


@dataclass(frozen=True)
class ColdStart:
    """Medians of fresh processes, in milliseconds: importing `runtime`, and until the first prediction."""

    import_ms: float
    first_prediction_ms: float


def session_latency(
    classifier: Classifier, batch: int, *, explain: bool, runs: int | None, seconds: float
) -> dict[str, Latency]:
    """Time the engine on random pixels: "class", and with `explain` also "class + map", in turns.

    Raises:
        ModelError: the model was exported without the input gradient.
    """
    manifest = classifier.manifest
    shape = (batch, *manifest.input.size, manifest.input.channels)
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    session = classifier.session
    contenders: dict[str, Callable[[], object]] = {"class": functools.partial(session.run, {INPUT_NAME: images})}
    if explain:
        if "saliency" not in session.outputs:
            raise ModelError("--explain: this model gives classes only; export it again without --no-saliency")
        inputs: dict[str, np.ndarray] = {INPUT_NAME: images, TARGET_NAME: np.full(batch, -1, np.int64)}
        contenders["class + map"] = functools.partial(session.run, inputs, ("logits", "saliency"))
    samples = measure(contenders, runs=runs, seconds=seconds, label=f"batch {batch}")
    return {name: summarize(times, batch) for name, times in samples.items()}


def cold_start(model: str, *, engine: str, device: str, threads: int | None, repeats: int = 5) -> ColdStart:
    """Start fresh processes that load the model and classify one image.

    Raises:
        ModelError: such a process fails; the text is its last line.
    """
    times = []
    for _ in command.progress(range(repeats), label="cold start"):
        done = subprocess.run(
            [sys.executable, "-c", _COLD_START, model, engine, device, str(threads or 0)],
            capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1],
        )  # fmt: skip
        if done.returncode:
            reason = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
            raise ModelError(f"{model}: cold start failed ({reason}); see runtime.classify, or --no-cold-start")
        times.append([1000 * float(value) for value in done.stdout.split()])
    import_ms, first_prediction_ms = np.median(times, axis=0)
    return ColdStart(float(import_ms), float(first_prediction_ms))


def main(argv: Sequence[str] | None = None) -> None:
    """Print latency per batch size, cold start and memory, for a person or as one JSON line."""
    parser = command.parser("bench.latency", "Measure the latency of an exported model.", EXAMPLES)
    parser.add_argument("model", help="ONNX file written by python -m export.onnx")
    parser.add_argument("--batch", default="1", help="batch sizes, comma-separated (default: 1)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of one inference (default: 1)")
    parser.add_argument("--engine", choices=tuple(ENGINES), help="default: the one the model was exported for")
    parser.add_argument("--device", default="cpu", help="default: cpu")
    parser.add_argument("--runs", type=int, help="runs to measure (default: as many as fit in --seconds)")
    parser.add_argument("--seconds", type=float, default=3.0, help="per batch size (default: 3)")
    parser.add_argument("--explain", action="store_true", help="time the class with its saliency map too")
    parser.add_argument("--no-cold-start", action="store_true", help="leave out the fresh processes")
    parser.add_argument("--json", action="store_true", help="one JSON line, with the environment")
    options = parser.parse_args(argv)
    batches = _batches(options.batch)
    if options.runs is not None and options.runs < 1:
        raise OptionError(f"--runs {options.runs}: expected a whole number from 1")
    check_seconds(options.seconds)
    model = str(Path(options.model).resolve())
    with Classifier(
        options.model, engine=options.engine, device=options.device, threads=options.threads
    ) as classifier:
        session = classifier.session
        latencies = {
            batch: session_latency(
                classifier, batch, explain=options.explain, runs=options.runs, seconds=options.seconds
            )
            for batch in batches
        }
        cold = None
        if not options.no_cold_start:
            cold = cold_start(model, engine=session.engine, device=options.device, threads=options.threads)
    where = environment()
    result = {
        "bench": "latency",
        "model": Path(options.model).name,
        "arch": session.manifest.arch,
        "precision": session.manifest.precision,
        "target": session.manifest.target,
        "file_bytes": Path(options.model).stat().st_size,
        "engine": f"{session.engine} {session.version}",
        "device": options.device,
        "threads": options.threads,
        "latency": {
            str(batch): {name: asdict(row) for name, row in rows.items()} for batch, rows in latencies.items()
        },
        "cold_start": asdict(cold) if cold else None,
        "peak_memory_bytes": peak_memory_bytes(),
        "environment": where,
    }
    if options.json:
        print(json.dumps(result))
        return
    print(f"{options.model}  {session.manifest.precision} on {result['engine']}, {options.device}, "
          f"threads {options.threads}")  # fmt: skip
    print("batch                p50 ms   p90 ms   p99 ms  mean ms     ± ms  images/s   runs")
    for batch, rows in latencies.items():
        for name, row in rows.items():
            print(f"{batch:5} {name:12}{row.p50_ms:9.3f}{row.p90_ms:9.3f}{row.p99_ms:9.3f}{row.mean_ms:9.3f}"
                  f"{row.std_ms:9.3f}{row.images_per_second:10,.0f}{row.n:7,}")  # fmt: skip
        if options.explain:
            ratio = rows["class + map"].p50_ms / rows["class"].p50_ms
            print(f"      class and map together cost {ratio:.2f} times the class alone")
    if cold:
        print(f"cold start {cold.first_prediction_ms:.0f} ms to the first prediction "
              f"(import runtime {cold.import_ms:.0f} ms)")  # fmt: skip
    print(f"file {result['file_bytes']:,} bytes, peak memory {peak_memory_bytes() / 2**20:,.0f} MiB")
    print(describe(where))


def _batches(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise OptionError(f"--batch {text}: expected whole numbers from 1, comma-separated, such as 1,8,32")
    return [int(part) for part in parts]


if __name__ == "__main__":
    command.run(main)
