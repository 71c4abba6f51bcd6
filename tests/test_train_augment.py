from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from train.data.augment import Augmentation, crop, erase, jitter, warp


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(st.integers(2, 12), st.integers(2, 12), st.integers(0, 3), st.booleans(), st.integers(0, 999))
@settings(max_examples=40)
def test_crops_are_crops_of_the_padded_image_or_with_flips_its_mirror(
    h: int, w: int, pad: int, flip: bool, seed: int
) -> None:
    images = torch.arange(2 * 3 * h * w).remainder(251).add(1).to(torch.uint8).reshape(2, 3, h, w)
    padded = torch.nn.functional.pad(images, (pad,) * 4)
    changed = crop(images, pad, flip=flip, generator=generator(seed))
    for original, new in zip(padded, changed, strict=True):
        crops = [original[:, r : r + h, c : c + w] for r in range(2 * pad + 1) for c in range(2 * pad + 1)]
        mirrored = [part.flip(2) for part in crops] if flip else []
        assert any(torch.equal(new, part) for part in crops + mirrored)


@pytest.mark.parametrize(("flip", "share"), [(True, 0.5), (False, 0.0)])
def test_crops_move_and_flips_mirror_half(flip: bool, share: float) -> None:
    images = torch.zeros(2000, 1, 5, 5, dtype=torch.uint8)
    images[:, 0, 2, 0] = 255
    moved = crop(images, 1, flip=flip, generator=generator()).reshape(2000, 25).float()
    columns = (moved.argmax(1) % 5)[moved.amax(1) > 0]
    assert float((columns >= 3).float().mean()) == pytest.approx(share, abs=0.05)
    assert set((moved.argmax(1) // 5)[moved.amax(1) > 0].tolist()) == {1, 2, 3}


@given(st.integers(1, 3), st.integers(3, 30), st.integers(3, 30), st.integers(0, 999))
@settings(max_examples=30)
def test_a_warp_by_nothing_is_the_image_bit_for_bit(channels: int, h: int, w: int, seed: int) -> None:
    images = torch.randint(0, 256, (2, channels, h, w), generator=generator(seed)).to(torch.uint8)
    assert torch.equal(warp(images, 0.0, 0.0, 0.0, generator(seed)), images)


@pytest.mark.parametrize("size", [(41, 41), (41, 81)])
def test_rotation_keeps_lengths_and_reaches_its_bound(size: tuple[int, int]) -> None:
    """A bar of 30 pixels through the centre stays one, at angles up to the bound to both sides."""
    height, width = size
    images = torch.zeros(300, 1, height, width, dtype=torch.uint8)
    images[:, :, height // 2, width // 2 - 15 : width // 2 + 16] = 255
    mass = warp(images, 30.0, 0.0, 0.0, generator())[:, 0].double()
    rows, columns = torch.arange(height) - height // 2, torch.arange(width) - width // 2
    total = mass.sum((1, 2))
    xx, yy = (mass * columns**2).sum((1, 2)) / total, (mass * rows[:, None] ** 2).sum((1, 2)) / total
    xy = (mass * rows[:, None] * columns).sum((1, 2)) / total
    degrees = torch.rad2deg(torch.atan2(2 * xy, xx - yy) / 2)
    assert -31 < float(degrees.min()) < -27
    assert 27 < float(degrees.max()) < 31
    assert (xx + yy).tolist() == pytest.approx([80.0] * 300, rel=0.05)  # (30^2 + 2 * 30) / 12


def test_zoom_changes_width_and_height_each_on_its_own() -> None:
    images = torch.zeros(300, 1, 40, 40, dtype=torch.uint8)
    images[:, :, 10:30, 10:30] = 255
    zoomed = warp(images, 0.0, 0.2, 0.0, generator())[:, 0].float() / 255
    widths, heights = zoomed.amax(1).sum(1), zoomed.amax(2).sum(1)
    for sides in (widths, heights):
        assert 16 < float(sides.min()) < 17.5  # 20 exp(-0.2) = 16.4
        assert 23 < float(sides.max()) < 25  # 20 exp(0.2) = 24.4
    assert abs(float(torch.corrcoef(torch.stack([widths, heights]))[0, 1])) < 0.2


def test_elastic_displacements_have_the_size_asked_for() -> None:
    """A pixel's brightness is its column, so that what is read tells the displacement."""
    images = (torch.arange(64) * 4).to(torch.uint8).expand(400, 1, 64, 64)
    moved = warp(images, 0.0, 0.0, 1.5, generator())[:, 0].float() / 4 - torch.arange(64)
    at_control_points = moved[:, 16:48:15, 16:48:15]  # the border reads black beyond the edge
    assert float(at_control_points.mean()) == pytest.approx(0, abs=0.15)
    assert 1.0 < float(at_control_points.std()) < 1.8


def test_an_erased_square_is_grey_and_everywhere() -> None:
    images = torch.zeros(500, 2, 9, 7, dtype=torch.uint8)
    erased = erase(images, 3, generator())
    assert set(erased.unique().tolist()) == {0, 128}
    assert torch.equal(erased[:, 0], erased[:, 1])
    area = (erased[:, 0] == 128).sum((1, 2))
    assert set(area.tolist()) == {4, 6, 9}  # in a corner, at an edge, inside
    assert (erased[:, 0] == 128).float().mean(0).min() > 0.03


def test_an_augmentation_is_repeatable_and_one_without_fields_does_nothing() -> None:
    images = torch.randint(0, 256, (8, 3, 16, 16), generator=generator()).to(torch.uint8)
    every = Augmentation(True, 2, 10.0, 0.1, 0.7, 4)
    assert torch.equal(every(images, generator(1)), every(images, generator(1)))
    assert not torch.equal(every(images, generator(1)), every(images, generator(2)))
    assert every(images, generator(1)).dtype == torch.uint8
    assert Augmentation()(images, generator()) is images


@pytest.mark.parametrize("channels", [1, 3])
def test_jitter_is_torchvisions_with_factors_of_each_image(channels: int) -> None:
    from torchvision.transforms.v2 import functional

    images = torch.randint(0, 256, (6, channels, 9, 7), dtype=torch.uint8, generator=generator(1))
    found = jitter(images, 0.4, generator(2))
    factors = 1 + 0.4 * (torch.rand(3, 6, 1, 1, 1, generator=generator(2)) * 2 - 1)
    for image, result, (brightness, contrast, saturation) in zip(
        images, found, factors.flatten(1).T.tolist(), strict=True
    ):
        x = functional.adjust_brightness(image.float() / 255, brightness)
        x = functional.adjust_saturation(functional.adjust_contrast(x, contrast), saturation)
        assert (x * 255 - result.float()).abs().max() < 0.51
    assert not torch.equal(found, images)
    assert torch.equal(jitter(images, 0.0, generator(2)), images)
