"""Who explains: the input gradient of one checkpoint's network, by us and by PyTorch's ways to it."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch

from bench.peers.contenders import INSTALL_PEERS
from bench.peers.names import OURS, OURS_WITH_MAP
from export.deploy_form import deploy_form
from export.pipeline import export
from runtime.classifier import Classifier
from runtime.errors import EngineError
from runtime.manifest import INPUT_NAME, TARGET_NAME
from train.checkpoint import Checkpoint

WAYS = {"captum": "Captum Saliency", "autograd": "PyTorch autograd", "compiled": "torch.compile autograd"}


def explainers(checkpoint: Checkpoint, images: np.ndarray, *, threads: int) -> dict[str, Callable[[], object]]:
    """Return name -> function that gives logits and the input gradient of the predicted class, on the CPU.

    All go from pixels uint8 [N, H, W, C] to logits and maps. The class alone, INT8 on OpenVINO, is among them.

    Raises:
        EngineError: Captum is not installed.
    """
    calls: dict[str, Callable[[], object]] = {
        name: explain_in_torch(checkpoint, images, device="cpu", way=way) for way, name in WAYS.items()
    }
    inputs: dict[str, np.ndarray] = {INPUT_NAME: images, TARGET_NAME: np.full(len(images), -1, np.int64)}
    for name, engine, int8, precision in (
        ("ONNX Runtime FP32 + map", "ort", False, "float32"),
        ("OpenVINO FP32 + map", "openvino", False, "float32"),
        ("ONNX Runtime INT8 + map", "ort", True, "float32"),
        ("OpenVINO INT8 + f32 map", "openvino", True, "float32"),
        (OURS_WITH_MAP, "openvino", True, "auto"),
    ):
        exported = export(checkpoint, int8=int8, target=engine, saliency_precision=precision)
        model = exported.model.SerializeToString()
        session = Classifier(model, engine=engine, threads=threads).session
        calls[name] = functools.partial(session.run, inputs, ("logits", "saliency"))
    calls[OURS] = functools.partial(session.run, {INPUT_NAME: images})
    return calls


def explain_in_torch(
    checkpoint: Checkpoint, images: np.ndarray, *, device: str, way: str
) -> Callable[[], tuple[np.ndarray, np.ndarray]]:
    """Return a function that gives logits float32 [N, K] and the maps float32 [N, H, W] of the predicted classes.

    Args:
        checkpoint: its float network is explained.
        images: uint8 [N, H, W, C].
        device: "cuda" or "cpu".
        way: one of WAYS: Captum's Saliency, or one forward and one backward pass of autograd, compiled or not.

    Raises:
        EngineError: Captum is not installed.
    """
    network = deploy_form(checkpoint.network(), checkpoint.input, int8=False).network.to(device)

    def normalized() -> torch.Tensor:
        pixels = torch.from_numpy(images).to(device).permute(0, 3, 1, 2)
        return checkpoint.input.normalize(pixels).contiguous().requires_grad_()

    if way == "captum":
        try:
            from captum.attr import Saliency
        except ImportError:
            raise EngineError(INSTALL_PEERS) from None
        saliency = Saliency(network)

        def by_captum() -> tuple[np.ndarray, np.ndarray]:
            x = normalized()
            with torch.no_grad():
                logits = network(x)
            maps = saliency.attribute(x, logits.argmax(1)).detach().amax(1)
            return logits.cpu().numpy(), maps.cpu().numpy()

        return by_captum
    called: Callable[[torch.Tensor], torch.Tensor] = torch.compile(network) if way == "compiled" else network

    def by_autograd() -> tuple[np.ndarray, np.ndarray]:
        x = normalized()
        logits = called(x)
        (gradient,) = torch.autograd.grad(logits.amax(1).sum(), x)
        return logits.detach().cpu().numpy(), gradient.abs().amax(1).cpu().numpy()

    return by_autograd
