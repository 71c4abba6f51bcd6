"""A libcudart and libcuda in one, compiled, that write down what they are called with; see cuda_stub.c."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

STUB = Path(__file__).with_name("cuda_stub.c")


def compiled(path: Path, *, runtime: int = 12060, driver: int = 12060) -> Path:
    """Return a libcudart and libcuda in one that say they are of these versions."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler for a stub of CUDA's library")
    path.parent.mkdir(parents=True, exist_ok=True)
    options = ["-std=c11", "-shared", "-fPIC", f"-DRUNTIME={runtime}", f"-DDRIVER={driver}"]
    subprocess.run([compiler, *options, "-o", str(path), str(STUB)], check=True)
    return path
