"""Learned rounding of weights (AdaRound, Nagel et al. 2020): up or down by what it does to the layer's output."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from train.post_training.hooks import run_with_hooks
from train.post_training.weight_scales import learned_scale_of
from train.quantization.grids import is_layer, norm_after
from train.quantization.quantizers import weight_qmax

STEPS = 400
_IMAGES = 32  # a step
_RATE = 1e-2
_PUSH = 0.01  # weight of what drives every choice to 0 or 1
_WARM_UP = 0.2  # share of the steps before it begins
_SHARPNESS = (20.0, 2.0)  # its exponent, first and last
_STRETCH = (-0.1, 1.1)  # of the sigmoid, which reaches 0 and 1 so
_LAYER_BYTES = 600 << 20  # of a layer's inputs and outputs; where more images would not fit, fewer are taken


@dataclass(frozen=True)
class _Seen:
    """What one layer is learned from: its inputs in the quantized network, and the float layer's outputs."""

    inputs: Tensor
    outputs: Tensor
    weight: Tensor


class _SeenError(Exception):
    """A layer's input was seen: the rest of the network need not run."""


def learn_rounding(
    model: fx.GraphModule,
    reference: nn.Module,
    batches: Sequence[Tensor],
    *,
    steps: int = STEPS,
    progress: Callable[[Sequence[str]], Iterable[str]] = lambda names: names,
) -> int:
    """Choose, in place, for each weight below 8 bits whether it is rounded up or down; return how many layers.

    Layer after layer, with those before it rounded already: the output, scaled as by the BatchNorm after it, is to
    be nearest to the float network's in squares (equations 21 to 25).

    Args:
        model: from `train.quantization.quantize.quantize`, its scales and alphas set, in evaluation mode.
        reference: the float network, whose layers have the same names.
        batches: normalized real images, float [n, C, H, W] each.
        steps: of Adam, for each layer.
        progress: goes through the names of the layers.
    """
    modules, floats = dict(model.named_modules()), dict(reference.named_modules())
    nodes = {str(node.target): node for node in model.graph.nodes if is_layer(node, modules)}
    calls = Counter(str(node.target) for node in model.graph.nodes if is_layer(node, modules))
    chosen = [
        name for name in nodes
        if calls[name] == 1 and (scale := learned_scale_of(modules[name])) is not None and scale.bits < 8
    ]  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    for name in progress(chosen):
        norm = norm_after(nodes[name], modules)
        gain = _gain(modules[str(norm.target)] if norm is not None else None)
        _round(modules[name], _see(model, modules[name], reference, floats[name], batches), gain, steps, generator)
    return len(chosen)


def _see(
    model: nn.Module, layer: nn.Module, reference: nn.Module, float_layer: nn.Module, batches: Sequence[Tensor]
) -> _Seen:
    """Run both networks up to a layer."""
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def keep_input(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        inputs.append(given[0].detach())
        raise _SeenError

    def keep_output(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        outputs.append(output.detach())
        raise _SeenError

    with torch.no_grad(), parametrize.cached():
        for batch in batches:
            for network, of, hook in ((model, layer, keep_input), (reference, float_layer, keep_output)):
                with contextlib.suppress(_SeenError):
                    run_with_hooks(network, [batch], {of: hook})
            if sum(t.nbytes for t in (*inputs, *outputs)) > _LAYER_BYTES:
                break
    original: Tensor = layer.parametrizations.weight.original  # type: ignore[union-attr,assignment]
    return _Seen(torch.cat(inputs), torch.cat(outputs), original.detach())


def _round(layer: nn.Module, seen: _Seen, gain: Tensor | None, steps: int, generator: torch.Generator) -> None:
    quantizer = learned_scale_of(layer)
    assert quantizer is not None
    qmax = weight_qmax(quantizer.bits)
    with torch.no_grad():
        scale = quantizer.scale(seen.weight).reshape(-1, *[1] * (seen.weight.ndim - 1))
    ratio = seen.weight / scale
    below = ratio.floor()
    low, high = _STRETCH
    # The start: rounding half-way gives back the float weight.
    choice = torch.logit(((ratio - below) - low) / (high - low)).requires_grad_()
    optimizer = torch.optim.Adam([choice], _RATE)
    axis = 1 if isinstance(layer, nn.Conv2d) else -1
    shape = [1] * seen.outputs.ndim
    shape[axis] = -1

    def up() -> Tensor:
        return (torch.sigmoid(choice) * (high - low) + low).clamp(0, 1)

    for step in range(steps):
        part = torch.randint(len(seen.inputs), (min(_IMAGES, len(seen.inputs)),), generator=generator)
        weight = (below + up()).clamp(-qmax, qmax) * scale
        x = seen.inputs[part]
        if isinstance(layer, nn.Conv2d):
            output = layer._conv_forward(x, weight, layer.bias)
        else:
            output = F.linear(x, weight, layer.bias)  # type: ignore[arg-type]
        error = output - seen.outputs[part]
        error = error if gain is None else error * gain.reshape(shape)
        loss = error.square().sum(axis).mean()
        done = step / steps
        if done > _WARM_UP:
            first, last = _SHARPNESS
            exponent = last + (first - last) * (1 - (done - _WARM_UP) / (1 - _WARM_UP))
            loss = loss + _PUSH * (1 - (2 * up() - 1).abs().pow(exponent)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        codes = (below + (up() > 0.5).to(below.dtype)).clamp(-qmax, qmax)
        layer.parametrizations.weight.original.copy_(codes * scale)  # type: ignore[operator,union-attr]
        quantizer.learned_scale.copy_(scale.flatten())


def _gain(norm: nn.Module | None) -> Tensor | None:
    """Return by how much a BatchNorm scales each channel, float [C]."""
    if norm is None:
        return None
    assert isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm2d))
    assert norm.running_var is not None
    scale = torch.rsqrt(norm.running_var + norm.eps)
    return (scale if norm.weight is None else scale * norm.weight).detach()
