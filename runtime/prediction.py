"""The prediction for an image: its class, with probabilities, from the logits of a model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from runtime.errors import ModelError, OptionError
from runtime.manifest import Manifest


@dataclass(frozen=True)
class Prediction:
    """The class of one image.

    Args:
        label: name of the most probable class.
        index: its position in the manifest's classes.
        probability: its softmax probability, 0 to 1, at the manifest's temperature.
        top: the k most probable classes as (label, probability), best first.
        logits: float32 [K].
        margin: best minus second logit, in steps of the last grid: below 1, another rounding of a single code may
            change the class. None where the file is in float or has one class.
    """

    label: str
    index: int
    probability: float
    top: tuple[tuple[str, float], ...]
    logits: np.ndarray
    margin: float | None = None

    @property
    def raw_probability(self) -> float:
        """The softmax probability of the label at temperature 1."""
        return float(softmax(self.logits)[self.index])


def prediction(logits: np.ndarray, manifest: Manifest, top_k: int) -> Prediction:
    """Return the prediction for an image whose logits [K] are finite."""
    probabilities = softmax(logits if manifest.temperature == 1 else logits / manifest.temperature)
    order = np.argsort(-probabilities, kind="stable")
    top = tuple((manifest.classes[i], float(probabilities[i])) for i in order[:top_k])
    margin = None
    if manifest.logit_step is not None and len(order) > 1:
        margin = float(logits[order[0]] - logits[order[1]]) / manifest.logit_step
    return Prediction(top[0][0], int(order[0]), top[0][1], top, logits, margin)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Return the probabilities float64 [..., K] of logits [..., K]."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    probabilities: np.ndarray = shifted / shifted.sum(-1, keepdims=True)
    return probabilities


def finite(values: np.ndarray, name: str = "logits") -> np.ndarray:
    """Return an output [N, ...] as it is; raise ModelError where it is not finite: no class or map could tell.

    Args:
        values: of N images.
        name: of the output, for the message.
    """
    if not np.isfinite(values).all():
        rows = np.flatnonzero(~np.isfinite(values).reshape(len(values), -1).all(1))
        raise ModelError(
            f"image {rows[0]} of {len(values)}: the model gives {name} that are not finite ({len(rows)} such "
            "images); its weights are damaged or it overflows: train or export it again"
        )
    return values


def check_top_k(top_k: object) -> None:
    """Raise OptionError unless so many classes can be listed."""
    if not isinstance(top_k, (int, np.integer)) or top_k < 1:
        raise OptionError(f"top_k {top_k!r}: expected a whole number from 1")
