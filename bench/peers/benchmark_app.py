"""OpenVINO's own throughput of a file, by the `benchmark_app -hint throughput` that comes with its package.

The tool opens the file by itself, chooses streams and requests for the whole machine, and fills the input with
random numbers; what it prints at its end are images a second.
"""

from __future__ import annotations

import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from runtime import command
from runtime.errors import EngineError, OptionError
from runtime.manifest import INPUT_NAME

_PROGRAM = "benchmark_app"
_THROUGHPUT = re.compile(r"Throughput:\s+([\d.]+) FPS")


@dataclass(frozen=True)
class Beside:
    """Images a second of ours and of the tool, one of each a round, in turns."""

    ours: tuple[float, ...]
    tool: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """Median over rounds of ours by the tool's; above 1 ours is faster."""
        return statistics.median(a / b for a, b in zip(self.ours, self.tool, strict=True))


def find_program() -> Path:
    """Return the tool that belongs to this interpreter.

    Raises:
        OptionError: it is not installed.
    """
    program = Path(sys.executable).parent / _PROGRAM
    if not program.is_file():
        raise OptionError(f"--beside-benchmark-app: no {_PROGRAM} beside this Python; pip install openvino")
    return program


def beside(
    ours: Callable[[], float], model: Path, shape: Sequence[int], *, seconds: float, rounds: int = 3
) -> Beside:
    """Measure ours and the tool in turns.

    Args:
        ours: returns our images a second of the same file.
        model: see `images_per_second`.
        shape: likewise.
        seconds: likewise.
        rounds: of each.

    Raises:
        OptionError: the tool is not installed.
        EngineError: see `images_per_second`.
    """
    program = find_program()
    found = [
        (ours(), images_per_second(program, model, shape, seconds=seconds))
        for _ in command.progress(range(rounds), label="beside benchmark_app")
    ]
    return Beside(tuple(a for a, _ in found), tuple(b for _, b in found))


def images_per_second(program: Path, model: Path, shape: Sequence[int], *, seconds: float) -> float:
    """Return what the tool measures of a file.

    Args:
        program: from `find_program`.
        model: ONNX file without maps: the tool computes every output.
        shape: of the pixels, [N, H, W, C].
        seconds: to fill; the tool takes whole ones.

    Raises:
        EngineError: the tool fails, or prints no throughput.
    """
    sizes = ",".join(map(str, shape))
    # Float parts stay float32, as in our sessions.
    given = ["-m", str(model), "-d", "CPU", "-hint", "throughput", "-t", str(max(1, round(seconds))),
             "-shape", f"{INPUT_NAME}[{sizes}]", "-infer_precision", "f32"]  # fmt: skip
    done = subprocess.run([str(program), *given], capture_output=True, text=True, check=False)
    found = frames_per_second(done.stdout)
    if done.returncode or found is None:
        reason = (done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}").splitlines()[-1]
        raise EngineError(f"{model}: {_PROGRAM} told no throughput ({reason}); run it alone")
    return found


def frames_per_second(text: str) -> float | None:
    """Return the throughput in what the tool prints; None where there is none."""
    found = _THROUGHPUT.search(text)
    return float(found[1]) if found else None
