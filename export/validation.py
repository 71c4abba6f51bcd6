"""What a finished file does on validation images: its temperature, and the reference that a device is watched by.

Both are measured on the file's own engine, after quantization, and stored in its manifest; nothing else changes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx

from export.probabilities import calibration, fit_temperature
from export.sources.images import validation_images
from runtime.classifier import MAX_BATCH
from runtime.errors import EngineError, OptionError
from runtime.manifest import INPUT_NAME, METADATA_KEY, TARGET_NAME, Manifest
from runtime.prediction import finite, softmax
from runtime.reference import BINS, Reference, confidence_bins, in_distribution_scores, region_shares
from runtime.session import Session, open_session
from train.input_spec import InputSpec

# The share of validation images whose score lies above the threshold (Liu et al. 2020, FPR95).
_TRUE_POSITIVES = 0.95


@dataclass(frozen=True)
class Validated:
    """A file with its temperature and reference, and what was found, as text."""

    data: bytes
    manifest: Manifest
    lines: tuple[str, ...]


def validated(
    data: bytes, manifest: Manifest, images: str, root: str | Path, status: Callable[[str], None]
) -> Validated:
    """Return a file that knows its temperature and its reference.

    Args:
        data: contents of the file.
        manifest: in it.
        images: a data set's name or "folder:PATH", with labels.
        root: folder of the data sets' files.
        status: told what is being done.

    Raises:
        OptionError: the images have other classes.
        FileError: an image cannot be read.
        EngineError: no engine is installed that runs the file.
        ModelError: its logits or maps are not finite on an image.
    """
    status("reading validation images ...")
    spec = InputSpec(manifest.input.size, manifest.input.channels, manifest.input.mean, manifest.input.std)
    found = validation_images(images, root, spec)
    if len(found.classes) != len(manifest.classes):
        raise OptionError(
            f"--validation {images}: {len(found.classes)} classes, expected the model's {len(manifest.classes)}"
        )
    status("validating ...")
    try:
        session = open_session(data, engine=manifest.target)
    except (EngineError, OptionError):
        session = open_session(data)  # a plan's file runs on what is installed
    try:
        output = next(
            (name for name in ("saliency", *(c.output for c in manifest.cams)) if name in session.outputs), ""
        )
        fitted, measured = (_pixels(part) for part in (found.fitted, found.measured))
        logits, shares = _run(session, fitted, output)
        other_logits, _ = _run(session, measured, "")
        engine = f"{session.engine} {session.version}"
    finally:
        session.close()
    labels, other_labels = found.fitted_labels.numpy(), found.measured_labels.numpy()
    temperature = fit_temperature(logits, labels)
    probabilities = softmax(logits / temperature)
    scores = in_distribution_scores(logits)
    reference = Reference(
        images=len(labels),
        class_shares=_shares(np.bincount(logits.argmax(1), minlength=len(manifest.classes))),
        confidences=_shares(np.bincount(confidence_bins(probabilities.max(1)), minlength=BINS)),
        scores=(float(scores.mean()), float(scores.std())),
        threshold=float(np.quantile(scores, 1 - _TRUE_POSITIVES)),
        map_output=output,
        map_shares=tuple(map(float, shares.mean(0))) if output else (),
    )
    manifest = replace(manifest, temperature=temperature, reference=reference)
    before, after = (calibration(other_logits, other_labels, t) for t in (1.0, temperature))
    lines = (
        f"probabilities: temperature {temperature:.3f} from {len(labels):,} {found.part} of {images} on {engine}",
        f"probabilities: on {len(other_labels):,} other images {before}; with the temperature {after}",
    )
    return Validated(_with_manifest(data, manifest), manifest, lines)


def _pixels(images: object) -> np.ndarray:
    return np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy())  # type: ignore[attr-defined]


def _shares(counts: np.ndarray) -> tuple[float, ...]:
    return tuple(map(float, counts / counts.sum()))


def _run(session: Session, pixels: np.ndarray, output: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the logits [N, K] and, where an output is named, the share of its maps by region [N, 9]."""
    logits, shares = [], []
    size = min(MAX_BATCH, session.max_batch or MAX_BATCH)
    for start in range(0, len(pixels), size):
        part = np.ascontiguousarray(pixels[start : start + size])
        feeds = {INPUT_NAME: part}
        if output:
            feeds[TARGET_NAME] = np.full(len(part), -1)
        found = session.run(feeds, ("logits", output) if output else ("logits",))
        logits.append(finite(found["logits"]))
        if output:
            shares.append(region_shares(finite(found[output], "maps")))
    return np.concatenate(logits), np.concatenate(shares) if shares else np.empty((0, 0))


def _with_manifest(data: bytes, manifest: Manifest) -> bytes:
    model = onnx.load_model_from_string(data)
    onnx.helper.set_model_props(model, {METADATA_KEY: manifest.to_json()})
    return bytes(model.SerializeToString())
