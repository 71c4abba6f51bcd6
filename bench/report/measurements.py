"""What the report measures itself where it is given images: records like those of the bench commands."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from bench import saliency
from bench.accuracy import count, score
from bench.measure.data import LabelledImages
from bench.measure.streams import ImageStream, in_memory
from bench.networks.network import Network
from bench.networks.removal import MASKED_PERCENTS, PERCENTS
from bench.report.sources import HERE, Record
from bench.report.subjects import Subject, role

_FILL, _CANVAS, _TARGET = "black", "blur", "predicted"


def measurements(
    subject: Subject, test: ImageStream, samples: LabelledImages, where: dict[str, Any]
) -> Iterator[Record]:
    """Yield the accuracy of a subject's last network on all images, and the curves of all of them on the samples.

    Args:
        subject: with networks.
        test: all images.
        samples: some of them.
        where: from `bench.measure.environment.environment`.
    """
    if not subject.networks:
        return
    yield Record(HERE, accuracy(subject.networks, test) | {"environment": where})
    some = in_memory(samples.name, samples.images, samples.labels)
    curves, agreements = saliency.measure(subject.networks, some, fill=_FILL, canvas=_CANVAS, target=_TARGET)
    pairs = zip(subject.networks, curves, strict=True)
    rows = [saliency.summarize(network, found) | {"precision": role(network)} for network, found in pairs]
    yield Record(HERE, {
        "bench": "saliency", "data": samples.name, "n": len(samples.labels), "fill": _FILL, "canvas": _CANVAS,
        "target": _TARGET, "masked_percent": MASKED_PERCENTS, "percent": PERCENTS, "networks": rows,
        "agreement": [{"pair": a.pair, "spearman": a.spearman, "top_overlap": a.top_overlap} for a in agreements],
        "environment": where,
    })  # fmt: skip


def accuracy(networks: Sequence[Network], test: ImageStream) -> dict[str, Any]:
    """Return a record of the last network's scores, and how often the one before it gives another class."""
    before, last = networks[-2:] if len(networks) > 1 else (None, networks[0])
    found = count(last.logits, test, len(last.classes), against=before.logits if before is not None else None)
    scores = score(found.confusion)
    return {
        "bench": "accuracy", "model": last.name, "precision": last.precision, "engine": last.engine,
        "data": test.name, "n": int(found.confusion.sum()), "accuracy": scores.accuracy,
        "sensitivity": scores.sensitivity, "specificity": scores.specificity, "classes": list(last.classes),
        "confusion": scores.confusion.tolist(),
        "classified_differently": None if before is None else found.differing,
    }  # fmt: skip
