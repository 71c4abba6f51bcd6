"""Bias correction (Nagel et al. 2019, section 4.2): mean outputs moved back to the float network's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from train.post_training.hooks import run_with_hooks
from train.quantization.grids import is_layer, norm_after

# What the values of one layer, for all images that are walked at once, may take; about three layers are alive.
_LAYER_BYTES = 150 << 20


@torch.no_grad()
def correct_biases(model: fx.GraphModule, reference: nn.Module, batches: Sequence[Tensor]) -> list[str]:
    """Shift every layer of a quantized network so that its mean output on real images is the float network's.

    Layer after layer, each with those before it corrected: the expectation of the error is measured, as in the
    paper's appendix D, not computed from BatchNorm's statistics. All batches walk through the graph together, node
    by node, so that a layer is computed once, not once for every layer behind it; where their values would not fit
    into memory, the first batches that do are taken.

    Args:
        model: from `train.quantization.quantize.quantize`, in evaluation mode.
        reference: the float network, whose layers have the same names.
        batches: normalized real images, float [n, C, H, W] each.

    Returns:
        Names of the layers that have neither bias nor BatchNorm after them, and stay as they are.
    """
    modules = dict(model.named_modules())
    calls = Counter(str(node.target) for node in model.graph.nodes if is_layer(node, modules))
    batches = _that_fit(reference, list(calls), batches)
    wanted = _means(reference, list(calls), batches)
    corrected: set[str] = set()
    left = []

    def correct(node: fx.Node, outputs: list[Tensor]) -> list[Tensor]:
        """Return the layer's outputs for every batch, corrected."""
        name = str(node.target)
        layer, norm_node = modules[name], norm_after(node, modules)
        if name in corrected:
            return outputs
        corrected.add(name)
        mean = _mean(layer, outputs) if calls[name] == 1 else _means(model, [name], batches)[name]
        error = mean - wanted[name]
        if isinstance(layer.bias, Tensor):
            layer.bias.sub_(error)
            shape = [1] * outputs[0].ndim
            shape[_channel_axis(layer, outputs[0])] = -1
            return [output - error.reshape(shape) for output in outputs]
        if norm_node is not None:
            modules[str(norm_node.target)].running_mean.add_(error)
        else:
            left.append(name)
        return outputs

    _walk(model, batches, lambda node: is_layer(node, modules), correct)
    return left


def _walk(
    model: fx.GraphModule,
    batches: Sequence[Tensor],
    chosen: Callable[[fx.Node], bool],
    change: Callable[[fx.Node, list[Tensor]], list[Tensor]],
) -> None:
    """Run all batches through a graph node by node, and let `change` replace what the chosen nodes give."""
    runs = [fx.Interpreter(model) for _ in batches]
    for run, batch in zip(runs, batches, strict=True):
        run.args_iter = iter([batch])
    for node in model.graph.nodes:
        if node.op == "output":
            return
        values = [run.run_node(node) for run in runs]
        if chosen(node):
            values = change(node, values)
        for run, value in zip(runs, values, strict=True):
            run.env[node] = value
            for last in run.user_to_last_uses.get(node, ()):
                del run.env[last]


def _that_fit(model: nn.Module, names: list[str], batches: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return the first batches, one at least, whose values in the largest layer fit into _LAYER_BYTES."""
    largest = 1

    def hook(layer: nn.Module, inputs: Any, output: Tensor) -> None:
        nonlocal largest
        largest = max(largest, inputs[0][0].nbytes, output[0].nbytes)

    run_with_hooks(model, [batches[0][:1]], {model.get_submodule(name): hook for name in names})
    kept, images = 1, len(batches[0])
    while kept < len(batches) and (images + len(batches[kept])) * largest <= _LAYER_BYTES:
        images += len(batches[kept])
        kept += 1
    return batches[:kept]


def _means(model: nn.Module, names: list[str], batches: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return the mean output of each layer by channel, [O]."""
    sums: dict[str, list[Tensor]] = {name: [] for name in names}

    def hook_of(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, inputs: Any, output: Tensor) -> None:
            sums[name].append(_mean(layer, [output]) * len(inputs[0]))

        return hook

    run_with_hooks(model, batches, {model.get_submodule(name): hook_of(name) for name in names})
    n = sum(map(len, batches))
    # A layer that is called twice has the mean of both calls.
    calls = len(batches)
    return {name: torch.stack(found).sum(0) * calls / (len(found) * n) for name, found in sums.items()}


def _mean(layer: nn.Module, outputs: list[Tensor]) -> Tensor:
    """Return the mean by channel, [O], of a layer's outputs for all batches."""
    means = [y.transpose(0, _channel_axis(layer, y)).flatten(1).mean(1) * len(y) for y in outputs]
    return torch.stack(means).sum(0) / sum(map(len, outputs))


def _channel_axis(layer: nn.Module, output: Tensor) -> int:
    return output.ndim - 1 if isinstance(layer, nn.Linear) else 1
