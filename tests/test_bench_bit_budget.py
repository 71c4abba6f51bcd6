from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.layers.bit_budget import LayerCost, assign, memory_bits
from runtime.errors import OptionError

BITS = (2, 3, 4, 8)


@st.composite
def layers(draw: st.DrawFn) -> list[LayerCost]:
    costs = st.fixed_dictionaries({bits: st.floats(0, 100) for bits in BITS})
    return [
        LayerCost(f"l{n}", draw(st.integers(1, 1000)), draw(costs))
        for n in range(draw(st.integers(1, 6)))
    ]  # fmt: skip


@given(found=layers(), share=st.fractions(0, 1))
def test_any_budget_that_can_be_met_is_met_and_nothing_that_helps_is_left_unspent(
    found: list[LayerCost], share: Fraction
) -> None:
    total = sum(layer.weights for layer in found)
    budget = int(total * (2 + 6 * share))
    chosen = assign(found, budget)
    used = memory_bits(found, chosen)
    assert used <= budget
    assert set(chosen.values()) <= set(BITS)
    for layer in found:
        for bits in BITS:
            if bits > chosen[layer.name] and used + layer.weights * (bits - chosen[layer.name]) <= budget:
                assert layer.cost[bits] == layer.cost[chosen[layer.name]]


@given(
    falls=st.lists(st.lists(st.integers(0, 1000), min_size=2, max_size=2), min_size=1, max_size=4),
    spent=st.integers(0, 8),
)
def test_where_each_bit_less_costs_more_than_the_one_before_the_greedy_choice_is_the_best(
    falls: list[list[int]], spent: int
) -> None:
    # Layers of one size, one bit a step, convex costs: then greedy is optimal.
    found = []
    for n, fall in enumerate(falls):
        first, second = sorted(fall)
        found.append(LayerCost(f"l{n}", 10, {4: 0, 3: first, 2: first + second}))
    budget = 10 * (2 * len(found) + min(spent, 2 * len(found)))
    chosen = assign(found, budget)
    cost = sum(layer.cost[chosen[layer.name]] for layer in found)
    names = [layer.name for layer in found]
    best = min(
        sum(layer.cost[bits] for layer, bits in zip(found, choice, strict=True))
        for choice in itertools.product((2, 3, 4), repeat=len(found))
        if memory_bits(found, dict(zip(names, choice, strict=True))) <= budget
    )
    assert cost == best


def test_the_large_cheap_layer_gives_first() -> None:
    found = [LayerCost("small", 100, {8: 0, 4: 1, 2: 5}), LayerCost("large", 1000, {8: 0, 4: 1, 2: 5})]
    assert assign(found, 1100 * 8) == {"small": 8, "large": 8}
    assert assign(found, 1100 * 5) == {"small": 8, "large": 4}
    assert assign(found, 1100 * 4) == {"small": 4, "large": 4}
    assert assign(found, 1100 * 2) == {"small": 2, "large": 2}


def test_fewer_bits_that_seem_to_help_count_as_free() -> None:
    layer = LayerCost("l", 10, {2: 3.0, 8: 0.5, 4: 0.2, 3: 0.1})
    assert layer.cost == {8: 0.5, 4: 0.5, 3: 0.5, 2: 3.0}


def test_a_layer_of_one_choice_keeps_it_and_a_budget_below_all_is_refused() -> None:
    found = [LayerCost("first", 100, {8: 0.0}), LayerCost("next", 300, {8: 0, 2: 1})]
    assert assign(found, 1400) == {"first": 8, "next": 2}
    message = r"^budget of 174 bytes, 3.48 bits a weight: expected at least 175 bytes, 3.50 bits; allow more"
    with pytest.raises(OptionError, match=message):
        assign(found, 1392)
