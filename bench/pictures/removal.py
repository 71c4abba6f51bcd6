"""Curves of what is left of an answer as salient pixels go, over all images and image by image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from bench.measure.streams import ImageStream
from bench.networks.network import Network
from bench.networks.removal import MASKED_PERCENTS, PERCENTS, removal_curves
from runtime import command
from train.figures import COLORS, save_figure, tidy

_MARKERS = "os^Dv*"
# What a probability must gain to count as a rise.
LEAST_RISE = 0.01
_HALF_PERCENT = 50


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
                      ncols=1 if len(labels) == 1 else 2, title="areas under masked accuracy, deletion, insertion",
                      title_fontsize="small")  # fmt: skip
        figure.suptitle(
            f"{result['n']:,} images of {result['data']}, saliency of the {result['target']} class, removed "
            f"pixels: {result['fill']}, canvas of insertion: {result['canvas']}",
            fontsize="medium",
        )

    return save_figure(draw, path, (12, 4.6 + 0.13 * len(result["networks"])))


@dataclass(frozen=True)
class Peaks:
    """Where the probability of each image's true class is highest as its most salient pixels go.

    Args:
        curves: of every image, float64 [N, 10], over MASKED_PERCENTS of the pixels.
        rises: whether it is higher with some pixels gone than with all there, by LEAST_RISE at least, bool [N].
        percent: of the pixels that are gone at the peak, int64 [N].
    """

    curves: np.ndarray
    rises: np.ndarray
    percent: np.ndarray

    @classmethod
    def of(cls, curves: np.ndarray) -> Peaks:
        """Return the peaks of curves float64 [N, 10]."""
        rises = curves.max(1) >= curves[:, 0] + LEAST_RISE
        return cls(curves, rises, np.where(rises, np.array(MASKED_PERCENTS)[curves.argmax(1)], 0))


def find_peaks(network: Network, test: ImageStream, *, fill: str) -> Peaks:
    """Return the peaks of all images (Karkehabadi et al. 2024, section III and Fig. 1).

    The paper counts, with a CNN on CIFAR-10, 16 % of the test images whose accuracy first rises, and says not how
    much is a rise. One image is right or wrong; what rises is the probability of its true class.
    """
    parts, first = [], 0
    for images, labels in command.progress(test.batches(), label="images / 64", total=test.batch_count):
        curves, _ = removal_curves(network, images, labels, fill=fill, target="true", first=first)
        # Without the empty image at the end, in which some classes are probable by nature.
        parts.append(curves.deletion[:, : len(MASKED_PERCENTS)])
        first += len(labels)
    return Peaks.of(np.concatenate(parts))


def draw_peaks(found: Mapping[str, Peaks], path: Path, *, title: str) -> Figure:
    """Draw a row for each network: the images that rise, by where their peak lies, beside those that only fall."""

    def draw(figure: Figure) -> None:
        for line, (name, peaks) in zip(figure.subplots(len(found), 3, squeeze=False), found.items(), strict=True):
            early = peaks.rises & (peaks.percent <= _HALF_PERCENT)
            late = peaks.rises & (peaks.percent > _HALF_PERCENT)
            for axes, chosen, where in zip(line, (early, late), ("up to 50 %", "beyond 50 %"), strict=False):
                groups = ((~peaks.rises, "only falls", COLORS[1]), (chosen, f"peak {where}", COLORS[0]))
                for members, text, color in groups:
                    if members.any():
                        low, middle, high = np.percentile(peaks.curves[members], [25, 50, 75], axis=0)
                        axes.plot(
                            MASKED_PERCENTS,
                            middle,
                            color=color,
                            label=f"{text}: {members.mean():.1%} of the images",
                        )
                        axes.fill_between(MASKED_PERCENTS, low, high, color=color, alpha=0.2, linewidth=0)
                axes.set(xlabel="most salient pixels removed (%)", ylabel="probability of the true class",
                         xlim=(0, 100), ylim=(0, 1.02), title=name)  # fmt: skip
                axes.legend(frameon=False, fontsize="small")
                tidy(axes)
            counts = [int((peaks.percent[peaks.rises] == percent).sum()) for percent in MASKED_PERCENTS[1:]]
            line[2].bar(MASKED_PERCENTS[1:], np.array(counts) / len(peaks.rises) * 100, width=7, color=COLORS[0])
            line[2].set(xlabel="pixels gone at the peak (%)", ylabel="share of the images (%)",
                        title=f"{peaks.rises.mean():.1%} rise", xlim=(0, 105))  # fmt: skip
            tidy(line[2])
        figure.suptitle(title, fontsize="medium")

    return save_figure(draw, path, (13, 0.5 + 3.6 * len(found)))
