from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from train import loop
from train.data.balance import balanced_batches, class_weights
from train.data.images import ImageData
from train.losses.guidance import cross_entropy_loss
from train.quantization.spec import QuantSpec
from train.recipe import METHODS, default_recipe


@given(st.lists(st.integers(0, 50), min_size=2, max_size=6).filter(any))
def test_weights_average_to_one_and_make_classes_equal(counts: list[int]) -> None:
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    weights = class_weights(labels, len(counts))
    assert weights[labels].mean().item() == pytest.approx(1, rel=1e-5)
    per_class = [weights[k].item() * count for k, count in enumerate(counts) if count]
    assert per_class == pytest.approx([per_class[0]] * len(per_class), rel=1e-5)
    assert all(weights[k] == 0 for k, count in enumerate(counts) if not count)


def test_weighted_loss_is_the_mean_of_weighted_images() -> None:
    logits = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    labels, weights = torch.tensor([0, 0, 0, 0, 0, 1, 1, 2]), torch.tensor([0.5, 1.0, 2.0])
    found = cross_entropy_loss(logits, labels, class_weights=weights)
    expected = sum(weights[y] * F.cross_entropy(row[None], y[None]) for row, y in zip(logits, labels, strict=True))
    assert found.item() == pytest.approx(float(expected) / 8, rel=1e-6)
    # Halves of the batch average to the same, as several processes need.
    halves = [cross_entropy_loss(logits[i : i + 4], labels[i : i + 4], class_weights=weights) for i in (0, 4)]
    assert torch.stack(halves).mean().item() == pytest.approx(found.item(), rel=1e-6)
    assert torch.equal(cross_entropy_loss(logits, labels), F.cross_entropy(logits, labels))


def test_balanced_batches_draw_rare_classes_as_often() -> None:
    labels = torch.arange(3).repeat_interleave(torch.tensor([900, 90, 10]))
    batches = list(balanced_batches(labels, 3, 100, generator=torch.Generator().manual_seed(0)))
    assert [len(batch) for batch in batches] == [100] * 10
    drawn = labels[torch.cat(batches)].bincount()
    assert drawn.min().item() > 280
    assert drawn.max().item() < 390


@pytest.mark.parametrize("method", METHODS)
def test_every_method_weights_its_cross_entropy(digits: ImageData, tmp_path: Path, method: str) -> None:
    few = dataclasses.replace(digits, train_images=digits.train_images[:64], train_labels=digits.train_labels[:64])
    recipe = dataclasses.replace(default_recipe("digits", method), epochs=1, batch_size=64)
    losses = []
    for weighted in (False, True):
        recipe = dataclasses.replace(recipe, class_weights=weighted)
        path = tmp_path / f"{weighted}.pt"
        losses.append(loop.fit(loop.start("cnn2", few, QuantSpec(8), recipe), few, path).history[0])
    assert losses[0]["train_cross_entropy"] != losses[1]["train_cross_entropy"]
    assert losses[1]["train_cross_entropy"] == pytest.approx(losses[0]["train_cross_entropy"], rel=0.1)


def test_balanced_sampling_finds_a_rare_class(digits: ImageData, tmp_path: Path) -> None:
    rare = torch.where(digits.train_labels == 8)[0][5:]
    kept = torch.ones(len(digits.train_labels), dtype=torch.bool).index_fill_(0, rare, False)
    few = dataclasses.replace(
        digits, train_images=digits.train_images[kept], train_labels=digits.train_labels[kept]
    )
    eights = digits.test_labels == 8
    found = []
    for balanced in (False, True):
        recipe = dataclasses.replace(default_recipe("digits", "plain"), epochs=3, balanced_sampling=balanced)
        checkpoint = loop.fit(loop.start("cnn2", few, QuantSpec(8), recipe), few, tmp_path / "a.pt")
        model = checkpoint.network()
        found.append(loop.evaluate(checkpoint, model, digits.test_images[eights], digits.test_labels[eights]))
    assert found[1] > found[0] + 20
