"""The losses of a user's own training loop: `plain_loss`, `sgt_loss`, `Smoot` and `AdaptiveThreshold`.

Saliency guidance makes a network rely on what its input gradient points at.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from train.losses.adaptive_threshold import AdaptiveThreshold, start_threshold
from train.losses.guidance import (
    LossTerms,
    cross_entropy_loss,
    filling,
    frozen_statistics,
    guided_terms,
    label_saliency,
    least_salient,
    masked_forward,
)
from train.losses.smoot import Smoot

__all__ = [
    "AdaptiveThreshold", "LossTerms", "Smoot", "filling", "frozen_statistics", "plain_loss", "sgt_loss",
    "start_threshold",
]  # fmt: skip


def plain_loss(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    label_smoothing: float = 0.0,
    class_weights: Tensor | None = None,
) -> LossTerms:
    """Return the cross entropy of `model` on normalized images [N, C, H, W] and labels int64 [N].

    `class_weights` [K] multiply each image's part, see `train.data.balance.class_weights`.
    """
    logits = model(images)
    cross_entropy = cross_entropy_loss(
        logits, labels, label_smoothing=label_smoothing, class_weights=class_weights
    )
    return LossTerms(cross_entropy, cross_entropy, torch.zeros_like(cross_entropy), logits)


def sgt_loss(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    mask_share: float = 0.5,
    kl_weight: float = 1.0,
    fill: str | Tensor = "random",
    label_smoothing: float = 0.0,
    class_weights: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> LossTerms:
    """Return the loss of saliency-guided training (Ismail et al. 2021, Algorithm 1).

    L = CE(f(X), y) + kl_weight * KL(f(X) || f(X~)), where X~ is X with the `mask_share` of its pixels that have
    the smallest |d f_y(X) / d X| replaced. One forward pass of X serves both the loss and the saliency. A pixel's
    saliency is the largest of its channels', and all its channels are masked together. The same loss on a network
    with PACT is Algorithm 2 of Maleki et al. 2024; its L_PACT, the loss that alpha sees, is read as this loss.

    Args:
        model: returns logits [N, K]; in training mode its BatchNorm statistics see X only, not X~.
        images: normalized, float [N, C, H, W].
        labels: int64 [N].
        mask_share: share of the pixels to mask, 0 to 1; floor(mask_share * H * W) pixels are.
        kl_weight: lambda of the paper, the weight of the divergence.
        fill: what masked pixels hold; see `train.losses.guidance.filling`.
        label_smoothing: of the cross entropy.
        class_weights: of the cross entropy, [K]; see `train.data.balance.class_weights`.
        generator: random numbers of the fill, on the images' device.
    """
    images = images.detach().requires_grad_()
    logits = model(images)
    saliency = label_saliency(logits, images, labels)
    images = images.detach()
    # 0.29 of 100 pixels are 29, though the product of the doubles lies just below.
    count = math.floor(mask_share * saliency[0].numel() + 1e-6)
    masked = least_salient(saliency, count)
    masked_logits = masked_forward(model, images, masked, filling(images, fill, generator))
    return guided_terms(
        logits, masked_logits, labels,
        kl_weight=kl_weight, label_smoothing=label_smoothing, class_weights=class_weights,
    )  # fmt: skip
