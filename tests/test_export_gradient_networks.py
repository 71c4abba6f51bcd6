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


def examples(net: torch.nn.Module) -> tuple[np.ndarray, np.ndarray]:
    """Return four images and targets: the predicted class, one class twice and another one.

    They are classes that no image gives a logit of 0: SqueezeNet ends in a Relu, and has no gradient there.
    """
    x = np.random.default_rng(2).normal(size=(4, 3, SIZE, SIZE)).astype(np.float32)
    second, first = net(torch.tensor(x)).amin(0).argsort()[-2:].tolist()
    return x, np.array([-1, first, first, second])


def autograd(net: torch.nn.Module, x: np.ndarray, target: np.ndarray) -> np.ndarray:
    leaf = torch.tensor(x, requires_grad=True)
    logits = net(leaf)
    chosen = torch.where(torch.tensor(target) < 0, logits.argmax(1), torch.tensor(target))
    return torch.autograd.grad(logits.gather(1, chosen[:, None]).sum(), leaf)[0].numpy()


def session(model: onnx.ModelProto) -> Callable[[np.ndarray, np.ndarray], list[np.ndarray]]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    engine = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda x, target: engine.run(None, {"image": x, "target": target})


def relative_error(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def assert_same_maps(got: np.ndarray, expected: np.ndarray) -> None:
    """Compare maps image by image, where half may have an activation within rounding of a kink.

    Whether its gate is open is then decided by the order of additions. For some images torch's own float32
    gradient of DenseNet is 1e-3 away from its float64 one; a wrong rule is wrong for all.
    """
    errors = sorted(relative_error(*pair) for pair in zip(got, expected, strict=True))
    assert errors[(len(errors) - 1) // 2] < 1e-4, errors
    assert errors[-1] < 5e-2, errors


@pytest.mark.parametrize("network", EVERY, ids=lambda network: network.__name__)
def test_the_gradient_is_autograds(network: Network) -> None:
    net, model = exported(network)
    x, target = examples(net)
    logits, gradient = session(append_input_gradient(model, outputs=["gradient"]))(x, target)
    assert relative_error(logits, net(torch.tensor(x)).detach().numpy()) < 1e-4
    assert_same_maps(gradient, autograd(net, x, target))


@pytest.mark.parametrize("network", EVERY, ids=lambda network: network.__name__)
def test_maps_follow_the_image_and_the_target_and_not_the_batch(network: Network) -> None:
    """A gradient frozen while it was exported would be constant."""
    net, model = exported(network)
    explain = session(append_input_gradient(model))
    x, target = examples(net)
    x[3] = x[2]
    logits, maps = explain(x, target)
    assert maps.shape == (4, SIZE, SIZE)
    assert maps.dtype == np.float32
    assert_same_maps(maps, np.abs(autograd(net, x, target)).max(1))
    assert relative_error(maps[1], maps[2]) > 0.1  # another image
    assert relative_error(maps[3], maps[2]) > 0.1  # another target
    single = [explain(x[i : i + 1], target[i : i + 1]) for i in range(4)]
    assert relative_error(np.concatenate([one[0] for one in single]), logits) < 1e-5
    assert_same_maps(np.concatenate([one[1] for one in single]), maps)


@pytest.mark.parametrize("network", EVERY, ids=lambda network: network.__name__)
def test_openvino_computes_the_same(network: Network) -> None:
    net, model = exported(network)
    explained = append_input_gradient(model)
    x, target = examples(net)
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(explained.SerializeToString()), "CPU", settings)
    result = compiled({"image": x, "target": target})
    logits, maps = session(explained)(x, target)
    assert relative_error(result["logits"], logits) < 1e-4
    assert_same_maps(result["saliency"], maps)


@pytest.mark.parametrize("network", FAST, ids=lambda network: network.__name__)
def test_the_map_is_captums_saliency(network: Network) -> None:
    net, model = exported(network)
    x, target = examples(net)
    target[0] = target[1]
    _, maps = session(append_input_gradient(model))(x, target)
    leaf = torch.tensor(x, requires_grad=True)
    attribution = captum.attr.Saliency(net).attribute(leaf, target=torch.tensor(target))
    assert_same_maps(maps, attribution.numpy().max(1))


def test_the_same_model_gives_the_same_bytes() -> None:
    _, model = exported(vision_transformer)
    before = model.SerializeToString(deterministic=True)
    results = {append_input_gradient(model).SerializeToString(deterministic=True) for _ in range(2)}
    assert len(results) == 1
    assert model.SerializeToString(deterministic=True) == before
