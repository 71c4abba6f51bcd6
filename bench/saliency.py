"""`python -m bench.saliency`: how well explanations find what a network relies on, and how much they agree.

Three curves of every network (bench.removal): accuracy without the most salient pixels, and the probability of the
explained class without them (deletion) and with them alone (insertion). Between any two networks: rank correlation
and overlap of the maps of the same image (runtime.agreement).
"""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module: python -m bench.saliency")

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.data import HELP, LabelledImages, evenly_spaced
from bench.environment import describe, environment
from bench.networks import Network, load_for, open_networks
from bench.record import append
from bench.removal import FILLS, MASKED_PERCENTS, PERCENTS, TARGETS, Curves, area, removal_curves
from runtime import command
from runtime.agreement import spearman, top_overlap
from runtime.classifier import MAX_BATCH
from runtime.errors import OptionError
from runtime.files import check_writable
from runtime.session import ENGINES
from train import factory

EXAMPLES = """
  python -m bench.saliency ckpt.onnx --data mnist_test.npz          # without torch
  python -m bench.saliency ckpt.pt ckpt.onnx --float --data mnist   # what quantization and export did to the maps
  python -m bench.saliency runs/plain runs/sgt --data mnist --plot curves.png
  python -m bench.saliency ckpt.pt --data mnist --fill random --target true --record results.jsonl
"""


@dataclass(frozen=True)
class Agreement:
    """How much the maps of two networks, given by their numbers from 0, agree; means over the images.

    Args:
        pair: numbers of the two.
        spearman: rank correlation of the maps of each image, -1 to 1.
        top_overlap: share of the 10 % most salient pixels in common, 0 to 1.
    """

    pair: tuple[int, int]
    spearman: float
    top_overlap: float


def measure(
    networks: Sequence[Network], test: LabelledImages, *, fill: str, canvas: str, target: str
) -> tuple[list[Curves], list[Agreement]]:
    """Return the curves of every network and the agreement of every pair.

    Memory grows with the images by their curves alone, some 200 bytes each.

    Args:
        networks: to measure, on the same images.
        test: the images, of the networks' size.
        fill: see `bench.removal.removal_curves`.
        canvas: likewise.
        target: likewise; two networks that predict different classes then explain different ones.
    """
    parts: list[list[Curves]] = [[] for _ in networks]
    pairs = list(itertools.combinations(range(len(networks)), 2))
    agreeing: list[list[np.ndarray]] = [[] for _ in pairs]
    starts = range(0, len(test.images), MAX_BATCH)
    steps = command.progress(itertools.product(starts, range(len(networks))), label="batches",
                             total=len(starts) * len(networks))  # fmt: skip
    maps: list[np.ndarray] = []
    for start, number in steps:
        cut = slice(start, start + MAX_BATCH)
        curves, found = removal_curves(
            networks[number], test.images[cut], test.labels[cut],
            fill=fill, canvas=canvas, target=target, first=start,
        )  # fmt: skip
        parts[number].append(curves)
        maps = [*maps, found] if number else [found]
        for (a, b), row in zip(pairs, agreeing, strict=True):
            if b == number:
                row.append(np.stack([spearman(maps[a], found), top_overlap(maps[a], found)]))
    means = [np.concatenate(row, 1).mean(1) for row in agreeing]
    joined = [
        Curves(*(np.concatenate([getattr(c, name) for c in row]) for name in ("correct", "deletion", "insertion")))
        for row in parts
    ]
    return joined, [Agreement(pair, float(m[0]), float(m[1])) for pair, m in zip(pairs, means, strict=True)]


