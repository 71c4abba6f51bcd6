"""The training loop: epochs over images that stay on the device as bytes, or come from files in time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from runtime import command
from runtime.errors import OptionError, TrainingError
from train import checkpoint as checkpoints
from train import processes
from train.checkpoint import Checkpoint
from train.data.balance import balanced_batches, class_weights
from train.data.images import ImageData, batches, stream
from train.device import arrange, in_precision, place
from train.divergence import diverged, is_finite, where_it_diverged
from train.input_spec import InputSpec
from train.losses.distillation import load_teacher
from train.losses.methods import Guidance, new_guidance, start_guidance
from train.losses.saliency import LossTerms, Smoot, filling
from train.models.pretrained import pretrained_state
from train.quantization.accumulators import biases_on_grid
from train.quantization.quantize import quantizers, start_alphas
from train.quantization.quantizers import PACT
from train.quantization.spec import QuantSpec
from train.recipe import Recipe
from train.state import load_state
from train.step import compute_gradients, new_optimizer, set_lr, update

if TYPE_CHECKING:
    from train.data.images import Images

# Images in one forward pass without gradients: so many, fewer of large ones, never fewer than the last number.
_MOST_IMAGES, _MOST_VALUES, _FEWEST_IMAGES = 1000, 1 << 22, 32
# On which alphas start: the images of one such pass, this many at most.
_START_IMAGES = 256
# Enough real images for export to compare networks on, few enough to travel in the checkpoint.
_MAX_SAMPLES = 256
_MAX_SAMPLE_BYTES = 4 << 20


def start(arch: str, data: ImageData, quant: QuantSpec, recipe: Recipe) -> Checkpoint:
    """Return the checkpoint of a run before its first epoch.

    Raises:
        FileError: `recipe.init` is no checkpoint, or pretrained parameters are not to be had.
        OptionError: `recipe.init` holds another architecture, or nobody trained this one.
    """
    torch.manual_seed(recipe.seed)
    input_spec = data.input_spec()
    arguments = {"channels": input_spec.channels, "size": input_spec.size, "classes": len(data.classes)}
    description = {"name": arch, **arguments}
    initial = _initial(recipe, description)
    parameters = initial.float_state() if initial is not None else _pretrained(recipe, description, input_spec)
    model = checkpoints.new_network(description, quant, input_spec, parameters)
    first = torch.randperm(len(data.train_images))[: min(_START_IMAGES, _pass_size(data.train_images))]
    images, labels = input_spec.normalize(data.train_images[first]), data.train_labels[first]
    if initial is not None and replace(initial.quant, bias_grid=quant.bias_grid) == quant:
        # The same grids: what alphas and scales have learned there is worth as much as the weights.
        load_state(model, initial.state_dict, recipe.init)
    else:
        start_alphas(model, images)
    guidance = start_guidance(recipe, len(data.train_images), model, images, labels)
    count = min(_MAX_SAMPLES, max(2, _MAX_SAMPLE_BYTES // data.test_images[:1].numel()), len(data.test_images))
    chosen = torch.linspace(0, len(data.test_images) - 1, count).long()
    return Checkpoint(
        arch=description,
        quant=quant,
        input=input_spec,
        classes=data.classes,
        recipe=recipe,
        state_dict=model.state_dict(),
        guidance={} if guidance is None else guidance.state_dict(),
        calibration_images=data.train_images[first[:count]].clone(),
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
    every random number comes from generators seeded by (seed, epoch). In several processes (`train.processes`)
    each computes its part of every batch, and the first one saves.

    Args:
        checkpoint: from `start`, or loaded to resume; returned with its fields brought up to date.
        data: the data set, on the CPU; what is in memory is moved to `device` as a whole.
        path: checkpoint file.
        device: where to train, "cpu" or "cuda".
        on_epoch: called after each save, for logs and plots.

    Raises:
        TrainingError: the loss is not a number or explodes; `path` keeps the last good epoch.
        OptionError: the batch cannot be shared equally among the processes.
        FileError: an image file is gone.
    """
    recipe = checkpoint.recipe
    model = place(checkpoint.training_network().eval(), device)
    trained = in_precision(processes.parallel(model), recipe.precision)
    teacher = None
    if recipe.teacher:
        teacher = in_precision(place(load_teacher(recipe.teacher, checkpoint), device), recipe.precision)
    optimizer = new_optimizer(model, recipe)
    guidance = new_guidance(recipe, len(data.train_images))
    if checkpoint.optimizer:
        optimizer.load_state_dict(checkpoint.optimizer)
    if guidance is not None:
        guidance.load_state_dict(checkpoint.guidance)
        guidance.to(device)
    train_images, train_labels = data.train_images.to(device), data.train_labels.to(device)
    test_images, test_labels = data.test_images.to(device), data.test_labels.to(device)
    val_images = val_labels = None
    if data.val_images is not None and data.val_labels is not None:
        val_images, val_labels = data.val_images.to(device), data.val_labels.to(device)
    weights = None
    if recipe.class_weights:
        weights = class_weights(data.train_labels, len(data.classes)).to(device)

    for epoch in range(len(checkpoint.history), recipe.epochs):
        began = time.perf_counter()
        try:
            row = _train_epoch(
                checkpoint, trained, teacher, guidance, optimizer, train_images, train_labels, weights, epoch
            )
        except TrainingError as error:
            kept = f"{path} keeps epoch {epoch}" if epoch else "no epoch was finished"
            raise TrainingError(f"{error}; lower --lr ({recipe.lr:g}) or try another --seed; {kept}") from None
        with biases_on_grid(model, checkpoint.image_shape) if checkpoint.quant.bias_grid else nullcontext():
            if val_images is not None and val_labels is not None:
                row["val_accuracy"] = evaluate(checkpoint, model, val_images, val_labels)
            row["test_accuracy"] = evaluate(checkpoint, model, test_images, test_labels)
        row["seconds"] = time.perf_counter() - began
        row |= guidance.metrics() if guidance is not None else {}
        row |= {f"alpha/{n}": q.alpha.item() for n, q in quantizers(model).items() if isinstance(q, PACT)}
        checkpoint.state_dict = {k: v.detach().cpu() for k, v in model.state_dict().items()}
        checkpoint.optimizer = optimizer.state_dict()
        if guidance is not None:
            checkpoint.guidance = {k: v.detach().cpu() for k, v in guidance.state_dict().items()}
        checkpoint.history = [*checkpoint.history, row]
        if processes.rank() == 0:
            checkpoints.save(checkpoint, path)
            on_epoch(checkpoint)
    return checkpoint


