"""TensorRT plans to compare: one for every batch size, since a plan is tuned for one."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bench.peers.cpu import Classify
from export.engine import __main__ as engine
from runtime.classifier import MAX_BATCH
from runtime.manifest import INPUT_NAME
from runtime.session import Session


def build_plan(model: Path, plan: Path, *, batch: int, precision: str) -> Path:
    """Build a plan as `python -m export.engine` does, tuned for `batch` images and taking fewer; return its path.

    Args:
        model: ONNX file lowered for TensorRT.
        plan: to write; the sidecar is put beside it, and a timing cache that the next plan reuses.
        batch: images.
        precision: one of export.engine.layers.PLAN_PRECISIONS.

    Raises:
        EngineError: TensorRT is not installed, or its builder fails.
        ModelError: its parser refuses the graph.
    """
    options = {"-o": plan, "--builder": "tensorrt", "--precision": precision, "--batch": f"1,{batch},{batch}",
               "--timing-cache": plan.with_name("timing.cache")}  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):  # its list of layers
        engine.main([str(model), *(str(word) for option in options.items() for word in option)])
    return plan


def in_plans(sessions: Sequence[Session]) -> Classify:
    """Return plans as one function: images go to the smallest that takes them, else in pieces to the largest.

    Args:
        sessions: by the most images they take, the fewest first.
    """
    sizes = [session.max_batch or MAX_BATCH for session in sessions]

    def classify(images: np.ndarray) -> np.ndarray:
        chosen = next((index for index, size in enumerate(sizes) if len(images) <= size), -1)
        session, size = sessions[chosen], sizes[chosen]
        pieces = [images[start : start + size] for start in range(0, len(images), size)]
        return np.concatenate([session.run({INPUT_NAME: piece})["logits"] for piece in pieces])

    return classify
