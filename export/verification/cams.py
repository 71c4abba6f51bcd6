"""Proof that the class activation maps in a file are those of the trained network, and what each costs.

In the graph as it is written, a map is compared with its formula on autograd's gradient, on the codes that the
graph gives. On the engine, it is compared with the graph's, and timed in turns with the class alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from export.gradient.cam import Cam
from export.reference import reference_run
from export.verification.gradient import check_error, explained_samples, on_codes
from export.verification.probes import ProbedGraph
from runtime.errors import EngineError, ModelError
from runtime.manifest import INPUT_NAME, CamOutput
from runtime.session import ENGINES, Session, open_session
from train.model import QuantizedModel

# Of the map's norm, median of the images: by so much an engine that rounds otherwise may move it.
LARGEST_DIFFERENCE = 0.5
_SECONDS, _MOST_TURNS, _WARM_UPS = 0.5, 200, 3


@dataclass(frozen=True)
class CamVerification:
    """One map of a file.

    Args:
        cam: which.
        samples: number of images.
        median_error: of the norm of the difference from the formula on autograd's gradient, relative to it; None
            where no module of the network gives the layer's activation.
        engine_difference: likewise, of the engine from the graph; None where the engine is not installed here.
        price: time of class and map, as a multiple of the class alone, one image on one thread; or None.
    """

    cam: CamOutput
    samples: int
    median_error: float | None
    engine_difference: float | None
    price: float | None

    def __str__(self) -> str:
        height, width = self.cam.size
        parts = [f"{self.cam.output}: {self.cam.method} of {self.cam.layer}, {height}x{width}"]
        if self.median_error is not None:
            parts.append(f"within {self.median_error:.1g} of autograd's (median of {self.samples} images)")
        if self.engine_difference is not None:
            parts.append(f"on the engine within {self.engine_difference:.1g} of the graph's")
        if self.price is not None:
            parts.append(f"with it an image costs {self.price:.2f} times the class alone")
        return ", ".join(parts)


def verify_cams(
    probed: ProbedGraph,
    data: bytes,
    network: nn.Module,
    model: QuantizedModel,
    cams: Sequence[Cam],
    written: onnx.ModelProto,
    *,
    target: str,
    gate: str,
    int8: bool,
) -> tuple[CamVerification, ...]:
    """Compare a file's maps of each image's true class with the network's, and time them.

    Args:
        probed: the graph with its maps.
        data: contents of the file.
        network: what it was made from, in evaluation mode.
        model: it was exported from; some of its samples are compared.
        cams: the maps.
        written: the graph before it was lowered, in which the activations have their names.
        target: engine of the file.
        gate: of the gradient, see `export.gradient.append_input_gradient`.
        int8: whether the graph's gradients are products of codes.

    Raises:
        ModelError: a map is another one.
    """
    x, labels, feeds = explained_samples(network, model)
    found = probed.run(feeds)
    values = reference_run(written, [cam.activation for cam in cams])[0](feeds)
    layers: dict[str, tuple[Tensor, Tensor]] = {}
    with on_codes(network, probed.codes(found), gate):
        for cam in cams:
            if cam.activation not in layers:
                module = _module_of(network, x, cam.activation, torch.from_numpy(values[cam.activation]))
                if module is not None:
                    layers[cam.activation] = _gradient_by(network, module, x, labels)
    errors: list[float | None] = []
    for cam in cams:
        error = None
        if cam.activation in layers:
            error = difference(found[cam.output.output], transcribed(cam.output.method, *layers[cam.activation]))
            check_error(cam.output.output, error, int8=int8)
        errors.append(error)
    on_engine = run_cams(data, target, [cam.output for cam in cams], feeds, found)
    return tuple(
        CamVerification(cam.output, len(x), error, *run) for cam, error, run in zip(cams, errors, on_engine,
                                                                                        strict=True)
    )  # fmt: skip


def transcribed(method: str, activation: Tensor, gradient: Tensor) -> np.ndarray:
    """Return a map [N, h, w] of an activation and its gradient [N, C, h, w], as the papers write it."""
    if method == "gradcam":
        gradient = gradient.mean((2, 3), keepdim=True)
    elif method == "layercam":
        gradient = gradient.clamp_min(0)
    return np.asarray((gradient * activation).sum(1).clamp_min(0))


def run_cams(
    data: bytes,
    engine: str,
    cams: Sequence[CamOutput],
    feeds: dict[str, np.ndarray],
    expected: dict[str, np.ndarray],
) -> list[tuple[float | None, float | None]]:
    """Return of each map its difference on the engine and its price, None where the engine is not installed.

    Raises:
        ModelError: the engine computes another map.
    """
    if engine not in ENGINES:
        return [(None, None)] * len(cams)
    try:
        session = open_session(data, engine=engine, threads=1)
    except EngineError:
        return [(None, None)] * len(cams)
    try:
        differences = []
        for cam in cams:
            maps = session.run(feeds, ("logits", cam.output))[cam.output]
            differences.append(difference(maps, expected[cam.output]))
            if not differences[-1] <= LARGEST_DIFFERENCE:
                raise ModelError(
                    f"{cam.output} on {engine}: differs from the graph's by {differences[-1]:.2g} of its norm, "
                    f"expected {LARGEST_DIFFERENCE} at most; export for another --target, or report the network"
                )
        prices = _prices(session, cams, {name: value[:1] for name, value in feeds.items()})
    finally:
        session.close()
    return list(zip(differences, prices, strict=True))


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    """Return how far maps [N, h, w] are from others, relative to their norm: the median of the images."""
    apart, size = (np.linalg.norm(maps.reshape(len(maps), -1), axis=1) for maps in (found - expected, expected))
    # A map of nothing but zeros is one: no channel speaks for the class.
    return float(np.median(np.where(apart > 0, apart / np.maximum(size, np.finfo(np.float32).tiny), 0)))


def _prices(session: Session, cams: Sequence[CamOutput], feeds: dict[str, np.ndarray]) -> list[float]:
    """Return the time of class and map of one image as multiples of the class alone, in turns; medians."""
    alone = {INPUT_NAME: feeds[INPUT_NAME]}
    ways = [(alone, ("logits",)), *((feeds, ("logits", cam.output)) for cam in cams)]
    turns: list[list[float]] = []
    until = time.perf_counter() + _SECONDS * len(ways)
    while len(turns) < _WARM_UPS + 1 or (time.perf_counter() < until and len(turns) < _MOST_TURNS):
        turns.append([])
        for inputs, outputs in ways:
            start = time.perf_counter()
            session.run(inputs, outputs)
            turns[-1].append(time.perf_counter() - start)
    times = np.array(turns[_WARM_UPS:])
    return [float(price) for price in np.median(times[:, 1:] / times[:, :1], axis=0)]


def _module_of(network: nn.Module, x: Tensor, name: str, value: Tensor) -> str | None:
    """Return the module that gives an activation: the one of its name, or of its value; None where none does."""
    modules = dict(network.named_modules())
    if name in modules:
        return name
    found: list[str] = []
    limit = 1e-4 * float(value.abs().max())

    def hook(module_name: str) -> Callable[..., None]:
        def compare(module: nn.Module, inputs: object, output: object) -> None:
            if (
                isinstance(output, Tensor)
                and output.shape == value.shape
                and float((output - value).abs().max()) <= limit
            ):
                found.append(module_name)

        return compare

    handles = [module.register_forward_hook(hook(key)) for key, module in modules.items() if key]
    try:
        with torch.no_grad():
            network(x)
    finally:
        for handle in handles:
            handle.remove()
    return found[-1] if found else None


def _gradient_by(network: nn.Module, module: str, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return a module's output and the gradient of the labels' logits by it."""
    outputs: list[Tensor] = []
    handle = network.get_submodule(module).register_forward_hook(lambda _, __, output: outputs.append(output))
    try:
        logits = network(x)
    finally:
        handle.remove()
    (gradient,) = torch.autograd.grad(logits.gather(1, labels.unsqueeze(1)).sum(), outputs[-1])
    return outputs[-1].detach(), gradient
