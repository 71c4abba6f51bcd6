"""`python -m bench.causes.map_limits`: how much quantized maps can agree with float ones at all.

A map is an input gradient, and changes with the pixels. What their own rounding, half a level, does to the float
network's map is the agreement that no quantization needs to exceed. Beside it: the cost of each part of it.
"""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module: python -m bench.causes.map_limits")

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from bench.measure import record
from bench.measure.environment import describe, environment
from bench.networks import floating
from export.choices import TARGETS
from runtime import command

if TYPE_CHECKING:
    from torch import Tensor, nn

    from train.input_spec import InputSpec

EXAMPLES = """
  python -m bench.causes.map_limits my_nets:make --state weights.pt --data cifar10
  python -m bench.causes.map_limits my_nets:make --state weights.pt --data folder:photos --mean 0.5 --std 0.5
"""
_DITHER_LEVELS = (0.5, 1.0)
_ACTIVATION_BITS = (9, 10, 12, 14)
_SEED = 0


def main(argv: Sequence[str] | None = None) -> None:
    """Print the mean Spearman correlation of each variant's maps with the float network's."""
    parser = command.parser(
        "bench.causes.map_limits", "How much can quantized maps agree with float ones?", EXAMPLES
    )
    floating.add_options(parser, samples=64, images=12)
    parser.add_argument("--target", choices=TARGETS, default="openvino", help="whose grids (default: openvino)")
    record.add_options(parser)
    options = parser.parse_args(argv)
    record.check(options, inputs=[options.state, options.network])
    # torch takes seconds to import: --help does without
    import torch

    from runtime.explanations.agreement import spearman

    loaded = floating.load(options)
    network, spec, images = loaded.network, loaded.input_spec, loaded.images
    x = spec.normalize(images.test)
    with torch.no_grad():
        classes = network(x).argmax(1)
    expected = maps(network, x, classes)
    rows = {}
    for name, found in _variants(network, spec, images.calibration, x, classes, options.target):
        rows[name] = float(spearman(found.numpy(), expected.numpy()).mean())
        if not options.json:
            print(f"{name:55}{rows[name]:6.3f}", flush=True)
    result = {
        "bench": "map limits", "network": options.network, "data": images.name, "images": len(x),
        "target": options.target, "samples": len(images.calibration), "spearman": rows,
        "environment": environment(),
    }  # fmt: skip
    if not record.deliver(options, result):
        print(describe(result["environment"]))


def maps(network: nn.Module, x: Tensor, classes: Tensor) -> Tensor:
    """Return the saliency maps float [n, H, W] of these classes, int64 [n], for normalized images [n, C, H, W]."""
    import torch

    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(network(x).gather(1, classes.unsqueeze(1)).sum(), x)
    return gradient.abs().amax(1)


def _variants(
    network: nn.Module, spec: InputSpec, calibration: Tensor, x: Tensor, classes: Tensor, target: str
) -> Iterator[tuple[str, Tensor]]:
    import torch

    from export.calibration import calibrate_network, spec_of
    from train.quantization.quantize import quantizers
    from train.quantization.quantizers import PACT, InputQuantizer

    level = torch.tensor([1 / 255 / s for s in spec.std]).reshape(1, -1, 1, 1)
    generator = torch.Generator().manual_seed(_SEED)
    for levels in _DITHER_LEVELS:
        dither = (2 * torch.rand(x.shape, generator=generator) - 1) * levels * level
        yield f"float, every pixel moved by up to {levels:g} level", maps(network, x + dither, classes)
    quantized = calibrate_network(network, spec, calibration, spec_of(8, target), target=target).network
    yield "8 bit", maps(quantized, x, classes)

    def changed(change: Callable[[PACT], None] | None, *, weights: bool) -> Tensor:
        other = copy.deepcopy(quantized)
        for module in quantizers(other).values():
            if isinstance(module, PACT):
                if change is not None:
                    change(module)
            elif not weights:
                module.forward = lambda x: x  # type: ignore[method-assign]
        return maps(other, x, classes)

    def widened(bits: int) -> Callable[[PACT], None]:
        def change(pact: PACT) -> None:
            pact.qmax = (pact.qmax + 1 << bits - 8) - 1
            pact.qmin = -pact.qmax if pact.signed else 0

        return change

    def clips(pact: PACT) -> None:
        alpha = pact.clip_alpha.item()
        pact.forward = lambda x: x.clamp(-alpha if pact.signed else 0, alpha)  # type: ignore[method-assign]

    def passes(pact: PACT) -> None:
        bound = pact.largest_start
        pact.forward = lambda x: x.clamp(-bound if pact.signed else 0, bound)  # type: ignore[method-assign]

    image = copy.deepcopy(quantized)
    for module in quantizers(image).values():
        if isinstance(module, InputQuantizer):
            module.forward = lambda x: x  # type: ignore[method-assign]
    yield "8 bit, but the image is not rounded", maps(image, x, classes)
    yield "8-bit activations, float weights", changed(None, weights=False)
    yield "8-bit weights, float activations", changed(passes, weights=True)
    yield "float, clipped at the alphas", changed(clips, weights=False)
    for bits in _ACTIVATION_BITS:
        yield f"8-bit weights, {bits}-bit activations", changed(widened(bits), weights=True)


if __name__ == "__main__":
    command.run(main)
