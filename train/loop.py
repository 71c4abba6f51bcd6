"""The training loop: epochs over images that stay on the device as bytes."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from runtime import command
from train import checkpoint as checkpoints
from train.checkpoint import Checkpoint
from train.data import ImageData, augment, batches
from train.quant import QuantSpec, quantizers, start_alphas
from train.quantizers import PACT
from train.recipe import Recipe
from train.saliency import (
    AdaptiveThreshold,
    LossTerms,
    Smoot,
    filling,
    plain_loss,
    sgt_loss,
    start_threshold,
)

# Enough real images for export to compare networks on, few enough to travel in the checkpoint.
_MAX_SAMPLES = 256
_MAX_SAMPLE_BYTES = 4 << 20

Guidance = Smoot | AdaptiveThreshold


def start(arch: str, data: ImageData, quant: QuantSpec, recipe: Recipe) -> Checkpoint:
    """Return the checkpoint of a run before its first epoch."""
    torch.manual_seed(recipe.seed)
    input_spec = data.input_spec()
    arguments = {"channels": input_spec.channels, "size": input_spec.size, "classes": len(data.classes)}
    description = {"name": arch, **arguments}
    model = checkpoints.new_network(description, quant, input_spec)
    first = torch.randperm(len(data.train_images))[:256]
    images, labels = input_spec.normalize(data.train_images[first]), data.train_labels[first]
    start_alphas(model, images)
    threshold = start_threshold(model, images, labels, recipe.mask_share) if recipe.method == "asg" else 1.0
    guidance = new_guidance(recipe, len(data.train_images), threshold)
    count = min(_MAX_SAMPLES, max(1, _MAX_SAMPLE_BYTES // data.test_images[0].numel()), len(data.test_images))
    chosen = torch.linspace(0, len(data.test_images) - 1, count).long()
    return Checkpoint(
        arch=description,
        quant=quant,
        input=input_spec,
        classes=data.classes,
        recipe=recipe,
        state_dict=model.state_dict(),
        guidance={} if guidance is None else guidance.state_dict(),
        samples={"images": data.test_images[chosen].clone(), "labels": data.test_labels[chosen].clone()},
    )


def fit(
    checkpoint: Checkpoint,
    data: ImageData,
    path: Path,
    *,
    device: str = "cpu",
    on_epoch: Callable[[Checkpoint], Any] = lambda checkpoint: None,
) -> Checkpoint:
    """Train from where `checkpoint` stands to the end of its recipe, saving to `path` after every epoch.

    Interrupted and resumed, a run gives the same parameters, bit for bit on the same machine, as one that was not:
    every random number comes from generators seeded by (seed, epoch).

    Args:
        checkpoint: from `start`, or loaded to resume; returned with its fields brought up to date.
        data: the data set, on the CPU; it is moved to `device` as a whole.
        path: checkpoint file.
        device: where to train, "cpu" or "cuda".
        on_epoch: called after each save, for logs and plots.
    """
    recipe = checkpoint.recipe
    model = checkpoint.network().to(device)
    optimizer = _optimizer(model, recipe)
    guidance = new_guidance(recipe, len(data.train_images))
    if checkpoint.optimizer:
        optimizer.load_state_dict(checkpoint.optimizer)
    if guidance is not None:
        guidance.load_state_dict(checkpoint.guidance)
        guidance.to(device)
    train_images, train_labels = data.train_images.to(device), data.train_labels.to(device)
    test_images, test_labels = data.test_images.to(device), data.test_labels.to(device)

    for epoch in range(len(checkpoint.history), recipe.epochs):
        began = time.perf_counter()
        row = _train_epoch(checkpoint, model, guidance, optimizer, train_images, train_labels, epoch)
        row["test_accuracy"] = evaluate(checkpoint, model, test_images, test_labels)
        row["seconds"] = time.perf_counter() - began
        row |= guidance.metrics() if guidance is not None else {}
        row |= {f"alpha/{n}": q.alpha.item() for n, q in quantizers(model).items() if isinstance(q, PACT)}
        checkpoint.state_dict = {k: v.detach().cpu() for k, v in model.state_dict().items()}
        checkpoint.optimizer = optimizer.state_dict()
        if guidance is not None:
            checkpoint.guidance = {k: v.detach().cpu() for k, v in guidance.state_dict().items()}
        checkpoint.history = [*checkpoint.history, row]
        checkpoints.save(checkpoint, path)
        on_epoch(checkpoint)
    return checkpoint


@torch.no_grad()
def evaluate(checkpoint: Checkpoint, model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the accuracy in percent on images uint8 [N, C, H, W] and labels int64 [N].

    Leaves the model in evaluation mode.
    """
    model.eval()
    correct = 0
    for start_index in range(0, len(images), 1000):
        part = slice(start_index, start_index + 1000)
        logits = model(checkpoint.input.normalize(images[part]))
        correct += int((logits.argmax(1) == labels[part]).sum())
    return 100 * correct / len(images)


