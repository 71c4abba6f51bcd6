"""How good contenders are at what they are compared in: classes and maps, on the same images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from bench import saliency
from bench.accuracy import confusion_matrix, score
from bench.measure.streams import ImageStream
from bench.networks.network import Network
from bench.peers.contenders import Contender
from runtime import command


@dataclass(frozen=True)
class Quality:
    """What one contender gets right, in percent.

    Args:
        accuracy: of the images.
        sensitivity: macro, one class against the rest.
        specificity: likewise.
        agreement: images put into the same class as by the float network in PyTorch.
    """

    accuracy: float
    sensitivity: float
    specificity: float
    agreement: float


@dataclass(frozen=True)
class MapQuality:
    """What one contender's maps are worth.

    Args:
        masked_auc: area under accuracy in percent without the 0 to 90 % most salient pixels, made black.
        spearman: rank correlation with the maps of the float network in PyTorch, mean.
        top_overlap: share of the 10 % most salient pixels in common with it, mean.
    """

    masked_auc: float
    spearman: float
    top_overlap: float


def qualities(found: Mapping[str, Contender], test: ImageStream, classes: int) -> dict[str, Quality]:
    """Return the quality of every contender on the same images; the first of them is what they agree with."""
    predicted: dict[str, list[np.ndarray]] = {name: [] for name in found}
    truth: list[np.ndarray] = []
    for images, labels in command.progress(test.batches(), label="accuracy, images / 64", total=test.batch_count):
        truth.append(labels)
        for name, contender in found.items():
            predicted[name].append(contender.classify(images).argmax(1))
    labels = np.concatenate(truth)
    joined = {name: np.concatenate(parts) for name, parts in predicted.items()}
    reference = next(iter(joined.values()))
    scored = {}
    for name, values in joined.items():
        scores = score(confusion_matrix(labels, values, classes))
        agreement = 100 * float((values == reference).mean())
        scored[name] = Quality(scores.accuracy, scores.sensitivity, scores.specificity, agreement)
    return scored


def map_qualities(networks: Mapping[str, Network], test: ImageStream, *, workers: int) -> dict[str, MapQuality]:
    """Return the quality of every network's maps of the predicted class; the first is what they agree with."""
    named = list(networks)
    sums, agreements = saliency.measure(
        list(networks.values()), test, fill="black", canvas="blur", target="predicted", workers=workers
    )
    with_first = {named[a.pair[1]]: (a.spearman, a.top_overlap) for a in agreements if a.pair[0] == 0}
    return {
        name: MapQuality(
            saliency.summarize(networks[name], found)["masked_auc"], *with_first.get(name, (1.0, 1.0))
        )
        for name, found in zip(named, sums, strict=True)
    }
