"""Masked accuracy, deletion and insertion: what becomes of a network as salient pixels go or come."""

from __future__ import annotations

from bench.report.charts import line_chart
from bench.report.page import Html, Section, figure, folded, join, missing, paragraph, table, tag
from bench.report.sources import Record, Sources, reading

_CURVES = (("masked", "masked_percent", "Masked accuracy", "accuracy (%)", 100.0, "removed"),
           ("deletion", "percent", "Deletion", "probability of the class", 1.0, "removed"),
           ("insertion", "percent", "Insertion", "probability of the class", 1.0, "inserted"))  # fmt: skip


def curves_section(sources: Sources) -> Section:
    """Return the curves of accuracy and probability as pixels go or come, and the areas under them."""
    records = sources.latest("saliency")
    title = "Masked accuracy"
    if not records:
        remedy = "python -m bench.saliency CKPT ckpt.onnx --float --data DATA --record results.jsonl"
        reason = "No record holds curves. Give the report images with --data, or measure them:"
        return Section(title, missing(reason, remedy))
    note = paragraph(
        "Accuracy after the most salient pixels are taken away: a map that finds what counts lets it fall early: "
        "a small area under the curve. Areas under different fillings cannot be compared."
    )
    cells = []
    for record in reversed(records):
        with reading(record) as values:
            setting = f"{values['n']:,} images of {values['data']}, removed pixels {values['fill']}"
            masked, *others = (_curve(record, *curve, setting) for curve in _CURVES)
            cells.append(tag("div", masked, folded("Deletion, insertion, areas", others, _areas(record))))
    return Section(title, join(note, tag("div", cells, class_="charts")))


def _curve(
    record: Record, name: str, percent: str, title: str, ylabel: str, top: float, verb: str, setting: str
) -> Html:
    values = record.values
    series = {
        f"{number}: {row['model']}, {row['precision']}": (values[percent], row[f"{name}_curve"])
        for number, row in enumerate(values["networks"], 1)
    }
    areas = ", ".join(f"{number}: {row[f'{name}_auc']:.{2 if top > 1 else 3}f}"
                      for number, row in enumerate(values["networks"], 1))  # fmt: skip
    xlabel = f"most salient pixels {verb} (%)"
    chart = line_chart(series, title=f"{title}, {setting}", xlabel=xlabel, ylabel=ylabel, limits=(0, 1.02 * top))
    return figure(chart, [tag("b", title), f", {setting}. Areas: {areas}."])


def _areas(record: Record) -> Html:
    networks = record.values["networks"]
    rows = [
        [f"{number}: {row['model']}, {row['precision']}", f"{row['accuracy']:.2f}",
         *(f"{row[f'{name}_auc']:.{digits}f} ± {row[f'{name}_auc_error']:.{digits}f}"
           for name, digits in (("masked", 2), ("insertion", 3), ("deletion", 3)))]
        for number, row in enumerate(networks, 1)
    ]  # fmt: skip
    header = ["network", "accuracy %", "masked accuracy", "insertion", "deletion"]
    areas = table("Areas ± standard error", header, rows, align="lrrrr")
    pairs = [[f"{a['pair'][0] + 1} and {a['pair'][1] + 1}", f"{a['spearman']:.3f}", f"{a['top_overlap']:.3f}"]
             for a in record.values["agreement"]]  # fmt: skip
    agreement = table("Agreement of the maps of two networks, means over the images",
                      ["networks", "Spearman", "top-10 % overlap"], pairs, align="lrr")  # fmt: skip
    return join(areas, agreement if pairs else None)
