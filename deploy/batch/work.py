"""What a worker does: one part of the plan, from encoded images to a Parquet file."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deploy.batch.arrow import import_arrow, write_rows
from deploy.batch.parts import Part, Settings
from deploy.batch.reading import images_of
from runtime import Classifier
from runtime.errors import ClearpactError
from runtime.images import to_batch
from runtime.images.resizing import resize_maps
from runtime.manifest import Manifest
from runtime.prediction import softmax
from runtime.reference import in_distribution_scores

BATCH = 32  # images in one run of the engine, which are all that is held decoded
_ONE_RUN = ("", "gradient", "input_x_gradient")  # methods that run the engine once for a batch


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
    """What came of a part.

    Args:
        images: in all.
        unreadable: those that could not be read.
        cpu_seconds: of processor time that the part took.
        start_cpu_seconds: that its worker took before, until it was ready; 0 but for a worker's first part.
    """

    images: int
    unreadable: int
    cpu_seconds: float
    start_cpu_seconds: float = 0.0


class Worker:
    """One classifier on one thread, which does part after part."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._classifier = Classifier(job.model, engine=job.engine, threads=1)
        import_arrow().array([0])  # at its first array Arrow imports pandas, where that is installed
        self._start_cpu_seconds = time.process_time()
        self._full_runs = False  # the engine is ready for BATCH images at a time

    def do(self, part: Part) -> Done:
        """Classify the images of a part and write its result; do nothing where it is there."""
        result = part.result(Path(self._job.folder))
        settings = self._job.settings
        if result.exists():
            return Done(0, 0, 0.0)
        began, started_before = time.process_time(), self._start_cpu_seconds
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
        taken = time.process_time() - began - (self._start_cpu_seconds - started_before)
        start, self._start_cpu_seconds = self._start_cpu_seconds, 0.0
        return Done(len(rows), sum("reason" in row for row in rows), taken, start)

    def _fill(self, rows: list[dict[str, Any]], batch: np.ndarray) -> None:
        one_run = self._job.settings.explain in _ONE_RUN
        if one_run and len(batch) == BATCH and not self._full_runs:
            began = time.process_time()
            self._answer(batch)  # compiles
            self._start_cpu_seconds += time.process_time() - began
            self._full_runs = True
        if self._full_runs:
            # Compiling for the number that is left over would cost more than to run some images again.
            batch = np.concatenate([batch, np.repeat(batch[-1:], BATCH - len(batch), axis=0)])
        logits, maps = self._answer(batch)
        if maps is not None:
            small = small_maps(maps[: len(rows)], self._job.settings.map_size)
            for row, (levels, largest) in zip(rows, small, strict=True):
                row |= {"map": levels, "map_max": largest}
        for row, answer in zip(rows, answers(logits[: len(rows)], self._classifier.manifest), strict=True):
            row |= answer

    def _answer(self, batch: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Return logits and, where they are wanted, maps of a batch."""
        method = self._job.settings.explain
        if not method:
            return self._classifier.logits(batch), None
        found = self._classifier.explain(batch, method=method)
        return found.logits, found.map


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
    small = resize_maps(maps, (size, size)).reshape(len(maps), -1)
    largest = small.max(1)
    factors = np.divide(255, largest, out=np.zeros_like(largest), where=largest > 0)
    levels = np.rint(small * factors[:, None]).astype(np.uint8)
    yield from zip(levels, largest.tolist(), strict=True)
