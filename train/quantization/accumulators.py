"""The grid on which an integer engine adds: the steps of a layer's input and of its weight, multiplied.

An engine that fuses a layer into an integer kernel rounds its bias, BatchNorm folded in, to that grid. A network
whose biases lie on it already is computed exactly by such an engine; they move by half a step at most, which is
little at 8 bits and much at 2: a network that is evaluated so in training is chosen by what it ships as.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from train.quantization import grids
from train.quantization.quantize import float_weight, weight_quantizer
from train.quantization.quantizers import PACT, InputQuantizer
from train.quantization.tracing import LAYERS, NORMS, source

# Engines add in int32.
LARGEST_SUM = 2**31 - 1


@dataclass(frozen=True)
class Accumulator:
    """Where one call of a quantized layer adds.

    Args:
        name: of the layer.
        call: name of the call, which tells those of one layer apart.
        layer: the layer.
        norm: the BatchNorm that is folded into it, or None.
        inputs: the quantizer that gives the layer's input its codes.
        step: of each output channel, float64 [O]; 0 where the BatchNorm switches the channel off.
        bias: that is added, BatchNorm folded in, float64 [O].
        largest: the most that products can add up to, in steps, float64 [O].
    """

    name: str
    call: str
    layer: nn.Module
    norm: nn.Module | None
    inputs: PACT | InputQuantizer
    step: Tensor
    bias: Tensor
    largest: Tensor

    @property
    def overflows(self) -> Tensor:
        """Whether products and bias together can leave int32, bool [O]."""
        steps = torch.where(self.step > 0, self.bias.abs() / self.step.clamp_min(1e-300), 0)
        return self.largest + steps > LARGEST_SUM


@torch.no_grad()
def accumulators(network: nn.Module, image: tuple[int, int, int]) -> list[Accumulator]:
    """Return those of a network from `quantize`, in the order of its calls; none of a float network.

    Args:
        network: as it is evaluated, on its way or at its end.
        image: channels, height and width.
    """
    if not isinstance(network, fx.GraphModule):
        return []
    modules = dict(network.named_modules())
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    mode = network.training
    ShapeProp(network.eval()).propagate(torch.zeros(1, *image, device=device))
    network.train(mode)
    found = []
    for node in network.graph.nodes:
        if not grids.is_layer(node, modules):
            continue
        layer = modules[str(node.target)]
        weights, grid = weight_quantizer(layer), grids.grid_source(source(node), modules)
        if weights is None or grid is None:
            continue
        inputs = modules[str(grid.target)]
        assert isinstance(inputs, PACT | InputQuantizer)
        # BatchNorm of rows of features normalizes by row: it is not folded.
        rows = isinstance(layer, nn.Linear) and len(node.meta["tensor_meta"].shape) > 2
        norm_node = None if rows else grids.norm_after(node, modules)
        norm = modules[str(norm_node.target)] if norm_node is not None else None
        weight = float_weight(layer)
        codes = weights.codes(weight).double().abs().flatten(1).sum(1)
        step = inputs.scale.double() * weights.scale(weight).double()
        bias = layer.bias.double() if isinstance(layer.bias, Tensor) else torch.zeros_like(step)
        if norm is not None:
            factor, mean, shift = _of_norm(norm)
            step, bias = step * factor.abs(), (bias - mean) * factor + shift
        largest = codes * max(-inputs.qmin, inputs.qmax)
        found.append(Accumulator(str(node.target), node.name, layer, norm, inputs, step, bias, largest))
    return found


@torch.no_grad()
def put_biases_on_grid(network: nn.Module, image: tuple[int, int, int]) -> None:
    """Move, in place, every bias of a quantized network to the next whole number of its accumulator's steps.

    Where a BatchNorm is folded, its shift moves. A bias or BatchNorm that several calls share stays: it would have
    to lie on several grids.
    """
    calls = accumulators(network, image)
    shared = Counter(id(call.norm if call.norm is not None else call.layer) for call in calls)
    for call in calls:
        module = call.norm if call.norm is not None else call.layer
        bias = module.bias
        if shared[id(module)] > 1 or (bias is None and call.norm is None):
            continue
        whole = torch.round(call.bias / call.step.clamp_min(1e-300)) * call.step
        moved = torch.where(call.step > 0, whole - call.bias, 0)
        if isinstance(bias, Tensor):
            bias.copy_((bias.double() + moved).to(bias.dtype))
        else:  # a BatchNorm without parameters: its mean moves the other way
            assert call.norm is not None
            factor, mean, _ = _of_norm(call.norm)
            running_mean = call.norm.running_mean
            assert isinstance(running_mean, Tensor)
            running_mean.copy_((mean - moved / factor).to(running_mean.dtype))


@contextmanager
def biases_on_grid(network: nn.Module, image: tuple[int, int, int]) -> Iterator[None]:
    """Put a network's biases on their grids for a block, and back: training goes on from where they were."""
    moved = (m for m in network.modules() if isinstance(m, (*LAYERS, *NORMS)))
    kept = [(t, t.detach().clone()) for m in moved for t in (m.bias, getattr(m, "running_mean", None))
            if isinstance(t, Tensor)]  # fmt: skip
    try:
        put_biases_on_grid(network, image)
        yield
    finally:
        with torch.no_grad():
            for tensor, before in kept:
                tensor.copy_(before)


def _of_norm(norm: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """Return gamma / sigma, mean and beta of a BatchNorm, float64 [O]."""
    variance, mean, eps = norm.running_var, norm.running_mean, norm.eps
    assert isinstance(variance, Tensor)
    assert isinstance(mean, Tensor)
    assert isinstance(eps, float)
    # In float32, as folding computes it.
    factor = 1 / torch.sqrt(variance + eps)
    if isinstance(norm.weight, Tensor):
        factor = factor * norm.weight
    shift = norm.bias.double() if isinstance(norm.bias, Tensor) else torch.zeros_like(mean).double()
    return factor.double(), mean.double(), shift
