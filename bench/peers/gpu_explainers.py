"""Who explains where there is an NVIDIA GPU: Captum, PyTorch's autograd, and our plan with the gradient in it.

All go from pixels uint8 [N, H, W, C] in host memory to logits and maps [N, H, W] in host memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np

from bench.peers.contenders import Found
from bench.peers.explainers import explain_in_torch
from bench.peers.gpu_contenders import OURS_ON_GPU_WITH_MAP, found_on_gpu, plan_with_map, torch_on_cuda
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
        makers["Captum CUDA"] = functools.partial(in_torch, "captum")
        makers["PyTorch CUDA autograd"] = functools.partial(in_torch, "autograd")
    makers[OURS_ON_GPU_WITH_MAP] = functools.partial(_in_tensorrt, checkpoint, images, folder)
    return found_on_gpu(makers, folder)


def _on_cuda(checkpoint: Checkpoint, images: np.ndarray, way: str) -> Callable[[], object]:
    with torch_on_cuda():
        explain = explain_in_torch(checkpoint, images, device="cuda", way=way)
        explain()  # what cannot run shows with the first kernels only
    return explain


def _in_tensorrt(checkpoint: Checkpoint, images: np.ndarray, folder: Path) -> Callable[[], object]:
    session = open_session(plan_with_map(checkpoint, folder, batch=len(images)))
    inputs: dict[str, np.ndarray] = {INPUT_NAME: images, TARGET_NAME: np.full(len(images), -1, np.int64)}
    return functools.partial(session.run, inputs, ("logits", "saliency"))
