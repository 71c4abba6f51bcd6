"""`python -m bench.causes.moved_classes`: why an engine gives another class than the calibrated network.

The network is taken in float64. Engines, and PyTorch's float32, add up in orders of their own: where a sum lies
within float32's rounding of the border between two codes, a tie, it may go to either. For every image whose class
differs the engine's codes are read inside the network, and each one that is not the network's, given the engine's
codes before it, is held against the value that it was rounded from: how far that lies from the tie.
"""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module: python -m bench.causes.moved_classes")

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from bench.measure import record
from bench.measure.environment import describe, environment
from bench.networks import floating
from runtime import command
from runtime.session import ENGINES, open_session
from train.choices import CALIBRATION_SAMPLES, QUANTIZED_BITS

if TYPE_CHECKING:
    from torch import Tensor

    from train.model import QuantizedModel

EXAMPLES = """
  python -m bench.causes.moved_classes my_nets:make --state weights.pt --data cifar10
  python -m bench.causes.moved_classes my_nets:make --state weights.pt --data cifar10 --bits 4 --target ort
"""
_BATCH = 100
# Logits that are closer, relative to their norm, are those of equal codes.
_EQUAL = 1e-4


@dataclass(frozen=True)
class Moved:
    """An image whose class differs, and the codes that did it.

    Args:
        image: its number.
        codes: that differ from the calibrated network's in float64, given the engine's codes before them.
        first: quantizer of the first of them.
        largest: difference of a code, in steps.
        farthest_steps: from the tie, in steps, of the value in float64 that is rounded; the farthest of the codes.
        gap: between the two best logits of the calibrated network.
        reproduced: whether reading the codes left the engine's logits as they are, bit for bit.
    """

    image: int
    codes: int
    first: str
    largest: int
    farthest_steps: float
    gap: float
    reproduced: bool


@dataclass(frozen=True)
class Counts:
    """Images with a code that is not the calibrated network's in float64.

    Args:
        on_engine: on the engine.
        in_float32: in PyTorch's float32.
        moved_in_float32: those of the latter whose class is another one.
    """

    on_engine: int
    in_float32: int
    moved_in_float32: int


def main(argv: Sequence[str] | None = None) -> None:
    """Print how many images change class on an engine, and what moved each."""
    parser = command.parser("bench.causes.moved_classes", "Why does an engine give another class?", EXAMPLES)
    floating.add_options(parser, samples=CALIBRATION_SAMPLES, images=10_000)
    parser.add_argument("--bits", type=int, choices=QUANTIZED_BITS, default=8, help="default: 8")
    parser.add_argument("--target", choices=tuple(ENGINES), default="openvino", help="engine (default: openvino)")
    record.add_options(parser)
    options = parser.parse_args(argv)
    record.check(options, inputs=[options.state, options.network])
    # torch takes seconds to import: --help does without
    from export.own_network import quantized_model

    command.status("reading images ...")
    loaded = floating.load(options)
    images, pixels = loaded.images, loaded.images.test
    model, _ = quantized_model(
        loaded.network, loaded.input_spec, images, loaded.classes,
        bits=options.bits, target=options.target, status=command.status,
    )  # fmt: skip
    counts, moved = moved_classes(model, pixels, options.target)
    result = {
        "bench": "moved classes", "network": options.network, "data": images.name, "bits": options.bits,
        "target": options.target, "samples": len(images.calibration), "n": len(pixels), **asdict(counts),
        "moved": [asdict(one) for one in moved], "environment": environment(),
    }  # fmt: skip
    if record.deliver(options, result):
        return
    ties = sum(one.largest == 1 for one in moved)
    print(
        f"{options.network}, {options.bits} bit on {options.target}: {len(moved)} of {len(pixels):,} images "
        f"change class, {ties} of them by codes one step away; {counts.on_engine:,} have a code that differs\n"
        f"  PyTorch's float32: {counts.moved_in_float32} and {counts.in_float32:,}"
    )
    for one in moved:
        print(
            f"  image {one.image:5}: {one.codes} codes, first {one.first}, at most {one.farthest_steps:.1e} steps "
            f"from the tie; logits {one.gap:.3g} apart{'' if one.reproduced else '; fused otherwise when read'}"
        )
    print(describe(result["environment"]))


