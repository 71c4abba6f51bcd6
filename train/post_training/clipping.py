"""Clipping of a quantized network that will not be trained: each PACT's alpha, from images without labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from train.choices import MSE
from train.post_training.hooks import run_with_hooks
from train.quantization.quantize import quantizers
from train.quantization.quantizers import PACT

# Shares of the positive activations that are not clipped, in percent; which one is best depends on the network.
PERCENTILES = ("99", "99.9", "99.99", "99.999", "100")

_BINS = 8192
# Pixels of the images that the candidates' logits are compared on: 83 of 224 x 224, 4,096 of 32 x 32.
_COMPARED_PIXELS = 1 << 22
_CANDIDATES = 100  # alphas tried for the least error: hundredths of the largest activation


@torch.no_grad()
def search_alphas(
    model: nn.Module, batches: Sequence[Tensor], logits: Sequence[Tensor], search: str = "best"
) -> dict[str, float]:
    """Set every PACT's alpha of a quantized network in evaluation mode.

    Candidates are the alphas with the least mean squared error of their own activation ("mse"), and those at each
    of PERCENTILES, the same for all layers; kept is the one whose logits are nearest to the float network's.

    Args:
        model: from `train.quantization.quantize.quantize`.
        batches: normalized real images, float [n, C, H, W] each.
        logits: of the float network for them, [n, K] each.
        search: one of SEARCHES: both kinds of candidates, or one of them.

    Returns:
        Mean squared error of the logits by candidate, the best one first.
    """
    with parametrize.cached():  # weights do not change here: each is rounded once
        return _searched(model, batches, logits, search)


def _searched(
    model: nn.Module, batches: Sequence[Tensor], logits: Sequence[Tensor], search: str
) -> dict[str, float]:
    counts = _magnitudes(model, batches)
    candidates: dict[str, dict[PACT, float]] = {}
    if search in (MSE, "best"):
        candidates[MSE] = {pact: _least_error(pact, *found) for pact, found in counts.items()}
    if search in ("percentile", "best"):
        for percentile in PERCENTILES:
            share = float(percentile) / 100
            candidates[f"{percentile} %"] = {pact: _quantile(share, *found) for pact, found in counts.items()}
    pixels = batches[0].shape[2] * batches[0].shape[3] if batches[0].ndim == 4 else 1
    some = max(1, _COMPARED_PIXELS // (pixels * len(batches[0])))
    errors = {}
    for name, alphas in candidates.items():
        _set(alphas)
        errors[name] = _error(model, batches[:some], logits[:some])
    ranked = sorted(errors, key=lambda name: errors[name])
    _set(candidates[ranked[0]])
    return {name: errors[name] for name in ranked}


def _magnitudes(model: nn.Module, batches: Sequence[Tensor]) -> dict[PACT, tuple[Tensor, float]]:
    """Return for every PACT the histogram [_BINS] of the positive magnitudes that reach it, and the largest."""
    pacts = [m for m in quantizers(model).values() if isinstance(m, PACT)]
    largest = dict.fromkeys(pacts, 0.0)
    histograms = {pact: torch.zeros(_BINS) for pact in pacts}

    def measure(pact: PACT, magnitudes: Tensor) -> None:
        largest[pact] = max(largest[pact], magnitudes.max().item())

    def count(pact: PACT, magnitudes: Tensor) -> None:
        if largest[pact] > 0:
            histogram = torch.histc(magnitudes.float(), _BINS, 0, largest[pact])
            histogram[0] -= (magnitudes == 0).sum()  # picking the others out would take longer than counting them
            histograms[pact] += histogram

    for look in (measure, count):
        run_with_hooks(model, batches, {pact: _unquantized(look) for pact in pacts})
    return {pact: (histograms[pact], largest[pact]) for pact in pacts if largest[pact] > 0}


def _unquantized(look: Callable[[PACT, Tensor], None]) -> Callable[..., Tensor]:
    """Return a hook that looks at magnitudes and lets them through unrounded: no layer sees another's error."""

    def hook(pact: PACT, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        (x,) = inputs
        passed = x.clamp(-pact.largest_start if pact.signed else 0, pact.largest_start)
        look(pact, passed.abs())
        return passed

    return hook


def _least_error(pact: PACT, histogram: Tensor, largest: float) -> float:
    values = (torch.arange(_BINS) + 0.5) * (largest / _BINS)
    alphas = torch.arange(1, _CANDIDATES + 1).unsqueeze(1) * (largest / _CANDIDATES)
    scale = alphas / pact.qmax
    rounded = torch.round(values / scale).clamp_max(pact.qmax) * scale
    errors = ((rounded - values).square() * histogram).sum(1)
    return alphas[errors.argmin()].item()


def _quantile(share: float, histogram: Tensor, largest: float) -> float:
    reached = histogram.double().cumsum(0) >= share * histogram.double().sum() * (1 - 1e-9)
    return (int(reached.int().argmax()) + 1) * largest / _BINS


def _set(alphas: dict[PACT, float]) -> None:
    for pact, alpha in alphas.items():
        pact.alpha.fill_(alpha)


def _error(model: nn.Module, batches: Sequence[Tensor], logits: Sequence[Tensor]) -> float:
    squares = [(model(x) - expected).square().mean(1) for x, expected in zip(batches, logits, strict=True)]
    return torch.cat(squares).mean().item()
