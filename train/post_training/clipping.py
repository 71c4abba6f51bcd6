"""Clipping of a quantized network that will not be trained: each PACT's alpha, from images without labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from train.choices import MSE
from train.post_training.hooks import forwards
from train.quantization.quantize import quantizers
from train.quantization.quantizers import PACT

# Shares of the positive activations that are not clipped, in percent; which one is best depends on the network.
PERCENTILES = ("99", "99.9", "99.99", "99.999", "100")

_BINS = 8192  # at least half of them below the largest magnitude
# Pixels of the images that the candidates' logits are compared on: 83 of 224 x 224, 4,096 of 32 x 32.
_COMPARED_PIXELS = 1 << 22
_FIRST = 4  # a quarter of them tells which half of the candidates is compared on all
_CANDIDATES = 100  # alphas tried for the least error: hundredths of the largest activation


def to_compare(batches: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return the first batches, enough to compare candidates on."""
    height, width = batches[0].shape[2:] if batches[0].ndim == 4 else (1, 1)
    return batches[: max(1, _COMPARED_PIXELS // (height * width * len(batches[0])))]


class _Histogram:
    """How positive magnitudes are distributed, in one pass: its range doubles where a larger one comes.

    Attributes:
        counts: float [_BINS], of equal bins from 0 to `top`, each with its upper end; zeros are not counted.
        top: where the last bin ends.
        largest: magnitude so far.
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(_BINS)
        self.top = self.largest = 0.0

    def add(self, magnitudes: Tensor) -> None:
        """Count magnitudes >= 0 of any shape."""
        self.largest = max(self.largest, magnitudes.max().item())
        if self.largest == 0:
            return
        self.top = self.top or self.largest
        while self.top < self.largest:
            self.top *= 2
            self.counts = torch.cat([self.counts.reshape(-1, 2).sum(1), torch.zeros(_BINS // 2)])
        # Half as long as torch.histc: a bin's number is the next whole number, and zeros have one of their own.
        bins = (magnitudes * (_BINS / self.top)).ceil_().clamp_max_(_BINS).to(torch.int32)
        counts = torch.bincount(bins.reshape(-1), minlength=_BINS + 1)[1:]
        self.counts += counts


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
        logits: of the float network for the first of them, [n, K] each: the candidates are compared there.
        search: one of SEARCHES: both kinds of candidates, or one of them.

    Returns:
        Mean squared error of the logits by candidate, the best one first; of the worse half on few images.
    """
    with parametrize.cached():  # weights do not change here: each is rounded once
        return _searched(model, batches, logits, search)


def _searched(
    model: nn.Module, batches: Sequence[Tensor], logits: Sequence[Tensor], search: str
) -> dict[str, float]:
    counts = _magnitudes(model, batches)
    candidates: dict[str, dict[PACT, float]] = {}
    if search in (MSE, "best"):
        candidates[MSE] = {pact: _least_error(pact, found) for pact, found in counts.items()}
    if search in ("percentile", "best"):
        for percentile in PERCENTILES:
            share = float(percentile) / 100
            candidates[f"{percentile} %"] = {pact: _quantile(share, found) for pact, found in counts.items()}
    errors: dict[str, float] = {}
    squares: dict[str, list[Tensor]] = {name: [] for name in candidates}
    ranked, count = list(candidates), len(logits)

    def compare(name: str, upto: int) -> None:
        """Set the error of a candidate on the first batches, of which some may be done."""
        _set(candidates[name])
        done = len(squares[name])
        for x, expected in zip(batches[done:upto], logits[done:upto], strict=True):
            squares[name].append((model(x) - expected).square().mean(1))
        errors[name] = torch.cat(squares[name]).mean().item()

    half = len(ranked)
    if few := count // _FIRST:
        for name in ranked:
            compare(name, few)
        ranked.sort(key=lambda name: errors[name])
        half = (len(ranked) + 1) // 2
    for name in ranked[:half]:
        compare(name, count)
    ranked[:half] = sorted(ranked[:half], key=lambda name: errors[name])
    _set(candidates[ranked[0]])
    return {name: errors[name] for name in ranked}


def _magnitudes(model: nn.Module, batches: Sequence[Tensor]) -> dict[PACT, _Histogram]:
    """Return for every PACT how the positive magnitudes that reach it are distributed; dead ones are left out."""
    histograms = {pact: _Histogram() for pact in quantizers(model).values() if isinstance(pact, PACT)}
    with forwards({pact: _counting(pact, histogram) for pact, histogram in histograms.items()}):
        for batch in batches:
            model(batch)
    return {pact: histogram for pact, histogram in histograms.items() if histogram.largest > 0}


def _counting(pact: PACT, histogram: _Histogram) -> Callable[[Tensor], Tensor]:
    """Return a forward that counts magnitudes and lets them through unrounded: no layer sees another's error."""

    def forward(x: Tensor) -> Tensor:
        passed = x.clamp(-pact.largest_start if pact.signed else 0, pact.largest_start)
        histogram.add(passed.abs() if pact.signed else passed)
        return passed

    return forward


def _least_error(pact: PACT, found: _Histogram) -> float:
    values = (torch.arange(_BINS) + 0.5) * (found.top / _BINS)
    alphas = torch.arange(1, _CANDIDATES + 1).unsqueeze(1) * (found.largest / _CANDIDATES)
    scale = alphas / pact.qmax
    rounded = torch.round(values / scale).clamp_max(pact.qmax) * scale
    errors = ((rounded - values).square() * found.counts).sum(1)
    return alphas[errors.argmin()].item()


def _quantile(share: float, found: _Histogram) -> float:
    reached = found.counts.double().cumsum(0) >= share * found.counts.double().sum() * (1 - 1e-9)
    return min((int(reached.int().argmax()) + 1) * found.top / _BINS, found.largest)


def _set(alphas: dict[PACT, float]) -> None:
    for pact, alpha in alphas.items():
        pact.alpha.fill_(alpha)
