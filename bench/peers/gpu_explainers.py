"""Who explains where there is an NVIDIA GPU: Captum, PyTorch's autograd, and our plan with the gradient in it.

All go from pixels uint8 [N, H, W, C] in host memory to logits and maps [N, H, W] in host memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np

from bench.measure.cold_start import Loading
from bench.peers.contenders import Found, loading_torch
from bench.peers.gpu_contenders import (
    OURS_ON_GPU_WITH_MAP,
    found_on_gpu,
    plan_with_map,
    torch_on_cuda,
)
from bench.peers.opening import explaining
from runtime.session import PLAN_ENGINE
from train.checkpoint import Checkpoint

_IN_TORCH = {
    "Captum CUDA": "captum",
    "PyTorch CUDA autograd": "eager",
    "PyTorch CUDA graph FP16": "graph",
    "torch.compile CUDA FP16": "max-autotune",
}


def gpu_explainers(
    checkpoint: Checkpoint, batch: int, folder: Path, *, threads: int, peers: bool = True
) -> Found[Loading]:
    """Return how what explains the predicted class on the first GPU is loaded; each has explained once.

    Without a GPU, all is missing for the same reason.

    Args:
        checkpoint: quantized.
        batch: images at a time.
        folder: where `bench.peers.explainers.explainers` has written its files; a plan is added.
        threads: CPU threads of one inference.
        peers: also Captum and PyTorch's own ways.
    """
    makers: dict[str, Callable[[], Loading]] = {}
    images = np.zeros((batch, *checkpoint.input.size, checkpoint.input.channels), np.uint8)
    for name, way in _IN_TORCH.items() if peers else ():
        loading = loading_torch(checkpoint, folder, way=way, device="cuda", explain=True)
        makers[name] = functools.partial(_on_cuda, loading, images, threads)
    makers[OURS_ON_GPU_WITH_MAP] = functools.partial(_in_tensorrt, checkpoint, images, folder, threads)
    return found_on_gpu(makers, folder)


def _on_cuda(loading: Loading, images: np.ndarray, threads: int) -> Loading:
    with torch_on_cuda():
        explaining(loading, threads=threads)(images)  # what cannot run shows with the first kernels only
    return loading


def _in_tensorrt(checkpoint: Checkpoint, images: np.ndarray, folder: Path, threads: int) -> Loading:
    plan = plan_with_map(checkpoint, folder, batch=len(images))
    loading = Loading("runtime", plan, PLAN_ENGINE, "cuda", explain=True)
    explaining(loading, threads=threads)(images)
    return loading
