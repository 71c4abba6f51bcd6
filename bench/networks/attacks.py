"""Adversarial examples that an exported file computes itself, by the gradient that it ships.

The loss is the margin of Carlini and Wagner 2017, the best other logit minus the true one: its gradient is that of
two logits, which the file gives in two runs. Images stay uint8, and within `levels` grey levels of the original.

    FGSM  Goodfellow et al. 2015: one step of `levels` along the sign of the gradient
    PGD   Madry et al. 2018: several smaller steps from a random place, back into the box after each
"""

from __future__ import annotations

import numpy as np

from runtime.manifest import INPUT_NAME, TARGET_NAME
from runtime.session import Session

PGD_STEPS = 10


def fgsm(session: Session, images: np.ndarray, labels: np.ndarray, levels: int) -> np.ndarray:
    """Return images uint8 [N, H, W, C] after one step of so many grey levels against their classes int64 [N]."""
    return _within(images, images + levels * _direction(session, images, labels), levels)


def pgd(
    session: Session,
    images: np.ndarray,
    labels: np.ndarray,
    levels: int,
    *,
    steps: int = PGD_STEPS,
    seed: int = 0,
) -> np.ndarray:
    """Return images uint8 [N, H, W, C] after several steps; one that was misclassified on the way stays so.

    Args:
        session: that classifies and explains.
        images: uint8 [N, H, W, C].
        labels: true classes int64 [N].
        levels: grey levels that a channel may change.
        steps: gradients that are computed.
        seed: of the random start.
    """
    size = max(1, round(levels / 4))
    start = np.random.default_rng(seed).integers(-levels, levels + 1, images.shape)
    moved, found = _within(images, images + start, levels), images.copy()
    fooled = np.zeros(len(images), bool)
    for _ in range(steps):
        moved = _within(images, moved + size * _direction(session, moved, labels), levels)
        wrong = session.run({INPUT_NAME: moved})["logits"].argmax(1) != labels
        found[wrong & ~fooled] = moved[wrong & ~fooled]
        fooled |= wrong
    found[~fooled] = moved[~fooled]
    return found


def _direction(session: Session, images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the sign of the margin's gradient by the pixels, int [N, H, W, C]: up with the best other class."""
    outputs = ("logits", "gradient")
    true = session.run({INPUT_NAME: images, TARGET_NAME: labels}, outputs)
    others = true["logits"].copy()
    others[np.arange(len(labels)), labels] = -np.inf
    best = others.argmax(1).astype(np.int64)
    other = session.run({INPUT_NAME: images, TARGET_NAME: best}, outputs)
    return np.sign(other["gradient"] - true["gradient"]).astype(int).transpose(0, 2, 3, 1)


def _within(images: np.ndarray, moved: np.ndarray, levels: int) -> np.ndarray:
    original = images.astype(int)
    return np.clip(np.clip(moved, original - levels, original + levels), 0, 255).astype(np.uint8)
