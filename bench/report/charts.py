"""Matplotlib's pictures as SVG inside the page: in its font, in its colours by day and by night, with their text.

A colour is drawn as a number that no picture needs and replaced by the name that the page's style gives it.
"""

from __future__ import annotations

import hashlib
import io
import re
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from bench.measure.statistics import percentile
from bench.report.labels import label_points
from bench.report.page import Html, legible

INK, QUIET, GRID, ACCENT = "#010001", "#010002", "#010003", "#010004"
SERIES = tuple(f"#0200{number:02x}" for number in range(6))
_NAMES = {INK: "currentColor", QUIET: "var(--quiet)", GRID: "var(--grid)", ACCENT: "var(--good)"} | {
    color: f"var(--series-{number})" for number, color in enumerate(SERIES)
}
_HUE = "#03{:04x}"  # of a sequence of many lines
_MARKERS = "os^Dv*"
_FONT_SIZE = 11.5
_WIDTH_INCHES = 5.4
_LEAST_PERCENT = 0.5  # between the ends of an axis of accuracy

_STYLE = {
    "svg.fonttype": "none",  # letters stay letters, to be found and read aloud
    "text.parse_math": False,  # a file's name may hold a dollar sign
    "font.size": _FONT_SIZE, "axes.titlesize": _FONT_SIZE, "axes.labelsize": _FONT_SIZE,
    "xtick.labelsize": 11, "ytick.labelsize": 11, "legend.fontsize": 11, "legend.frameon": False,
    "text.color": INK, "axes.labelcolor": QUIET, "axes.edgecolor": QUIET, "xtick.color": QUIET,
    "ytick.color": QUIET, "legend.labelcolor": INK, "grid.color": GRID, "axes.grid": True, "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False, "figure.facecolor": "none", "axes.facecolor": "none",
    "lines.linewidth": 1.8, "lines.markersize": 5,
}  # fmt: skip

Series = Mapping[str, tuple[Sequence[float], Sequence[float]]]


def spectrum(number: int, of: int) -> str:
    """Return the colour of one of many lines in their order, from blue over green to red."""
    return _HUE.format(round(250 - 250 * number / max(1, of - 1)))


def chart(draw: Callable[[Axes], object], *, title: str, description: str, height_inches: float = 3.6) -> Html:
    """Return a picture as an inline SVG, about as wide as a phone's screen.

    Args:
        draw: draws into the axes.
        title: what a screen reader says first.
        description: what the picture shows, in words and numbers.
        height_inches: of the picture.
    """
    with matplotlib.rc_context(_STYLE):
        # A Figure of its own, without pyplot: no display, no state shared with the caller's plots.
        picture = Figure(figsize=(_WIDTH_INCHES, height_inches), dpi=72, layout="constrained")
        FigureCanvasAgg(picture)  # measures texts
        draw(picture.add_subplot())
        written = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        with warnings.catch_warnings():
            # The browser has other fonts than Matplotlib, which warns of letters that it cannot draw.
            warnings.filterwarnings("ignore", "Glyph .* missing from font")
            picture.savefig(written, format="svg", metadata=nothing)
    return _inlined(legible(written.getvalue()), legible(title), legible(description))


