"""Knowledge distillation: a trained network's probabilities as a second, softer label (Hinton et al. 2015)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from runtime.errors import OptionError
from train import checkpoint as checkpoints
from train.checkpoint import Checkpoint


def load_teacher(path: str, student: Checkpoint) -> nn.Module:
    """Return the network of a checkpoint, in evaluation mode, without gradients.

    Raises:
        FileError: `path` is no checkpoint.
        OptionError: it was trained on other classes, or expects other images than the student.
    """
    teacher = checkpoints.load(path)
    if (teacher.classes, teacher.input) != (student.classes, student.input):
        raise OptionError(f"teacher {path}: classes or image format of {teacher.recipe.data}, "
                          f"expected those of {student.recipe.data}; name a checkpoint trained on it")  # fmt: skip
    return teacher.network().requires_grad_(False)


def distillation_loss(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Return T^2 KL(teacher || student) of logits [N, K] divided by T, the mean over images (section 2)."""
    student = F.log_softmax(logits / temperature, 1)
    teacher = F.log_softmax(teacher_logits / temperature, 1)
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)
