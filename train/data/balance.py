"""Classes of unequal size: weights for their loss, or batches that draw them equally often."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def class_weights(labels: Tensor, classes: int) -> Tensor:
    """Return the weight of each class, float32 [classes]: N / (classes * its images).

    Over the training images the weights average to 1, so that the size of the loss, and with it the learning rate
    that suits it, stays. A class without images weighs nothing.

    Args:
        labels: of all training images, int64 [N].
        classes: number of classes.
    """
    counts = labels.bincount(minlength=classes).float()
    weights = len(labels) / (int((counts > 0).sum()) * counts)
    return torch.where(counts > 0, weights, torch.zeros_like(weights))


def balanced_batches(labels: Tensor, classes: int, size: int, *, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield as many batches of `size` as an epoch has, every class equally likely, drawn with replacement.

    Args:
        labels: of all training images, int64 [N], on the CPU.
        classes: number of classes.
        size: images a batch.
        generator: random numbers of the CPU.
    """
    n = len(labels)
    drawn = torch.multinomial(class_weights(labels, classes)[labels], n, replacement=True, generator=generator)
    for start in range(0, n - n % min(size, n), size):
        yield drawn[start : start + size]
