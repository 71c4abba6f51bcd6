"""A network that is measured: what it is, and its two functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

CHECKPOINT_NAME = "ckpt.pt"


@dataclass(frozen=True)
class Network:
    """A classifier that explains itself. Its functions take at most runtime.classifier.MAX_BATCH images at a time.

    Args:
        name: from `display_name`.
        precision: "int8" or "fp32" of an exported file, "8 bit" or "float" of a checkpoint.
        engine: what computes it, with its version.
        data: name of the data set it was trained on.
        shape: height, width and channels of its images.
        classes: class names.
        logits: uint8 [N, H, W, C] -> float32 [N, K].
        explain: the same images and the classes to explain, int64 [N] with -1 for the predicted one -> logits, and
            saliency float32 [N, H, W]: the largest |d logit / d normalized pixel| over channels.
        explains: whether it can; `explain` of a network that gives classes only raises ModelError.
        close: gives back what the network holds on a GPU.
    """

    name: str
    precision: str
    engine: str
    data: str
    shape: tuple[int, int, int]
    classes: tuple[str, ...]
    logits: Callable[[np.ndarray], np.ndarray]
    explain: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
    explains: bool = True
    close: Callable[[], None] = lambda: None


def find(path: str) -> Path:
    """Return the file of a network: of a run folder, its checkpoint."""
    return Path(path) / CHECKPOINT_NAME if Path(path).is_dir() else Path(path)


def display_name(file: Path) -> str:
    """Return what tells a network's file from others: the run's name, or folder and file."""
    *_, folder, name = file.absolute().parts
    return folder if name == CHECKPOINT_NAME else f"{folder}/{name}"
