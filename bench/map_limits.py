"""`python -m bench.map_limits`: how much a quantized network's maps can agree with the float network's at all.

A map is an input gradient, and changes with the pixels. What their own rounding, half a level, does to the float
network's map is the agreement that no quantization needs to exceed. Beside it: the cost of each part of it.
"""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module: python -m bench.map_limits")

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from bench.measure import record
from bench.measure.environment import describe, environment
from export.choices import TARGETS
from runtime import command

if TYPE_CHECKING:
    from torch import Tensor, nn

    from train.input_spec import InputSpec

EXAMPLES = """
  python -m bench.map_limits my_nets:make --state weights.pt --data cifar10 --size 32
  python -m bench.map_limits docs.examples.efficientnet_lite0:imagenet --data folder:photos --mean 0.5 --std 0.5
"""
_DITHER_LEVELS = (0.5, 1.0)
_ACTIVATION_BITS = (9, 10, 12, 14)
_SEED = 0


def main(argv: Sequence[str] | None = None) -> None:
    """Print the mean Spearman correlation of each variant's maps with the float network's."""
    parser = command.parser("bench.map_limits", "How much can quantized maps agree with float ones?", EXAMPLES)
    parser.add_argument("network", metavar="MODULE:FACTORY", help="float network, as given to export.onnx")
    parser.add_argument("--state", metavar="FILE", help="its state dict")
    parser.add_argument("--data", required=True, metavar="NAME", help="folder:PATH or a data set's name")
    parser.add_argument("--data-root", default="data", help="folder of the data sets' files (default: data)")
    parser.add_argument("--size", type=int, default=224, help="side of the image (default: 224)")
    parser.add_argument("--mean", type=float, nargs="+", default=[0.485, 0.456, 0.406], help="default: ImageNet's")
    parser.add_argument("--std", type=float, nargs="+", default=[0.229, 0.224, 0.225], help="default: ImageNet's")
    parser.add_argument("--samples", type=int, default=64, help="images that calibrate (default: 64)")
    parser.add_argument("--images", type=int, default=12, help="images whose maps are compared (default: 12)")
    parser.add_argument("--target", choices=TARGETS, default="openvino", help="whose grids (default: openvino)")
    record.add_options(parser, json_line=False)
    options = parser.parse_args(argv)
    record.check(options)
    # torch takes seconds to import: --help does without
    import torch

    from export.sources.images import real_images
    from export.sources.own_input import values_of
    from export.sources.torch_network import load_network
    from runtime.agreement import spearman
    from train.input_spec import InputSpec

    network = load_network(options.network, options.state)
    mean, std = (values_of(f"--{n}", getattr(options, n), 3) for n in ("mean", "std"))
    spec = InputSpec((options.size, options.size), 3, mean, std)
    images = real_images(options.data, options.data_root, spec, options.samples)
    x = spec.normalize(images.test[: options.images])
    with torch.no_grad():
        classes = network(x).argmax(1)
    expected = maps(network, x, classes)
    rows = {}
    for name, found in _variants(network, spec, images.calibration, x, classes, options.target):
        rows[name] = float(spearman(found.numpy(), expected.numpy()).mean())
        print(f"{name:55}{rows[name]:6.3f}", flush=True)
    found_on = environment()
    print(describe(found_on))
    record.deliver(options, {
        "bench": "map limits", "network": options.network, "data": images.name, "images": len(x),
        "target": options.target, "spearman": rows, "environment": found_on,
    })  # fmt: skip


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
    from train.quantization.quantizers import PACT

    level = torch.tensor([1 / 255 / s for s in spec.std]).reshape(1, -1, 1, 1)
    generator = torch.Generator().manual_seed(_SEED)
    for levels in _DITHER_LEVELS:
        dither = (2 * torch.rand(x.shape, generator=generator) - 1) * levels * level
        yield f"float, every pixel moved by up to {levels:g} level", maps(network, x + dither, classes)
    quantized = calibrate_network(network, spec, calibration, spec_of(8, target)).network
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

    yield "8-bit activations, float weights", changed(None, weights=False)
    yield "8-bit weights, float activations", changed(passes, weights=True)
    yield "float, clipped at the alphas", changed(clips, weights=False)
    for bits in _ACTIVATION_BITS:
        yield f"8-bit weights, {bits}-bit activations", changed(widened(bits), weights=True)


if __name__ == "__main__":
    command.run(main)