@torch.no_grad()
def evaluate(checkpoint: Checkpoint, model: nn.Module, images: Images, labels: Tensor) -> float:
    """Return the accuracy in percent on images uint8 [N, C, H, W] and labels int64 [N].

    Leaves the model in evaluation mode. Several processes share the images.
    """
    model.eval()
    correct = torch.zeros((), dtype=torch.int64, device=labels.device)
    size = _pass_size(images)
    starts = range(size * processes.rank(), len(images), size * processes.size())
    parts = (torch.arange(start, min(start + size, len(images))) for start in starts)
    for index, pixels in stream(images, parts):
        logits = model(arrange(checkpoint.input.normalize(pixels), model))
        correct += (logits.argmax(1) == labels[index]).sum()
    return 100 * int(processes.total(correct)) / len(images)


def _train_epoch(
    checkpoint: Checkpoint,
    model: nn.Module,
    teacher: nn.Module | None,
    guidance: Guidance | None,
    optimizer: torch.optim.Optimizer,
    images: Images,
    labels: Tensor,
    weights: Tensor | None,
    epoch: int,
) -> dict[str, float]:
    recipe = checkpoint.recipe
    device = labels.device
    seed = recipe.seed * 1_000_003 + epoch
    torch.manual_seed(seed + (processes.rank() << 32))  # dropout
    on_cpu = torch.Generator().manual_seed(seed)  # order and augmentation, the same on every device
    on_device = torch.Generator(device).manual_seed(seed)  # fill
    steps_per_epoch = len(images) // min(recipe.batch_size, len(images))
    augmentation = recipe.augmentation
    sums: dict[str, Tensor] = {}
    before = guidance.percent.clone() if isinstance(guidance, Smoot) else None
    model.train()
    # Augmentation draws from the same generator, step by step: the order is drawn before it, as a whole.
    steps: Iterable[tuple[Tensor, Tensor]] = stream(images, list(_order(checkpoint, labels, on_cpu)))
    if processes.rank() == 0:
        steps = command.progress(steps, label=f"epoch {epoch + 1}/{recipe.epochs}", total=steps_per_epoch)
    for step, (index, pixels) in enumerate(steps):
        set_lr(optimizer, recipe.lr_at(epoch * steps_per_epoch + step, steps_per_epoch))
        target = labels[index]
        inputs = arrange(checkpoint.input.normalize(augmentation(pixels, on_cpu)), model)
        fill, mine = filling(inputs, recipe.fill, on_device), processes.part(len(index))
        inputs, target = inputs[mine], target[mine]
        terms = compute_gradients(
            model, guidance, inputs, target, index[mine], fill[mine], recipe, teacher, weights
        )
        if diverged(terms.loss.item()):
            raise _divergence(f"the loss is {terms.loss.item():.4g}", epoch, step, model, inputs)
        update(optimizer, guidance)
        for key, value in _measured(terms, target).items():
            sums[key] = sums.get(key, 0) + value.detach().double()
    if not is_finite(model.state_dict()):
        raise _divergence("a parameter is not finite", epoch, step, model, inputs)
    if isinstance(guidance, Smoot) and before is not None:
        # Each image was seen by one process. In float64 the differences of float32 numbers are exact.
        changes = guidance.percent.double() - before.double()
        guidance.percent.copy_(before.double() + processes.total(changes))
    row = {"epoch": epoch + 1, "lr": optimizer.param_groups[0]["lr"]}
    return row | {f"train_{key}": (processes.mean(value) / steps_per_epoch).item() for key, value in sums.items()}


