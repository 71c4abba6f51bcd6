"""`python -m bench.saliency`: how well explanations find what a network relies on, and how much they agree.

Three curves of every network (measure/removal.py): accuracy without the most salient pixels, and the probability
of the explained class without them (deletion) and with them alone (insertion). Between any two networks: rank
correlation and overlap of the maps of the same image; bench.agreement says more of two.
"""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module: python -m bench.saliency")

import argparse
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.measure import record
from bench.measure.data import HELP
from bench.measure.environment import describe, environment, peak_memory_bytes
from bench.measure.streams import Batch, ImageStream, cores, in_parallel, watched
from bench.networks.agreement import of_maps
from bench.networks.imputation import ROAD_PERCENTS
from bench.networks.methods import measure_methods
from bench.networks.network import Network, find
from bench.networks.opened import open_networks, stream_for
from bench.networks.removal import FILLS, MASKED_PERCENTS, PERCENTS, TARGETS, Curves, area, removal_curves
from runtime import command
from runtime.session import ENGINES
from train.data.splits import sources_of
from train.models import factory

EXAMPLES = """
  python -m bench.saliency ckpt.onnx --data mnist_test.npz          # without torch
  python -m bench.saliency ckpt.pt ckpt.onnx --float --data mnist   # what quantization and export did to the maps
  python -m bench.saliency runs/plain runs/sgt --data mnist --plot curves.png
  python -m bench.saliency ckpt.pt --data mnist --fill random --target true --record results.jsonl
  python -m bench.saliency ckpt.onnx --data mnist --method all --images 500 --plot methods.png
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


@dataclass(frozen=True)
class Sums:
    """What is known of some images, and adds up with that of others: a mean, and the error of a mean.

    Args:
        images: how many.
        curves: sums of the curves "masked" (accuracy, 0 or 100 an image), "insertion" and "deletion".
        areas: of the areas under them, the sums, and the sums of the squares: float64 [3, 2].
    """

    images: int
    curves: tuple[np.ndarray, np.ndarray, np.ndarray]
    areas: np.ndarray

    @classmethod
    def of(cls, curves: Curves) -> Sums:
        """Return the sums over the images of some curves."""
        measured = (100.0 * curves.correct, curves.insertion, curves.deletion)
        areas = np.stack([area(values) for values in measured])
        masked, insertion, deletion = (values.sum(0) for values in measured)
        return cls(len(curves.correct), (masked, insertion, deletion), np.stack([areas, areas**2], 2).sum(1))

    def __add__(self, other: Sums) -> Sums:
        masked, insertion, deletion = (a + b for a, b in zip(self.curves, other.curves, strict=True))
        return Sums(self.images + other.images, (masked, insertion, deletion), self.areas + other.areas)


def measure(
    networks: Sequence[Network], test: ImageStream, *, fill: str, canvas: str, target: str, workers: int = 1
) -> tuple[list[Sums], list[Agreement]]:
    """Return the curves of every network, summed over the images, and the agreement of every pair.

    Memory does not grow with the images.

    Args:
        networks: to measure, on the same images.
        test: the images, of the networks' size.
        fill: see `bench.networks.removal.removal_curves`.
        canvas: likewise.
        target: likewise; two networks that predict different classes then explain different ones.
        workers: batches that are measured at the same time.

    Raises:
        ClearpactError: the images cannot be read.
    """
    pairs = list(itertools.combinations(range(len(networks)), 2))

    def of_batch(batch: tuple[int, tuple[np.ndarray, np.ndarray]]) -> tuple[list[Sums], np.ndarray]:
        first, (images, labels) = batch
        found = [removal_curves(network, images, labels, fill=fill, canvas=canvas, target=target, first=first)
                 for network in networks]  # fmt: skip
        maps = [m for _, m in found]
        agreeing = [of_maps(maps[a], maps[b]).sum(0) for a, b in pairs]
        return [Sums.of(curves) for curves, _ in found], np.array(agreeing).reshape(len(pairs), 2)

    steps = command.progress(in_parallel(of_batch, _numbered(test.batches()), workers), label="images / 64",
                             total=test.batch_count)  # fmt: skip
    total, agreement = next(iter_steps := iter(steps))
    for sums, agreeing in iter_steps:
        total = [a + b for a, b in zip(total, sums, strict=True)]
        agreement = agreement + agreeing
    means = agreement / total[0].images
    return total, [Agreement(pair, float(m[0]), float(m[1])) for pair, m in zip(pairs, means, strict=True)]


def summarize(network: Network, sums: Sums) -> dict[str, Any]:
    """Return means over the images: curves, areas, and the standard errors of the areas.

    Accuracy in percent, probabilities 0 to 1, shares of the pixels 0 to 1: the area under the accuracy lies
    between 0 and 90, the others between 0 and 1.
    """
    n = sums.images
    found: dict[str, Any] = {"model": network.name, "precision": network.precision, "engine": network.engine}
    found["accuracy"] = float(sums.curves[0][0] / n)
    for name, curve, (areas, squares) in zip(("masked", "insertion", "deletion"), sums.curves, sums.areas,
                                             strict=True):  # fmt: skip
        mean = areas / n
        found[f"{name}_auc"] = float(mean)
        found[f"{name}_auc_error"] = float(np.sqrt(max(squares / n - mean**2, 0) / n))
        found[f"{name}_curve"] = (curve / n).tolist()
    return found


def _numbered(batches: Iterable[Batch]) -> Iterator[tuple[int, Batch]]:
    """Yield every batch with the number of its first image."""
    first = 0
    for batch in batches:
        yield first, batch
        first += len(batch[1])


def main(argv: Sequence[str] | None = None) -> None:
    """Print one row per network and the agreement of every pair, or one JSON line."""
    options = _parser().parse_args(argv)
    factory.allow(*options.arch)
    command.check_counts(options, threads=1)
    inputs = [*map(find, options.models), *sources_of(options.data, options.data_root)]
    record.check(options, inputs=inputs, outputs=[options.plot])
    if options.method:
        _compare_methods(options)
        return
    workers = options.threads or cores()
    networks = [
        network
        for path in options.models
        for network in open_networks(
            path, engine=options.engine, threads=1, parallel_runs=workers, with_float=options.float
        )
    ]
    test = stream_for(networks, options.data, options.data_root)
    if options.images is not None:
        test = test.evenly_spaced(options.images)
    peaks: dict[int, int] = {}
    measured, agreements = measure(
        networks,
        watched(test, peaks),
        fill=options.fill,
        canvas=options.canvas,
        target=options.target,
        workers=workers,
    )
    rows = [summarize(network, found) for network, found in zip(networks, measured, strict=True)]
    where = environment()
    result = {
        "bench": "saliency",
        "data": test.name,
        "n": measured[0].images,
        "fill": options.fill,
        "canvas": options.canvas,
        "target": options.target,
        "masked_percent": MASKED_PERCENTS,
        "percent": PERCENTS,
        "networks": rows,
        "agreement": [{"pair": a.pair, "spearman": a.spearman, "top_overlap": a.top_overlap} for a in agreements],
        "peak_memory_bytes": peak_memory_bytes(),
        "peak_memory_bytes_after_images": peaks,
        "environment": where,
    }
    if options.plot:
        from bench.pictures.removal import draw_removal_curves

        draw_removal_curves(result, Path(options.plot))
    if record.deliver(options, result):
        return
    print(_report(result))
    print(describe(where))


def _compare_methods(options: argparse.Namespace) -> None:
    """Print what each method of exported files is worth and costs, or one JSON line."""
    rows: list[dict[str, Any]] = []
    for path in options.models:
        (network,) = open_networks(path, engine=options.engine, threads=1, classes_only=True)
        test = stream_for([network], options.data, options.data_root)
        network.close()
        if options.images is not None:
            test = test.evenly_spaced(options.images)
        rows += measure_methods(find(path), network.name, test, options.method, engine=options.engine,
                                fill=options.fill, canvas=options.canvas)  # fmt: skip
    where = environment()
    result = {
        "bench": "saliency-methods", "data": test.name, "n": len(test.positions), "fill": options.fill,
        "canvas": options.canvas, "road_percent": ROAD_PERCENTS, "methods": rows, "environment": where,
    }  # fmt: skip
    if options.plot:
        from bench.pictures.methods import draw_methods

        draw_methods([result], Path(options.plot))
    if record.deliver(options, result):
        return
    print(f"{result['n']:,} images of {test.name}; the predicted class is explained; lower is better but for "
          "insertion, energy, pointing")  # fmt: skip
    print(f"{'':52}masked AUC  ROAD % deletion insertion  energy pointing       ms  x class")
    for row in rows:
        energy, pointing = (
            f"{row[key]:8.3f}" if row[key] is not None else "       -" for key in ("energy", "pointing")
        )
        print(f"{_shortened(row['model'], 24)} {row['precision']:5}{row['method']:22}{row['masked_auc']:10.2f}"
              f"{row['road']:8.2f}{row['deletion_auc']:9.3f}{row['insertion_auc']:10.3f}{energy}{pointing}"
              f"{row['ms']:9.2f}{row['times_class']:9.2f}")  # fmt: skip
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
    parser.add_argument("--method", metavar="METHODS",
                        help="of exported files: all, or some of their methods, and what each costs")  # fmt: skip
    parser.add_argument("--engine", choices=tuple(ENGINES), help="of .onnx files (default: as exported)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    parser.add_argument("--plot", metavar="PNG", help="draw the three curves of all networks")
    record.add_options(parser)
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
