"""Saliency maps of several networks side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from bench.measure.data import LabelledImages
from bench.networks.network import Network
from runtime.classifier import MAX_BATCH
from runtime.errors import OptionError
from runtime.prediction import softmax
from train.figures import COLORS, save_figure

SCALES = ("shared", "network")

# The saliency drawn as brightest: single pixels above it would otherwise darken all others.
_BRIGHT_PERCENTILE = 99.5


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
                axes.set_title(f"{networks[0].classes[index]}\n{p:.0%}", fontsize=8, pad=3,
                               color="black" if index == label else COLORS[1])  # fmt: skip
            if scale == "network":
                figure.colorbar(shown, ax=line, extend="max", pad=0.01)
        label = "|d logit / d pixel|"
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


def _label_row(axes: Any, text: str) -> None:
    axes.set_ylabel(text, rotation=0, ha="right", va="center", fontsize=9)
