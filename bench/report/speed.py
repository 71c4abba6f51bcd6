"""How long what takes: accuracy against latency, and the distribution of the times of every contender."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bench.measure.ratios import read_ratio
from bench.measure.record import missing_by_reason
from bench.measure.statistics import percentile
from bench.report.charts import front_chart, range_chart
from bench.report.page import Content, Html, Section, figure, folded, join, missing, paragraph, table, tag
from bench.report.sources import Record, Sources, reading
from train.choices import FLOAT_BITS

_RATIO = "ratio_to_"
_COMPARISONS = {"compare": "class only", "compare-explain": "class and saliency map"}


def front_section(sources: Sources) -> Section:
    """Return accuracy against latency, one picture for each data set, network, batch and number of threads."""
    groups = _points(sources)
    title = "Accuracy against latency"
    if not groups:
        remedy = "python -m bench.compare CKPT --data DATA --record results.jsonl"
        return Section(
            title, missing("No record holds both accuracy and latency of one file. To measure them:", remedy)
        )
    figures = []
    for group, points in groups.items():
        front = pareto_front(points)
        ours = [name for name in points if is_ours(name)]
        caption = [tag("b", group), f". On the Pareto front: {', '.join(front)}."]
        picture = front_chart(points, front, title=f"Accuracy against latency: {group}", ours=ours)
        figures.append(figure(picture, caption))
    note = paragraph(
        "To the left is faster, upwards more accurate. Full points lie on the Pareto front: nothing else is as "
        "accurate and as fast. Green: exported by this project in INT8."
    )
    return Section(title, join(note, tag("div", figures, class_="charts")))


def latency_section(sources: Sources) -> Section:
    """Return the distribution of the times of all contenders of every comparison, and of single files."""
    title = "Latency"
    cells = [_comparison(record) for record in sorted(sources.latest(*_COMPARISONS), key=_order)]
    single = _single_files(sources.latest("latency"))
    if not cells and not single:
        remedy = "python -m bench.compare CKPT --record results.jsonl"
        return Section(title, missing("No record holds times. To measure all contenders in turns:", remedy))
    note = paragraph(
        "Point: median; thin line: to the 99th percentile, where 1,000 runs tell it; bars: 5 to 95 % and 25 to "
        "75 % of the runs, where the record holds them. Contenders of one picture ran in turns, so their ratios "
        "hold; other "
        "pictures may come from different machines."
    )
    return Section(
        title, join(note if cells else None, tag("div", cells, class_="charts") if cells else None, single)
    )


def pareto_front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Return the names of the points (milliseconds, percent) that none is as fast and as accurate as, by speed."""
    front: list[str] = []
    for name in sorted(points, key=lambda name: (points[name][0], -points[name][1])):
        if not front or points[name][1] > points[front[-1]][1]:
            front.append(name)
    return front


def is_ours(contender: str) -> bool:
    """Return whether a contender of `bench.compare` is an INT8 file of this project."""
    return " INT8" in contender


def milliseconds(value: float) -> str:
    """Return a time with three digits that mean something."""
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"


def _points(sources: Sources) -> dict[str, dict[str, tuple[float, float]]]:
    """Return group -> name -> (median milliseconds, accuracy in percent); groups of one point are left out."""
    groups: dict[str, dict[str, tuple[float, float]]] = {}
    for record in sources.latest("compare"):
        with reading(record) as values:
            for name, quality in (values.get("quality") or {}).items():
                group = f"{values['data']}, {_setting(values)}"
                point = float(values["latency"][name]["p50_ms"]), float(quality["accuracy"])
                groups.setdefault(group, {})[name] = point
    accuracies: dict[tuple[str, str], tuple[str, float]] = {}
    for record in sources.latest("accuracy"):
        with reading(record) as values:
            accuracies[values["model"], values["engine"]] = values["data"], float(values["accuracy"])
    for record in sources.latest("latency"):
        with reading(record) as values:
            data, accuracy = accuracies.get((values["model"], values["engine"]), ("", 0.0))
            for batch, rows in values["latency"].items() if data else ():
                group = f"{data}, single files, batch {batch}, {_threads(values)}"
                name = f"{values['model']}, {values['engine'].split()[0]}"
                groups.setdefault(group, {})[name] = float(rows["class"]["p50_ms"]), accuracy
    return {group: points for group, points in groups.items() if len(points) > 1}


