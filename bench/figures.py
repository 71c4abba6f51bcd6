"""`python -m bench.figures`: the pictures of the papers, from any runs.

alpha: the clipping value of every layer over epochs. masks: the mask shares that SMOOT arrives at. maps: what
several networks rely on in the same images. peaks: the images whose probability first rises as salient pixels go.
gradients: box and distribution of the gradients. methods: what explanations are worth and cost, as
`bench.saliency --method all` recorded it. The curves of masked accuracy come from `bench.saliency --plot`.
"""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module: python -m bench.figures")

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from bench.evidence.explanation_tables import latest_methods
from bench.measure.data import HELP, collected
from bench.measure.record import numbered
from bench.networks.network import display_name, find
from bench.networks.opened import open_networks, stream_for
from bench.networks.removal import FILLS, TARGETS
from bench.pictures.gradients import draw_gradients, gradient_magnitudes
from bench.pictures.maps import SCALES, draw_maps, one_of_each_class
from bench.pictures.methods import draw_methods
from bench.pictures.removal import LEAST_RISE, draw_peaks, find_peaks
from runtime import command
from runtime.errors import OptionError
from runtime.outputs import check_outputs
from runtime.session import ENGINES
from train.data.splits import sources_of
from train.figures import (
    History,
    draw_alphas,
    draw_mask_shares,
    has_alphas,
    has_mask_shares,
)
from train.models import factory

EXAMPLES = """
  python -m bench.figures alpha runs/mnist-cnn2-8bit-sgt runs/cifar10-resnet20-4bit-sgt -o alpha.png
  python -m bench.figures masks runs/mnist-cnn2-8bit-smoot -o masks.png
  python -m bench.figures maps runs/plain runs/sgt runs/smoot --data mnist -o maps.png
  python -m bench.figures maps ckpt8.pt ckpt4.pt ckpt2.onnx --float --data mnist --images 6 -o bits.png
  python -m bench.figures peaks runs/plain runs/sgt --data cifar10 --images 2000 -o peaks.png
  python -m bench.figures methods bench/results/explanations.jsonl -o methods.png
  python -m bench.figures gradients runs/plain runs/sgt runs/smoot --data mnist -o gradients.png
"""

_OF_NETWORKS = ("maps", "peaks", "gradients")


def main(argv: Sequence[str] | None = None) -> None:
    """Draw one figure into a PNG file."""
    options = _parser().parse_args(argv)
    factory.allow(*options.arch)
    check_outputs(
        [options.output], inputs=[*map(find, options.runs), *sources_of(options.data, options.data_root)]
    )
    if options.figure in _OF_NETWORKS:
        _draw_networks(options)
    elif options.figure == "methods":
        _draw_methods(options)
    elif options.figure == "alpha":
        _draw_histories(options, draw_alphas, has_alphas, "no alpha: a network in float; train with --bits 8")
    else:
        _draw_histories(options, draw_mask_shares, has_mask_shares, "no mask shares; train with --method smoot")
    print(options.output)


def _draw_networks(options: argparse.Namespace) -> None:
    if options.data is None:
        raise OptionError(f"{options.figure}: --data is missing; name the data set of the runs, or an .npz file")
    networks = [
        network
        for path in options.runs
        for network in open_networks(path, engine=options.engine, with_float=options.float)
    ]
    stream, output = stream_for(networks, options.data, options.data_root), Path(options.output)
    if options.figure == "maps":
        test = one_of_each_class(collected(stream), 10 if options.images is None else options.images)
        draw_maps(networks, test, output, target=options.target, scale=options.scale)
        return
    if options.images is not None:
        stream = stream.evenly_spaced(options.images)
    names = [f"{network.name}, {network.precision}" for network in networks]
    title = f"{len(stream.positions):,} images of {stream.name}"
    if options.figure == "gradients":
        magnitudes = [gradient_magnitudes(network, stream) for network in networks]
        draw_gradients(dict(zip(names, magnitudes, strict=True)), output, title=f"{title}, the predicted class")
        return
    peaks = [find_peaks(network, stream, fill=options.fill) for network in networks]
    draw_peaks(dict(zip(names, peaks, strict=True)), output, title=f"{title}, removed pixels {options.fill}; "
               f"a rise is {LEAST_RISE:.0%} of probability at least; bands: quartiles")  # fmt: skip
    for name, found in zip(names, peaks, strict=True):
        at = np.percentile(found.percent[found.rises], [25, 50, 75]) if found.rises.any() else np.zeros(3)
        print(f"{name}: {found.rises.mean():.1%} of the images first rise, "
              f"peak at {at[1]:.0f} % of the pixels ({at[0]:.0f} to {at[2]:.0f})")  # fmt: skip


def _draw_methods(options: argparse.Namespace) -> None:
    found = [result for path in options.runs for _, result in numbered(Path(path))]
    latest = latest_methods(found)
    if not latest:
        raise OptionError(
            f"{', '.join(options.runs)}: no methods; record them with bench.saliency --method all --record"
        )
    draw_methods(list(latest.values()), Path(options.output))


def _draw_histories(
    options: argparse.Namespace,
    draw: Callable[[Mapping[str, History], Path], object],
    is_there: Callable[[History], bool],
    missing: str,
) -> None:
    from train import checkpoint as checkpoints

    histories: dict[str, History] = {}
    for run in options.runs:
        file = find(run)
        history = checkpoints.load(file).history
        if not is_there(history):
            raise OptionError(f"{file}: {missing if history else 'no epoch is done; train it first'}")
        histories[display_name(file)] = history
    draw(histories, Path(options.output))


def _parser() -> argparse.ArgumentParser:
    parser = command.parser("bench.figures", "Draw the papers' figures from runs.", EXAMPLES)
    parser.add_argument("figure", choices=("alpha", "masks", "methods", *_OF_NETWORKS), help="what to draw")
    parser.add_argument(
        "runs", nargs="+", metavar="run", help="run folder or ckpt.pt; of networks also .onnx; methods: .jsonl"
    )
    parser.add_argument("-o", "--output", required=True, help="PNG file to write")
    maps = parser.add_argument_group("maps, peaks, gradients")
    maps.add_argument("--data", help=HELP)
    maps.add_argument("--data-root", default="data", help="folder of the data sets' files (default: data)")
    maps.add_argument("--images", type=int,
                      help="of maps one of each class in turn (default: 10), else all")  # fmt: skip
    maps.add_argument(
        "--fill", choices=FILLS, default="black", help="peaks: what removed pixels hold (default: black)"
    )
    maps.add_argument("--float", action="store_true", help="add the float network of every quantized checkpoint")
    maps.add_argument("--target", choices=TARGETS, default="predicted",
                      help="the class that is explained (default: predicted)")  # fmt: skip
    maps.add_argument("--scale", choices=SCALES, default="shared",
                      help="one colour scale for all maps, or one for each network (default: shared)")  # fmt: skip
    maps.add_argument("--engine", choices=tuple(ENGINES), help="of .onnx files (default: as exported)")
    factory.add_option(parser)
    return parser


if __name__ == "__main__":
    command.run(main)
