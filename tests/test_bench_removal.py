from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import trapezoid

from bench.networks.network import Network
from bench.networks.removal import (
    FILLS,
    MASKED_PERCENTS,
    PERCENTS,
    TARGETS,
    area,
    filling,
    overwrite,
    removal_curves,
    salience_ranks,
)


def network(
    logits: Callable[[np.ndarray], np.ndarray],
    saliency: Callable[[np.ndarray, np.ndarray], np.ndarray],
    shape: tuple[int, int, int],
    classes: int,
) -> Network:
    def explain(images: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        found = logits(images)
        return found, saliency(images, np.where(target < 0, found.argmax(1), target))

    names = tuple(str(c) for c in range(classes))
    return Network("toy", "float", "numpy", "toy", shape, names, logits, explain)


def one_pixel_network(row: int, column: int, slope: float) -> Network:
    """Class 1 where the pixel is bright: logits 0 and slope * (level - 100); no other pixel has a gradient."""

    def logits(images: np.ndarray) -> np.ndarray:
        bright = slope * (images[:, row, column, 0].astype(np.float32) - 100)
        return np.stack([np.zeros_like(bright), bright], 1)

    def saliency(images: np.ndarray, target: np.ndarray) -> np.ndarray:
        maps = np.zeros(images.shape[:3], np.float32)
        maps[:, row, column] = np.where(target == 1, abs(slope), 0)
        return maps

    return network(logits, saliency, (10, 10, 1), 2)


def two_layer_network(seed: int, shape: tuple[int, int, int], classes: int) -> Network:
    rng = np.random.default_rng(seed)
    first, second = rng.normal(size=(math.prod(shape), 16)) / 100, rng.normal(size=(16, classes))

    def hidden(images: np.ndarray) -> np.ndarray:
        return (images.reshape(len(images), -1) - 100.0) @ first

    def logits(images: np.ndarray) -> np.ndarray:
        return np.maximum(hidden(images), 0) @ second

    def saliency(images: np.ndarray, target: np.ndarray) -> np.ndarray:
        gradient = ((hidden(images) > 0) * second.T[target]) @ first.T
        return np.abs(gradient).reshape(len(images), *shape).max(3)

    return network(logits, saliency, shape, classes)


def test_a_network_that_looks_at_one_pixel_has_closed_form_curves() -> None:
    slope, level = 0.02, 200
    toy = one_pixel_network(3, 4, slope)
    images = np.full((3, 10, 10, 1), level, np.uint8)
    curves, maps = removal_curves(toy, images, np.array([1, 1, 0]), canvas="black")
    bright = 1 / (1 + math.exp(-slope * (level - 100)))
    dark = 1 / (1 + math.exp(-slope * (0 - 100)))
    assert maps.sum() == pytest.approx(3 * slope)
    assert curves.correct.tolist() == [[True] + [False] * 9] * 2 + [[False] + [True] * 9]
    np.testing.assert_allclose(curves.deletion, [[bright] + [dark] * 10] * 3, rtol=1e-6)
    np.testing.assert_allclose(curves.insertion, [[dark] + [bright] * 10] * 3, rtol=1e-6)
    assert area(100.0 * curves.correct) == pytest.approx([5, 5, 85])
    assert area(curves.deletion) == pytest.approx([0.05 * bright + 0.95 * dark] * 3)
    assert area(curves.insertion) == pytest.approx([0.05 * dark + 0.95 * bright] * 3)


def test_a_map_that_points_elsewhere_loses_nothing_until_its_pixel_goes() -> None:
    honest = one_pixel_network(9, 9, 0.02)  # the last pixel in raster order
    misled = network(honest.logits, lambda images, _: np.zeros(images.shape[:3], np.float32), (10, 10, 1), 2)
    images = np.full((1, 10, 10, 1), 200, np.uint8)
    curves, _ = removal_curves(misled, images, np.array([1]))
    assert curves.correct.tolist() == [[True] * 10]
    assert area(100.0 * curves.correct) == pytest.approx([90])
    assert (curves.deletion[0, :10] == curves.deletion[0, 0]).all()
    assert curves.deletion[0, 10] < 0.2


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("target", TARGETS)
def test_curves_are_those_of_a_literal_transcription(fill: str, target: str) -> None:
    """Image by image, share by share and pixel by pixel, as the definitions read."""
    shape = (5, 7, 3)
    toy = two_layer_network(0, shape, 4)
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (6, *shape), dtype=np.uint8)
    labels = rng.integers(0, 4, 6)
    curves, _ = removal_curves(toy, images, labels, fill=fill, canvas="mean", target=target, first=40)
    removed, canvas = filling(images, fill, first=40), filling(images, "mean")
    for n in range(6):
        logits = toy.logits(images[n : n + 1])[0]
        explained = int(labels[n]) if target == "true" else int(logits.argmax())
        _, (saliency,) = toy.explain(images[n : n + 1], np.array([explained]))
        pixels = sorted(
            ((row, column) for row in range(5) for column in range(7)),
            key=lambda pixel: (-saliency[pixel], pixel),
        )
        for position, percent in enumerate(range(0, 101, 10)):
            without, only = images[n].copy(), canvas[n].copy()
            for pixel in pixels[: math.floor(percent * 35 / 100)]:
                without[pixel] = removed[n][pixel]
                only[pixel] = images[n][pixel]
            for image, found in ((without, curves.deletion), (only, curves.insertion)):
                exponentials = [math.exp(v) for v in toy.logits(image[None])[0].astype(float)]
                expected = exponentials[explained] / sum(exponentials)
                assert found[n, position] == pytest.approx(expected, rel=1e-9)
            if percent < 100:
                assert curves.correct[n, position] == (toy.logits(without[None])[0].argmax() == labels[n])


