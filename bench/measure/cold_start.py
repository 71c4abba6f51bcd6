"""What a contender costs before it is of use: fresh processes, from their first line to the first prediction.

Each process does what its engine's own documentation does: import, load, compile, classify one image.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from runtime import command
from runtime.errors import ModelError

_BEGIN = """
import sys, time
def resident_bytes():
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS:"))
    except OSError:
        return 0
memory, times = [resident_bytes()], [time.perf_counter()]
import numpy as np
memory.append(resident_bytes())
path, engine, device, threads, cache, explain, way, *shape = sys.argv[1:]
threads, image = int(threads) or None, np.zeros((1, *map(int, shape)), np.uint8)
"""

_MARK = """
times.append(time.perf_counter())
"""

_END = """
memory.append(resident_bytes())
from bench.measure.environment import peak_memory_bytes
print(*times, *memory, peak_memory_bytes())
"""

_IMPORT_TORCH = """
import torch
from bench.peers.torch_ways import WAYS, classify_in_torch
from train import checkpoint as checkpoints
from train.models import factory
torch.set_num_threads(threads or 1)
"""
_OPEN_TORCH = """
if engine:
    factory.allow(engine)
classify = classify_in_torch(checkpoints.load(path), WAYS[way], device)
"""

# What loads a file -> how it imports, opens and predicts.
_PROGRAMS = {
    "runtime": (
        "from runtime import Classifier",
        "classifier = Classifier(path, engine=engine, device=device, threads=threads, cache=cache or None)",
        "classifier.explain(image[0]) if explain else classifier.logits(image)",
    ),
    "torch": (_IMPORT_TORCH, _OPEN_TORCH, "classify(image)"),
    "onnxruntime": (
        "from pathlib import Path\nfrom bench.peers.cpu import run_on_onnx_runtime",
        "classify = run_on_onnx_runtime(Path(path).read_bytes(), threads)",
        "classify(image)",
    ),
    "openvino": (
        "import openvino\nfrom bench.peers.cpu import run_on_openvino",
        "classify = run_on_openvino(openvino.Core().read_model(path), threads, precision=engine)",
        "classify(image)",
    ),
}


@dataclass(frozen=True)
class Loading:
    """How a contender is loaded.

    Args:
        program: one of "runtime", "torch", "onnxruntime" and "openvino".
        path: file that it loads.
        engine: of "runtime", its name; of "openvino", the precision of what is not quantized; of "torch", the name
            of the user's own architecture, if it is one.
        device: "cpu" or "cuda", of "runtime" and "torch".
        cache: of "runtime", folder of compiled models, "" for none.
        explain: of "runtime" and "torch", ask for the image's saliency too.
        way: of "torch", one of `bench.peers.torch_ways.WAYS`.
    """

    program: str
    path: Path
    engine: str = ""
    device: str = "cpu"
    cache: str = ""
    explain: bool = False
    way: str = "eager"


@dataclass(frozen=True)
class ColdStart:
    """One fresh process, or the medians of several.

    Args:
        import_ms: importing numpy and the engine's package, or `runtime`.
        open_ms: loading the file; `Classifier(...)` imports the engine.
        predict_ms: the first prediction, which may compile for its batch size.
        classifier_ms: the two together.
        first_prediction_ms: everything from the process's first line on.
        resident_bytes: memory after the prediction; 0 where the system does not say.
        above_numpy_bytes: of it, what came after numpy was imported.
        above_interpreter_bytes: of it, what came after the bare interpreter.
        peak_memory_bytes: the most memory held until the prediction.
    """

    import_ms: float
    open_ms: float
    predict_ms: float
    classifier_ms: float
    first_prediction_ms: float
    resident_bytes: float
    above_numpy_bytes: float
    above_interpreter_bytes: float
    peak_memory_bytes: float


def start(loading: Loading, *, shape: Sequence[int], threads: int | None, name: str = "") -> ColdStart:
    """Start one fresh process that loads a contender and classifies one image.

    Args:
        loading: of the contender.
        shape: height, width and channels of an image.
        threads: CPU threads of one inference; None leaves the number to the engine.
        name: of the contender, in messages; "" takes the file's.

    Raises:
        ModelError: the process fails; the text is its last line.
    """
    importing, opening, predicting = _PROGRAMS[loading.program]
    program = _MARK.join([_BEGIN + importing, opening, predicting, _END])
    explain = "explain" if loading.explain else ""
    arguments = (
        loading.path,
        loading.engine,
        loading.device,
        threads or 0,
        loading.cache,
        explain,
        loading.way,
        *shape,
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, *map(str, arguments)],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    if done.returncode:
        reason = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
        raise ModelError(
            f"{name or loading.path}: cold start failed ({reason}); leave cold starts out, or see runtime.classify"
        )
    values = list(map(float, done.stdout.split()[-8:]))
    began, imported, opened, predicted = (1000 * value for value in values[:4])
    interpreter, with_numpy, resident, peak = values[4:]
    return ColdStart(
        import_ms=imported - began,
        open_ms=opened - imported,
        predict_ms=predicted - opened,
        classifier_ms=predicted - imported,
        first_prediction_ms=predicted - began,
        resident_bytes=resident,
        above_numpy_bytes=resident - with_numpy,
        above_interpreter_bytes=resident - interpreter,
        peak_memory_bytes=peak,
    )


def median(starts: Sequence[ColdStart]) -> ColdStart:
    """Return the medians, field by field."""
    names = ColdStart.__dataclass_fields__
    return ColdStart(**{name: float(np.median([getattr(found, name) for found in starts])) for name in names})


def in_turns(
    loadings: Mapping[str, Loading], *, shape: Sequence[int], threads: int | None, starts: int
) -> dict[str, ColdStart]:
    """Return the medians of every contender's fresh processes, the contenders in turns.

    Args:
        loadings: by name of the contender.
        shape: height, width and channels of an image.
        threads: CPU threads of one inference.
        starts: processes of each.

    Raises:
        ModelError: see `start`.
    """
    found: dict[str, list[ColdStart]] = {name: [] for name in loadings}
    turns = [(name, loading) for _ in range(starts) for name, loading in loadings.items()]
    for name, loading in command.progress(turns, label="cold starts"):
        found[name].append(start(loading, shape=shape, threads=threads, name=name))
    return {name: median(values) for name, values in found.items() if values}
