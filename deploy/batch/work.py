"""What a worker does: one part of the plan, from encoded images to a Parquet file."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deploy.batch.arrow import write_rows
from deploy.batch.parts import Part, Settings
from deploy.batch.reading import images_of
from runtime import Classifier
from runtime.errors import ClearpactError
from runtime.images import to_batch
from runtime.manifest import Manifest
from runtime.prediction import softmax
from runtime.reference import in_distribution_scores
from runtime.resizing import resize_maps

BATCH = 32  # images in one run of the engine, which are all that is held decoded


@dataclass(frozen=True)
class Job:
    """What all workers are given.

    Args:
        model: path of the model file.
        engine: of it; None takes the one it was exported for.
        folder: of results.
        settings: of all results.
    """

    model: str
    engine: str | None
    folder: str
    settings: Settings


@dataclass(frozen=True)
class Done:
    """What came of a part: images in all, those that could not be read, and seconds of processor time it took."""

    images: int
    unreadable: int
    cpu_seconds: float


class Worker:
    """One classifier on one thread, which does part after part."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._classifier = Classifier(job.model, engine=job.engine, threads=1)

    def do(self, part: Part) -> Done:
        """Classify the images of a part and write its result; do nothing where it is there."""
        result = part.result(Path(self._job.folder))
        settings = self._job.settings
        if result.exists():
            return Done(0, 0, 0.0)
        began = time.process_time()
        rows: list[dict[str, Any]] = []  # one an image, in the order of the plan
        waiting: list[dict[str, Any]] = []  # rows of the images that the next run of the engine takes
        images: list[np.ndarray] = []
        for name, image in images_of(part, settings.column):
            rows.append({"path": name})
            try:
                if isinstance(image, ClearpactError):
                    raise image
                batch = to_batch(image, self._classifier.manifest.input)
            except ClearpactError as error:
                rows[-1]["reason"] = str(error)
                continue
            waiting.append(rows[-1])
            images.append(batch)
            if len(images) == BATCH:
                self._fill(waiting, np.concatenate(images))
                waiting, images = [], []
        if images:
            self._fill(waiting, np.concatenate(images))
        described = {"clearpact.model": settings.model, "clearpact.map": f"{settings.explain} {settings.map_size}"}
        pixels = settings.map_size**2 if settings.explain else 0
        write_rows(result, rows, described=described, map_pixels=pixels)
        return Done(len(rows), sum("reason" in row for row in rows), time.process_time() - began)

    def _fill(self, rows: list[dict[str, Any]], batch: np.ndarray) -> None:
        settings = self._job.settings
        if settings.explain:
            found = self._classifier.explain(batch, method=settings.explain)
            logits = found.logits
            for row, (levels, largest) in zip(rows, small_maps(found.map, settings.map_size), strict=True):
                row |= {"map": levels, "map_max": largest}
        else:
            logits = self._classifier.logits(batch)
        for row, answer in zip(rows, answers(logits, self._classifier.manifest), strict=True):
            row |= answer


def answers(logits: np.ndarray, manifest: Manifest) -> Iterator[dict[str, Any]]:
    """Yield what is said of every image: class, index, probability, margin, score and whether that is usual.

    Args:
        logits: float32 [N, K].
        manifest: of the model, with its temperature and reference.

    The margin is `runtime.Prediction`'s. The score is that of `runtime.reference` (Liu et al. 2020); an image that
    reaches the reference's threshold is in distribution, and None is said where the file has no reference.
    """
    probabilities = softmax(logits / manifest.temperature)
    scores = in_distribution_scores(logits)
    ordered = np.sort(logits, axis=1)
    stepped = manifest.logit_step is not None and logits.shape[1] > 1
    margins = (ordered[:, -1] - ordered[:, -2]) / manifest.logit_step if stepped else [None] * len(logits)
    reference = manifest.reference
    for index, row, margin, score in zip(logits.argmax(1), probabilities, margins, scores, strict=True):
        yield {
            "class": manifest.classes[index],
            "index": int(index),
            "probability": float(row[index]),
            "margin": None if margin is None else float(margin),
            "score": float(score),
            "in_distribution": None if reference is None else bool(score >= reference.threshold),
        }


def small_maps(maps: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, float]]:
    """Yield maps float32 [N, H, W] as uint8 [size * size], 255 being the largest value of each, and that value."""
    for small in resize_maps(maps, (size, size)):
        largest = float(small.max())
        levels = np.rint(small * (255 / largest if largest > 0 else 0)).astype(np.uint8)
        yield levels.ravel(), largest
