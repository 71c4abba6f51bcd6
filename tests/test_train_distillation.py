from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from runtime.errors import OptionError
from train import checkpoint as checkpoints
from train import loop
from train.checkpoint import Checkpoint
from train.data.images import ImageData
from train.losses.distillation import distillation_loss, load_teacher
from train.quantization.spec import QuantSpec
from train.recipe import default_recipe


def test_loss_is_the_divergence_written_out() -> None:
    torch.manual_seed(0)
    student, teacher, temperature = torch.randn(5, 4, requires_grad=True), torch.randn(5, 4), 3.0
    p, q = (teacher / temperature).softmax(1), (student / temperature).softmax(1)
    expected = temperature**2 * (p * (p.log() - q.log())).sum(1).mean()
    assert distillation_loss(student, teacher, temperature).item() == pytest.approx(expected.item(), rel=1e-5)
    assert distillation_loss(teacher, teacher, temperature).item() == pytest.approx(0, abs=1e-6)
    # The gradient is (q - p) T / N: of the same size whatever the temperature.
    distillation_loss(student, teacher, temperature).backward()
    assert student.grad is not None
    assert torch.allclose(student.grad, temperature * (q - p) / 5, atol=1e-6)


def test_a_student_of_the_teacher_alone_learns_what_the_teacher_says(
    digits: ImageData, digits_checkpoint: Checkpoint, digits_checkpoint_path: Path, tmp_path: Path
) -> None:
    """Its labels are all wrong, and have no weight: what it knows, it has from the teacher."""
    wrong = dataclasses.replace(digits, train_labels=(digits.train_labels + 1) % 10)
    recipe = dataclasses.replace(
        default_recipe("digits", "plain"), epochs=5, teacher=str(digits_checkpoint_path), teacher_weight=1.0
    )
    student = loop.fit(loop.start("cnn2", wrong, QuantSpec(8), recipe), wrong, tmp_path / "student.pt")
    assert student.test_accuracy > 85
    assert checkpoints.load(tmp_path / "student.pt").recipe.teacher == str(digits_checkpoint_path)


def test_a_teacher_of_other_images_is_refused(digits_checkpoint_path: Path, resnet_checkpoint: Checkpoint) -> None:
    assert not any(
        p.requires_grad for p in load_teacher(str(digits_checkpoint_path), resnet_checkpoint).parameters()
    )
    other = dataclasses.replace(resnet_checkpoint, classes=("a", "b"))
    with pytest.raises(
        OptionError, match=r"teacher .*: classes or image format of digits, expected those of digits"
    ):
        load_teacher(str(digits_checkpoint_path), other)
