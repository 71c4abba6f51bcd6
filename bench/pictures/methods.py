"""Faithfulness against cost: one picture of what each explanation is worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from matplotlib.figure import Figure

from train.data.names import short_name
from train.figures import COLORS, save_figure

_MARKERS = "os^Dv*PX"


def draw_methods(found: Sequence[Mapping[str, Any]], path: Path) -> Figure:
    """Draw ROAD accuracy (lower: more faithful) over the cost in times of the class, a colour a network.

    Args:
        found: records of `bench.saliency --method`, a panel each.
        path: PNG file.
    """
    panels = [[(row, _kind(row, one["methods"])) for row in one["methods"]] for one in found]
    kinds = list(dict.fromkeys(kind for panel in panels for _, kind in panel))
    markers = dict(zip(kinds, _MARKERS * len(kinds), strict=False))

    def draw(figure: Figure) -> None:
        figure.subplots(1, len(panels), squeeze=False)
        for axes, one, panel in zip(figure.axes, found, panels, strict=True):
            models = list(dict.fromkeys(_network(row) for row, _ in panel))
            colors = {model: COLORS[number % len(COLORS)] for number, model in enumerate(models)}
            for row, kind in panel:
                axes.scatter(row["times_class"], row["road"], color=colors[_network(row)], marker=markers[kind],
                             s=60, alpha=0.85)  # fmt: skip
            for model, color in colors.items():
                axes.scatter([], [], color=color, label=model)
            axes.set(xscale="log", xlabel="cost, times the class alone", ylim=(0, None))
            axes.set_title(f"{short_name(one['data']).partition('@')[0]}, {one['n']:,} images", fontsize=10)
            axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.16))
        figure.axes[0].set_ylabel("accuracy without the most salient pixels, % (ROAD)")
        handles = [
            figure.axes[0].scatter([], [], color="0.3", marker=marker, label=kind)
            for kind, marker in markers.items()
        ]
        figure.legend(handles=handles, fontsize=8, loc="outside right upper")

    return save_figure(draw, path, (3.6 * len(panels) + 2, 5))


def _network(row: Mapping[str, Any]) -> str:
    return f"{PurePath(row['model']).stem}, {row['precision']}"


def _kind(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a name that means the same for every network: of a map of layers, the first one or another."""
    method, _, layer = row["method"].partition(":")
    if not layer:
        return method.replace("_x_", " x ").replace("_", " ")
    of_network = [
        other["method"] for other in rows
        if _network(other) == _network(row) and other["method"].startswith(f"{method}:")
    ]  # fmt: skip
    return f"{method}, {'last convolution' if row['method'] == of_network[0] else 'earlier layer'}"
