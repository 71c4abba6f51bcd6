"""Figures of others, to stand beside ours: of the papers whose methods are trained here, and the best known."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PublishedResult:
    """One printed result.

    Args:
        data: data set, as train.data names it.
        network: architecture; "" if it is not told.
        bits: of weights and activations; 32 is float, None not told.
        method: one of train.recipe.METHODS.
        accuracy: on the test split, in percent.
        source: the paper.
        masked_auc: area under the accuracy (in percent) without the 0 to 90 % most salient pixels, where printed.
    """

    data: str
    network: str
    bits: int | None
    method: str
    accuracy: float
    source: str
    masked_auc: float | None = None


_MALEKI = "Maleki et al. 2024"
_KARKEHABADI = "Karkehabadi et al. 2024"
_LAVAEI = "Lavaei et al. 2025"
_APOT = "Li et al. 2020 (APoT)"
_PACT = "Choi et al. 2018 (PACT)"
_REDBIT = "Santos et al. 2023 (RedBit)"
_MEDMNIST = "Yang et al. 2023 (MedMNIST v2, its whole training set)"

PUBLISHED = (
    PublishedResult("mnist", "resnet20", 8, "sgt", 99.35, _MALEKI),
    PublishedResult("mnist", "resnet20", 8, "plain", 99.23, _MALEKI),
    PublishedResult("mnist", "cnn2", 32, "smoot", 99.40, _KARKEHABADI, 33.16),
    PublishedResult("mnist", "cnn2", 32, "sgt", 99.35, _KARKEHABADI, 34.67),
    PublishedResult("mnist", "cnn2", 32, "plain", 99.40, _KARKEHABADI, 36.35),
    PublishedResult("mnist", "LeNet-5", 8, "plain", 99.69, _REDBIT),
    PublishedResult("mnist", "LeNet-5", 4, "plain", 99.68, _REDBIT),
    PublishedResult("mnist", "LeNet-5", 2, "plain", 99.62, _REDBIT),
    PublishedResult("fashion-mnist", "cnn2", 32, "smoot", 93.65, _KARKEHABADI, 36.18),
    PublishedResult("fashion-mnist", "cnn2", 32, "sgt", 93.35, _KARKEHABADI, 39.91),
    PublishedResult("fashion-mnist", "cnn2", 32, "plain", 93.60, _KARKEHABADI, 40.79),
    PublishedResult("cifar10", "deit_tiny", 32, "smoot", 96.35, _KARKEHABADI),
    PublishedResult("cifar10", "resnet20", 4, "plain", 92.45, _APOT),
    PublishedResult("cifar10", "resnet20", 4, "sgt", 76.12, _MALEKI),
    PublishedResult("cifar10", "resnet20", 4, "plain", 75.55, _MALEKI),
    PublishedResult("cifar10", "resnet20", 4, "plain", 90.8, _PACT),
    PublishedResult("cifar10", "resnet20", 3, "plain", 90.6, _PACT),
    PublishedResult("cifar10", "resnet20", 2, "plain", 90.96, _APOT),
    PublishedResult("cifar10", "resnet20", 2, "plain", 88.9, _PACT),
    PublishedResult("cifar100", "deit_tiny", 32, "smoot", 79.65, _KARKEHABADI),
    PublishedResult("caltech101", "resnet18", 32, "smoot", 95.10, _KARKEHABADI),
    PublishedResult("pneumoniamnist", "AutoML Vision", 32, "plain", 94.6, _MEDMNIST),
    PublishedResult("pneumoniamnist", "resnet18", 32, "plain", 85.4, _MEDMNIST),
    PublishedResult("kvasir", "", None, "asg", 79.05, _LAVAEI),
)
