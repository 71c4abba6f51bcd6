"""The input gradient of whole networks, against torch.autograd and Captum, on ONNX Runtime and OpenVINO."""

from __future__ import annotations

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

from export.gradient import append_input_gradient

CLASSES, SIZE = 10, 64


def vision_transformer(num_classes: int) -> torch.nn.Module:
    return torchvision.models.VisionTransformer(
        image_size=SIZE,
        patch_size=16,
        num_layers=2,
        num_heads=4,
        hidden_dim=64,
        mlp_dim=128,
        num_classes=num_classes,
    )


MODELS = torchvision.models
FAST = [MODELS.squeezenet1_1, MODELS.mobilenet_v2, vision_transformer]
SLOW = [MODELS.resnet18, MODELS.vgg11_bn, MODELS.densenet121, MODELS.efficientnet_b0]
EVERY = [*FAST, *(pytest.param(network, marks=pytest.mark.slow) for network in SLOW)]

Network = Callable[..., torch.nn.Module]


@cache
def exported(network: Network) -> tuple[torch.nn.Module, onnx.ModelProto]:
    """Return a network with random weights and statistics, and its ONNX model with an open batch."""
    torch.manual_seed(0)
    net = network(num_classes=CLASSES).eval()
    for parameter in net.parameters():
        if not parameter.any():  # the transformer's head starts at zero, and with it the gradient
            torch.nn.init.uniform_(parameter, 0.0, 0.1)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's exporter warns about its own deprecations
        program = torch.onnx.export(
            net,
            (torch.zeros(2, 3, SIZE, SIZE),),
            dynamo=True,
            opset_version=21,
            verbose=False,
            input_names=["image"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )
    return net, program.model_proto


def images(count: int) -> np.ndarray:
    """Return images of a seed for which no activation is so close to 0 that rounding decides on its gate.

    With others, torch's own float32 gradient of DenseNet is up to 1e-3 away from its float64 one.
    """
    return np.random.default_rng(2).normal(size=(count, 3, SIZE, SIZE)).astype(np.float32)


def autograd(net: torch.nn.Module, x: np.ndarray, target: np.ndarray) -> np.ndarray:
    leaf = torch.tensor(x, requires_grad=True)
    logits = net(leaf)
    chosen = torch.where(torch.tensor(target) < 0, logits.argmax(1), torch.tensor(target))
    return torch.autograd.grad(logits.gather(1, chosen[:, None]).sum(), leaf)[0].numpy()


def session(model: onnx.ModelProto) -> Callable[[np.ndarray, np.ndarray], list[np.ndarray]]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    engine = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return lambda x, target: engine.run(["logits", "saliency"], {"image": x, "target": target})


def relative_error(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("network", EVERY, ids=lambda network: network.__name__)
def test_the_gradient_is_autograds(network: Network) -> None:
    net, model = exported(network)
    x, target = images(3), np.array([1, -1, 7])
    logits, gradient = session(append_input_gradient(model, raw=True))(x, target)
    assert relative_error(logits, net(torch.tensor(x)).detach().numpy()) < 1e-4
    assert relative_error(gradient, autograd(net, x, target)) < 1e-4


@pytest.mark.parametrize("network", EVERY, ids=lambda network: network.__name__)
def test_maps_follow_the_image_and_the_target_and_not_the_batch(network: Network) -> None:
    """A gradient frozen while it was exported would be constant."""
    net, model = exported(network)
    explain = session(append_input_gradient(model))
    x = images(2)[[0, 1, 0]]
    # Classes that no image gives a logit of 0: SqueezeNet ends in a Relu.
    second, first = net(torch.tensor(x)).amin(0).argsort()[-2:].tolist()
    target = np.array([first, first, second])
    logits, maps = explain(x, target)
    assert maps.shape == (3, SIZE, SIZE)
    assert maps.dtype == np.float32
    assert relative_error(maps, np.abs(autograd(net, x, target)).max(1)) < 1e-4
    assert relative_error(maps[1], maps[0]) > 1e-2
    assert relative_error(maps[2], maps[0]) > 1e-2
    for i in range(3):
        single = explain(x[i : i + 1], target[i : i + 1])
        assert relative_error(single[0][0], logits[i]) < 1e-5
        assert relative_error(single[1][0], maps[i]) < 1e-4


@pytest.mark.parametrize("network", EVERY, ids=lambda network: network.__name__)
def test_openvino_computes_the_same(network: Network) -> None:
    _, model = exported(network)
    explained = append_input_gradient(model)
    x, target = images(2), np.array([-1, 3])
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(explained.SerializeToString()), "CPU", settings)
    result = compiled({"image": x, "target": target})
    for got, expected in zip(
        (result["logits"], result["saliency"]), session(explained)(x, target), strict=True
    ):
        assert relative_error(got, expected) < 1e-4


@pytest.mark.parametrize("network", FAST, ids=lambda network: network.__name__)
def test_the_map_is_captums_saliency(network: Network) -> None:
    net, model = exported(network)
    x, target = images(2), np.array([8, 0])
    _, maps = session(append_input_gradient(model))(x, target)
    leaf = torch.tensor(x, requires_grad=True)
    attribution = captum.attr.Saliency(net).attribute(leaf, target=torch.tensor(target))
    assert relative_error(maps, attribution.numpy().max(1)) < 1e-4


def test_the_same_model_gives_the_same_bytes() -> None:
    _, model = exported(vision_transformer)
    before = model.SerializeToString(deterministic=True)
    results = {append_input_gradient(model).SerializeToString(deterministic=True) for _ in range(2)}
    assert len(results) == 1
    assert model.SerializeToString(deterministic=True) == before
