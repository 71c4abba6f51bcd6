"""What quantization does to every layer of a checkpoint: the codes in use, and how much of the signal is noise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from train.checkpoint import Checkpoint
from train.quantization.description import describe
from train.quantization.quantize import Quantizer, float_weight, quantizers, weight_quantizer
from train.quantization.quantizers import PACT

_PASS = 64


@dataclass(frozen=True)
class GridUse:
    """One tensor on its grid.

    Args:
        bits: of the grid.
        codes_used: how many different codes occur.
        codes: how many there are.
        scale: smallest and largest step of the grid; weights have one for each output channel.
        sqnr_db: signal-to-quantization-noise ratio, 10 log10 of the sum of x^2 by the sum of (x - quantized x)^2;
            infinite where nothing is lost. Of an activation, clipping is noise too.
        clipped_share: of the values, beyond the last code, 0 to 1; 0 of a weight.
        alpha: clipping value of a PACT; None of all others.
    """

    bits: int
    codes_used: int
    codes: int
    scale: tuple[float, float]
    sqnr_db: float
    clipped_share: float = 0.0
    alpha: float | None = None


@dataclass(frozen=True)
class LayerStatistics:
    """A layer with parameters; `weight` is None where it stays float, `input` where its input is on no grid.

    Args:
        name: of the layer's module.
        kind: of module.
        shape: of its weight.
        weight: its weight's grid.
        quantizer: name of its input's quantizer.
        input: that quantizer's grid.
        reason: why it stays float.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    weight: GridUse | None
    quantizer: str | None
    input: GridUse | None
    reason: str


def layer_statistics(checkpoint: Checkpoint, images: Tensor) -> list[LayerStatistics]:
    """Return what quantization does to each layer that is not folded into another at export.

    Args:
        checkpoint: quantized or not.
        images: uint8 [n, C, H, W], which the activations are measured on.
    """
    model = checkpoint.network()
    inputs = activation_use(model, checkpoint.input.normalize, images)
    modules, rows = dict(model.named_modules()), []
    for layer in describe(model):
        if "folded" in layer.reason:
            continue
        module = modules.get(layer.name)  # of a function there is none
        weight = getattr(module, "weight", None)
        shape = tuple(weight.shape) if isinstance(weight, Tensor) else ()
        rows.append(
            LayerStatistics(
                name=layer.name,
                kind=layer.kind,
                shape=shape,
                weight=None if module is None else weight_use(module),
                quantizer=layer.quantizer,
                input=None if layer.quantizer is None else inputs[layer.quantizer],
                reason=layer.reason,
            )
        )
    return rows


@torch.no_grad()
def weight_use(layer: nn.Module) -> GridUse | None:
    """Return what quantization does to a layer's weight; None where it stays float."""
    quantizer = weight_quantizer(layer)
    if quantizer is None:
        return None
    weight = float_weight(layer)
    codes, scale = quantizer.codes(weight), quantizer.scale(weight)
    noise = weight - quantizer(weight)
    return GridUse(
        bits=quantizer.bits,
        codes_used=len(codes.unique()),
        codes=2 * quantizer.qmax + 1,
        scale=(scale.min().item(), scale.max().item()),
        sqnr_db=_decibels(weight.double().square().sum(), noise.double().square().sum()),
    )


@torch.no_grad()
def activation_use(model: nn.Module, normalize: Callable[[Tensor], Tensor], images: Tensor) -> dict[str, GridUse]:
    """Return what each activation quantizer of a model does to real images, by its name."""
    measures = {name: _Measure(quantizer) for name, quantizer in quantizers(model).items()}
    handles = [measure.quantizer.register_forward_hook(measure.add) for measure in measures.values()]
    try:
        for part in images.split(_PASS):
            model(normalize(part))
    finally:
        for handle in handles:
            handle.remove()
    return {name: measure.result() for name, measure in measures.items()}


class _Measure:
    """Sums over the batches that pass a quantizer."""

    def __init__(self, quantizer: Quantizer) -> None:
        self.quantizer = quantizer
        self._counts = torch.zeros(quantizer.qmax - quantizer.qmin + 1, dtype=torch.int64)
        self._signal = self._noise = torch.zeros((), dtype=torch.float64)
        self._clipped = 0

    def add(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        quantizer, x = self.quantizer, inputs[0]
        # What the quantizer stands for without its grid: a ReLU, or nothing at all.
        exact = x if quantizer.qmin else x.clamp_min(0)
        codes = torch.round(output / quantizer.scale).long() - quantizer.qmin
        self._counts += torch.bincount(codes.flatten(), minlength=len(self._counts))
        self._signal = self._signal + exact.double().square().sum()
        self._noise = self._noise + (exact - output).double().square().sum()
        if isinstance(quantizer, PACT):
            self._clipped += int((exact.abs() > quantizer.clip_alpha).sum())

    def result(self) -> GridUse:
        quantizer = self.quantizer
        scale = quantizer.scale.item()
        return GridUse(
            bits=quantizer.bits,
            codes_used=int((self._counts > 0).sum()),
            codes=len(self._counts),
            scale=(scale, scale),
            sqnr_db=_decibels(self._signal, self._noise),
            clipped_share=self._clipped / max(1, int(self._counts.sum())),
            alpha=quantizer.clip_alpha.item() if isinstance(quantizer, PACT) else None,
        )


def _decibels(signal: Tensor, noise: Tensor) -> float:
    return float("inf") if noise == 0 else 10 * torch.log10(signal / noise).item()
