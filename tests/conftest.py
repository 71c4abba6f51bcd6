"""Checkpoints and exported models that many tests read; each is made once and never changed."""

from __future__ import annotations

import dataclasses
import functools
import gc
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from onnxscript.values import TracedOnnxFunction

from runtime.files import write_atomically
from tests.exports import exported
from tests.fake_cuda import FakeGpu
from tests.fake_tensorrt import install, write_plan
from tests.toy_models import randomize_norms
from train import checkpoint as checkpoints
from train import loop
from train.checkpoint import Checkpoint
from train.data import datasets
from train.data.images import ImageData
from train.quantization.spec import QuantSpec
from train.recipe import default_recipe

# Started in the background of a script, this process and its children would ignore Ctrl-C, which tests send.
signal.signal(signal.SIGINT, signal.default_int_handler)
# The networks are tiny: a second thread would cost more than it gives.
torch.set_num_threads(1)
# torch's exporter parses the source of its 497 translations in every export, a quarter of a small one's time.
TracedOnnxFunction.function_ir = property(functools.cache(TracedOnnxFunction.function_ir.fget))
# No deadline: other work on the machine is no defect. No database: tests write nothing into the working directory.
settings.register_profile("clearpact", deadline=None, database=None)
settings.load_profile("clearpact")


@pytest.fixture(scope="session")
def digits() -> ImageData:
    return datasets.load("digits")


@pytest.fixture(scope="session")
def digits_checkpoint_path(digits: ImageData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """cnn2 on digits, 8 bits, saliency-guided, trained for six epochs: accurate enough to have real margins."""
    path = tmp_path_factory.mktemp("digits") / "ckpt.pt"
    recipe = dataclasses.replace(default_recipe("digits"), epochs=6)
    loop.fit(loop.start("cnn2", digits, QuantSpec(8), recipe), digits, path)
    return path


@pytest.fixture(scope="session")
def digits_checkpoint(digits_checkpoint_path: Path) -> Checkpoint:
    return checkpoints.load(digits_checkpoint_path)


@pytest.fixture(scope="session")
def digits_models(digits_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The digits checkpoint as ONNX files by name: openvino, ort, tensorrt (INT8 each) and float.

    Their gradients are in float32, so that tests can hold them to autograd's.
    """
    folder = tmp_path_factory.mktemp("models")
    made = {}
    for name in ("openvino", "ort", "tensorrt", "float"):
        target = "openvino" if name == "float" else name
        made[name] = folder / f"{name}.onnx"
        found = exported(digits_checkpoint, int8=name != "float", target=target, saliency_precision="float32")
        write_atomically(made[name], found.model.SerializeToString())
    return made


@pytest.fixture(scope="session")
def resnet_checkpoint(digits: ImageData) -> Checkpoint:
    """resnet20 at 4 bits on digits' images, not trained, with BatchNorm statistics as if it were."""
    checkpoint = loop.start("resnet20", digits, QuantSpec(4), default_recipe("digits"))
    model = checkpoint.network()
    randomize_norms(model)
    checkpoint.state_dict = model.state_dict()
    return checkpoint


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    """The model of a GPU, which `import tensorrt` and `import cuda.bindings.runtime` find; tests must clean up."""
    gpu = FakeGpu()
    install(monkeypatch, gpu)
    # What was there before is no leak of this test; to walk through all objects of torch takes half a second.
    gc.freeze()
    yield gpu
    gc.collect()
    gc.unfreeze()
    gpu.assert_clean()


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    """A plan for `gpu`, with its sidecar."""
    return write_plan(tmp_path / "engine.plan")
