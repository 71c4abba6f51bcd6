"""What the method of a recipe means: its loss, and what it learns beside the network."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from train.losses.saliency import AdaptiveThreshold, LossTerms, Smoot, plain_loss, sgt_loss, start_threshold
from train.recipe import Recipe

Guidance = Smoot | AdaptiveThreshold


def start_guidance(recipe: Recipe, n: int, model: nn.Module, images: Tensor, labels: Tensor) -> Guidance | None:
    """Return what the recipe's method learns beside the network, before training; None where that is nothing.

    Args:
        recipe: method and its hyperparameters.
        n: number of training images.
        model: the network, not trained yet, in training mode.
        images: some normalized training images [N, C, H, W].
        labels: their labels, int64 [N].
    """
    if recipe.method != "asg":
        return new_guidance(recipe, n)
    return AdaptiveThreshold(start_threshold(model, images, labels, recipe.mask_share), rate=recipe.threshold_rate)


def new_guidance(recipe: Recipe, n: int) -> Guidance | None:
    """Return what `start_guidance` returns, before a saved state is loaded into it."""
    if recipe.method == "asg":
        return AdaptiveThreshold(1.0, rate=recipe.threshold_rate)
    if recipe.method == "smoot":
        start = round(100 * recipe.mask_share)
        return Smoot(n, start=start, top1_weight=recipe.top1_weight, speed=recipe.mask_speed)
    return None


def loss_terms(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    index: Tensor,
    fill: Tensor,
    recipe: Recipe,
    guidance: Guidance | None,
    class_weights: Tensor | None = None,
) -> LossTerms:
    """Return the loss of the recipe's method.

    Args:
        model: in training mode.
        images: normalized, float [N, C, H, W].
        labels: int64 [N].
        index: which training images they are, int64 [N].
        fill: what masked pixels hold, float [N, C, H, W].
        recipe: method and its hyperparameters.
        guidance: from `start_guidance` or `new_guidance`.
        class_weights: weights of the cross entropy, float [K]; None: all 1.
    """
    options: dict[str, Any] = {"label_smoothing": recipe.label_smoothing, "class_weights": class_weights}
    kl_weight = recipe.kl_weight
    if isinstance(guidance, AdaptiveThreshold):
        options |= {"saliency_weight": recipe.saliency_weight, "alpha_weight": recipe.alpha_weight}
        return guidance.loss(model, images, labels, kl_weight=kl_weight, **options)
    if isinstance(guidance, Smoot):
        return guidance.loss(model, images, labels, index, kl_weight=kl_weight, fill=fill, **options)
    if recipe.method == "plain":
        return plain_loss(model, images, labels, **options)
    share = recipe.mask_share
    return sgt_loss(model, images, labels, mask_share=share, kl_weight=kl_weight, fill=fill, **options)
