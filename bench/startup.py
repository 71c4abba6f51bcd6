"""`python -m bench.startup`: how long a fresh process takes to its first prediction, and the memory it then holds.

What a user waits for is import, load, compile and the first answer together; each of them is also given alone.
Processes without a cache of compiled models, with an empty one and with a filled one are started in turns.
"""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module: python -m bench.startup")

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from bench.measure.environment import describe, environment
from bench.measure.record import append
from runtime import command
from runtime.errors import ModelError, OptionError
from runtime.outputs import check_outputs
from runtime.session import ENGINES, open_session

EXAMPLES = """
  python -m bench.startup model.onnx
  python -m bench.startup model.onnx --explain --engine ort
  python -m bench.startup model.onnx --record bench/results/cpu.jsonl
"""

WITHOUT, FIRST, SECOND = "without cache", "first, cache empty", "second, from cache"

_PROCESS = """
import sys, time
def resident():
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS:"))
    except OSError:
        return 0
memory, times = [resident()], [time.perf_counter()]
import numpy as np
memory.append(resident())
from runtime import Classifier
times.append(time.perf_counter())
model, engine, device, threads, cache, explain = sys.argv[1:]
options = {"engine": engine, "device": device, "threads": int(threads) or None, "cache": cache or None}
with Classifier(model, **options) as classifier:
    times.append(time.perf_counter())
    height, width = classifier.manifest.input.size
    image = np.zeros((height, width, classifier.manifest.input.channels), np.uint8)
    if explain:
        classifier.explain(image)
    else:
        classifier.predict(image)
    times.append(time.perf_counter())
    memory.append(resident())
print(*times, *memory)
"""


@dataclass(frozen=True)
class ColdStart:
    """Medians of fresh processes.

    Args:
        import_ms: importing numpy and `runtime`.
        open_ms: `Classifier(...)`, which imports the engine.
        predict_ms: the first prediction, which compiles for its batch size.
        classifier_ms: the two together.
        first_prediction_ms: everything from the process's first line on.
        resident_bytes: memory after the prediction; 0 where the system does not say.
        above_numpy_bytes: of it, what came after numpy was imported.
        above_interpreter_bytes: of it, what came after the bare interpreter.
    """

    import_ms: float
    open_ms: float
    predict_ms: float
    classifier_ms: float
    first_prediction_ms: float
    resident_bytes: float
    above_numpy_bytes: float
    above_interpreter_bytes: float


def start(
    model: str, *, engine: str, device: str, threads: int | None, cache: str = "", explain: bool = False
) -> list[float]:
    """Start one fresh process that loads a model and classifies one image; return the fields of a ColdStart.

    Args:
        model: path of an exported model.
        engine: see `runtime.session.open_session`.
        device: likewise.
        threads: likewise.
        cache: folder of compiled models, or "" for none.
        explain: ask for the image's saliency too.

    Raises:
        ModelError: the process fails; the text is its last line.
    """
    done = subprocess.run(
        [sys.executable, "-c", _PROCESS, model, engine, device, str(threads or 0), cache, "explain" * explain],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    if done.returncode:
        reason = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
        raise ModelError(f"{model}: cold start failed ({reason}); see runtime.classify")
    *times, interpreter, with_numpy, resident = map(float, done.stdout.split())
    began, imported, opened, predicted = (1000 * value for value in times)
    return [imported - began, opened - imported, predicted - opened, predicted - imported, predicted - began,
            resident, resident - with_numpy, resident - interpreter]  # fmt: skip


def median(starts: Sequence[Sequence[float]]) -> ColdStart:
    """Return the medians, field by field, of what `start` returned."""
    values = [float(value) for value in np.median(np.array(starts), axis=0)]
    return ColdStart(*values)


def cold_starts(
    model: str, *, engine: str, device: str, threads: int | None, starts: int, explain: bool = False
) -> dict[str, ColdStart]:
    """Return the cold start without a cache, with an empty one and from a filled one, measured in turns.

    Raises:
        ModelError: see `start`.
    """
    measured: dict[str, list[list[float]]] = {WITHOUT: [], FIRST: [], SECOND: []}
    for _ in command.progress(range(starts), label="cold starts"):
        with tempfile.TemporaryDirectory() as folder:
            for name, found in measured.items():
                cache = "" if name == WITHOUT else folder
                found.append(start(model, engine=engine, device=device, threads=threads, cache=cache,
                                   explain=explain))  # fmt: skip
    return {name: median(found) for name, found in measured.items()}


def main(argv: Sequence[str] | None = None) -> None:
    """Print time and memory of a cold start with and without a cache of compiled models."""
    parser = command.parser("bench.startup", "Measure the cold start of an exported model.", EXAMPLES)
    parser.add_argument("model", help="ONNX file of python -m export.onnx, or plan of export.engine")
    parser.add_argument("--engine", choices=tuple(ENGINES), help="default: the one the model was exported for")
    parser.add_argument("--device", help="default: cpu; cuda for a plan")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of one inference (default: 1)")
    parser.add_argument("--starts", type=int, default=9, help="fresh processes of each kind (default: 9)")
    parser.add_argument("--explain", action="store_true", help="to the first saliency map")
    parser.add_argument("--record", metavar="FILE", help="append the result to a .jsonl file")
    parser.add_argument("--json", action="store_true", help="one JSON line, with the environment")
    options = parser.parse_args(argv)
    if options.starts < 1:
        raise OptionError(f"--starts {options.starts}: expected a whole number from 1")
    check_outputs([options.record], inputs=[options.model])
    model = Path(options.model).resolve()
    session = open_session(model, engine=options.engine, device=options.device, threads=options.threads)
    session.close()
    found = cold_starts(str(model), engine=session.engine, device=session.device, threads=options.threads,
                        starts=options.starts, explain=options.explain)  # fmt: skip
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
    if options.record:
        append(options.record, result)
    if options.json:
        print(json.dumps(result))
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
