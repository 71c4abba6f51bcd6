from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from runtime.agreement import spearman, top_overlap


@given(st.integers(0, 9999), st.integers(2, 9), st.integers(2, 50))
def test_spearman_is_scipys_with_and_without_ties(seed: int, side: int, levels: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, levels, (2, 3, side, side)).astype(np.float32)
    for found, x, y in zip(spearman(a, b), a, b, strict=True):
        if x.min() == x.max() or y.min() == y.max():
            assert found == 0
        else:
            assert found == pytest.approx(spearmanr(x.ravel(), y.ravel()).statistic, abs=1e-12)


def test_top_overlap_of_known_maps() -> None:
    a = np.arange(100.0).reshape(1, 10, 10)
    assert top_overlap(a, a).tolist() == [1.0]
    assert top_overlap(a, -a).tolist() == [0.0]
    half = a.copy()
    half[0, 9, :5] = -1  # five of the ten most salient fall out
    assert top_overlap(a, half).tolist() == [0.5]
    assert top_overlap(a, half, share=0.001).tolist() == [1.0]