def _order(checkpoint: Checkpoint, labels: Tensor, generator: torch.Generator) -> Iterable[Tensor]:
    """Return the indices int64 [n] of each of an epoch's batches."""
    size = checkpoint.recipe.batch_size
    if checkpoint.recipe.balanced_sampling:
        return balanced_batches(labels.cpu(), len(checkpoint.classes), size, generator=generator)
    return batches(len(labels), size, generator=generator)


def _pass_size(images: Images) -> int:
    _, channels, height, width = images.shape
    return min(_MOST_IMAGES, max(_FEWEST_IMAGES, _MOST_VALUES // (channels * height * width)))


def _pretrained(recipe: Recipe, arch: dict[str, Any], input_spec: InputSpec) -> dict[str, Tensor] | None:
    return pretrained_state(arch["name"], input_spec) if recipe.pretrained else None


def _initial(recipe: Recipe, arch: dict[str, Any]) -> Checkpoint | None:
    if not recipe.init:
        return None
    initial = checkpoints.load(recipe.init)
    if initial.arch != arch:
        raise OptionError(
            f"init {recipe.init}: holds {initial.arch}, expected {arch}; name a run of the same architecture"
        )
    return initial


def _divergence(what: str, epoch: int, step: int, model: nn.Module, images: Tensor) -> TrainingError:
    return TrainingError(f"epoch {epoch + 1}, step {step + 1}: {what}; {where_it_diverged(model, images)}")


def _measured(terms: LossTerms, labels: Tensor) -> dict[str, Tensor]:
    measured = {
        "loss": terms.loss,
        "cross_entropy": terms.cross_entropy,
        "divergence": terms.divergence,
        "accuracy": (terms.logits.argmax(1) == labels).double().mean() * 100,
    }
    return measured if terms.saliency_norm is None else {**measured, "saliency_norm": terms.saliency_norm}
