"""The input gradient of whole networks, against torch.autograd and Captum.

In float64, on onnx's reference evaluator, the graph agrees with autograd to rounding, for any image. In float32,
on ONNX Runtime and OpenVINO, it is held to 1e-4 for images with no activation at a kink: see `steady`.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import cache

import captum.attr
import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch
import torchvision
from onnx.reference import ReferenceEvaluator

from export.gradient.walk import append_input_gradient
from tests.reference_operators import EXACT
from train.models.build import build
from train.models.vision_transformer import VisionTransformer

CLASSES = 10
BAR = 1e-4


def cnn2(num_classes: int) -> torch.nn.Module:
    return build("cnn2", channels=3, size=(32, 32), classes=num_classes)


def resnet20(num_classes: int) -> torch.nn.Module:
    return build("resnet20", channels=3, size=(32, 32), classes=num_classes)


def vision_transformer(num_classes: int) -> torch.nn.Module:
    return torchvision.models.VisionTransformer(
        image_size=64,
        patch_size=16,
        num_layers=2,
        num_heads=4,
        hidden_dim=64,
        mlp_dim=128,
        num_classes=num_classes,
    )


def deit(num_classes: int) -> torch.nn.Module:
    return VisionTransformer(3, (64, 64), num_classes, patch=16, width=48, depth=2)


def deit_tiny(num_classes: int) -> torch.nn.Module:
    return build("deit_tiny", channels=3, size=(64, 64), classes=num_classes)


MODELS = torchvision.models
FAST = [cnn2, resnet20, MODELS.squeezenet1_1, vision_transformer, deit]
SLOW = [
    deit_tiny,
    MODELS.mobilenet_v2,
    MODELS.resnet18,
    MODELS.vgg11_bn,
    MODELS.densenet121,
    MODELS.efficientnet_b0,
]
EVERY = [*FAST, *(pytest.param(network, marks=pytest.mark.slow) for network in SLOW)]
# Where a larger image would hardly ever be steady: the more activations, the more of them near a kink.
SMALL = {cnn2, resnet20, MODELS.mobilenet_v2, MODELS.densenet121}

Network = Callable[..., torch.nn.Module]


def images(network: Network, count: int, seed: int) -> np.ndarray:
    size = 32 if network in SMALL else 64
    return np.random.default_rng(seed).normal(size=(count, 3, size, size)).astype(np.float32)


@cache
def initialized(network: Network) -> torch.nn.Module:
    """Return a network with random weights, and with BatchNorm statistics that are those of its activations."""
    torch.manual_seed(0)
    net = network(num_classes=CLASSES).eval()
    for parameter in net.parameters():
        if not parameter.any():  # the transformer's head starts at zero, and with it the gradient
            torch.nn.init.uniform_(parameter, 0.0, 0.1)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.train().momentum = None
    with torch.no_grad():
        net(torch.tensor(images(network, 32, seed=1)))
    return net.eval()


@cache
def exported(network: Network, dtype: torch.dtype = torch.float32) -> onnx.ModelProto:
    """Return the ONNX model of a network, with an open batch."""
    net = copy.deepcopy(initialized(network)).to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's exporter warns about its own deprecations
        program = torch.onnx.export(
            net,
            (torch.tensor(images(network, 2, seed=0), dtype=dtype),),
            dynamo=True,
            opset_version=21,
            verbose=False,
            input_names=["image"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )
    return program.model_proto


def autograd(net: torch.nn.Module, x: np.ndarray, target: np.ndarray) -> np.ndarray:
    leaf = torch.tensor(x, dtype=next(net.parameters()).dtype, requires_grad=True)
    logits = net(leaf)
    chosen = torch.where(torch.tensor(target) < 0, logits.argmax(1), torch.tensor(target))
    return torch.autograd.grad(logits.gather(1, chosen[:, None]).sum(), leaf)[0].numpy()


def targets(net: torch.nn.Module, x: np.ndarray) -> np.ndarray:
    """Return targets of four images: the predicted class, one class twice and another one.

    They are classes that no image gives a logit of 0: SqueezeNet ends in a Relu, and has no gradient there.
    """
    with torch.no_grad():
        second, first = net(torch.tensor(x)).amin(0).argsort()[-2:].tolist()
    return np.array([-1, first, first, second])


def steady(network: Network, x: np.ndarray, target: int) -> np.ndarray:
    """Return of which images [N] rounding cannot move the gradient: no activation lies at a kink, bool [N].

    Within rounding of a kink of Relu, or of a tie in MaxPool, the order of additions decides which of two
    gradients an engine gives, and they are 1e-3 to 1e-1 apart. Whether that is so, torch alone decides: in
    float64, every bias is moved by a few roundings of float32, eight times. Away from kinks that moves the
    gradient by 5e-5 at most.
    """
    net = copy.deepcopy(initialized(network)).double()
    expected = autograd(net, x, np.full(len(x), target))
    largest = np.zeros(len(x))
    generator = torch.Generator().manual_seed(0)
    for _ in range(8):
        moved = copy.deepcopy(net)
        with torch.no_grad():
            for bias in (p for p in moved.parameters() if p.ndim == 1):
                bias.add_(2.0**-22 * torch.randn(bias.shape, generator=generator, dtype=bias.dtype))
        largest = np.maximum(largest, relative_errors(autograd(moved, x, np.full(len(x), target)), expected))
    return largest < BAR / 2


@cache
def examples(network: Network) -> tuple[np.ndarray, np.ndarray]:
    """Return four steady images, and their targets."""
    net, x = initialized(network), images(network, 16, seed=2)
    x = x[steady(network, x, targets(net, x)[1])][:4]
    assert len(x) == 4
    return x, targets(net, x)


def session(model: onnx.ModelProto) -> Callable[[np.ndarray, np.ndarray], list[np.ndarray]]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    engine = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda x, target: engine.run(None, {"image": x, "target": target})


def relative_error(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def relative_errors(got: np.ndarray, expected: np.ndarray) -> list[float]:
    """Return the relative error of each image."""
    return [relative_error(*pair) for pair in zip(got, expected, strict=True)]


@pytest.mark.parametrize("network", EVERY, ids=lambda network: network.__name__)
def test_in_float64_the_gradient_is_autograds_to_rounding(network: Network) -> None:
    """What is left beyond 1e-14 are attributes such as epsilon, which ONNX stores in float32."""
    x = images(network, 4, seed=2)
    target = targets(initialized(network), x)
    model = append_input_gradient(exported(network, torch.float64), outputs=["gradient"])
    _, gradient = ReferenceEvaluator(model, new_ops=EXACT).run(None, {"image": x.astype(float), "target": target})
    assert gradient.dtype == np.float64
    expected = autograd(copy.deepcopy(initialized(network)).double(), x, target)
    assert max(relative_errors(gradient, expected)) < 1e-10


@pytest.mark.parametrize("network", EVERY, ids=lambda network: network.__name__)
def test_the_gradient_is_autograds(network: Network) -> None:
    x, target = examples(network)
    logits, gradient = session(append_input_gradient(exported(network), outputs=["gradient"]))(x, target)
    net = initialized(network)
    assert relative_error(logits, net(torch.tensor(x)).detach().numpy()) < BAR
    assert max(relative_errors(gradient, autograd(net, x, target))) < BAR


@pytest.mark.parametrize("network", EVERY, ids=lambda network: network.__name__)
def test_maps_follow_the_image_and_the_target_and_not_the_batch(network: Network) -> None:
    """A gradient frozen while it was exported would be constant."""
    explain = session(append_input_gradient(exported(network)))
    x, target = (array.copy() for array in examples(network))
    x[3] = x[2]
    logits, maps = explain(x, target)
    assert maps.shape == (4, *x.shape[2:])
    assert maps.dtype == np.float32
    assert max(relative_errors(maps, np.abs(autograd(initialized(network), x, target)).max(1))) < BAR
    assert relative_error(maps[1], maps[2]) > 0.1  # another image
    assert relative_error(maps[3], maps[2]) > 0.1  # another target
    single = [explain(x[i : i + 1], target[i : i + 1]) for i in range(4)]
    assert relative_error(np.concatenate([one[0] for one in single]), logits) < 1e-5
    assert max(relative_errors(np.concatenate([one[1] for one in single]), maps)) < BAR


@pytest.mark.parametrize("network", EVERY, ids=lambda network: network.__name__)
def test_openvino_computes_the_same(network: Network) -> None:
    explained = append_input_gradient(exported(network))
    x, target = examples(network)
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(explained.SerializeToString()), "CPU", settings)
    result = compiled({"image": x, "target": target})
    logits, maps = session(explained)(x, target)
    assert relative_error(result["logits"], logits) < BAR
    assert max(relative_errors(result["saliency"], maps)) < BAR


@pytest.mark.parametrize("network", EVERY, ids=lambda network: network.__name__)
def test_the_map_is_captums_saliency(network: Network) -> None:
    x, target = examples(network)
    _, maps = session(append_input_gradient(exported(network)))(x, target)
    net, leaf = initialized(network), torch.tensor(x, requires_grad=True)
    chosen = np.where(target < 0, net(leaf).argmax(1).numpy(), target)
    attribution = captum.attr.Saliency(net).attribute(leaf, target=torch.tensor(chosen))
    assert max(relative_errors(maps, attribution.numpy().max(1))) < BAR


def test_the_same_model_gives_the_same_bytes() -> None:
    model = exported(vision_transformer)
    before = model.SerializeToString(deterministic=True)
    results = {append_input_gradient(model).SerializeToString(deterministic=True) for _ in range(2)}
    assert len(results) == 1
    assert model.SerializeToString(deterministic=True) == before
