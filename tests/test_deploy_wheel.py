"""What a device gets: the wheel and one engine, in an environment of its own, outside of the repository."""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]


def run(*arguments: object, folder: Path) -> str:
    done = subprocess.run(
        [str(a) for a in arguments], cwd=folder, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("extra", ["openvino", "ort"])
def test_the_wheel_and_one_engine_classify_and_explain(
    extra: str, digits_models: dict[str, Path], tmp_path: Path
) -> None:
    """It needs a package index, for the engine."""
    source, device = tmp_path / "source", tmp_path / "device"
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in tracked.splitlines():
        if name.split("/")[0] not in ("tests", "bench") or name.endswith(".py"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", tmp_path / "dist", ".", folder=source)
    (wheel,) = (tmp_path / "dist").glob("clearpact-*-py3-none-any.whl")
    device.mkdir()
    venv.create(device / "env", with_pip=True)
    python = device / "env" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", f"{wheel}[{extra},tools]", folder=device)
    shutil.copy(digits_models[extra], device / "model.onnx")
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 4).save(device / "digit.png")
    clearpact = device / "env" / "bin" / "clearpact"
    said = run(clearpact, "classify", "model.onnx", "digit.png", "--explain", "heat.png", folder=device)
    assert said.startswith("digit.png  ")
    with Image.open(device / "heat.png") as heat:
        assert min(heat.size) == 256  # large enough for a person, and its caption below
    code = """
import sys
import numpy as np
from runtime import Classifier
with Classifier("model.onnx", threads=1) as classifier:
    frame = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    print(classifier.predict(frame).label, classifier.explain(frame).map.shape)
print([name for name in ("torch", "onnx", "train", "export") if name in sys.modules])
"""
    assert run(python, "-c", code, folder=device).splitlines()[1] == "[]"
    # What the wheel holds and this device cannot run is told in one line.
    done = subprocess.run(
        [clearpact, "export", "ckpt.pt"], cwd=device, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "needs onnx, which is not installed" in done.stderr
