"""Pictures of explanations: their size, their colours for every kind of vision, their captions."""

from __future__ import annotations

import matplotlib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime import Explanation
from runtime.errors import ImageError, OptionError
from runtime.explanations.picture import COLORMAPS, blend, colored, enlarged, levels

# Linear RGB as protanopes, deuteranopes and tritanopes see it (Machado et al. 2009, severity 1).
VISIONS = {
    "all": np.eye(3),
    "protanopia": np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
                            [-0.003882, -0.048116, 1.051998]]),
    "deuteranopia": np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
                              [-0.011820, 0.042940, 0.968881]]),
    "tritanopia": np.array([[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
                            [0.004733, 0.691367, 0.303900]]),
}  # fmt: skip


def luminance(colors: np.ndarray, vision: str = "all") -> np.ndarray:
    """Return the relative luminance (WCAG 2.2) of sRGB colours [..., 3] as one kind of vision sees them."""
    share = np.asarray(colors) / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    seen = np.clip(linear @ VISIONS[vision].T, 0, 1)
    found: np.ndarray = seen @ np.array([0.2126, 0.7152, 0.0722])
    return found


def explanation(size: tuple[int, ...] = (28, 28), label: str = "seven") -> Explanation:
    rng = np.random.default_rng(0)
    return Explanation(
        map=rng.random(size[:2], np.float32) ** 4, target=np.int64(1), label=label, logits=np.array([0, 2.0, 1]),
        attribution=np.zeros((1, *size[:2]), np.float32), method="input_x_gradient",
        images=rng.integers(0, 256, size, dtype=np.uint8),
    )  # fmt: skip


@pytest.mark.parametrize("name", COLORMAPS)
def test_the_scales_are_matplotlibs(name: str) -> None:
    level = np.linspace(0, 1, 200)
    assert np.abs(colored(level, name) - 255 * matplotlib.colormaps[name](level)[:, :3]).max() < 20


@pytest.mark.parametrize("vision", VISIONS)
@pytest.mark.parametrize("name", COLORMAPS)
@pytest.mark.parametrize("frame", [0, 128, 255])
def test_the_most_salient_pixels_are_the_lightest_for_every_eye(vision: str, name: str, frame: int) -> None:
    image = np.full((1, 101), frame, np.uint8)
    picture = blend(image, np.linspace(0, 1, 101, dtype=np.float32)[None], colormap=name)
    light = luminance(picture[0], vision)
    contrast = (light[100] + 0.05) / (light[0] + 0.05)
    assert contrast > (3 if name == "inferno" else 2.7)  # WCAG 2.2 asks 3 of graphics
    assert light.argmax() >= 95
    assert np.diff(luminance(colored(np.linspace(0, 1, 33), name), vision)).min() > -1e-3


@given(height=st.integers(1, 400), width=st.integers(1, 400))
def test_the_shorter_side_has_256_pixels(height: int, width: int) -> None:
    pixels = np.zeros((height, width, 3), np.uint8)
    large = enlarged(pixels)
    assert min(large.shape[:2]) >= 256
    assert abs(large.shape[1] / large.shape[0] - width / height) <= 0.02 * width / height
    if min(height, width) >= 256:
        assert large is pixels


def test_tiny_pixels_stay_squares() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (28, 30, 3), dtype=np.uint8)
    large = enlarged(pixels)
    assert large.shape == (280, 300, 3)
    np.testing.assert_array_equal(large[5::10, 5::10], pixels)
    np.testing.assert_array_equal(large[:10, :10], np.broadcast_to(pixels[0, 0], (10, 10, 3)))


def test_a_map_of_few_pixels_is_seen_and_one_of_none_is_dark() -> None:
    few = np.zeros((100, 100), np.float32)
    few[3, 4] = 1e-6
    assert levels(few)[3, 4] == 1
    assert not levels(np.zeros((4, 4), np.float32)).any()


def test_panels_and_captions() -> None:
    one, other = explanation(), explanation(label="one")
    plain = one.picture(caption=False)
    assert plain.shape == (280, 280, 3)
    captioned = one.picture()
    np.testing.assert_array_equal(captioned[:280], plain)
    strip = captioned[280:]
    assert strip.min() < 80 < 200 < strip.max()
    side = one.picture(side_by_side=True)
    assert side.shape == (captioned.shape[0], 3 * 280 + 2 * 6, 3)
    np.testing.assert_array_equal(side[:280, 572:], plain)
    grey = np.repeat(np.repeat(one.images, 10, 0), 10, 1)
    np.testing.assert_array_equal(side[:280, :280], np.stack([grey] * 3, axis=-1))
    both = one.picture(side_by_side=True, runner_up=other)
    assert both.shape[1] == 4 * 280 + 3 * 6
    long = explanation(label="a name of many words that one line of the picture does not hold")
    assert long.picture().shape[0] > captioned.shape[0]


def test_what_cannot_be_drawn() -> None:
    with pytest.raises(OptionError, match="colormap 'jet': expected one of inferno, viridis, cividis"):
        explanation().picture(colormap="jet")
    with pytest.raises(ImageError, match="expected uint8"):
        blend(np.zeros((4, 4, 2), np.uint8), np.zeros((4, 4), np.float32))
