"""What a worker does: one part of the plan, from encoded images to a Parquet file."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deploy.batch.arrow import import_arrow, write_results
from deploy.batch.parts import Part, Settings
from deploy.batch.reading import images_of
from runtime import Classifier
from runtime.errors import ClearpactError
from runtime.images import load_readers, to_batch
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
        load_readers()
        self._start_cpu_seconds = time.process_time()
        self._full_runs = False  # the engine is ready for BATCH images at a time

    def do(self, part: Part) -> Done:
        """Classify the images of a part and write its result; do nothing where it is there."""
        result = part.result(Path(self._job.folder))
        settings = self._job.settings
        if result.exists():
            return Done(0, 0, 0.0)
        began, started_before = time.process_time(), self._start_cpu_seconds
        names: list[str] = []  # of all images, in the order of the plan
        reasons: list[str | None] = []  # why an image cannot be read
        images: list[np.ndarray] = []  # that the next run of the engine takes
        answered: list[tuple[np.ndarray, ...]] = []  # logits and small maps, of one run each
        for name, image in images_of(part, settings.column):
            names.append(name)
            try:
                if isinstance(image, ClearpactError):
                    raise image
                images.append(to_batch(image, self._classifier.manifest.input))
            except ClearpactError as error:
                reasons.append(str(error))
                continue
            reasons.append(None)
            if len(images) == BATCH:
                answered.append(self._answer(np.concatenate(images)))
                images = []
        if images:
            answered.append(self._answer(np.concatenate(images)))
        # For a whole part at once: in numpy, an array of a thousand images costs little more than one of a batch.
        columns: dict[str, np.ndarray] = {}
        if answered:
            logits, *maps = map(np.concatenate, zip(*answered, strict=True))
            columns = answers(logits, self._classifier.manifest)
            for small in maps:
                columns |= levels(small)
        described = {"clearpact.model": settings.model, "clearpact.map": f"{settings.explain} {settings.map_size}"}
        pixels = settings.map_size**2 if settings.explain else 0
        write_results(result, names, reasons, columns, described=described, map_pixels=pixels)
        taken = time.process_time() - began - (self._start_cpu_seconds - started_before)
        start, self._start_cpu_seconds = self._start_cpu_seconds, 0.0
        return Done(len(names), len(names) - reasons.count(None), taken, start)

    def _answer(self, batch: np.ndarray) -> tuple[np.ndarray, ...]:
        """Return logits [N, K] of a batch and, where maps are wanted, small ones [N, size, size], float32."""
        count = len(batch)
        one_run = self._job.settings.explain in _ONE_RUN
        if one_run and count == BATCH and not self._full_runs:
            began = time.process_time()
            self._run(batch)  # compiles
            self._start_cpu_seconds += time.process_time() - began
            self._full_runs = True
        if self._full_runs and count < BATCH:
            # Compiling for the number that is left over would cost more than to run some images again.
            batch = np.concatenate([batch, np.repeat(batch[-1:], BATCH - count, axis=0)])
        logits, maps = self._run(batch)
        if maps is None:
            return (logits[:count],)
        size = self._job.settings.map_size
        return logits[:count], resize_maps(maps[:count], (size, size))

    def _run(self, batch: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Return logits and, where they are wanted, maps of a batch."""
        method = self._job.settings.explain
        if not method:
            return self._classifier.logits(batch), None
        found = self._classifier.explain(batch, method=method)
        return found.logits, found.map


def answers(logits: np.ndarray, manifest: Manifest) -> dict[str, np.ndarray]:
    """Return what is said of images, as columns: class, index, probability, margin, score, in_distribution.

    Args:
        logits: float32 [N, K].
        manifest: of the model, with its temperature and reference.

    The margin is `runtime.Prediction`'s. The score is that of `runtime.reference` (Liu et al. 2020); an image that
    reaches the reference's threshold is in distribution. There is no margin where the file is in float or has one
    class, and no `in_distribution` where it has no reference.
    """
    best = logits.argmax(1)
    probabilities = softmax(logits / manifest.temperature)
    scores = in_distribution_scores(logits)
    found = {
        "class": np.array(manifest.classes, object)[best],
        "index": best,
        "probability": probabilities[np.arange(len(best)), best],
        "score": scores,
    }
    if manifest.logit_step is not None and logits.shape[1] > 1:
        ordered = np.sort(logits, axis=1)
        found["margin"] = (ordered[:, -1] - ordered[:, -2]) / manifest.logit_step
    if manifest.reference is not None:
        found["in_distribution"] = scores >= manifest.reference.threshold
    return found


def levels(maps: np.ndarray) -> dict[str, np.ndarray]:
    """Return maps float32 [N, H, W] as columns: `map`, uint8 [N, H * W], whose 255 is `map_max`."""
    flat = maps.reshape(len(maps), -1)
    largest = flat.max(1)
    factors = np.divide(255, largest, out=np.zeros_like(largest), where=largest > 0)
    return {"map": np.rint(flat * factors[:, None]).astype(np.uint8), "map_max": largest}
