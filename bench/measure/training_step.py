"""One training step on real images, taken again and again to be timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from train import loop
from train.data.images import ImageData
from train.device import arrange, in_precision, place
from train.losses.methods import new_guidance
from train.losses.saliency import LossTerms, filling
from train.quantization.quantize import QuantSpec
from train.recipe import Recipe
from train.step import compute_gradients, new_optimizer, update


def first_images(images: ImageData, count: int) -> ImageData:
    """Return the first `count` training and test images, in memory; a step is timed on one batch alone."""
    return ImageData(
        images.name, images.classes,
        images.train_images[:count].clone(), images.train_labels[:count].clone(),
        images.test_images[:count].clone(), images.test_labels[:count].clone(),
    )  # fmt: skip


def step_of(images: ImageData, arch: str, quant: QuantSpec, recipe: Recipe) -> Callable[[], LossTerms]:
    """Return a function that takes one training step on the CPU, always on the same batch of real images.

    The learning rate is zero, so that the batch is never learned by heart, however often it comes.
    """
    recipe = replace(recipe, lr=0.0)
    checkpoint = loop.start(arch, images, quant, recipe)
    model = in_precision(place(checkpoint.training_network(), "cpu"), recipe.precision).train()
    count = min(recipe.batch_size, len(images.train_images))
    batch = arrange(checkpoint.input.normalize(images.train_images[:count]), model)
    labels, index = images.train_labels[:count], torch.arange(count)
    optimizer, generator = new_optimizer(model, recipe), torch.Generator().manual_seed(0)
    guidance = new_guidance(recipe, len(images.train_images))
    if guidance is not None:
        guidance.load_state_dict(checkpoint.guidance)

    def step() -> LossTerms:
        fill = filling(batch, recipe.fill, generator)
        terms = compute_gradients(model, guidance, batch, labels, index, fill, recipe)
        update(optimizer, guidance)
        return terms

    return step
