"""`python -m bench.processes.startup`: a fresh process's time to its first prediction, and its memory.

What a user waits for is import, load, compile and the first answer together; each of them is also given alone.
Processes without a cache of compiled models, with an empty one and with a filled one are started in turns.
"""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module: python -m bench.processes.startup")

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from bench.measure import record
from bench.measure.cold_start import ColdStart, Loading, median, start
from bench.measure.environment import describe, environment
from runtime import command
from runtime.session import ENGINES, open_session

EXAMPLES = """
  python -m bench.processes.startup model.onnx
  python -m bench.processes.startup model.onnx --explain --engine ort
  python -m bench.processes.startup model.onnx --record bench/results/cpu.jsonl
"""

WITHOUT, FIRST, SECOND = "without cache", "first, cache empty", "second, from cache"


def cold_starts(
    loading: Loading, *, shape: Sequence[int], threads: int | None, starts: int
) -> dict[str, ColdStart]:
    """Return the cold start without a cache, with an empty one and from a filled one, measured in turns.

    Raises:
        ModelError: see `bench.measure.cold_start.start`.
    """
    measured: dict[str, list[ColdStart]] = {WITHOUT: [], FIRST: [], SECOND: []}
    for _ in command.progress(range(starts), label="cold starts"):
        with tempfile.TemporaryDirectory() as folder:
            for name, found in measured.items():
                cached = replace(loading, cache="" if name == WITHOUT else folder)
                found.append(start(cached, shape=shape, threads=threads))
    return {name: median(found) for name, found in measured.items()}


def main(argv: Sequence[str] | None = None) -> None:
    """Print time and memory of a cold start with and without a cache of compiled models."""
    parser = command.parser("bench.processes.startup", "Measure the cold start of an exported model.", EXAMPLES)
    parser.add_argument("model", help="ONNX file of python -m export.onnx, or plan of export.engine")
    parser.add_argument("--engine", choices=tuple(ENGINES), help="default: the one the model was exported for")
    parser.add_argument("--device", help="default: cpu; cuda for a plan")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of one inference (default: 1)")
    parser.add_argument("--starts", type=int, default=9, help="fresh processes of each kind (default: 9)")
    parser.add_argument("--explain", action="store_true", help="to the first saliency map")
    record.add_options(parser)
    options = parser.parse_args(argv)
    command.check_counts(options, starts=1)
    record.check(options, inputs=[options.model])
    model = Path(options.model).resolve()
    session = open_session(model, engine=options.engine, device=options.device, threads=options.threads)
    session.close()
    image = session.manifest.input
    loading = Loading("runtime", model, session.engine, session.device, explain=options.explain)
    found = cold_starts(
        loading, shape=(*image.size, image.channels), threads=options.threads, starts=options.starts
    )
    where = environment()
    result = {
        "bench": "startup",
        "model": model.name,
        "arch": session.manifest.arch,
        "precision": session.manifest.precision,
        "engine": f"{session.engine} {session.version}",
        "device": session.device,
        "threads": options.threads,
        "explain": options.explain,
        "starts": options.starts,
        "cold_start": {name: asdict(row) for name, row in found.items()},
        "environment": where,
    }
    if record.deliver(options, result):
        return
    print(f"{options.model}  {session.manifest.precision} on {result['engine']}, {session.device}, threads "
          f"{options.threads}; medians of {options.starts} processes each, in turns")  # fmt: skip
    print(f"{'ms':20}  import    open  predict  open+predict   all")
    for name, row in found.items():
        print(f"{name:20}{row.import_ms:8.0f}{row.open_ms:8.0f}{row.predict_ms:9.0f}{row.classifier_ms:14.0f}"
              f"{row.first_prediction_ms:6.0f}")  # fmt: skip
    ratio = found[FIRST].classifier_ms / found[SECOND].classifier_ms
    whole = found[FIRST].first_prediction_ms / found[SECOND].first_prediction_ms
    print(f"from the cache {ratio:.2f} times as fast as the first time, {whole:.2f} times with the imports")
    print(f"\n{'resident MB':20}     all  above numpy  above the interpreter")
    for name, row in found.items():
        print(f"{name:20}{row.resident_bytes / 1e6:8.1f}{row.above_numpy_bytes / 1e6:13.1f}"
              f"{row.above_interpreter_bytes / 1e6:23.1f}")  # fmt: skip
    print(describe(where))


if __name__ == "__main__":
    command.run(main)