def test_the_area_is_scipys_trapezoid_in_float64() -> None:
    rng = np.random.default_rng(0)
    curves = rng.random((50, 10), dtype=np.float32)
    expected = trapezoid(curves.astype(np.float64), np.array(MASKED_PERCENTS) / 100, axis=1)
    assert area(curves).dtype == np.float64
    np.testing.assert_allclose(area(curves), expected, rtol=1e-14)
    # 2**25 + 1 is no float32: halves that cancel are kept.
    assert area(np.array([2.0**25 + 1, 1.0, -(2.0**25)])) == pytest.approx(0.15, rel=1e-7)
    assert area(np.full(len(MASKED_PERCENTS), 100.0)) == pytest.approx(90)
    assert area(np.ones(len(PERCENTS))) == pytest.approx(1)


@given(st.integers(0, 9999), st.integers(1, 4), st.integers(1, 9), st.integers(1, 9), st.integers(1, 5))
def test_ranks_go_from_the_most_salient_pixel_in_raster_order_where_equal(
    seed: int, n: int, height: int, width: int, levels: int
) -> None:
    maps = np.random.default_rng(seed).integers(0, levels, (n, height, width)).astype(np.float32)
    for one, ranks in zip(maps.reshape(n, -1), salience_ranks(maps).reshape(n, -1), strict=True):
        assert ranks[sorted(range(one.size), key=lambda i: (-one[i], i))].tolist() == list(range(one.size))


@given(
    st.integers(0, 9999), st.sampled_from(PERCENTS), st.integers(1, 9), st.integers(1, 9), st.sampled_from([1, 3])
)
def test_the_stated_number_of_pixels_is_overwritten_in_all_channels(
    seed: int, percent: int, height: int, width: int, channels: int
) -> None:
    maps = np.random.default_rng(seed).random((2, height, width))
    ranks = salience_ranks(maps)
    zeros, ones = np.zeros((2, height, width, channels), np.uint8), np.ones((2, height, width, channels), np.uint8)
    found = overwrite(zeros, ones, ranks, percent)
    assert found.dtype == np.uint8
    count = math.floor(percent / 100 * height * width + 1e-9)
    assert found.sum((1, 2, 3)).tolist() == [count * channels] * 2
    assert (found.min(3) == found.max(3)).all()
    for one, taken in zip(maps, found[..., 0] == 1, strict=True):
        if 0 < count < height * width:
            assert one[taken].min() >= one[~taken].max()


@pytest.mark.parametrize("fill", FILLS)
def test_fillings_do_not_depend_on_the_batch(fill: str) -> None:
    images = np.random.default_rng(0).integers(30, 200, (6, 9, 8, 3), dtype=np.uint8)
    whole = filling(images, fill, first=10)
    parts = np.concatenate([filling(images[:4], fill, first=10), filling(images[4:], fill, first=14)])
    assert whole.dtype == np.uint8
    assert whole.shape == images.shape
    assert np.array_equal(whole, parts)


def test_fillings_hold_what_their_names_say() -> None:
    images = np.random.default_rng(0).integers(30, 200, (2, 40, 40, 3), dtype=np.uint8)
    images[:, :20] //= 2
    assert not filling(images, "black").any()
    assert (filling(images, "grey") == 128).all()
    means = images.astype(float).mean((1, 2))
    assert np.abs(filling(images, "mean") - means[:, None, None]).max() <= 0.5
    for image, noise in zip(images, filling(images, "random"), strict=True):
        assert (noise.min(), noise.max()) == (image.min(), image.max())  # 4,800 draws of 185 levels
        assert noise.mean() == pytest.approx((int(image.min()) + int(image.max())) / 2, abs=3)
    assert len({filling(images, "random", first=n).tobytes() for n in range(5)}) == 5


def test_blur_is_the_gaussian_of_scipy_and_leaves_a_constant_alone() -> None:
    from scipy.ndimage import gaussian_filter

    images = np.random.default_rng(0).integers(0, 256, (2, 28, 33, 3), dtype=np.uint8)
    expected = gaussian_filter(images.astype(np.float64), sigma=(0, 5, 5, 0), mode="nearest", radius=15)
    assert np.abs(filling(images, "blur") - expected).max() < 0.501
    assert (filling(np.full((1, 9, 9, 1), 77, np.uint8), "blur") == 77).all()
