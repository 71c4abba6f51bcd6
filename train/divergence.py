"""When training cannot go on: the loss is not a number or explodes."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from train.losses.guidance import frozen_statistics
from train.quantization.quantizers import PACT

# Far above anything a run recovers from: ten classes guessed at random cost 2.3.
MAX_LOSS = 1e4


def diverged(loss: float) -> bool:
    """Whether a loss is not a number, infinite or beyond MAX_LOSS."""
    return not abs(loss) <= MAX_LOSS


def is_finite(state: dict[str, Tensor]) -> bool:
    """Whether every number of a state dictionary is finite."""
    return all(bool(torch.isfinite(value).all()) for value in state.values() if value.is_floating_point())


@torch.no_grad()
def where_it_diverged(model: nn.Module, images: Tensor) -> str:
    """Return the first layer whose output is not finite, or else the one with the largest, and its alpha's value.

    Args:
        model: in training mode.
        images: the normalized images of the step, [N, C, H, W].
    """
    reached: list[tuple[str, nn.Module, float]] = []

    def note(name: str, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            reached.append((name, module, output.abs().max().item()))

        return module.register_forward_hook(hook)

    handles = [note(n, m) for n, m in model.named_modules() if isinstance(m, PACT) or _is_layer(m)]
    try:
        with frozen_statistics(model):
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    sizes = [size for _, _, size in reached]
    broken = [position for position, size in enumerate(sizes) if not math.isfinite(size)]
    site = broken[0] if broken else sizes.index(max(sizes))
    layers = [(name, size) for name, module, size in reached[: site + 1] if not isinstance(module, PACT)]
    clips = [(i, name, module) for i, (name, module, _) in enumerate(reached) if isinstance(module, PACT)]
    name, size = layers[-1] if layers else (reached[site][0], sizes[site])
    text = f"layer {name} (largest output {size:.4g})"
    if not clips:
        return f"{text}, no alpha in a float network"
    _, clip, pact = next((c for c in clips if c[0] >= site), clips[-1])
    return f"{text}, alpha {pact.alpha.item():.4g} of {clip.removeprefix('quantizers.')}"


def _is_layer(module: nn.Module) -> bool:
    if isinstance(module, parametrize.ParametrizationList):
        return False
    return parametrize.is_parametrized(module) or any(True for _ in module.parameters(recurse=False))
