"""Honest probabilities: what a model's confidence is worth, and the temperature that corrects it.

    ECE     expected calibration error in percent: mean distance of confidence and accuracy in 15 equal bins of the
            confidence, weighted by their images (Guo et al. 2017, equation 3)
    NLL     mean negative log-likelihood of the true class, in nats
    Brier   mean squared distance of the probabilities from the true class's one-hot vector, 0 to 2 (Brier 1950)

Quantization moves logits, so that the temperature is fitted on those of the engine, after quantization.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from runtime.prediction import softmax

_BINS = 15
_LOWEST, _HIGHEST = 0.05, 20.0


@dataclass(frozen=True)
class Calibration:
    """How far probabilities are to be believed; see the module's text."""

    ece_percent: float
    nll: float
    brier: float

    def __str__(self) -> str:
        return f"ECE {self.ece_percent:.2f} %, NLL {self.nll:.4f}, Brier {self.brier:.4f}"


def calibration(logits: np.ndarray, labels: np.ndarray, temperature: float = 1.0) -> Calibration:
    """Return how far the softmax of logits [N, K] / temperature is to be believed, given labels int64 [N]."""
    return of_sums(sums(logits, labels, temperature))


def sums(logits: np.ndarray, labels: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Return what adds up over batches, float64 [18]: confidence minus hits in 15 bins, NLL, Brier, images."""
    logits = logits.astype(np.float64) / temperature
    probabilities = softmax(logits)
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    bins = np.minimum((confidence * _BINS).astype(np.int64), _BINS - 1)
    rows = np.arange(len(labels))
    of_truth = probabilities[rows, labels]
    brier = (probabilities**2).sum() - (of_truth**2).sum() + ((1 - of_truth) ** 2).sum()
    nll = -_log_softmax(logits)[rows, labels].sum()
    return np.concatenate([np.bincount(bins, confidence - right, _BINS), [nll, brier, len(labels)]])


def of_sums(total: np.ndarray) -> Calibration:
    """Return what sums of batches, added up, mean."""
    *gaps, nll, brier, n = total.tolist()
    return Calibration(100 * float(np.abs(gaps).sum()) / n, nll / n, brier / n)


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the temperature of least NLL, 0.05 to 20 (Guo et al. 2017, section 4.2).

    The NLL is convex in 1 / temperature; its minimum is where the derivative changes sign, found by bisection.

    Args:
        logits: [N, K] of images that the network was not trained on.
        labels: int64 [N].
    """
    logits = logits.astype(np.float64)
    truth = logits[np.arange(len(labels)), labels].mean()

    def slope(inverse: float) -> float:
        return float((softmax(inverse * logits) * logits).sum(1).mean() - truth)

    low, high = 1 / _HIGHEST, 1 / _LOWEST
    for _ in range(60):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return 1 / (low * high) ** 0.5


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(1, keepdims=True)
    found: np.ndarray = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return found
