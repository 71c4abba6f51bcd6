"""Bits for every layer within a budget, from what each layer alone was seen to cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from runtime.errors import OptionError


@dataclass(frozen=True)
class LayerCost:
    """What one layer costs at each number of bits while the others keep theirs.

    Args:
        name: of the layer.
        weights: how many it has.
        cost: bits -> cost, in any unit that adds up over layers; less is better.
    """

    name: str
    weights: int
    cost: Mapping[int, float]

    def __post_init__(self) -> None:
        """Let fewer bits never cost less than more: what looks so is the error of few samples."""
        bits = sorted(self.cost, reverse=True)
        object.__setattr__(
            self, "cost", dict(zip(bits, accumulate((self.cost[b] for b in bits), max), strict=True))
        )


def assign(layers: Sequence[LayerCost], budget_bits: int) -> dict[str, int]:
    """Return bits by layer name whose weights take at most `budget_bits` together.

    Greedy: from the most bits of every layer, take again and again the step down, over one number of bits or
    several, that costs least for each bit of memory it saves of those that are still to be saved, until the budget
    is met; then give back what was saved too much, where that lowers the cost. Costs of single layers are taken to
    add up.

    Args:
        layers: measured layers; one with a single number of bits keeps it.
        budget_bits: memory of all weights.

    Raises:
        OptionError: the fewest bits of all layers need more.
    """
    least = sum(layer.weights * min(layer.cost) for layer in layers)
    if least > budget_bits:
        total = sum(layer.weights for layer in layers)
        raise OptionError(
            f"budget of {budget_bits / 8:,.0f} bytes, {budget_bits / total:.2f} bits a weight: expected at least "
            f"{least / 8:,.0f} bytes, {least / total:.2f} bits; allow more, or fewer bits (--bits, --all-layers)"
        )
    chosen = {layer.name: max(layer.cost) for layer in layers}
    while (excess := memory_bits(layers, chosen) - budget_bits) > 0:
        best = min(
            _steps(layers, chosen, down=True), key=lambda step: (step.cost / min(step.memory, excess), *step)
        )
        chosen[best.layer] = best.bits
    while True:
        free = budget_bits - memory_bits(layers, chosen)
        gains = [step for step in _steps(layers, chosen, down=False) if step.memory <= free and step.cost < 0]
        if not gains:
            return chosen
        best = min(gains, key=lambda step: (step.cost / step.memory, *step))
        chosen[best.layer] = best.bits


def memory_bits(layers: Sequence[LayerCost], chosen: Mapping[str, int]) -> int:
    """Return the memory of all weights in bits, packed."""
    return sum(layer.weights * chosen[layer.name] for layer in layers)


class _Step(NamedTuple):
    """Another number of bits for one layer: the cost it adds, the bits of memory it saves or spends."""

    cost: float
    memory: int
    layer: str
    bits: int


def _steps(layers: Sequence[LayerCost], chosen: Mapping[str, int], *, down: bool) -> Iterator[_Step]:
    for layer in layers:
        now = chosen[layer.name]
        for bits in layer.cost:
            if bits != now and (bits < now) == down:
                added = layer.cost[bits] - layer.cost[now]
                yield _Step(added, layer.weights * abs(now - bits), layer.name, bits)
