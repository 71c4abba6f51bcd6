"""How large the input gradients of several networks are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from bench.measure.streams import ImageStream
from bench.networks.network import Network
from runtime import command
from train.figures import COLORS, save_figure, tidy

_BINS = 80
_LEAST = 1e-6  # of the largest value: below it the logarithmic axis begins


def gradient_magnitudes(network: Network, test: ImageStream) -> np.ndarray:
    """Return |d logit / d normalized pixel| of the predicted class, the largest over channels, float32 [N H W]."""
    parts = []
    for images, labels in command.progress(test.batches(), label="images / 64", total=test.batch_count):
        _, maps = network.explain(images, np.full(len(labels), -1, np.int64))
        parts.append(maps.ravel())
    return np.concatenate(parts)


def draw_gradients(found: Mapping[str, np.ndarray], path: Path, *, title: str) -> Figure:
    """Draw a box and the distribution of each network's magnitudes (Karkehabadi et al. 2024, Figs. 4 and 5).

    Args:
        found: network -> magnitudes float32 [n].
        path: PNG file.
        title: of the figure.
    """
    top = max(float(values.max()) for values in found.values()) or 1.0
    edges = np.geomspace(_LEAST * top, top, _BINS + 1)

    def draw(figure: Figure) -> None:
        boxes, shares = figure.subplots(1, 2)
        drawn = boxes.boxplot(list(found.values()), whis=(5, 95), showfliers=False, patch_artist=True,
                              tick_labels=list(found), medianprops={"color": "black"})  # fmt: skip
        for number, (name, values) in enumerate(found.items()):
            color = COLORS[number % len(COLORS)]
            drawn["boxes"][number].set(facecolor=color, alpha=0.6)
            counts, _ = np.histogram(np.maximum(values, edges[0]), edges)
            label = f"{name}: median {np.median(values):.3g}, 95 % {np.percentile(values, 95):.3g}"
            shares.stairs(100 * counts / len(values), edges, color=color, label=label)
        boxes.set(ylabel="|d logit / d normalized pixel|", title="boxes: quartiles; whiskers: 5 and 95 %")
        boxes.set_xticks(boxes.get_xticks(), list(found), rotation=20, ha="right", fontsize="small")
        shares.set(xscale="log", xlabel="|d logit / d normalized pixel|", ylabel="share of the pixels (%)",
                   title="distribution; the first bin holds all below")  # fmt: skip
        figure.legend(*shares.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False,
                      fontsize="small")  # fmt: skip
        for axes in (boxes, shares):
            tidy(axes)
        figure.suptitle(title, fontsize="medium")

    return save_figure(draw, path, (12, 4.8 + 0.1 * len(found)))
