"""`python -m bench.figures`: the pictures of the papers, from any runs.

alpha: the clipping value of every layer over epochs. masks: the mask shares that SMOOT arrives at. maps: what
several networks rely on in the same images. The curves of masked accuracy come from `bench.saliency --plot`.
"""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module: python -m bench.figures")

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from bench.measure.data import HELP, LabelledImages, collected
from bench.networks.network import Network, display_name, find
from bench.networks.opened import open_networks, stream_for
from bench.networks.removal import MASKED_PERCENTS, PERCENTS, TARGETS
from runtime import command
from runtime.classifier import MAX_BATCH, softmax
from runtime.errors import OptionError
from runtime.outputs import check_outputs
from runtime.session import ENGINES
from train.data.splits import sources_of
from train.figures import (
    COLORS,
    History,
    draw_alphas,
    draw_mask_shares,
    has_alphas,
    has_mask_shares,
    save_figure,
    tidy,
)
from train.models import factory

EXAMPLES = """
  python -m bench.figures alpha runs/mnist-cnn2-8bit-sgt runs/cifar10-resnet20-4bit-sgt -o alpha.png
  python -m bench.figures masks runs/mnist-cnn2-8bit-smoot -o masks.png
  python -m bench.figures maps runs/plain runs/sgt runs/smoot --data mnist -o maps.png
  python -m bench.figures maps ckpt8.pt ckpt4.pt ckpt2.onnx --float --data mnist --images 6 -o bits.png
"""

SCALES = ("shared", "network")

_MARKERS = "os^Dv*"
# The saliency drawn as brightest: single pixels above it would otherwise darken all others.
_BRIGHT_PERCENTILE = 99.5


def draw_removal_curves(result: Mapping[str, Any], path: Path) -> Figure:
    """Draw the curves of a result of `bench.saliency` into a PNG file (Maleki et al. 2024, Fig. 3; RISE).

    Args:
        result: what `bench.saliency --json` prints.
        path: PNG file.
    """
    panels = (
        ("masked", MASKED_PERCENTS, "accuracy (%)", 100, "most salient pixels removed (%)"),
        ("deletion", PERCENTS, "probability of the class", 1, "most salient pixels removed (%)"),
        ("insertion", PERCENTS, "probability of the class", 1, "most salient pixels inserted (%)"),
    )

    def draw(figure: Figure) -> None:
        for axes, (name, percents, ylabel, top, xlabel) in zip(figure.subplots(1, 3), panels, strict=True):
            for number, row in enumerate(result["networks"]):
                axes.plot(percents, row[f"{name}_curve"], color=COLORS[number % len(COLORS)],
                          marker=_MARKERS[number % len(_MARKERS)], markersize=5, markerfacecolor="none",
                          linestyle="-" if number < len(COLORS) else "--",
                          label=f"{row['model']} {row['precision']}: {row['masked_auc']:.2f}, "
                          f"{row['deletion_auc']:.3f}, {row['insertion_auc']:.3f}")  # fmt: skip
            axes.set(title="masked accuracy" if name == "masked" else name, xlabel=xlabel, ylabel=ylabel,
                     xlim=(0, 100), ylim=(0, 1.02 * top))  # fmt: skip
            tidy(axes)
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", frameon=False, fontsize="small",
                      ncols=1 + len(labels) // 4, title="areas under masked accuracy, deletion, insertion",
                      title_fontsize="small")  # fmt: skip
        figure.suptitle(
            f"{result['n']:,} images of {result['data']}, saliency of the {result['target']} class, removed "
            f"pixels: {result['fill']}, canvas of insertion: {result['canvas']}",
            fontsize="medium",
        )

    return save_figure(draw, path, (12, 4.6 + 0.1 * len(result["networks"])))


