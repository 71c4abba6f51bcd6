"""How long an open session takes for the class and its maps, alone and on the way from a frame to an answer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from bench.measure import gpu_latency
from bench.measure.statistics import Latency, measure, summarize
from runtime import Classifier
from runtime.engines.tensorrt.session import TensorRTSession
from runtime.errors import ModelError
from runtime.manifest import INPUT_NAME, TARGET_NAME
from runtime.session import Session


@dataclass(frozen=True)
class BatchLatency:
    """One batch size: what was timed -> its latency, and -> its phases, None where the engine shows none."""

    latency: dict[str, Latency]
    phases: dict[str, dict[str, dict[str, float | None]] | None]


def random_images(session: Session, batch: int) -> np.ndarray:
    """Return random pixels uint8 [batch, H, W, C] of the model's size."""
    shape = (batch, *session.manifest.input.size, session.manifest.input.channels)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def contenders(session: Session, batch: int, *, explain: bool) -> dict[str, Callable[[], object]]:
    """Return what is timed: "class", and with `explain` also "class + map" and "class + cam_<layer>".

    Raises:
        ModelError: the model was exported without maps.
    """
    images = random_images(session, batch)
    found: dict[str, Callable[[], object]] = {"class": functools.partial(session.run, {INPUT_NAME: images})}
    if explain:
        maps = maps_of(session)
        if not maps:
            raise ModelError("--explain: this model gives classes only; export it again without --no-saliency")
        inputs: dict[str, np.ndarray] = {INPUT_NAME: images, TARGET_NAME: np.full(batch, -1, np.int64)}
        for name, output in maps.items():
            found[name] = functools.partial(session.run, inputs, ("logits", output))
    return found


def maps_of(session: Session) -> dict[str, str]:
    """Return the outputs that explain, by how they are named beside the class."""
    by_gradient = {"class + map": "saliency"} if "saliency" in session.outputs else {}
    return by_gradient | {f"class + {cam.output}": cam.output for cam in session.manifest.cams}


def methods_of(session: Session) -> dict[str, str]:
    """Return the method, and of a class activation map its layer, by how the map is named beside the class."""
    cams = {cam.output: f"{cam.method}:{cam.layer}" for cam in session.manifest.cams}
    return {name: cams.get(output, "gradient") for name, output in maps_of(session).items()}


def frame_latency(
    session: Session, frame: tuple[int, int], *, explain: bool, runs: int | None, seconds: float
) -> dict[str, Latency]:
    """Time the way from one frame of random pixels [H, W, 3] to its answer beside the network alone, in turns.

    The answer is what an app gets: a `Prediction`, and with `explain` an `Explanation` with its map in the frame's
    size.

    Raises:
        ModelError: `explain`, and the model was exported without maps.
    """
    classifier = Classifier.on(session)
    pixels = np.random.default_rng(0).integers(0, 256, (*frame, 3), dtype=np.uint8)
    calls = {"network": contenders(session, 1, explain=False)["class"]}
    calls["frame to class"] = functools.partial(classifier.predict, pixels)
    if explain:
        _, calls["network + map"], *_ = contenders(session, 1, explain=True).values()  # as `Classifier.explain`
        calls["frame to class + map"] = functools.partial(classifier.explain, pixels)
    label = f"frame {frame[0]}x{frame[1]}"
    return {
        name: summarize(times) for name, times in measure(calls, runs=runs, seconds=seconds, label=label).items()
    }


def session_latency(
    session: Session, batch: int, *, explain: bool, runs: int | None, seconds: float
) -> BatchLatency:
    """Time the engine on random pixels, the contenders in turns; a plan with and without a CUDA graph.

    Raises:
        ModelError: the model was exported without maps.
    """
    calls = contenders(session, batch, explain=explain)
    if not isinstance(session, TensorRTSession):
        samples = measure(calls, runs=runs, seconds=seconds, label=f"batch {batch}")
        latency = {name: summarize(times) for name, times in samples.items()}
        return BatchLatency(latency, dict.fromkeys(samples))
    asked = {"class": ("logits",), **{name: ("logits", output) for name, output in maps_of(session).items()}}
    ways = {
        f"{name}{suffix}": (asked[name], graph)
        for name in calls
        for suffix, graph in (("", True), (", no graph", False))
    }
    found = gpu_latency.phase_samples(
        session, random_images(session, batch), ways, runs=runs, seconds=seconds, label=f"batch {batch}"
    )
    return BatchLatency(
        {name: summarize(times[:, -1]) for name, times in found.items()},
        {name: gpu_latency.as_json(times) for name, times in found.items()},
    )
