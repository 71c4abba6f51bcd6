"""What each explanation of an exported file is worth, and what it costs.

Faithfulness: masked accuracy, deletion, insertion (removal.py) and ROAD (imputation.py). Localization: the images
are made smaller and pasted on an empty field, so that it is known where the class is; the share of the map inside
(energy) and how often its peak lies there (pointing game, Zhang et al. 2016). Cost: of one image, in turns.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.measure.streams import ImageStream
from bench.networks.imputation import road_curve
from bench.networks.network import Network
from bench.networks.opened import exported_network
from bench.networks.removal import area, removal_curves
from runtime import command
from runtime.classifier import Classifier
from runtime.errors import OptionError
from runtime.explanations.attribution import METHODS
from runtime.images.resizing import resize
from runtime.manifest import CAM_METHODS, Manifest

ALL = "all"
# The side of a pasted image, as a share of the field's.
_PASTED = 0.6
_TURNS, _WARM_UPS = 15, 1


@dataclass(frozen=True)
class Method:
    """A way to explain: a method, and of a class activation map its layer."""

    name: str
    layer: str | None = None

    def __str__(self) -> str:
        return f"{self.name}:{self.layer}" if self.layer else self.name


def methods_of(manifest: Manifest, outputs: Sequence[str], asked: str) -> tuple[Method, ...]:
    """Return the methods that a file offers and that are asked for.

    Args:
        manifest: of the file.
        outputs: of the file.
        asked: "all", or methods separated by commas.

    Raises:
        OptionError: an unknown method, or none that the file offers.
    """
    names = [name.strip() for name in asked.split(",")]
    known = (*METHODS, *CAM_METHODS)
    for name in names:
        if name not in (ALL, *known):
            raise OptionError(f"--method {name}: expected {ALL} or some of {', '.join(known)}")
    offered = [Method(name) for name in METHODS if "gradient" in outputs]
    offered += [Method(cam.method, cam.layer) for cam in manifest.cams]
    found = tuple(method for method in offered if ALL in names or method.name in names)
    if not found:
        raise OptionError(
            f"--method {asked}: the file offers {', '.join(map(str, offered)) or 'none'}; export it so"
        )
    return found


def measure_methods(
    path: Path, name: str, test: ImageStream, asked: str, *, engine: str | None, fill: str, canvas: str
) -> list[dict[str, Any]]:
    """Return one row for every method of a file: what it is worth on the images, and what it costs.

    Each method reads the images anew, and keeps sums alone: memory does not grow with them.

    Args:
        path: exported file.
        name: of the network.
        test: labelled images of its size.
        asked: see `methods_of`.
        engine: None takes the one it was exported for.
        fill: what removed pixels hold, see `bench.networks.removal`.
        canvas: what pixels are inserted into.
    """
    with Classifier(path, engine=engine, threads=1) as classifier:
        network = exported_network(path, name, engine=engine, threads=1, classes_only=True)
        methods = methods_of(classifier.manifest, classifier.session.outputs, asked)
        (image, _), *_ = test.evenly_spaced(1).batches()
        prices = _prices(classifier, methods, image)
        rows = []
        for method in methods:
            explain = functools.partial(_explain, classifier, method)
            one = replace(network, name=f"{name} {method}", explain=explain, explains=True)
            rows.append({
                "model": name, "precision": network.precision, "engine": network.engine, "method": str(method),
                **_worth(one, test, fill, canvas), **prices[method],
            })  # fmt: skip
        network.close()
    return rows


def _explain(
    classifier: Classifier, method: Method, images: np.ndarray, target: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    chosen = None if (target < 0).all() else target
    found = classifier.explain(images, chosen, method=method.name, layer=method.layer)
    return found.logits, found.map


def _worth(network: Network, test: ImageStream, fill: str, canvas: str) -> dict[str, float | None]:
    """Return means over the images: of the areas under the curves, of ROAD, and of where the maps lie."""
    sums, located, first = np.zeros(5), np.zeros(4), 0
    steps = command.progress(test.batches(), label=network.name.rpartition(" ")[2], total=test.batch_count)
    for images, labels in steps:
        found, maps = removal_curves(network, images, labels, fill=fill, canvas=canvas, first=first)
        road = road_curve(network, images, labels, maps, first=first)
        areas = (area(100.0 * found.correct), area(found.deletion), area(found.insertion))
        sums += [values.sum() for values in (100.0 * found.correct[:, 0], *areas, 100.0 * road.mean(1))]
        located += _located(network, images, labels, first)
        first += len(labels)
    names = ("accuracy", "masked_auc", "deletion_auc", "insertion_auc", "road")
    worth: dict[str, float | None] = dict(zip(names, map(float, sums / first), strict=True))
    count = int(located[0])
    means = map(float, located[1:] / count) if count else (None,) * 3
    return worth | {"located_images": count} | dict(zip(("energy", "pointing", "box_share"), means, strict=True))


def _located(network: Network, images: np.ndarray, labels: np.ndarray, first: int) -> np.ndarray:
    """Return sums over small copies in a field that are put right: one, energy, pointing game, the box's share."""
    fields, boxes = pasted(images, first=first)
    logits, maps = network.explain(fields, np.full(len(fields), -1))
    sums = np.zeros(4)
    for right, one, box in zip(logits.argmax(1) == labels, maps, boxes, strict=True):
        if right and one.max() > 0:
            sums += [1, one[box].sum() / one.sum(), one[box].max() == one.max(), one[box].size / one.size]
    return sums


def pasted(images: np.ndarray, *, first: int = 0) -> tuple[np.ndarray, list[tuple[slice, slice]]]:
    """Return smaller copies of images somewhere on an empty field of their size, and where they lie.

    The field has the image's mean level of each channel; of grey images it is black.

    Args:
        images: uint8 [N, H, W, C].
        first: number of the first, which seeds its place.
    """
    height, width = images.shape[1:3]
    size = max(1, round(_PASTED * height)), max(1, round(_PASTED * width))
    small = resize(images, size)
    means = np.rint(images.mean((1, 2), keepdims=True)).astype(np.uint8)
    fields = np.zeros_like(images) if images.shape[3] == 1 else np.broadcast_to(means, images.shape).copy()
    boxes = []
    for n, image in enumerate(small):
        rng = np.random.default_rng([7, first + n])
        top, left = rng.integers(height - size[0] + 1), rng.integers(width - size[1] + 1)
        box = slice(int(top), int(top) + size[0]), slice(int(left), int(left) + size[1])
        fields[n][box] = image
        boxes.append(box)
    return fields, boxes


def _prices(
    classifier: Classifier, methods: Sequence[Method], image: np.ndarray
) -> dict[Method, dict[str, float]]:
    """Return milliseconds of one image, and times the class alone, in turns; medians."""
    calls: list[Callable[[], object]] = [functools.partial(classifier.predict, image)]
    calls += [functools.partial(classifier.explain, image, method=m.name, layer=m.layer) for m in methods]
    turns: list[list[float]] = []
    for _ in range(_WARM_UPS + _TURNS):
        turns.append([])
        for call in calls:
            call()  # the method before left its own data in the caches
            start = time.perf_counter()
            call()
            turns[-1].append(1e3 * (time.perf_counter() - start))
    times = np.array(turns[_WARM_UPS:])
    ratios = np.median(times / times[:, :1], axis=0)
    return {
        method: {"ms": float(np.median(times[:, i])), "times_class": float(ratios[i])}
        for i, method in enumerate(methods, 1)
    }