def moved_classes(model: QuantizedModel, pixels: Tensor, target: str) -> tuple[Counts, list[Moved]]:
    """Return how many images have a code that differs from the network's in float64, and those whose class does.

    Args:
        model: calibrated.
        pixels: images uint8 [n, C, H, W].
        target: the engine, one of runtime.session.ENGINES.
    """
    import torch

    from export.deploy_form import deploy_form
    from export.pipeline import export
    from export.verification.exact import on_codes
    from export.verification.forward import run_layer_by_layer
    from export.verification.probes import probe
    from train.quantization.accumulators import put_biases_on_grid

    command.status("exporting ...")
    data = export(model, target=target, saliency=False).data
    network = model.evaluated()
    if target == "ort" and not model.quant.bias_grid:
        put_biases_on_grid(network, model.image_shape)  # as the export does
    graph = onnx.load_model_from_string(data)
    probed = probe(graph, deploy_form(network, model.input, int8=True))
    frames = pixels.permute(0, 2, 3, 1).contiguous().numpy()
    on_engine = _run(data, target, frames, ("logits",))["logits"]
    exact = on_codes(network, model.image_shape)
    with torch.no_grad():
        logits = []
        for part in command.progress(pixels.split(_BATCH), label="in PyTorch"):
            x = model.input.normalize(part)
            logits.append((exact(x.double()), network(x)))
    expected, in_float32 = (torch.cat(part).numpy() for part in zip(*logits, strict=True))
    moved_in_float32 = int((in_float32.argmax(1) != expected.argmax(1)).sum())
    counts = Counts(_differing(on_engine, expected), _differing(in_float32, expected), moved_in_float32)
    numbers = _moved(on_engine, expected)
    if not len(numbers):
        return counts, []
    names = list(dict.fromkeys(p.value for p in probed.probes.values()))
    known = {value.name: value for value in onnx.shape_inference.infer_shapes(graph).graph.value_info}
    graph.graph.output.extend(known[name] for name in names)
    inside = _run(graph.SerializeToString(), target, frames[numbers], ("logits", *names))
    codes = probed.codes(inside)
    x = model.input.normalize(pixels[torch.from_numpy(numbers)])
    values, _ = run_layer_by_layer(exact, network, x.double(), codes)
    grids: dict[str, Any] = {name: network.get_submodule(name) for name in codes}
    found = []
    for i, number in enumerate(numbers):
        steps = {
            name: (code[i] - values[name][i].clamp(grids[name].qmin, grids[name].qmax).round()).abs()
            for name, code in codes.items()
        }
        moved = {name: step > 0 for name, step in steps.items() if step.any()}
        far = [
            (v - v.floor() - 0.5).abs().max() for v in (values[name][i][where] for name, where in moved.items())
        ]
        best = np.sort(expected[number])[-2:]
        found.append(Moved(
            image=int(number), codes=int(sum(where.sum() for where in moved.values())),
            first=next(iter(moved), ""), largest=max((int(steps[name].max()) for name in moved), default=0),
            farthest_steps=float(max(far, default=0.0)), gap=float(best[1] - best[0]),
            reproduced=bool((inside["logits"][i] == on_engine[number]).all()),
        ))  # fmt: skip
    return counts, found


def _differing(logits: np.ndarray, expected: np.ndarray) -> int:
    """Return how many images have logits [n, K] of other codes."""
    size = np.linalg.norm(expected - expected.mean(1, keepdims=True), axis=1)
    return int((np.linalg.norm(logits - expected, axis=1) > _EQUAL * size).sum())


def _moved(on_engine: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Return the numbers of the images whose logits [n, K] have their largest elsewhere."""
    return np.flatnonzero(on_engine.argmax(1) != expected.argmax(1))


def _run(model: bytes, target: str, frames: np.ndarray, outputs: tuple[str, ...]) -> dict[str, np.ndarray]:
    session = open_session(model, engine=target, threads=1)
    try:
        parts = np.array_split(frames, -(-len(frames) // _BATCH))
        found = [session.run({"image": part}, outputs) for part in parts]
    finally:
        session.close()
    return {name: np.concatenate([one[name] for one in found]) for name in outputs}


if __name__ == "__main__":
    command.run(main)
