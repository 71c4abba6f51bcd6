"""Which precision is fastest on the device at hand, and still says and explains what the exported graph does."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from export.reference import reference_run
from runtime.engines.tensorrt.plan import PlanSidecar, sidecar_path
from runtime.errors import ModelError
from runtime.explanations.agreement import spearman
from runtime.files import write_atomically
from runtime.manifest import INPUT_NAME, TARGET_NAME
from runtime.session import Session, open_session

_WARM_UPS, _RUNS = 20, 200


@dataclass(frozen=True)
class Budget:
    """What a faster plan may cost.

    Args:
        accuracy_drop: most percentage points below the exported graph.
        spearman: least mean rank correlation of its maps with the exported graph's.
    """

    accuracy_drop: float = 0.5
    spearman: float = 0.95


@dataclass(frozen=True)
class PlanScore:
    """One plan on the samples.

    Args:
        latency_ms: median time of one run of the most frequent batch.
        accuracy: percent.
        spearman: mean rank correlation of its maps with the exported graph's; None where it gives no maps.
    """

    latency_ms: float
    accuracy: float
    spearman: float | None


def expected_outputs(model: bytes, images: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """Return the outputs of the exported graph, operator by operator, for samples and their true classes.

    Args:
        model: contents of the ONNX file.
        images: uint8 [N, H, W, C].
        labels: int64 [N].
    """
    graph = onnx.load_from_string(model)
    feeds = {INPUT_NAME: images, TARGET_NAME: labels}
    return reference_run(graph)[0]({i.name: feeds[i.name] for i in graph.graph.input})


def compare(
    outputs: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray], labels: np.ndarray, latency_ms: float
) -> PlanScore:
    """Return how a plan's outputs for the samples do beside those of the exported graph."""
    maps = outputs.get("saliency")
    return PlanScore(
        latency_ms=latency_ms,
        accuracy=accuracy(outputs, labels),
        spearman=None if maps is None else float(spearman(maps, expected["saliency"]).mean()),
    )


def measure(
    session: Session,
    batch: tuple[int, int, int],
    images: np.ndarray,
    labels: np.ndarray,
    expected: Mapping[str, np.ndarray],
) -> PlanScore:
    """Run a loaded model on the samples, and the most frequent batch again and again.

    Args:
        session: of a plan, or of any other model.
        batch: smallest, most frequent and largest batch it takes.
        images: uint8 [N, H, W, C].
        labels: int64 [N].
        expected: the exported graph's outputs for them, of `expected_outputs`.
    """
    smallest, usual, largest = batch
    wanted: tuple[str, ...] = tuple(name for name in ("logits", "saliency") if name in session.outputs)
    # A plan for the class alone takes no target.
    inputs = (INPUT_NAME, TARGET_NAME) if len(wanted) > 1 else (INPUT_NAME,)
    feeds = [dict(zip(inputs, part, strict=False)) for part in _batches(images, labels, smallest, largest)]
    parts = [session.run(feed, wanted) for feed in feeds]
    outputs = {name: np.concatenate([part[name] for part in parts])[: len(images)] for name in wanted}
    once = dict(zip(inputs, next(_batches(images[:usual], labels[:usual], usual, usual)), strict=False))
    times_ms = []
    for run in range(_WARM_UPS + _RUNS):
        start = time.perf_counter()
        session.run(once, wanted)
        if run >= _WARM_UPS:
            times_ms.append(1e3 * (time.perf_counter() - start))
    return compare(outputs, expected, labels, float(np.median(times_ms)))


def measure_plan(
    plan: bytes, sidecar: PlanSidecar, images: np.ndarray, labels: np.ndarray, expected: Mapping[str, np.ndarray]
) -> PlanScore:
    """Run a plan on the GPU at hand; see `measure`.

    Raises:
        EngineError: TensorRT or the GPU is not there.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "engine.plan"
        write_atomically(path, plan)
        write_atomically(sidecar_path(path), sidecar.to_json())
        session = open_session(path)
        try:
            return measure(session, sidecar.batch, images, labels, expected)
        finally:
            session.close()


def choose(measured: Mapping[str, PlanScore], expected_accuracy: float, budget: Budget) -> str:
    """Return the name of the fastest plan within the budget.

    Args:
        measured: plans by name.
        expected_accuracy: of the exported graph, percent.
        budget: what may be lost.

    Raises:
        ModelError: none is within it.
    """
    within = {name: row for name, row in measured.items() if _within(row, expected_accuracy, budget)}
    if not within:
        raise ModelError(
            f"autotune: no plan keeps {expected_accuracy - budget.accuracy_drop:.2f} % accuracy and Spearman "
            f"{budget.spearman:g} of the maps; allow more with --max-accuracy-drop or --min-agreement"
        )
    return min(within, key=lambda name: within[name].latency_ms)


def table(measured: Mapping[str, PlanScore], expected_accuracy: float, budget: Budget, chosen: str) -> str:
    """Return what was measured, one plan a line, as text."""
    lines = [f"{'plan':8} {'median':>9} {'accuracy':>10} {'maps':>7}"]
    for name, row in measured.items():
        maps = "-" if row.spearman is None else f"{row.spearman:.3f}"
        verdict = (
            "kept" if name == chosen else "" if _within(row, expected_accuracy, budget) else "outside the budget"
        )
        lines.append(f"{name:8} {row.latency_ms:6.3f} ms {row.accuracy:8.2f} % {maps:>7}  {verdict}".rstrip())
    return "\n".join(lines)


def accuracy(outputs: Mapping[str, np.ndarray], labels: np.ndarray) -> float:
    """Return the accuracy of outputs in percent."""
    return 100 * float((outputs["logits"].argmax(1) == labels).mean())


def _batches(
    images: np.ndarray, labels: np.ndarray, smallest: int, largest: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the samples in batches that the plan takes; the last may repeat its own to be large enough."""
    for start in range(0, len(images), largest):
        x, y = images[start : start + largest], labels[start : start + largest]
        size = max(len(x), smallest)
        yield np.resize(x, (size, *x.shape[1:])), np.resize(y, size)


def _within(row: PlanScore, expected_accuracy: float, budget: Budget) -> bool:
    explains = row.spearman is None or row.spearman >= budget.spearman
    return explains and row.accuracy >= expected_accuracy - budget.accuracy_drop
