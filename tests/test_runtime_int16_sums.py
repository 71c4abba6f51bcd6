from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import openvino
import pytest
import torch
from torch import nn

from export.pipeline import export
from runtime.engines.int16_sums import adds_in_int16, keep_sums_exact
from train.input_spec import InputSpec
from train.model import QuantizedModel
from train.quantization.quantize import quantize
from train.quantization.spec import QuantSpec

X86 = platform.machine().lower() in ("x86_64", "amd64")
# Logits and maps as the process computes them; with a second argument, without what keeps sums exact.
PROGRAM = """
import sys
import numpy as np
from runtime.engines import int16_sums
from runtime import Classifier
if len(sys.argv) > 3:
    int16_sums.adds_in_int16 = lambda: False
images = np.load(sys.argv[2] + "/images.npy")
found = Classifier(sys.argv[1], engine="openvino", threads=1).session.run(
    {"image": images, "target": np.full(len(images), -1)}, ("logits", "saliency"))
np.savez(sys.argv[2] + "/found.npz", **found)
"""


def network_of(*, full_range: bool) -> QuantizedModel:
    """Return one of three layers, of which the first alone reads signed codes."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10)]
    spec = InputSpec((12, 12), 3, (128 / 255,) * 3, (0.25,) * 3)
    network = quantize(nn.Sequential(*layers), QuantSpec(8, full_range=full_range), input_scale=spec.grid_scale)
    images = torch.randint(0, 256, (8, 3, 12, 12), dtype=torch.uint8)
    return QuantizedModel(network.eval(), spec, tuple("abcdefghij"), images)


def computed(model: Path, images: np.ndarray, isa: str, *more: str) -> dict[str, np.ndarray]:
    """Return what a process whose oneDNN knows instructions up to `isa` computes; "": all there are."""
    np.save(model.parent / "images.npy", images)
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": isa}
    command = [sys.executable, "-c", PROGRAM, str(model), str(model.parent), *more]
    subprocess.run(command, env=environment, check=True, cwd=Path(__file__).parents[1])
    return dict(np.load(model.parent / "found.npz"))


@pytest.mark.skipif(not X86, reason="other processors have no 16-bit sums")
def test_without_vnni_a_network_computes_the_same_and_without_the_care_it_would_not(tmp_path: Path) -> None:
    model = network_of(full_range=True)
    (tmp_path / "model.onnx").write_bytes(export(model).data)
    images = model.samples.permute(0, 2, 3, 1).contiguous().numpy()
    expected = computed(tmp_path / "model.onnx", images, "")
    found = computed(tmp_path / "model.onnx", images, "AVX2")
    careless = computed(tmp_path / "model.onnx", images, "AVX2", "careless")
    for name, values in expected.items():
        assert np.allclose(found[name], values, rtol=1e-5, atol=1e-5 * np.abs(values).max()), name
    assert np.abs(careless["logits"] - expected["logits"]).max() > 1e-3 * np.abs(expected["logits"]).max()


@pytest.mark.parametrize(("full_range", "held"), [(False, 1), (True, 3)])
def test_layers_that_read_signed_codes_are_held_and_those_of_the_full_range(full_range: bool, held: int) -> None:
    """The first layer of pixels alone, and every layer where codes reach 255."""
    model = network_of(full_range=full_range)
    data = export(model, saliency=False).data
    read = openvino.Core().read_model(data)
    assert keep_sums_exact(read, openvino.op.Constant, largest_code=255 if full_range else 127) == held


def test_the_variable_of_onednn_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert adds_in_int16() == X86
