"""Ties: values so near the border between two codes that float32 may take them to either."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from runtime.errors import ModelError
from train.quantization.quantizers import PACT, InputQuantizer

# How far from the border between two codes, in steps, float32 may take a sum for one on the other side. Of the
# codes that differed in ResNet-18, MobileNetV2 and DeiT-tiny, fresh from `quantize`, the farthest was at 5e-5.
TIE_STEPS = 2.0**-10


def check_ties(difference: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> None:
    """Refuse codes that differ where no tie explains it.

    Args:
        difference: by quantizer, how far each code is from the trained network's.
        exact: the values they were rounded from, in steps, computed in float64.

    Raises:
        ModelError: a code differs by more than one, or where its value is not on the border between two codes.
    """
    for name, steps in difference.items():
        differs = steps > 0
        if not differs.any():
            continue
        wrong = int(((steps[differs] > 1) | ~_tied(exact[name][differs])).sum())
        if wrong:
            raise ModelError(
                f"activation {name}: {wrong} of {steps.numel()} codes differ from the trained network's, by up to "
                f"{int(steps.max())}, where no rounding explains it; the export is not exact"
            )


def largest_tied_share(network: nn.Module, exact: Mapping[str, Tensor]) -> float:
    """Return which share of a quantizer's values lies at ties, of that quantizer which has most.

    Args:
        network: the trained network.
        exact: by quantizer, the values that it rounds, in steps, computed in float64; clipped ones do not count.
    """
    shares = [0.0]
    for name, values in exact.items():
        quantizer = network.get_submodule(name)
        assert isinstance(quantizer, PACT | InputQuantizer)
        inside = (values > quantizer.qmin - 1) & (values < quantizer.qmax + 1) & (values != 0)
        if count := int(inside.count_nonzero()):
            shares.append(int((_tied(values) & inside).count_nonzero()) / count)
    return max(shares)


def _tied(values: Tensor) -> Tensor:
    """Return which values, in steps, lie at the border between two codes."""
    return values.frac().abs_().sub_(0.5).abs_() < TIE_STEPS


def nearly_tied(trained: Tensor, in_float64: Tensor) -> Tensor:
    """Return of which images [n] the two best logits lie closer than rounding moves logits: bool."""
    moved = (trained - in_float64).abs().max()
    best = trained.topk(2, dim=1).values
    return best[:, 0] - best[:, 1] <= 2 * moved
