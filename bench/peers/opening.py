"""From how a contender is loaded to a function that can be called, in whichever process."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from bench.measure.cold_start import Loading
from bench.peers.cpu import Classify, run_on_onnx_runtime, run_on_openvino
from runtime.manifest import INPUT_NAME, TARGET_NAME
from runtime.session import Session, open_session

if TYPE_CHECKING:  # torch takes seconds to import, and not everybody needs it
    from train.checkpoint import Checkpoint


def opened(loading: Loading, *, threads: int) -> Callable[[np.ndarray], object]:
    """Return a contender as a function of images uint8 [N, H, W, C], which gives logits, with `explain` maps, too.

    Args:
        loading: of the contender.
        threads: CPU threads of one inference; PyTorch's are those of its process.
    """
    return explaining(loading, threads=threads) if loading.explain else classifying(loading, threads=threads)


def classifying(loading: Loading, *, threads: int) -> Classify:
    """Return a contender as a function from images uint8 [N, H, W, C] to logits float32 [N, K]; see `opened`."""
    if loading.program == "runtime":
        return in_session(_session(loading, threads))
    if loading.program == "torch":
        from bench.peers.torch_ways import WAYS, classify_in_torch

        return classify_in_torch(_checkpoint(loading), WAYS[loading.way], loading.device)
    if loading.program == "onnxruntime":
        return run_on_onnx_runtime(loading.path.read_bytes(), threads)
    import openvino

    return run_on_openvino(openvino.Core().read_model(loading.path), threads, precision=loading.engine)


def explaining(loading: Loading, *, threads: int) -> Callable[[np.ndarray], tuple[np.ndarray, ...]]:
    """Return one as a function to logits and maps float32 [N, H, W] of the predicted classes; see `opened`."""
    if loading.program == "torch":
        from bench.peers.torch_ways import WAYS, explain_in_torch

        return explain_in_torch(_checkpoint(loading), WAYS[loading.way], loading.device)
    session = _session(loading, threads)

    def explain(images: np.ndarray) -> tuple[np.ndarray, ...]:
        found = session.run({INPUT_NAME: images, TARGET_NAME: predicted(len(images))}, ("logits", "saliency"))
        return found["logits"], found["saliency"]

    return explain


def in_session(session: Session) -> Classify:
    """Return a session as a function."""
    return lambda images: session.run({INPUT_NAME: images})["logits"]


@functools.cache
def predicted(count: int) -> np.ndarray:
    """Return the target that stands for the predicted class of so many images."""
    return np.full(count, -1, np.int64)


def _session(loading: Loading, threads: int) -> Session:
    return open_session(loading.path, engine=loading.engine, device=loading.device, threads=threads)


def _checkpoint(loading: Loading) -> Checkpoint:
    from train import checkpoint as checkpoints
    from train.models import factory

    if loading.engine:
        factory.allow(loading.engine)
    return checkpoints.load(loading.path)
