"""What each explanation of an exported file is worth, and what it costs.

Faithfulness: masked accuracy, deletion, insertion (removal.py) and ROAD (imputation.py). Localization: the images
are made smaller and pasted on an empty field, so that it is known where the class is; the share of the map inside
(energy) and how often its peak lies there (pointing game, Zhang et al. 2016). Cost: of one image, in turns.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.measure.streams import Batch, ImageStream
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

    Args:
        path: exported file.
        name: of the network.
        test: labelled images of its size.
        asked: see `methods_of`.
        engine: None takes the one it was exported for.
        fill: what removed pixels hold, see `bench.networks.removal`.
        canvas: what pixels are inserted into.
    """
    batches = list(test.batches())
    with Classifier(path, engine=engine, threads=1) as classifier:
        network = exported_network(path, name, engine=engine, threads=1, classes_only=True)
        methods = methods_of(classifier.manifest, classifier.session.outputs, asked)
        prices = _prices(classifier, methods, batches[0][0][:1])
        rows = []
        for method in methods:
            explain = functools.partial(_explain, classifier, method)
            one = replace(network, name=f"{name} {method}", explain=explain, explains=True)
            rows.append({
                "model": name, "precision": network.precision, "engine": network.engine, "method": str(method),
                **_faithful(one, batches, fill, canvas), **_located(one, batches), **prices[method],
            })  # fmt: skip
        network.close()
    return rows


def _explain(
    classifier: Classifier, method: Method, images: np.ndarray, target: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    chosen = None if (target < 0).all() else target
    found = classifier.explain(images, chosen, method=method.name, layer=method.layer)
    return found.logits, found.map


def _faithful(network: Network, batches: Iterable[Batch], fill: str, canvas: str) -> dict[str, float]:
    curves, road, first = [], [], 0
    for images, labels in command.progress(batches, label=network.name.rpartition(" ")[2]):
        found, maps = removal_curves(network, images, labels, fill=fill, canvas=canvas, first=first)
        curves.append(found)
        road.append(road_curve(network, images, labels, maps, first=first))
        first += len(labels)
    masked, deletion, insertion = (
        np.concatenate([getattr(part, key) for part in curves]) for key in ("correct", "deletion", "insertion")
    )
    return {
        "accuracy": 100 * float(masked[:, 0].mean()),
        "masked_auc": float(area(100.0 * masked).mean()),
        "deletion_auc": float(area(deletion).mean()),
        "insertion_auc": float(area(insertion).mean()),
        "road": 100 * float(np.concatenate(road).mean()),
    }


def _located(network: Network, batches: Iterable[Batch]) -> dict[str, float | None]:
    """Return energy and hits of the pointing game on small copies in a field, of those that are put right."""
    energies, hits, shares, first = [], [], [], 0
    for images, labels in batches:
        fields, boxes = pasted(images, first=first)
        logits, maps = network.explain(fields, np.full(len(fields), -1))
        for right, one, box in zip(logits.argmax(1) == labels, maps, boxes, strict=True):
            if right and one.max() > 0:
                energies.append(float(one[box].sum() / one.sum()))
                hits.append(bool(one[box].max() == one.max()))
                shares.append(one[box].size / one.size)
        first += len(labels)
    if not energies:
        return {"located_images": 0, "energy": None, "pointing": None, "box_share": None}
    return {
        "located_images": len(energies), "energy": float(np.mean(energies)), "pointing": float(np.mean(hits)),
        "box_share": float(np.mean(shares)),
    }  # fmt: skip


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