def _order(record: Record) -> tuple[str, int, int, str]:
    with reading(record) as values:
        return str(values["arch"]), int(values["input"][0]), int(values["threads"]), record.bench


def _comparison(record: Record) -> Html:
    with reading(record) as values:
        setting = f"{_setting(values)}: {_COMPARISONS[record.bench]}"
        rows = dict(sorted(values["latency"].items(), key=lambda item: float(item[1]["p50_ms"])))
        ratios, by = next((values[key], key.removeprefix(_RATIO)) for key in values if key.startswith(_RATIO))
        quality, sizes = values.get("quality") or {}, values.get("file_bytes") or {}
        picture = range_chart(rows, title=f"Latency of {setting}", ours=[name for name in rows if is_ours(name)])
        header: list[Content] = ["", "p50 ms", "p99 ms", f"times {by}"]
        extra = ["accuracy %", "as float %"] * bool(quality) + ["file kB"] * any(sizes.values())
        lines = [
            [tag("span", name, class_="ours" if is_ours(name) else None), milliseconds(row["p50_ms"]),
             _percentile_99(row), _ratio(ratios.get(name)),
             *([f"{quality[name][key]:.2f}" for key in ("accuracy", "agreement")] if quality else []),
             *([f"{sizes.get(name, 0) / 1000:,.0f}" if sizes.get(name) else "-"] * any(sizes.values()))]
            for name, row in rows.items()
        ]  # fmt: skip
        runs = f"{next(iter(rows.values()))['n']:,} rounds in turns"
        runs += f", in {values['instances']} fresh processes" if "instances" in values else ", in one process"
        numbers = table(f"{setting}, {runs}", [*header, *extra], lines, align="l" + "r" * (3 + len(extra)))
        absent = [paragraph(f"Not compared: {', '.join(names)}; {reason}.")
                  for reason, names in missing_by_reason(values).items()]  # fmt: skip
    return tag("div", figure(picture, [tag("b", setting), f", {runs}"]), absent, folded("Numbers", numbers))


def _single_files(records: list[Record]) -> Html | None:
    lines: list[list[Content]] = []
    for record in records:
        with reading(record) as values:
            cold, throughput = values.get("cold_start"), values.get("throughput_images_per_second", {})
            for batch, rows in values["latency"].items():
                lines += [
                    [values["model"], f"{values['engine']}, {values['device']}, {_threads(values)}", batch, name,
                     milliseconds(row["p50_ms"]), _percentile_99(row),
                     f"{throughput[batch]:,.0f}" if name == "class" and batch in throughput else "-",
                     f"{cold['first_prediction_ms']:.0f}" if cold else "-",
                     f"{values['peak_memory_bytes'] / 2**20:,.0f}"]
                    for name, row in rows.items()
                ]  # fmt: skip
    if not lines:
        return None
    header = [
        "file",
        "engine",
        "batch",
        "what",
        "p50 ms",
        "p99 ms",
        "images/s in parallel",
        "cold start ms",
        "peak MiB",
    ]
    return table("Files measured by bench.latency", header, lines, align="llrlrrrrr")


def _setting(values: Mapping[str, Any]) -> str:
    bits = "float" if values["bits"] == FLOAT_BITS else f"{values['bits']} bit"
    return f"{values['arch']}, {bits}, batch {values['input'][0]}, {_threads(values)}"


def _threads(values: Mapping[str, Any]) -> str:
    threads = values["threads"]
    return "engine's threads" if threads is None else f"{threads} thread{'s' * (threads != 1)}"


def _percentile_99(row: Mapping[str, Any]) -> str:
    found = percentile(row, 99)
    return "-" if found is None else milliseconds(found)


def _ratio(value: Any) -> str:
    """Return a ratio with its interval; before there were intervals, it was the number alone."""
    if value is None:
        return "-"
    return read_ratio(value).told(2) if isinstance(value, dict) else f"{float(value):.2f}"
