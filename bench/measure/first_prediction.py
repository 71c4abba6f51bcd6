"""What a contender costs before it is of use: fresh processes, from their first line to the first prediction.

Each process does what its engine's own documentation does: import, load, compile, classify one image.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from runtime import command
from runtime.errors import ModelError

_BEGIN = """
import sys, time
began = time.perf_counter()
import numpy as np
path, engine, device, threads, *shape = sys.argv[1:]
threads, image = int(threads), np.zeros(tuple(map(int, shape)), np.uint8)
"""

_END = """
milliseconds = 1000 * (time.perf_counter() - began)
from bench.measure.environment import peak_memory_bytes
print(milliseconds, peak_memory_bytes())
"""

_TORCH = """
import torch
from export.deploy_form import deploy_form
from train import checkpoint as checkpoints
from train.models import factory
torch.set_num_threads(threads)
if engine:
    factory.allow(engine)
checkpoint = checkpoints.load(path)
network = deploy_form(checkpoint.network(), checkpoint.input, int8=False).to(device)
"""

# What loads a file -> the program between the two above.
_PROGRAMS = {
    "runtime": """
from runtime import Classifier
Classifier(path, engine=engine, device=device, threads=threads).logits(image)
""",
    "torch": _TORCH + """
with torch.inference_mode():
    network(torch.from_numpy(image).to(device)).cpu()
""",
    "torch.compile": _TORCH + """
network = torch.compile(network)
with torch.inference_mode():
    network(torch.from_numpy(image))
""",
    "onnxruntime": """
from pathlib import Path
from bench.peers.cpu import run_on_onnx_runtime
run_on_onnx_runtime(Path(path).read_bytes(), threads)(image)
""",
    "openvino": """
import openvino
from bench.peers.cpu import run_on_openvino
run_on_openvino(openvino.Core().read_model(path), threads, precision=engine)(image)
""",
}  # fmt: skip


@dataclass(frozen=True)
class Loading:
    """How a contender is loaded.

    Args:
        program: one of "runtime", "torch", "torch.compile", "onnxruntime" and "openvino".
        path: file that it loads.
        engine: of "runtime", its name; of "openvino", the precision of what is not quantized; of "torch", the name
            of the user's own architecture, if it is one.
        device: "cpu" or "cuda", of "runtime" and "torch".
    """

    program: str
    path: Path
    engine: str = ""
    device: str = "cpu"


@dataclass(frozen=True)
class FirstPrediction:
    """Medians of fresh processes: milliseconds to the first prediction, and the most memory held until then."""

    cold_start_ms: float
    peak_memory_bytes: float


def first_predictions(
    loadings: Mapping[str, Loading], *, shape: tuple[int, int, int], threads: int, starts: int
) -> dict[str, FirstPrediction]:
    """Return what each contender's fresh process costs, the contenders in turns.

    Args:
        loadings: by name of the contender.
        shape: height, width and channels of an image.
        threads: CPU threads of one inference.
        starts: processes of each.

    Raises:
        ModelError: a process fails; the text is its last line.
    """
    found: dict[str, list[list[float]]] = {name: [] for name in loadings}
    turns = [(name, loading) for _ in range(starts) for name, loading in loadings.items()]
    for name, loading in command.progress(turns, label="cold starts"):
        program = _BEGIN + _PROGRAMS[loading.program] + _END
        arguments = map(str, (loading.path, loading.engine, loading.device, threads, 1, *shape))
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", program, *arguments],
            capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2],
        )  # fmt: skip
        if done.returncode:
            reason = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
            raise ModelError(f"{name}: cold start failed ({reason}); leave cold starts out: --starts 0")
        found[name].append([float(value) for value in done.stdout.split()[-2:]])
    return {name: FirstPrediction(*map(float, np.median(values, axis=0))) for name, values in found.items()}
