"""Bias correction (Nagel et al. 2019, section 4.2): mean outputs moved back to the float network's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from train.post_training.hooks import run_with_hooks
from train.quantization.grids import is_layer, norm_after


@torch.no_grad()
def correct_biases(model: fx.GraphModule, reference: nn.Module, batches: Sequence[Tensor]) -> list[str]:
    """Shift every layer of a quantized network so that its mean output on real images is the float network's.

    Layer after layer, each with those before it corrected: the expectation of the error is measured, as in the
    paper's appendix D, not computed from BatchNorm's statistics.

    Args:
        model: from `train.quantization.quantize.quantize`, in evaluation mode.
        reference: the float network, whose layers have the same names.
        batches: normalized real images, float [n, C, H, W] each.

    Returns:
        Names of the layers that have neither bias nor BatchNorm after them, and stay as they are.
    """
    modules = dict(model.named_modules())
    nodes = {str(node.target): node for node in model.graph.nodes if is_layer(node, modules)}
    wanted = _means(reference, list(nodes), batches)
    left = []
    for name, node in nodes.items():
        layer, norm_node = modules[name], norm_after(node, modules)
        error = _means(model, [name], batches)[name] - wanted[name]
        if isinstance(layer.bias, Tensor):
            layer.bias.sub_(error)
        elif norm_node is not None:
            modules[str(norm_node.target)].running_mean.add_(error)
        else:
            left.append(name)
    return left


def _means(model: nn.Module, names: list[str], batches: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return the mean output of each layer by channel, [O]."""
    sums: dict[str, list[Tensor]] = {name: [] for name in names}

    def hook_of(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, inputs: Any, output: Tensor) -> None:
            axis = output.ndim - 1 if isinstance(layer, nn.Linear) else 1
            sums[name].append(output.transpose(0, axis).flatten(1).mean(1) * len(inputs[0]))

        return hook

    run_with_hooks(model, batches, {model.get_submodule(name): hook_of(name) for name in names})
    n = sum(map(len, batches))
    # A layer that is called twice has the mean of both calls.
    calls = len(batches)
    return {name: torch.stack(found).sum(0) * calls / (len(found) * n) for name, found in sums.items()}
