"""Watching a device: what a model does there, beside what it did on validation images.

    monitor = Monitor(classifier.manifest)
    monitor.add(classifier.predict(frame), classifier.explain(frame))
    print(monitor.report()["out_of_distribution"])

Memory does not grow with the images: sums and counts are kept, of all that was added and of a window that forgets.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np

from runtime.errors import ModelError, OptionError
from runtime.explanations.explanation import Explanation
from runtime.manifest import Manifest
from runtime.prediction import Prediction
from runtime.reference import BINS, REGIONS, confidence_bins, in_distribution_scores, region_shares

# The share of validation images that score below the reference's threshold.
EXPECTED_OUTSIDE = 0.05


class Monitor:
    """Counts what a model says, against the reference in its file. Safe to use from several threads.

    Args:
        manifest: of the model, exported with `--validation`.
        window: images after which the weight of one has fallen to 1 / e, so that a change shows however long the
            device has run; None: all images count alike.

    Raises:
        ModelError: the file has no reference.
        OptionError: a window below 1.
    """

    def __init__(self, manifest: Manifest, *, window: int | None = None) -> None:
        if manifest.reference is None:
            raise ModelError(
                "this model has no reference to watch it by; export it again with --validation IMAGES"
            )
        if window is not None and window < 1:
            raise OptionError(f"window {window}: expected images, from 1")
        self._classes = manifest.classes
        self._reference = manifest.reference
        methods = {"saliency": "gradient", **{cam.output: cam.method for cam in manifest.cams}}
        self._method = methods.get(manifest.reference.map_output, "")
        self._keep = 1.0 if window is None else math.exp(-1 / window)
        self._lock = threading.Lock()
        self._images = 0
        self._weight = self._outside = self._score = self._confidence = self._map_weight = 0.0
        self._counts = np.zeros(len(self._classes))
        self._bins = np.zeros(BINS)
        self._mass = np.zeros(REGIONS**2)

    def add(self, prediction: Prediction, explanation: Explanation | None = None) -> bool:
        """Count one image, and return whether it looks like those of the validation.

        Args:
            prediction: of `Classifier.predict`.
            explanation: of the same image, by the method that the reference was made with; None counts no map.

        Raises:
            OptionError: the explanation is of several images, or by another method.
        """
        score = float(in_distribution_scores(prediction.logits))
        shares = None
        if explanation is not None:
            if explanation.method != self._method or explanation.map.ndim != 2:
                raise OptionError(
                    f"explanation by {explanation.method}: expected one image's by {self._method or 'nothing'}, "
                    "as in the file's reference"
                )
            # In the model's size: of a cropped frame the rest has no map.
            shares = region_shares(np.abs(explanation.attribution).max(0)[None])[0]
        inside = score >= self._reference.threshold
        with self._lock:
            self._images += 1
            self._forget()
            self._weight += 1
            self._outside += not inside
            self._score += score
            self._confidence += prediction.probability
            self._counts[prediction.index] += 1
            self._bins[confidence_bins(np.array(prediction.probability))] += 1
            if shares is not None:
                self._map_weight += 1
                self._mass += shares
        return inside

    def _forget(self) -> None:
        """Lower the weight of all that was added before."""
        for name in ("_weight", "_outside", "_score", "_confidence", "_counts", "_bins", "_map_weight", "_mass"):
            setattr(self, name, getattr(self, name) * self._keep)

    def report(self) -> dict[str, Any]:
        """Return what was seen, and how far it is from the reference, as plain values for JSON.

        `drift` is the total variation distance of two distributions: 0 where they are equal, 1 where they have
        nothing in common. Before the first image, shares are null.
        """
        reference = self._reference
        with self._lock:
            images, weight, map_weight = self._images, self._weight, self._map_weight
            counts, bins, mass = self._counts.copy(), self._bins.copy(), self._mass.copy()
            outside, score, confidence = self._outside, self._score, self._confidence
        seen: dict[str, Any] = {
            "images": images,
            "reference_images": reference.images,
            "classes": _beside(counts, weight, reference.class_shares, self._classes),
            "confidence": {
                "mean": _ratio(confidence, weight), **_beside(bins, weight, reference.confidences, _tenths()),
            },
            "out_of_distribution": {
                "share": _ratio(outside, weight), "expected": EXPECTED_OUTSIDE, "threshold": reference.threshold,
                "mean_score": _ratio(score, weight), "reference_mean_score": reference.scores[0],
            },
            "map": None,
        }  # fmt: skip
        if reference.map_shares:
            seen["map"] = _beside(mass, map_weight, reference.map_shares, _regions())
        return seen

    def to_json(self) -> str:
        """Return the report as JSON text."""
        return json.dumps(self.report())

    def to_prometheus(self, labels: Mapping[str, str] | None = None) -> str:
        """Return the report in Prometheus' text format, to serve at /metrics.

        Args:
            labels: of every value, such as {"device": "line 3"}.
        """
        report, common = self.report(), dict(labels or {})
        outside = report["out_of_distribution"]
        values: list[tuple[str, str, str, dict[str, str], float | None]] = [
            ("images_total", "counter", "images seen", {}, report["images"]),
            ("confidence_mean", "gauge", "mean probability of the class", {}, report["confidence"]["mean"]),
            ("out_of_distribution_share", "gauge", "share of images unlike the validation's, 0.05 expected", {},
             outside["share"]),
            ("score_mean", "gauge", "mean of log(sum(exp(logits)))", {}, outside["mean_score"]),
        ]  # fmt: skip
        for name, part in (("class", "classes"), ("confidence", "confidence"), ("map", "map")):
            if report[part] is not None:
                drift = report[part]["drift"]
                values.append((f"{name}_drift", "gauge", "total variation distance, 0 to 1", {}, drift))
        for name, part, key in (("class_share", "classes", "class"), ("map_share", "map", "region")):
            if report[part] is not None and report[part]["shares"] is not None:
                for label, share in report[part]["shares"].items():
                    values.append((name, "gauge", f"share by {key}", {key: label}, share))
        lines, told = [], set()
        for name, kind, text, own, value in values:
            if name not in told:
                lines += [f"# HELP clearpact_{name} {text}", f"# TYPE clearpact_{name} {kind}"]
                told.add(name)
            if value is not None:
                lines.append(f"clearpact_{name}{_labels({**common, **own})} {float(value):.9g}")
        return "\n".join(lines) + "\n"


def _beside(
    seen: np.ndarray, weight: float, reference: tuple[float, ...], names: tuple[str, ...]
) -> dict[str, Any]:
    """Return the shares of what was seen by name, those of the reference, and their distance."""
    expected = dict(zip(names, reference, strict=True))
    if not weight:
        return {"shares": None, "reference": expected, "drift": None}
    shares = seen / weight
    drift = 0.5 * float(np.abs(shares - np.array(reference)).sum())
    return {"shares": dict(zip(names, map(float, shares), strict=True)), "reference": expected, "drift": drift}


def _ratio(total: float, weight: float) -> float | None:
    return total / weight if weight else None


def _tenths() -> tuple[str, ...]:
    return tuple(f"{i / BINS:.1f}-{(i + 1) / BINS:.1f}" for i in range(BINS))


def _regions() -> tuple[str, ...]:
    return tuple(
        f"{row} {column}" for row in ("top", "middle", "bottom") for column in ("left", "middle", "right")
    )


def _labels(labels: Mapping[str, str]) -> str:
    escaped = (
        f'{name}="{value.translate({92: chr(92) * 2, 34: chr(92) + chr(34), 10: chr(92) + "n"})}"'
        for name, value in labels.items()
    )
    text = ",".join(escaped)
    return f"{{{text}}}" if text else ""