def line_chart(
    series: Series,
    *,
    title: str,
    xlabel: str,
    ylabel: str,
    limits: tuple[float | None, float | None] = (None, None),
    whole: bool = False,
) -> Html:
    """Return lines with their legend; more than SERIES has colours are drawn as a sequence.

    Args:
        series: name -> x and y.
        title: of the picture.
        xlabel: name and unit of x.
        ylabel: likewise of y.
        limits: of y.
        whole: x are whole numbers, such as epochs.
    """  # fmt: skip
    few = len(series) <= len(SERIES)
    columns = max(1, min(len(series), 4, 54 // (max(map(len, series)) + 5)))

    def draw(axes: Axes) -> None:
        for number, (name, (x, y)) in enumerate(series.items()):
            color = SERIES[number] if few else spectrum(number, len(series))
            marker = _MARKERS[number] if few and len(x) <= 12 else "o" if len(x) < 3 else None
            axes.plot(x, y, color=color, marker=marker, markerfacecolor="none", label=f" {name}")
        axes.set(xlabel=xlabel, ylabel=ylabel, ylim=limits)
        if whole:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.figure.legend(loc="outside lower center", ncols=columns, handlelength=1.6, columnspacing=1.2)

    lines = -(-len(series) // columns)
    said = "; ".join(
        f"{name}: {y[0]:.4g} at {x[0]:g} to {y[-1]:.4g} at {x[-1]:g}" for name, (x, y) in series.items()
    )
    return chart(
        draw, title=title, description=f"{ylabel} over {xlabel}. {said}.", height_inches=3.4 + 0.2 * lines
    )


def range_chart(
    rows: Mapping[str, Mapping[str, float | Sequence[float]]], *, title: str, ours: Collection[str]
) -> Html:
    """Return the distribution of each contender's times on one logarithmic axis.

    Args:
        rows: name -> fields of `bench.measure.statistics.Latency`; quantiles_ms may be missing.
        title: of the picture.
        ours: names of the contenders that stand out.
    """

    def draw(axes: Axes) -> None:
        for position, (name, row) in enumerate(rows.items()):
            color = ACCENT if name in ours else SERIES[0]
            quantiles = row.get("quantiles_ms")
            if isinstance(quantiles, Sequence) and len(quantiles) == 21:
                for low, high, width in ((1, 19, 4), (5, 15, 9)):
                    axes.plot([quantiles[low], quantiles[high]], [position] * 2, color=color, linewidth=width,
                              alpha=0.35, solid_capstyle="butt")  # fmt: skip
            p99 = percentile(row, 99)
            if p99 is not None:
                axes.plot([row["p50_ms"], p99], [position] * 2, color=color, linewidth=1.4)
                axes.plot(p99, position, marker="|", markersize=9, color=color)
            axes.plot(row["p50_ms"], position, marker="o", markersize=6, color=color)
            axes.annotate(f"{name}  {row['p50_ms']:.3g} ms", (0, position), xytext=(2, 11), va="center",
                          xycoords=("axes fraction", "data"), textcoords="offset points")  # fmt: skip
        axes.set(xscale="log", xlabel="time of one run (ms, logarithmic)", yticks=[],
                 ylim=(len(rows) - 0.6, -0.85))  # fmt: skip
        axes.spines.left.set_visible(False)
        _plain_log(axes)

    said = "; ".join(f"{name}: median {row['p50_ms']:.3g} ms{_tail(row)}" for name, row in rows.items())
    return chart(draw, title=title, description=f"{said}.", height_inches=0.9 + 0.42 * len(rows))


def _tail(row: Mapping[str, Any]) -> str:
    found = percentile(row, 99)
    return "" if found is None else f", 99th percentile {found:.3g} ms"


def front_chart(
    points: Mapping[str, tuple[float, float]], front: Sequence[str], *, title: str, ours: Collection[str]
) -> Html:
    """Return accuracy against latency: full points lie on the Pareto front, which is drawn, hollow ones behind it.

    Args:
        points: name -> milliseconds and percent.
        front: names on it, the fastest first.
        title: of the picture.
        ours: names of the contenders that stand out.
    """

    def draw(axes: Axes) -> None:
        stairs = [points[name] for name in front]
        axes.plot(*zip(*stairs, strict=True), color=GRID, linewidth=3, zorder=1, drawstyle="steps-post")
        for name, (x, y) in points.items():
            color = ACCENT if name in ours else SERIES[0]
            axes.plot(x, y, "o", markersize=8, color=color, markerfacecolor=color if name in front else "none")
        axes.set(xscale="log", xlabel="median latency (ms, logarithmic)", ylabel="accuracy (%)")
        axes.margins(x=0.16)
        axes.set_ylim(*_span([y for _, y in points.values()], _LEAST_PERCENT))
        _plain_log(axes)
        label_points(axes, points, sorted(points, key=lambda name: name not in front), line_color=QUIET)

    said = "; ".join(f"{name}: {x:.3g} ms, {y:.2f} %" for name, (x, y) in points.items())
    return chart(
        draw, title=title, description=f"{said}. On the Pareto front: {', '.join(front)}.", height_inches=4
    )


def _span(values: Sequence[float], least: float) -> tuple[float, float]:
    """Return limits around values, at least so far apart that trifles look like trifles."""
    low, high = min(values), max(values)
    missing = max(0.0, least - (high - low)) / 2
    margin = 0.15 * max(high - low, least)
    return low - missing - margin, high + missing + margin


def _plain_log(axes: Axes) -> None:
    """Let a logarithmic x axis show 0.2, 0.5, 1 and not powers of ten."""
    low, high = axes.get_xlim()
    few = np.log10(high / low) > 1.3
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1, 1.5, 2, 3, 4, 5, 7)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(visible=False, axis="x", which="minor")


def _inlined(svg: str, title: str, description: str) -> Html:
    """Return matplotlib's file as an element of the page: without namespaces, in the page's colours."""
    root = ElementTree.fromstring(svg)
    prefix = "c" + hashlib.sha256(svg.encode() + title.encode()).hexdigest()[:10]
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith("}style"):  # it would hold for the whole page
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.tail = None
        if element.tag != "text":
            element.text = None
        given = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
        if element.tag == "g":
            given.pop("id", None)
        element.attrib.clear()
        element.attrib.update({key: _attribute(key, value, prefix) for key, value in given.items()})
    named = {"title": title, "desc": description}
    for position, (name, text) in enumerate(named.items()):
        element = ElementTree.Element(name, id=f"{prefix}-{name}")
        element.text = text
        root.insert(position, element)
    view_box = root.attrib["viewBox"]
    root.attrib.clear()
    root.attrib.update(
        {"role": "img", "viewBox": view_box, "aria-labelledby": f"{prefix}-title",
         "aria-describedby": f"{prefix}-desc"}
    )  # fmt: skip
    return Html(ElementTree.tostring(root, encoding="unicode"))


def _attribute(key: str, value: str, prefix: str) -> str:
    if key == "id":
        return f"{prefix}{value}"
    if key == "href":
        return f"#{prefix}{value.removeprefix('#')}"
    value = re.sub(r"font-family: [^;]*;?", "", value) if key == "style" else value
    value = value.replace("url(#", f"url(#{prefix}")
    value = re.sub(r"#0[123][0-9a-f]{4}\b", _color_name, value)
    value = re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}", value)
    return " ".join(value.split())


def _color_name(found: re.Match[str]) -> str:
    color = found[0]
    if color.startswith(_HUE[:3]):
        return f"hsl({int(color[3:], 16)} 75% var(--lightness))"
    return _NAMES.get(color, color)
