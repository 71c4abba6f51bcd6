"""One training step on real images, taken again and again to be timed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch._dynamo.utils import counters

from train import loop
from train.data.images import ImageData
from train.device import arrange, in_precision, place
from train.losses.methods import new_guidance
from train.losses.saliency import LossTerms, filling
from train.quantization.spec import QuantSpec
from train.recipe import Recipe
from train.step import compute_gradients, new_optimizer, update


@dataclass(frozen=True)
class FirstStep:
    """What became of a step's first run, in which torch.compile compiles.

    Args:
        seconds: that it took.
        failure: its error in one line; "" where it ran.
        graph_breaks: why the compiler handed parts back to Python, and how often.
    """

    seconds: float
    failure: str
    graph_breaks: dict[str, int]


def first_step(step: Callable[[], object]) -> FirstStep:
    """Take a step once, and tell what happened; a compiler's error is told, not raised."""
    counters.clear()
    failure, began = "", time.perf_counter()
    try:
        step()
    except Exception as error:  # Dynamo, AOTAutograd and Inductor each have errors of their own
        failure = f"{type(error).__name__}: {_first_line(str(error))}"
    seconds = time.perf_counter() - began
    return FirstStep(seconds, failure, {_first_line(reason): n for reason, n in counters["graph_break"].items()})


def first_images(images: ImageData, count: int) -> ImageData:
    """Return the first `count` training and test images, in memory; a step is timed on one batch alone."""
    return ImageData(
        images.name, images.classes,
        images.train_images[:count].clone(), images.train_labels[:count].clone(),
        images.test_images[:count].clone(), images.test_labels[:count].clone(),
    )  # fmt: skip


def step_of(
    images: ImageData, arch: str, quant: QuantSpec, recipe: Recipe, *, compiled: bool = False
) -> Callable[[], LossTerms]:
    """Return a function that takes one training step on the CPU, always on the same batch of real images.

    The learning rate is zero, so that the batch is never learned by heart, however often it comes.

    Args:
        images: see `first_images`.
        arch: of the network.
        quant: likewise.
        recipe: of the training.
        compiled: by torch.compile, which gets PyTorch's own layers: those that `place` puts in their stead save
            what a compiler saves by itself.
    """
    recipe = replace(recipe, lr=0.0)
    checkpoint = loop.start(arch, images, quant, recipe)
    network = checkpoint.training_network()
    model = in_precision(network if compiled else place(network, "cpu"), recipe.precision).train()
    count = min(recipe.batch_size, len(images.train_images))
    batch = arrange(checkpoint.input.normalize(images.train_images[:count]), model)
    labels, index = images.train_labels[:count], torch.arange(count)
    optimizer, generator = new_optimizer(model, recipe), torch.Generator().manual_seed(0)
    guidance = new_guidance(recipe, len(images.train_images))
    run: nn.Module = torch.compile(model) if compiled else model  # type: ignore[assignment]
    if guidance is not None:
        guidance.load_state_dict(checkpoint.guidance)

    def step() -> LossTerms:
        fill = filling(batch, recipe.fill, generator)
        terms = compute_gradients(run, guidance, batch, labels, index, fill, recipe)
        update(optimizer, guidance)
        return terms

    return step


def _first_line(text: str) -> str:
    return next(iter(text.strip().splitlines()), "")