def draw_maps(
    networks: Sequence[Network], test: LabelledImages, path: Path, *, target: str, scale: str = "shared"
) -> Figure:
    """Draw the saliency of the same images under several networks (Karkehabadi et al. 2024, Fig. 2).

    One row per network. Above each map stands the predicted class with its probability, in orange where wrong.

    Args:
        networks: to explain, all of the images' size.
        test: the images, at most runtime.classifier.MAX_BATCH.
        path: PNG file.
        target: class that is explained, one of bench.networks.removal.TARGETS.
        scale: of the colours, one of SCALES: with "shared", brightness can be compared between networks; with
            "network", the shapes of maps can whose gradients differ by magnitudes, as after a penalty on them.
    """
    asked = test.labels if target == "true" else np.full(len(test.labels), -1, np.int64)
    found = [network.explain(test.images, asked) for network in networks]
    groups = [[maps for _, maps in found]] if scale == "shared" else [[maps] for _, maps in found]
    brightest = [float(np.percentile(group, _BRIGHT_PERCENTILE)) for group in groups for _ in group]
    columns, rows = len(test.labels), len(networks) + 1

    def draw(figure: Figure) -> None:
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes in grid.flat:
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        for axes, image, label in zip(grid[0], test.images, test.labels, strict=True):
            axes.imshow(image.squeeze(-1) if image.shape[-1] == 1 else image, cmap="gray", vmin=0, vmax=255)
            axes.set_title(networks[0].classes[label], fontsize=9)
        _label_row(grid[0, 0], "image,\ntrue class")
        for line, network, (logits, maps), vmax in zip(grid[1:], networks, found, brightest, strict=True):
            _label_row(line[0], "\n".join([*network.name.split("/"), network.precision]))
            predicted, probability = logits.argmax(1), softmax(logits).max(1)
            for axes, one, index, p, label in zip(line, maps, predicted, probability, test.labels, strict=True):
                shown = axes.imshow(one, cmap="inferno", vmin=0, vmax=vmax)
                axes.set_title(f"{networks[0].classes[index]}  {p:.0%}", fontsize=8, pad=3,
                               color="black" if index == label else COLORS[1])  # fmt: skip
            if scale == "network":
                figure.colorbar(shown, ax=line, extend="max", pad=0.01)
        label = "|d logit / d normalized pixel|"
        if scale == "shared":
            figure.colorbar(shown, ax=grid[1:], extend="max", aspect=30, pad=0.01, label=label)
        scales = "one colour scale for all maps" if scale == "shared" else f"each row on its own scale of {label}"
        figure.suptitle(f"saliency of the {target} class, {test.name}: {scales}", fontsize=11)

    return save_figure(draw, path, (2.2 + 1.15 * columns, 0.6 + 1.35 * rows))


def one_of_each_class(test: LabelledImages, count: int) -> LabelledImages:
    """Return `count` images, the first of each class in turn, then the second ones.

    Raises:
        OptionError: more than one run of an engine takes, or than there are.
    """
    most = min(MAX_BATCH, len(test.labels))
    if not 1 <= count <= most:
        raise OptionError(f"--images {count}: expected a whole number from 1 to {most}")
    by_class = np.argsort(test.labels, kind="stable")
    sizes = np.bincount(test.labels)
    earlier = np.empty(len(test.labels), np.int64)  # images of the same class that come before
    earlier[by_class] = np.arange(len(test.labels)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    chosen = np.lexsort((test.labels, earlier))[:count]
    return LabelledImages(test.name, test.images[chosen], test.labels[chosen])


def main(argv: Sequence[str] | None = None) -> None:
    """Draw one figure into a PNG file."""
    options = _parser().parse_args(argv)
    factory.allow(*options.arch)
    check_outputs(
        [options.output], inputs=[*map(find, options.runs), *sources_of(options.data, options.data_root)]
    )
    if options.figure == "maps":
        _draw_maps(options)
    elif options.figure == "alpha":
        _draw_histories(options, draw_alphas, has_alphas, "no alpha: a network in float; train with --bits 8")
    else:
        _draw_histories(options, draw_mask_shares, has_mask_shares, "no mask shares; train with --method smoot")
    print(options.output)


def _draw_maps(options: argparse.Namespace) -> None:
    if options.data is None:
        raise OptionError("maps: --data is missing; name the data set of the runs, or an .npz file")
    networks = [
        network
        for path in options.runs
        for network in open_networks(path, engine=options.engine, with_float=options.float)
    ]
    test = one_of_each_class(collected(stream_for(networks, options.data, options.data_root)), options.images)
    draw_maps(networks, test, Path(options.output), target=options.target, scale=options.scale)


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


def _label_row(axes: Any, text: str) -> None:
    axes.set_ylabel(text, rotation=0, ha="right", va="center", fontsize=9)


def _parser() -> argparse.ArgumentParser:
    parser = command.parser("bench.figures", "Draw the papers' figures from runs.", EXAMPLES)
    parser.add_argument("figure", choices=("alpha", "masks", "maps"), help="what to draw")
    parser.add_argument("runs", nargs="+", metavar="run", help="run folder or ckpt.pt; for maps also .onnx")
    parser.add_argument("-o", "--output", required=True, help="PNG file to write")
    maps = parser.add_argument_group("maps")
    maps.add_argument("--data", help=HELP)
    maps.add_argument("--data-root", default="data", help="folder of the data sets' files (default: data)")
    maps.add_argument("--images", type=int, default=10, help="how many, one of each class in turn (default: 10)")
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
