from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr
from skimage.metrics import structural_similarity

from runtime.explanations.agreement import MEASURES, pearson, spearman, ssim, top_20_overlap, top_overlap


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


@given(size=st.tuples(st.integers(7, 20), st.integers(7, 20)), seed=st.integers(0, 100))
def test_structural_similarity_is_that_of_scikit_image(size: tuple[int, int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    a = rng.random((2, *size)).astype(np.float32)
    b = np.clip(a + rng.normal(size=a.shape, scale=0.3), 0, None).astype(np.float32)
    for one, other, found, linear in zip(a, b, ssim(a, b), pearson(a, b), strict=True):
        expected = structural_similarity(
            one.astype(np.float64) / one.max(), other.astype(np.float64) / other.max(), data_range=1, win_size=7
        )
        # scikit-image leaves out a border of three pixels: its mean is over the same windows.
        assert found == pytest.approx(expected, abs=1e-9)
        assert linear == pytest.approx(np.corrcoef(one.ravel(), other.ravel())[0, 1], abs=1e-9)


def test_equal_maps_are_alike_by_every_measure_and_constant_ones_by_none_of_order() -> None:
    maps = np.random.default_rng(0).random((3, 5, 9)).astype(np.float32)
    for name, measure in MEASURES.items():
        np.testing.assert_allclose(measure(maps, maps), 1, err_msg=name)
        np.testing.assert_allclose(measure(maps, 7 * maps), 1, rtol=1e-6, err_msg=name)
    assert not pearson(maps, np.zeros_like(maps)).any()
    assert (top_20_overlap(maps, maps) >= top_overlap(maps, maps)).all()
