"""One step of training: the gradients of the recipe's loss, and the optimizer that follows them."""

from __future__ import annotations

import re
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from runtime.errors import ModelError
from train.losses.distillation import distillation_loss
from train.losses.methods import Guidance, loss_terms
from train.losses.saliency import AdaptiveThreshold, LossTerms
from train.recipe import Recipe


def compute_gradients(
    model: nn.Module,
    guidance: Guidance | None,
    images: Tensor,
    labels: Tensor,
    index: Tensor,
    fill: Tensor,
    recipe: Recipe,
    teacher: nn.Module | None = None,
    class_weights: Tensor | None = None,
) -> LossTerms:
    """Return the recipe's loss, and leave its gradients, and no others, in the parameters; see `loss_terms`.

    Raises:
        ModelError: `asg` meets an operation that PyTorch cannot differentiate twice.
    """
    parameters = [p for module in (model, guidance) if module is not None for p in module.parameters()]
    for parameter in parameters:
        parameter.grad = None
    learned = [p for p in parameters if p.requires_grad]  # a user's network may have frozen the others
    with parametrize.cached():  # a step quantizes each weight once, however often it runs the network
        terms = loss_terms(model, images, labels, index, fill, recipe, guidance, class_weights)
        if teacher is not None:
            with torch.no_grad():
                teacher_logits = teacher(images)
            soft = distillation_loss(terms.logits, teacher_logits, recipe.temperature)
            terms = replace(terms, loss=terms.loss + recipe.teacher_weight * (soft - terms.cross_entropy))
        # Not into the images, which saliency made variables: their gradient costs a convolution.
        try:
            terms.loss.backward(inputs=learned)
        except RuntimeError as error:
            missing = re.fullmatch(r"derivative for (\S+) is not implemented", str(error))
            if missing is None or recipe.method != "asg":
                raise
            raise ModelError(
                f"asg: PyTorch has no second derivative of {missing[1]}; write that layer in other operations, or "
                "train with --method sgt or smoot, which need none"
            ) from None
    return terms


def update(optimizer: torch.optim.Optimizer, guidance: Guidance | None) -> None:
    """Move the network, and what the method learns beside it, by the gradients computed."""
    optimizer.step()
    if isinstance(guidance, AdaptiveThreshold):
        guidance.step()


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of the next update, alpha's as its multiple."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_multiple"]


def new_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Return the optimizer: a decay for weights, one for alpha, none for biases, BatchNorm and learned scales."""
    named = dict(model.named_parameters())
    alphas = [p for n, p in named.items() if n.endswith(".alpha")]
    weights = [p for n, p in named.items() if p.ndim > 1]
    others = [p for n, p in named.items() if p.ndim <= 1 and not n.endswith(".alpha")]
    groups = [
        {"params": weights, "weight_decay": recipe.weight_decay, "lr_multiple": 1.0},
        {"params": alphas, "weight_decay": recipe.alpha_decay, "lr_multiple": recipe.alpha_lr},
        {"params": others, "weight_decay": 0.0, "lr_multiple": 1.0},
    ]
    groups = [g for g in groups if g["params"]]
    if recipe.optimizer == "adam":
        return torch.optim.Adam(groups, lr=recipe.lr)
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=recipe.lr)
    if recipe.optimizer == "adadelta":
        return torch.optim.Adadelta(groups, lr=recipe.lr)
    return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=recipe.momentum > 0)
