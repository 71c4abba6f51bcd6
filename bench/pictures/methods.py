"""Faithfulness against cost: one picture of what each explanation is worth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from train.figures import COLORS, save_figure

_MARKERS = "os^Dv*PX"


def draw_methods(rows: Sequence[dict[str, Any]], data: str, path: Path) -> Figure:
    """Draw ROAD accuracy (lower: more faithful) over the cost in times of the class, a colour a network.

    Args:
        rows: of `bench.networks.methods.measure_methods`.
        data: name of the images.
        path: PNG file.
    """
    models = list(dict.fromkeys(f"{row['model']} {row['precision']}" for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for row in rows:
            color = COLORS[models.index(f"{row['model']} {row['precision']}") % len(COLORS)]
            marker = _MARKERS[methods.index(row["method"]) % len(_MARKERS)]
            axes.scatter(row["times_class"], row["road"], color=color, marker=marker, s=60, alpha=0.85)
        for number, model in enumerate(models):
            axes.scatter([], [], color=COLORS[number % len(COLORS)], label=model)
        for number, method in enumerate(methods):
            axes.scatter([], [], color="0.3", marker=_MARKERS[number % len(_MARKERS)], label=method)
        axes.set(xscale="log", xlabel="cost, times the class alone", title=f"explanations on {data}")
        axes.set_ylabel("accuracy without the most salient pixels, % (ROAD)")
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))

    return save_figure(draw, path, (9, 5))