def new_guidance(recipe: Recipe, n: int, threshold: float = 1.0) -> Guidance | None:
    """Return what the recipe's method learns beside the network; None where that is nothing.

    Args:
        recipe: method and its hyperparameters.
        n: number of training images.
        threshold: where that of asg starts.
    """
    if recipe.method == "asg":
        return AdaptiveThreshold(threshold, rate=recipe.threshold_rate)
    if recipe.method == "smoot":
        start = round(100 * recipe.mask_share)
        return Smoot(n, start=start, top1_weight=recipe.top1_weight, speed=recipe.mask_speed)
    return None


def loss_terms(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    index: Tensor,
    recipe: Recipe,
    guidance: Guidance | None,
    generator: torch.Generator,
) -> LossTerms:
    """Return the loss of the recipe's method.

    Args:
        model: in training mode.
        images: normalized, float [N, C, H, W].
        labels: int64 [N].
        index: which training images they are, int64 [N].
        recipe: method and its hyperparameters.
        guidance: from `new_guidance`.
        generator: random numbers of the fill, on the images' device.
    """
    if recipe.method == "plain":
        return plain_loss(model, images, labels, label_smoothing=recipe.label_smoothing)
    kl_weight, smoothing = recipe.kl_weight, recipe.label_smoothing
    if isinstance(guidance, AdaptiveThreshold):
        return guidance.loss(
            model,
            images,
            labels,
            kl_weight=kl_weight,
            saliency_weight=recipe.saliency_weight,
            alpha_weight=recipe.alpha_weight,
            label_smoothing=smoothing,
        )
    fill = filling(images, recipe.fill, generator)
    if isinstance(guidance, Smoot):
        return guidance.loss(
            model, images, labels, index, kl_weight=kl_weight, fill=fill, label_smoothing=smoothing
        )
    return sgt_loss(
        model,
        images,
        labels,
        mask_share=recipe.mask_share,
        kl_weight=kl_weight,
        fill=fill,
        label_smoothing=smoothing,
    )


def _train_epoch(
    checkpoint: Checkpoint,
    model: nn.Module,
    guidance: Guidance | None,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    epoch: int,
) -> dict[str, float]:
    recipe = checkpoint.recipe
    device = images.device
    seed = recipe.seed * 1_000_003 + epoch
    torch.manual_seed(seed)  # dropout
    on_cpu = torch.Generator().manual_seed(seed)  # order and augmentation, the same on every device
    on_device = torch.Generator(device).manual_seed(seed)  # fill
    steps_per_epoch = len(images) // min(recipe.batch_size, len(images))
    sums: dict[str, Tensor] = {}
    model.train()
    indices = batches(len(images), recipe.batch_size, generator=on_cpu)
    label = f"epoch {epoch + 1}/{recipe.epochs}"
    for step, index in enumerate(command.progress(indices, label=label, total=steps_per_epoch)):
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr_at(epoch * steps_per_epoch + step, steps_per_epoch)
        index = index.to(device)
        chosen, target = images[index], labels[index]
        if recipe.crop_padding:
            chosen = augment(chosen, padding=recipe.crop_padding, generator=on_cpu)
        terms = loss_terms(model, checkpoint.input.normalize(chosen), target, index, recipe, guidance, on_device)
        optimizer.zero_grad(set_to_none=True)
        terms.loss.backward()
        optimizer.step()
        if isinstance(guidance, AdaptiveThreshold):
            guidance.step()
        for key, value in _measured(terms, target).items():
            sums[key] = sums.get(key, 0) + value.detach().double()
    row = {"epoch": epoch + 1, "lr": optimizer.param_groups[0]["lr"]}
    return row | {f"train_{key}": (value / steps_per_epoch).item() for key, value in sums.items()}


def _measured(terms: LossTerms, labels: Tensor) -> dict[str, Tensor]:
    measured = {
        "loss": terms.loss,
        "cross_entropy": terms.cross_entropy,
        "divergence": terms.divergence,
        "accuracy": (terms.logits.argmax(1) == labels).double().mean() * 100,
    }
    return measured if terms.saliency_norm is None else {**measured, "saliency_norm": terms.saliency_norm}


def _optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """One decay for weights, one for alpha, none for biases, BatchNorm and learned scales."""
    named = dict(model.named_parameters())
    alphas = [p for n, p in named.items() if n.endswith(".alpha")]
    weights = [p for n, p in named.items() if p.ndim > 1]
    others = [p for n, p in named.items() if p.ndim <= 1 and not n.endswith(".alpha")]
    groups = [
        {"params": weights, "weight_decay": recipe.weight_decay},
        {"params": alphas, "weight_decay": recipe.alpha_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    if recipe.optimizer == "adam":
        return torch.optim.Adam(groups, lr=recipe.lr)
    if recipe.optimizer == "adadelta":
        return torch.optim.Adadelta(groups, lr=recipe.lr)
    return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=recipe.momentum > 0)
