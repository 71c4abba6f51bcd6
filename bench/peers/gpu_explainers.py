"""Who explains where there is an NVIDIA GPU: Captum, PyTorch's autograd, and our plan with the gradient in it.

All go from pixels uint8 [N, H, W, C] in host memory to logits and maps [N, H, W] in host memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from bench.peers.contenders import INSTALL_PEERS, Found
from bench.peers.gpu_contenders import OURS_ON_GPU_WITH_MAP, found_on_gpu, plan_with_map, torch_on_cuda
from export.deploy_form import deploy_form
from runtime.errors import EngineError
from runtime.manifest import INPUT_NAME, TARGET_NAME
from runtime.session import open_session
from train.checkpoint import Checkpoint


def gpu_explainers(
    checkpoint: Checkpoint, images: np.ndarray, folder: Path, *, peers: bool = True
) -> Found[Callable[[], object]]:
    """Return what explains the predicted class on the first GPU; without one, all is missing for the same reason.

    Args:
        checkpoint: quantized.
        images: uint8 [N, H, W, C].
        folder: where files are written.
        peers: also Captum and PyTorch's autograd.
    """
    makers: dict[str, Callable[[], Callable[[], object]]] = {}
    if peers:
        in_torch = functools.partial(_on_cuda, checkpoint, images)
        makers["Captum CUDA"] = functools.partial(in_torch, captum=True)
        makers["PyTorch CUDA autograd"] = functools.partial(in_torch, captum=False)
    makers[OURS_ON_GPU_WITH_MAP] = functools.partial(_in_tensorrt, checkpoint, images, folder)
    return found_on_gpu(makers, folder)


def explain_in_torch(
    checkpoint: Checkpoint, images: np.ndarray, *, device: str, captum: bool
) -> Callable[[], tuple[np.ndarray, np.ndarray]]:
    """Return a function that gives logits float32 [N, K] and the maps float32 [N, H, W] of the predicted classes.

    Args:
        checkpoint: quantized; its float network is explained.
        images: uint8 [N, H, W, C].
        device: "cuda" or "cpu".
        captum: by Captum's Saliency, otherwise by autograd in one forward and one backward pass.

    Raises:
        EngineError: Captum is not installed.
    """
    network = deploy_form(checkpoint.network(), checkpoint.input, int8=False).network.to(device)

    def normalized() -> torch.Tensor:
        pixels = torch.from_numpy(images).to(device).permute(0, 3, 1, 2)
        return checkpoint.input.normalize(pixels).contiguous().requires_grad_()

    def by_autograd() -> tuple[np.ndarray, np.ndarray]:
        x = normalized()
        logits = network(x)
        (gradient,) = torch.autograd.grad(logits.amax(1).sum(), x)
        return logits.detach().cpu().numpy(), gradient.abs().amax(1).cpu().numpy()

    if not captum:
        return by_autograd
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


def _on_cuda(checkpoint: Checkpoint, images: np.ndarray, *, captum: bool) -> Callable[[], object]:
    with torch_on_cuda():
        explain = explain_in_torch(checkpoint, images, device="cuda", captum=captum)
        explain()  # what cannot run shows with the first kernels only
    return explain


def _in_tensorrt(checkpoint: Checkpoint, images: np.ndarray, folder: Path) -> Callable[[], object]:
    session = open_session(plan_with_map(checkpoint, folder, batch=len(images)))
    inputs: dict[str, np.ndarray] = {INPUT_NAME: images, TARGET_NAME: np.full(len(images), -1, np.int64)}
    return functools.partial(session.run, inputs, ("logits", "saliency"))
