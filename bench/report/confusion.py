"""Who is taken for whom."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from bench.report.page import Content, Html, Section, folded, join, missing, table, tag
from bench.report.sources import Sources, reading

# More classes than this are no matrix to look at: the most frequent confusions are listed instead.
_MOST_CLASSES = 25
_LISTED = 20


def confusion_section(sources: Sources) -> Section:
    """Return the scores and the confusion matrix of every measured file, the first one open."""
    parts: list[Content] = []
    # Newest first: what the report measured itself, then the records.
    for record in reversed(sources.latest("accuracy")):
        with reading(record) as values:
            heading = f"{values['model']}, {values['precision']} on {values['engine']}, {values['data']}"
            contents = join(_scores(values), _matrix(values, heading))
        parts.append(folded(heading, contents) if parts else join(tag("h3", heading), contents))
    if not parts:
        remedy = "python -m bench.report SOURCE... --data DATA -o report.html"
        return Section(
            "Confusion matrix", missing("No record holds one. With images, the report measures it:", remedy)
        )
    return Section("Confusion matrix", join(parts))


def _scores(values: dict[str, Any]) -> Html:
    scores = [("accuracy", values["accuracy"]), ("sensitivity, macro", values["sensitivity"]),
              ("specificity, macro", values["specificity"])]  # fmt: skip
    tiles = [tag("div", tag("b", f"{value:.2f} %"), tag("span", name), class_="tile") for name, value in scores]
    different = values.get("classified_differently")
    if different is not None:
        said = f"of {values['n']:,} images in another class than by the network it was exported from"
        tiles.append(tag("div", tag("b", f"{different:,}"), tag("span", said), class_="tile"))
    return tag("div", tiles, class_="tiles")


def _matrix(values: dict[str, Any], heading: str) -> Html:
    confusion = np.array(values["confusion"], dtype=np.int64)
    classes = values.get("classes") or [str(number) for number in range(len(confusion))]
    if len(classes) != len(confusion) or confusion.shape != (len(confusion),) * 2:
        raise ValueError(heading)
    if len(classes) > _MOST_CLASSES:
        return _most_confused(confusion, classes)
    of_class = np.maximum(confusion.sum(1), 1)
    rows: list[list[Content]] = []
    for number, name in enumerate(classes):
        cells = [_cell(int(n), n / of_class[number], own=number == column)
                 for column, n in enumerate(confusion[number])]  # fmt: skip
        rows.append([str(name), *cells])
    # Cells that know their colour are whole elements: the table is built here.
    head = tag("tr", tag("th", "true ╲ predicted", scope="col"), (tag("th", str(c), scope="col") for c in classes))
    body = (tag("tr", tag("th", first, scope="row"), rest) for first, *rest in rows)
    caption = "Images by true class (row) and predicted class (column)"
    whole = tag("table", tag("caption", caption), tag("thead", head), tag("tbody", body), class_="confusion")
    return tag("div", whole, class_="wide", role="region", aria_label=caption, tabindex=0)


def _cell(count: int, share: float, *, own: bool) -> Html:
    kind = "right" if own else "wrong" if count else "none"
    # The square root, so that single mistakes among thousands are seen.
    style = f"--share: {math.sqrt(share):.2f}" if count else None
    return tag("td", f"{count:,}" if count else "·", class_=kind, style=style)


def _most_confused(confusion: np.ndarray, classes: list[str]) -> Html:
    mistakes = confusion * (1 - np.eye(len(confusion), dtype=np.int64))
    order = np.argsort(-mistakes, axis=None, kind="stable")[:_LISTED]
    pairs = [divmod(int(place), len(classes)) for place in order]
    rows = [[classes[true], classes[taken], f"{mistakes[true, taken]:,}",
             f"{100 * mistakes[true, taken] / max(1, confusion[true].sum()):.1f}"]
            for true, taken in pairs if mistakes[true, taken]]  # fmt: skip
    caption = f"The most frequent mistakes; {len(classes)} classes are too many for a matrix"
    return table(caption, ["true class", "taken for", "images", "% of the class"], rows, align="llrr")
