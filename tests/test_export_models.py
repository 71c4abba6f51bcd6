"""Networks of many styles, from `quantize` to each engine: codes, classes and maps of the fake-quantized network.

Four in the style of users' own (tests/toy_models.py), and the architectures that others published. None is
trained: their BatchNorm has statistics as if they were, and their alphas are those of their images.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn

from export.engine.builder import BuildOptions, build
from export.engine.lowering import lower
from export.pipeline import ExportResult, export
from export.reference import reference_run
from export.verification.probes import CODES_SUFFIX
from runtime import Classifier
from runtime.explanations.agreement import spearman
from runtime.manifest import INPUT_NAME, TARGET_NAME
from tests.code_gate import with_code_gate
from tests.toy_models import move_alphas, randomize_norms
from train import loop
from train.checkpoint import Checkpoint
from train.data.images import ImageData
from train.models import factory
from train.quantization.quantize import start_alphas
from train.quantization.quantizers import PACT
from train.quantization.spec import QuantSpec
from train.recipe import default_recipe

OWN = tuple(f"tests.toy_models:{name}" for name in ("mobile_net", "two_branches", "patch_mlp", "attention"))
PUBLISHED = ("resnet18", "mobilenet_v2", "deit_tiny")
EVERY = [*OWN, *(pytest.param(arch, marks=pytest.mark.slow) for arch in PUBLISHED)]
IMAGES, CLASSES = 8, 4
BAR = 1e-4

# Layers and products of activations; those of one pixel, of which TensorRT-RTX's report does not tell.
LAYERS = {
    OWN[0]: 12, OWN[1]: 5, OWN[2]: 6, OWN[3]: 4 + 2, "resnet18": 21, "mobilenet_v2": 53, "deit_tiny": 74 + 24
}  # fmt: skip
UNREPORTED = {OWN[0]: {"node_conv2d_4", "node_conv2d_9"}}


@pytest.fixture(autouse=True, scope="module")
def named() -> Iterator[None]:
    factory.allow(*OWN)
    yield
    factory._allowed.clear()


@cache
def checkpoint(arch: str) -> Checkpoint:
    size = 16 if arch in OWN else 32
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(IMAGES, 3, size // 4, size // 4, generator=generator)
    pixels = (nn.functional.interpolate(coarse, size=(size, size), mode="bilinear") * 255).to(torch.uint8)
    labels = torch.arange(IMAGES) % CLASSES
    data = ImageData("digits", tuple("abcd"), pixels, labels, pixels, labels)
    made = loop.start(arch, data, QuantSpec(8), default_recipe("digits"))
    network = randomize_norms(made.network())
    for name, parameter in network.named_parameters():
        if name.startswith("head"):
            nn.init.normal_(parameter, generator=generator)
    start_alphas(network, made.input.normalize(pixels))
    move_alphas(network, generator)
    made.state_dict = network.state_dict()
    return made


@cache
def exported(arch: str, target: str) -> ExportResult:
    return export(checkpoint(arch), target=target, saliency_precision="float32")


def by_autograd(arch: str, network: nn.Module) -> tuple[np.ndarray, np.ndarray]:
    """Return logits and gradients by each image's class."""
    made = checkpoint(arch)
    x = made.input.normalize(made.samples["images"]).requires_grad_()
    logits = network(x)
    (gradient,) = torch.autograd.grad(logits.gather(1, made.samples["labels"][:, None]).sum(), x)
    return logits.detach().numpy(), gradient.numpy()


def feeds(arch: str) -> dict[str, np.ndarray]:
    samples = checkpoint(arch).samples
    image = samples["images"].permute(0, 2, 3, 1).contiguous().numpy()
    return {INPUT_NAME: image, TARGET_NAME: samples["labels"].numpy()}


def relative_errors(found: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    difference = (found - wanted).reshape(len(wanted), -1)
    return np.linalg.norm(difference, axis=1) / np.linalg.norm(wanted.reshape(len(wanted), -1), axis=1)


@pytest.mark.parametrize("arch", EVERY)
def test_the_graph_gives_logits_and_gradient_of_the_network(arch: str) -> None:
    """Given the graph's codes: those that differ are at ties, as its verification has proved."""
    made, network = exported(arch, "tensorrt"), checkpoint(arch).network()
    names = [name for name, module in network.named_modules() if isinstance(module, PACT)]
    found = reference_run(made.model, [f"{name}{CODES_SUFFIX}" for name in names])[0](feeds(arch))
    codes = {name: torch.from_numpy(found[f"{name}{CODES_SUFFIX}"]) for name in names}
    logits, gradient = by_autograd(arch, with_code_gate(network, codes))
    assert np.abs(found["logits"] - logits).max() < BAR * np.abs(logits).max()
    assert np.abs(gradient).reshape(IMAGES, -1).max(1).min() > 0
    assert relative_errors(found["gradient"], gradient).max() < BAR
    assert relative_errors(found["saliency"], np.abs(gradient).max(1)).max() < BAR
    assert made.verification.flipped_codes < 1e-4 * made.verification.activation_codes


@pytest.mark.parametrize("engine", ["openvino", "ort"])
@pytest.mark.parametrize("arch", EVERY)
def test_engines_give_its_classes_and_maps(arch: str, engine: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(exported(arch, engine).model.SerializeToString())
    logits, gradient = by_autograd(arch, with_code_gate(checkpoint(arch).network()))
    with Classifier(path, threads=1) as classifier:
        assert classifier.session.engine.lower().startswith(engine[:4])
        found = classifier.session.run(feeds(arch), ("logits", "saliency"))
    assert np.abs(found["logits"] - logits).max() < 0.05 * np.abs(logits).max()
    assert np.array_equal(found["logits"].argmax(1), logits.argmax(1))
    # An engine's kernels round by their own arithmetic: in a deep network that was not trained, codes at ties, and
    # the gates behind them, go other ways.
    agreement = spearman(found["saliency"], np.abs(gradient).max(1))
    assert agreement.mean() > (0.99 if arch in OWN else 0.93)
    assert agreement.min() > (0.95 if arch in OWN else 0.8)


@pytest.mark.parametrize("arch", EVERY)
def test_tensorrt_rtx_builds_it_ahead_of_time_and_multiplies_int8(arch: str) -> None:
    trt: ModuleType = pytest.importorskip(
        "tensorrt_rtx_bindings", reason="no wheel of TensorRT-RTX here: pip install 'clearpact[tensorrt-aot]'"
    )
    lowered = lower(exported(arch, "tensorrt").model.SerializeToString(), "model.onnx", precision="int8")
    built = build(trt, "tensorrt_rtx", lowered.onnx, "model.onnx", BuildOptions(batch=(1, 1, 1)))
    assert built.products is not None
    forward = [layer for layer in lowered.layers if not layer.name.startswith("grad/")]
    assert [layer.precision for layer in forward] == ["INT8"] * LAYERS[arch]
    reported = {layer.name for layer in forward if "Int8" in built.products.get(layer.name, ())}
    assert {layer.name for layer in forward} - reported == UNREPORTED.get(arch, set())
    assert not [warning for warning in built.warnings if "INT8" in warning or "FP16" in warning]