def summarize(network: Network, curves: Curves) -> dict[str, Any]:
    """Return means over the images: curves, areas, and the standard errors of the areas.

    Accuracy in percent, probabilities 0 to 1, shares of the pixels 0 to 1: the area under the accuracy lies
    between 0 and 90, the others between 0 and 1.
    """
    measured = {"masked": 100.0 * curves.correct, "insertion": curves.insertion, "deletion": curves.deletion}
    found: dict[str, Any] = {"model": network.name, "precision": network.precision, "engine": network.engine}
    found["accuracy"] = float(measured["masked"][:, 0].mean())
    for name, values in measured.items():
        areas = area(values)
        found[f"{name}_auc"] = float(areas.mean())
        found[f"{name}_auc_error"] = float(areas.std() / np.sqrt(len(areas)))
        found[f"{name}_curve"] = values.mean(0).tolist()
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Print one row per network and the agreement of every pair, or one JSON line."""
    options = _parser().parse_args(argv)
    factory.allow(*options.arch)
    if options.threads is not None and options.threads < 1:
        raise OptionError(f"--threads {options.threads}: expected a whole number from 1")
    for path in filter(None, (options.record, options.plot)):
        check_writable(path)
    networks = [
        network
        for path in options.models
        for network in open_networks(
            path, engine=options.engine, threads=options.threads, with_float=options.float
        )
    ]
    test = load_for(networks, options.data, options.data_root)
    if options.images is not None:
        test = evenly_spaced(test, options.images)
    curves, agreements = measure(networks, test, fill=options.fill, canvas=options.canvas, target=options.target)
    rows = [summarize(network, found) for network, found in zip(networks, curves, strict=True)]
    where = environment()
    result = {
        "bench": "saliency",
        "data": test.name,
        "n": len(test.labels),
        "fill": options.fill,
        "canvas": options.canvas,
        "target": options.target,
        "masked_percent": MASKED_PERCENTS,
        "percent": PERCENTS,
        "networks": rows,
        "agreement": [{"pair": a.pair, "spearman": a.spearman, "top_overlap": a.top_overlap} for a in agreements],
        "environment": where,
    }
    if options.plot:
        from bench.figures import draw_removal_curves

        draw_removal_curves(result, Path(options.plot))
    if options.record:
        append(options.record, result)
    if options.json:
        print(json.dumps(result))
        return
    print(_report(result))
    print(describe(where))


def _parser() -> Any:
    parser = command.parser("bench.saliency", "Measure how well a network's saliency explains it.", EXAMPLES)
    parser.add_argument("models", nargs="+", metavar="model", help="exported .onnx, ckpt.pt or run folder")
    parser.add_argument("--data", required=True, help=HELP)
    parser.add_argument("--data-root", default="data", help="folder of the data sets' files (default: data)")
    parser.add_argument("--images", type=int, help="how many, evenly spaced over the test split (default: all)")
    parser.add_argument("--float", action="store_true",
                        help="add the float network of every quantized checkpoint")  # fmt: skip
    parser.add_argument("--fill", choices=FILLS, default="black", help="what removed pixels hold (default: black)")
    parser.add_argument("--canvas", choices=FILLS, default="blur",
                        help="what salient pixels are inserted into (default: blur)")  # fmt: skip
    parser.add_argument("--target", choices=TARGETS, default="predicted",
                        help="the class that is explained (default: predicted)")  # fmt: skip
    parser.add_argument("--engine", choices=tuple(ENGINES), help="of .onnx files (default: as exported)")
    parser.add_argument("--threads", type=int, help="CPU threads of one inference (default: the engine's choice)")
    parser.add_argument("--plot", metavar="PNG", help="draw the three curves of all networks")
    parser.add_argument("--record", metavar="FILE", help="append the result to a .jsonl file")
    parser.add_argument("--json", action="store_true", help="one JSON line, with the environment")
    factory.add_option(parser)
    return parser


def _report(result: dict[str, Any]) -> str:
    rows, agreements = result["networks"], result["agreement"]
    lines = [
        f"{result['n']:,} images of {result['data']}; saliency of the {result['target']} class",
        f"removed pixels: {result['fill']}; canvas of insertion: {result['canvas']}; ± standard error",
        "",
        f"{'':39}accuracy    masked AUC insertion deletion",
    ]
    for number, row in enumerate(rows, 1):
        lines.append(
            f"{number:2} {_shortened(row['model'], 29)} {row['precision']:5}{row['accuracy']:9.2f}"
            f"{row['masked_auc']:7.2f} ± {row['masked_auc_error']:4.2f}{row['insertion_auc']:10.3f}"
            f"{row['deletion_auc']:9.3f}"
        )
    shares = "".join(f"{f'{percent} %':>7}" for percent in result["masked_percent"])
    lines += ["", "accuracy (%) without the most salient pixels", f"  {shares}"]
    for number, row in enumerate(rows, 1):
        lines.append(f"{number:2}" + "".join(f"{value:7.2f}" for value in row["masked_curve"]))
    if agreements:
        lines += ["", "agreement of maps: Spearman, top-10 % overlap"]
        lines += [
            f"{a['pair'][0] + 1:2} and {a['pair'][1] + 1:<2} {a['spearman']:8.3f} {a['top_overlap']:8.3f}"
            for a in agreements
        ]
    return "\n".join(lines)


def _shortened(text: str, width: int) -> str:
    return f"{text:{width}}" if len(text) <= width else f"…{text[1 - width :]}"


if __name__ == "__main__":
    command.run(main)
