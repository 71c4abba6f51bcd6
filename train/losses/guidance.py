"""What the saliency-guided losses share: the saliency of a forward pass, the masks, the terms of the loss."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class LossTerms:
    """A loss, its parts, and the logits of the unmasked images [N, K]; `saliency_norm` where it is a part."""

    loss: Tensor
    cross_entropy: Tensor
    divergence: Tensor
    logits: Tensor
    saliency_norm: Tensor | None = None


def label_saliency(logits: Tensor, images: Tensor, labels: Tensor) -> Tensor:
    """Return |d f_y(X) / d X|, the largest over the channels, [N, H, W]; the graph of `logits` is kept.

    Args:
        logits: f(X), [N, K].
        images: X, [N, C, H, W], requiring a gradient.
        labels: y, int64 [N].
    """
    target_logits = logits.gather(1, labels.unsqueeze(1)).sum()
    (gradient,) = torch.autograd.grad(target_logits, images, retain_graph=True)
    return gradient.abs().amax(1)


def least_salient(saliency: Tensor, count: int | Tensor) -> Tensor:
    """Return where the `count` least salient pixels are, bool [N, H, W].

    Args:
        saliency: float [N, H, W].
        count: pixels, one number for all images or one each, [N].
    """
    # Stable: equal saliencies, zeros above all, are taken in the pixels' order whatever the size of the batch.
    order = saliency.flatten(1).argsort(dim=1, stable=True)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    count = torch.as_tensor(count, device=order.device).reshape(-1, 1)
    return (rank < count).reshape(saliency.shape)


def filling(images: Tensor, fill: str | Tensor = "random", generator: torch.Generator | None = None) -> Tensor:
    """Return what the pixels of images [N, C, H, W] hold where they are masked, in the images' shape.

    Args:
        images: normalized.
        fill: "random" (uniform in the image's range, as in the code of Ismail et al. 2021), "zero" (of the
            normalized image), "mean" (of the image and channel), or the filling itself.
        generator: random numbers, on the images' device.
    """
    if isinstance(fill, Tensor):
        return fill
    if fill == "zero":
        return torch.zeros_like(images)
    if fill == "mean":
        return images.mean((2, 3), keepdim=True).expand_as(images)
    lowest = images.amin((1, 2, 3), keepdim=True)
    highest = images.amax((1, 2, 3), keepdim=True)
    noise = torch.rand(images.shape, generator=generator, device=images.device, dtype=images.dtype)
    return lowest + noise * (highest - lowest)


def masked_forward(model: nn.Module, images: Tensor, masked: Tensor, fill: Tensor) -> Tensor:
    """Return the logits of images whose pixels `masked`, bool [N, H, W], hold `fill` instead.

    BatchNorm normalizes by the masked batch, but its running statistics stay those of unmasked images.
    """
    with frozen_statistics(model):
        logits: Tensor = model(torch.where(masked.unsqueeze(1), fill, images))
    return logits


def cross_entropy_loss(
    logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0, class_weights: Tensor | None = None
) -> Tensor:
    """Return the mean over the batch of each image's cross entropy, times the weight of its class [K] if given.

    Not torch's weighted mean, which divides by the batch's own weights: this one does not depend on how a batch is
    divided among processes.
    """
    if class_weights is None:
        return F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    each = F.cross_entropy(logits, labels, label_smoothing=label_smoothing, reduction="none")
    return (class_weights[labels] * each).mean()


def guided_terms(
    logits: Tensor,
    masked_logits: Tensor,
    labels: Tensor,
    *,
    kl_weight: float,
    label_smoothing: float = 0.0,
    class_weights: Tensor | None = None,
) -> LossTerms:
    """Return CE(f(X), y) + kl_weight * KL(f(X) || f(X~)), each the mean over the batch."""
    cross_entropy = cross_entropy_loss(
        logits, labels, label_smoothing=label_smoothing, class_weights=class_weights
    )
    divergence = F.kl_div(
        F.log_softmax(masked_logits, 1), F.log_softmax(logits, 1), reduction="batchmean", log_target=True
    )
    return LossTerms(cross_entropy + kl_weight * divergence, cross_entropy, divergence, logits)


@contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Keep the running statistics of every BatchNorm as they are, while it still normalizes by its batch.

    Masked images are not what the deployed network will see: letting them into the running mean and variance
    would shift what BatchNorm subtracts at test time.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [m.momentum for m in norms]
    tracked = [m.num_batches_tracked for m in norms]
    for norm in norms:
        norm.momentum = 0.0
        norm.num_batches_tracked = None
    try:
        yield
    finally:
        for norm, momentum, count in zip(norms, momenta, tracked, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked = count
