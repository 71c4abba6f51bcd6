"""The shipped networks on ARM64, emulated: the same file gives the same codes and classes as on x86.

It needs qemu and what `tests/make_arm64.sh` puts into build/arm64: `make test-arm64`. The results are appended as
JSON lines to the file that CLEARPACT_RECORD names.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from bench.measure.environment import environment
from bench.measure.record import append
from bench.networks.codes import differences, with_codes
from export.pipeline import export
from runtime.manifest import read_manifest
from train import checkpoint as checkpoints
from train.data import datasets

pytestmark = pytest.mark.arm64
ROOT = Path(__file__).parents[1]
MODELS = sorted((ROOT / "deploy" / "models").glob("*.pt"))
ARM64 = ROOT / "build" / "arm64"
IMAGES = 32


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, dict[str, np.ndarray]]]:
    """What each machine says of every model: "x86" and "arm64", then the model, then the output."""
    folder = tmp_path_factory.mktemp("models")
    for path in MODELS:
        data = export(checkpoints.load(path), target="ort").data
        (folder / f"{path.stem}.onnx").write_bytes(with_codes(data)[0])
        trained_on = read_manifest(data, path.name).data
        images = datasets.load(trained_on, str(ROOT / "data")).test_images[:IMAGES]
        np.save(folder / f"{path.stem}.npy", images.permute(0, 2, 3, 1).contiguous().numpy())
    emulator = ["qemu-aarch64-static", "-cpu", "cortex-a72", "-L", str(ARM64 / "root")]
    variables = {"PYTHONPATH": f"{ARM64 / 'site'}:{ROOT}", "PYTHONHOME": str(ARM64 / "root" / "usr")}
    settings = [part for name, value in variables.items() for part in ("-E", f"{name}={value}")]
    pythons = {
        "x86": [sys.executable],
        "arm64": [*emulator, *settings, str(ARM64 / "root" / "usr" / "bin" / "python3.11")],
    }
    results: dict[str, dict[str, dict[str, np.ndarray]]] = {}
    for machine, python in pythons.items():
        into = tmp_path_factory.mktemp(machine)
        command = [*python, str(Path(__file__).with_name("arm64_run.py")), str(folder), str(into)]
        inherited = {**os.environ, "OMP_NUM_THREADS": "1"} | (
            {"PYTHONPATH": str(ROOT)} if machine == "x86" else {}
        )
        done = subprocess.run(command, cwd=ROOT, env=inherited, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        results[machine] = {path.stem: dict(np.load(path)) for path in into.glob("*.npz")}
    return results


@pytest.mark.parametrize("name", [path.stem for path in MODELS])
def test_codes_and_classes_are_those_of_x86(name: str, found: dict[str, dict[str, dict[str, np.ndarray]]]) -> None:
    assert platform.machine() == "x86_64"
    ours, theirs = found["x86"][name], found["arm64"][name]
    assert ours.keys() == theirs.keys()
    moved = differences(ours, theirs)
    assert moved.codes >= 1000 * IMAGES
    assert moved.classes_differing == (ours["classes"] != theirs["classes"]).sum()
    result = {
        "bench": "arm64",
        "machine": "ARM64, emulated",
        "model": name,
        **asdict(moved),
        "environment": environment(),
    }
    if os.environ.get("CLEARPACT_RECORD"):
        append(os.environ["CLEARPACT_RECORD"], result)
    assert moved.classes_differing == 0
    # Where every code is the same, only floats that are added in another order differ.
    assert moved.logits_of_equal_codes is not None
    assert moved.map_of_equal_codes is not None
    assert moved.logits_of_equal_codes < 1e-5
    assert moved.map_of_equal_codes < 1e-3
    # A network without residual sums in float has no ties that another order decides.
    assert moved.images_with_moved_codes <= (0 if "cnn2" in name else 0.4 * IMAGES)
