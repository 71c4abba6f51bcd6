"""Saliency-guided training: the loss that makes a network rely on what its input gradient points at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FILLS = ("random", "zero", "mean")


@dataclass(frozen=True)
class LossTerms:
    """A loss, its parts, and the logits of the unmasked images [N, K]."""

    loss: Tensor
    cross_entropy: Tensor
    divergence: Tensor
    logits: Tensor


def plain_loss(model: nn.Module, images: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> LossTerms:
    """Return the cross entropy of `model` on normalized images [N, C, H, W] and labels int64 [N]."""
    logits = model(images)
    cross_entropy = F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    return LossTerms(cross_entropy, cross_entropy, torch.zeros_like(cross_entropy), logits)


def sgt_loss(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    mask_share: float = 0.5,
    kl_weight: float = 1.0,
    fill: str = "random",
    label_smoothing: float = 0.0,
    generator: torch.Generator | None = None,
) -> LossTerms:
    """Return the loss of saliency-guided training (Ismail et al. 2021, Algorithm 1).

    L = CE(f(X), y) + kl_weight * KL(f(X) || f(X~)), where X~ is X with the `mask_share` of its pixels that have
    the smallest |d f_y(X) / d X| replaced. One forward pass of X serves both the loss and the saliency. A pixel's
    saliency is the largest of its channels', and all its channels are masked together.

    Args:
        model: returns logits [N, K]; in training mode its BatchNorm statistics see X only, not X~.
        images: normalized, float [N, C, H, W].
        labels: int64 [N].
        mask_share: share of the pixels to mask, 0 to 1.
        kl_weight: lambda of the paper, the weight of the divergence.
        fill: what masked pixels hold: "random" (uniform in the image's range, as in the authors' code), "zero"
            (of the normalized image) or "mean" (of the image and channel).
        label_smoothing: of the cross entropy.
        generator: random numbers of the fill, on the images' device.
    """
    images = images.detach().requires_grad_()
    logits = model(images)
    target_logits = logits.gather(1, labels.unsqueeze(1)).sum()
    (gradient,) = torch.autograd.grad(target_logits, images, retain_graph=True)
    saliency = gradient.abs().amax(1)
    masked = mask_least_salient(images.detach(), saliency, mask_share, fill=fill, generator=generator)
    with frozen_statistics(model):
        masked_logits = model(masked)
    cross_entropy = F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    divergence = F.kl_div(
        F.log_softmax(masked_logits, 1), F.log_softmax(logits, 1), reduction="batchmean", log_target=True
    )
    return LossTerms(cross_entropy + kl_weight * divergence, cross_entropy, divergence, logits)


def mask_least_salient(
    images: Tensor,
    saliency: Tensor,
    mask_share: float | Tensor,
    *,
    fill: str = "random",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the images with floor(mask_share * H * W) of their least salient pixels filled.

    Args:
        images: float [N, C, H, W].
        saliency: float [N, H, W].
        mask_share: 0 to 1, one for all images or one each, [N].
        fill: see `sgt_loss`.
        generator: random numbers of the fill, on the images' device.
    """
    N, _, H, W = images.shape
    order = saliency.reshape(N, -1).argsort(1)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(H * W, device=order.device).expand(N, -1))
    count = torch.as_tensor(mask_share, device=images.device).mul(H * W).floor().reshape(-1, 1)
    masked = (rank < count).reshape(N, 1, H, W)
    return torch.where(masked, _filling(images, fill, generator), images)


def _filling(images: Tensor, fill: str, generator: torch.Generator | None) -> Tensor:
    if fill == "zero":
        return torch.zeros_like(images)
    if fill == "mean":
        return images.mean((2, 3), keepdim=True).expand_as(images)
    lowest = images.amin((1, 2, 3), keepdim=True)
    highest = images.amax((1, 2, 3), keepdim=True)
    noise = torch.rand(images.shape, generator=generator, device=images.device, dtype=images.dtype)
    return lowest + noise * (highest - lowest)


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
