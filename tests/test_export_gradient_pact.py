"""The input gradient of whole PACT networks, as exported, against torch.autograd and Captum.

The oracle is the fake-quantized network that was trained, in torch: with its own gradient, the paper's, for the
gate `ste`, and with the gate of the codes for `code`. It and the engine add float32 numbers in different orders,
so that now and then a value at the border of two codes, or of a gate, falls to the other side, and the two explain
different forward passes. Only images where every code and every gate agree are compared; most must.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import captum.attr
import numpy as np
import onnx
import openvino
import pytest
import torch
from torch import nn

from export.choices import TARGETS
from export.pipeline import export
from export.reference import reference_run
from export.verification.probes import CODES_SUFFIX, zero_points_of
from tests.code_gate import with_code_gate
from tests.toy_models import move_alphas, randomize_norms
from train import loop
from train.checkpoint import Checkpoint
from train.data.images import ImageData
from train.quantization.quantize import start_alphas
from train.quantization.quantizers import PACT
from train.quantization.spec import QuantSpec
from train.quantization.straight_through import BELOW_ZERO_STEPS
from train.recipe import default_recipe

BAR = 1e-4
CLASSES, SIZE, IMAGES = 10, 16, 24
SPECS = {
    "cnn2-8": ("cnn2", QuantSpec(8)),
    "cnn2-4": ("cnn2", QuantSpec(4)),
    "cnn2-mixed": ("cnn2", QuantSpec(8, layer_bits={"conv2": 3, "fc1": 5})),
    "resnet20-8": ("resnet20", QuantSpec(8)),
    "resnet20-4": ("resnet20", QuantSpec(4)),
    "resnet20-2": ("resnet20", QuantSpec(2)),
    "resnet20-addends": ("resnet20", QuantSpec(8, quantize_adds=True)),
}
# The export takes seconds: each target and each network once, and the rest of the table in the slow tests.
FAST = [(name, "openvino") for name in SPECS if name not in ("resnet20-addends", "resnet20-2")] + [
    ("cnn2-mixed", "ort"), ("resnet20-addends", "ort"), ("resnet20-4", "tensorrt"),
]  # fmt: skip
SLOW = [(n, t) for n in SPECS for t in TARGETS if (n, t) not in (*FAST, ("resnet20-addends", "tensorrt"))]
FILES = [*FAST, *(pytest.param(*file, marks=pytest.mark.slow) for file in SLOW)]
every_file = pytest.mark.parametrize(("name", "target"), FILES)
every_network = pytest.mark.parametrize("name", SPECS)
both_gates = pytest.mark.parametrize("gate", ["code", "ste"])


class Found(NamedTuple):
    """What one side found: logits [N, K], gradient [N, C, H, W], and by quantizer its codes and its gate."""

    logits: np.ndarray
    gradient: np.ndarray
    codes: dict[str, np.ndarray]
    gates: dict[str, np.ndarray]


@cache
def checkpoint(name: str) -> Checkpoint:
    """Return a network that was not trained, with BatchNorm statistics as if it were and alphas from images."""
    arch, spec = SPECS[name]
    pixels = torch.randint(
        0, 256, (64, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(1), dtype=torch.uint8
    )
    labels = torch.arange(64) % CLASSES
    data = ImageData("noise", tuple("0123456789"), pixels, labels, pixels[:IMAGES], labels[:IMAGES])
    made = loop.start(arch, data, spec, default_recipe("digits"))
    network = randomize_norms(made.network())
    start_alphas(network, made.input.normalize(pixels))
    move_alphas(network, torch.Generator().manual_seed(2))
    made.state_dict = network.state_dict()
    return made


@cache
def explained(name: str, target: str, gate: str) -> onnx.ModelProto:
    return export(checkpoint(name), target=target, gate=gate, saliency_precision="float32").model


def network(name: str, gate: str) -> nn.Module:
    fake_quantized = checkpoint(name).network()
    return with_code_gate(fake_quantized) if gate == "code" else fake_quantized


def examples(name: str) -> tuple[torch.Tensor, np.ndarray]:
    return checkpoint(name).samples["images"], np.arange(IMAGES) % CLASSES


def opened(gate: str, code: Any, x: Any, module: PACT) -> Any:
    """Return where a quantizer lets the gradient through, bool of the shape of its codes and of its input x."""
    if gate == "code":
        return (code > 0) & (code < module.qmax)
    return (x >= -BELOW_ZERO_STEPS * module.scale.item()) & (x < module.alpha.item())


def by_autograd(name: str, gate: str) -> Found:
    """Run the fake-quantized network, and notice what its quantizers do."""
    images, target = examples(name)
    net, codes, gates = network(name, gate), {}, {}

    def notice(key: str) -> Callable[..., None]:
        def hook(module: PACT, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
            code, x = torch.round(output / module.scale), inputs[0]
            codes[key] = code.detach().numpy()
            gates[key] = opened(gate, code, x, module).numpy()

        return hook

    for key, module in net.named_modules():
        if isinstance(module, PACT):
            module.register_forward_hook(notice(key))
    x = checkpoint(name).input.normalize(images).requires_grad_()
    logits = net(x)
    (gradient,) = torch.autograd.grad(logits.gather(1, torch.tensor(target)[:, None]).sum(), x)
    return Found(logits.detach().numpy(), gradient.numpy(), codes, gates)


def by_the_graph(name: str, target: str, gate: str) -> Found:
    """Run the exported graph on ONNX Runtime, and read what its quantizers do."""
    images, classes = examples(name)
    model = explained(name, target, gate)
    producer = {value: node for node in model.graph.node for value in node.output}
    pacts = {k: m for k, m in checkpoint(name).network().named_modules() if isinstance(m, PACT)}
    # Where the class clips codes after a pooling, those before it are the gradient's.
    names = [(key, f"{prefix}{key}{CODES_SUFFIX}") for key in pacts for prefix in ("", "grad/")]
    codes = {key: name for key, name in names if name in producer}
    before = {}
    for key, value in codes.items():
        # From the codes back over a Clip of codes, the quantizer, and a Clip or Relu of floats: to the float x.
        while producer[value].op_type in ("Clip", "QuantizeLinear", "Relu"):
            value = producer[value].input[0]
        before[key] = value
    run, _ = reference_run(model, [*codes.values(), *before.values()])
    found = run({"image": images.permute(0, 2, 3, 1).contiguous().numpy(), "target": classes})
    for value, zero_point in zero_points_of(model).items():
        if value in found:
            found[value] = found[value].astype(np.int32) - zero_point
    gates = {}
    for key, module in pacts.items():
        code, x = found[codes[key]], found[before[key]]
        gates[key] = opened(gate, code, x, module)
    return Found(found["logits"], found["gradient"], {k: found[v] for k, v in codes.items()}, gates)


def agreeing(a: Found, b: Found) -> np.ndarray:
    """Return for which images [N] all codes and all gates of the two are the same."""
    pairs = [(one[key], other[key]) for one, other in ((a.codes, b.codes), (a.gates, b.gates)) for key in one]
    assert len(pairs) == 2 * len(a.codes) == 2 * len(b.codes) > 0
    return np.all([(x == y).reshape(IMAGES, -1).all(1) for x, y in pairs], axis=0)


def on_openvino(name: str, gate: str) -> Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Return the exported file on the engine it was lowered for: (images, target) -> logits, gradient."""
    core = openvino.Core()
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    model = core.read_model(explained(name, "openvino", gate).SerializeToString())
    compiled = core.compile_model(model, "CPU", settings)

    def run(images: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        result = compiled({"image": images, "target": target})
        return result["logits"].copy(), result["gradient"].copy()

    return run


def relative_errors(got: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Return the relative error of each image."""
    difference, size = ((a.reshape(len(a), -1)) for a in (got - expected, expected))
    return np.linalg.norm(difference, axis=1) / np.linalg.norm(size, axis=1)


@both_gates
@every_file
def test_the_gradient_is_autograds(name: str, target: str, gate: str) -> None:
    found, expected = by_the_graph(name, target, gate), by_autograd(name, gate)
    same = agreeing(found, expected)
    assert same.sum() >= 0.75 * IMAGES
    assert relative_errors(found.logits, expected.logits)[same].max() < BAR
    assert relative_errors(found.gradient, expected.gradient)[same].max() < BAR


@both_gates
@every_network
def test_the_map_is_captums_saliency(name: str, gate: str) -> None:
    found, expected = by_the_graph(name, "openvino", gate), by_autograd(name, gate)
    same = agreeing(found, expected)
    images, target = examples(name)
    x = checkpoint(name).input.normalize(images).requires_grad_()
    saliency = captum.attr.Saliency(network(name, gate)).attribute(x, target=torch.tensor(target))
    maps = np.abs(found.gradient).max(1)
    assert relative_errors(maps, saliency.numpy().max(1))[same].max() < BAR


@both_gates
@every_network
def test_openvinos_gradient_is_autograds(name: str, gate: str) -> None:
    """Its codes cannot be read without another compilation; one that differs moves the logits by 1e-2."""
    images, target = examples(name)
    logits, gradient = on_openvino(name, gate)(images.permute(0, 2, 3, 1).contiguous().numpy(), target)
    expected = by_autograd(name, gate)
    same = relative_errors(logits, expected.logits) < BAR
    assert same.sum() >= 0.75 * IMAGES
    assert relative_errors(gradient, expected.gradient)[same].max() < BAR


@pytest.mark.parametrize("name", ["cnn2-8", "resnet20-4"])
def test_maps_follow_the_image_and_the_target_and_not_the_batch(name: str) -> None:
    explain = on_openvino(name, "code")
    images = examples(name)[0][:9].permute(0, 2, 3, 1).contiguous().numpy()
    images[1] = images[0]
    target = np.array([0, 1, 2, 2, 3, 4, -1, 5, 6])
    logits, gradient = explain(images, target)
    maps = np.abs(gradient).max(1)
    assert relative_errors(maps[:1], maps[1:2])[0] > 0.1  # another target
    assert relative_errors(maps[2:3], maps[3:4])[0] > 0.1  # another image
    single = [explain(images[i : i + 1], target[i : i + 1]) for i in range(9)]
    assert relative_errors(np.concatenate([one[0] for one in single]), logits).max() < 1e-5
    assert relative_errors(np.concatenate([one[1] for one in single]), gradient).max() < BAR


@every_network
def test_the_gates_differ(name: str) -> None:
    """Else one of the two would be compared twice."""
    code, ste = by_autograd(name, "code"), by_autograd(name, "ste")
    assert relative_errors(code.gradient, ste.gradient).min() > 0.01
