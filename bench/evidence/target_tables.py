"""What the pages show of targets: what each computes beside x86, a million images, start from C++, and browsers.

One function a table, from records to Markdown. Of several records of the same thing the last one counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from bench.evidence.markdown import markdown
from bench.evidence.speed_tables import ENGINES
from bench.measure.ratios import Ratio
from bench.measure.record import Record

_IMAGES = 1_000_000
_ALONE = "Classifier alone"


def million(records: Sequence[Record]) -> str:
    """Return what a million images take by `deploy.batch`: hours of a core, and gigabytes of results."""
    latest = {
        (found["arch"], found["data"], found["engine"].split()[0], found["explain"]): found
        for found in records
        if found["bench"] == "throughput" and "start_cpu_seconds" in found
    }
    rows = []
    for (arch, data, engine, explain), found in sorted(latest.items()):
        alone = np.array(found["images_per_cpu_second"][_ALONE])
        beside = found.get("beside", {})
        for name in found["result_bytes"]:
            rates = found["images_per_cpu_second"][name]
            rate = float(np.median(rates))
            as_many = found["images_per_cpu_second"].get(beside.get(name))
            rows.append([
                f"{arch}, {data}, {ENGINES[engine]}", "class and map" if explain else "class",
                name.removeprefix("deploy.batch, "), f"{rate:,.0f}", f"{float(np.median(rates / alone)):.0%}",
                "-" if as_many is None else f"{float(np.median(np.divide(rates, as_many))):.0%}",
                f"{_IMAGES / rate / 3600:.2f}", f"{float(np.median(found['start_cpu_seconds'][name])):.1f}",
                f"{_IMAGES * found['result_bytes'][name] / found['images'] / 1e9:.2f}",
            ])  # fmt: skip
    header = ["network", "answer", "by", "images a second of a core", "of `Classifier` alone",
              "of as many at once", "a million: hours of one core", "s of a core until ready",
              "a million: GB of results"]  # fmt: skip
    return markdown(header, rows, "lllrrrrrr")


def native_start(records: Sequence[Record]) -> str:
    """Return time and peak memory of one picture by the C++ program and by Python."""
    latest = {
        (found["arch"], found["data"], found["engine"], found["explain"]): found
        for found in records
        if found["bench"] == "native start"
    }
    rows = []
    for (arch, data, engine, explain), found in sorted(latest.items()):
        cells = [f"{arch}, {data}, {ENGINES[engine]}", "map" if explain else "class"]
        cells += [f"{found['wall'][name]['p50_ms']:.0f}" for name in ("C++", "Python")]
        cells += [f"{found['peak_memory_bytes'][name] / 1e6:.0f}" for name in ("C++", "Python")]
        rows.append(cells)
    header = ["one picture", "to its", "C++, ms", "Python, ms", "C++, MB at most", "Python, MB at most"]
    return markdown(header, rows, "llrrrr")


def browser(records: Sequence[Record]) -> str:
    """Return milliseconds of the same file in a browser and here, and how many times as long the browser takes."""
    latest = {(found["arch"], found["data"]): found for found in records if found["bench"] == "browser"}
    rows = []
    for (arch, data), found in sorted(latest.items()):
        for kind, times in found["ratio"].items():
            cells = [f"{arch}, {data}", kind]
            cells += [f"{found['latency'][f'{kind}, {where}']['p50_ms']:.2f}" for where in ("browser", "native")]
            rows.append([*cells, Ratio(**times).told(1)])
    header = ["network", "answer", "browser, ms", "ONNX Runtime here, ms", "browser / here"]
    return markdown(header, rows, "llrrr")


def targets(records: Sequence[Record]) -> str:
    """Return what every target computes of the same network: classes, codes, maps and milliseconds."""
    latest = {found["model"]: found for found in records if found["bench"] == "targets"}
    arm64 = {found["model"]: found for found in records if found["bench"] == "arm64"}
    rows = []
    for model, found in sorted(latest.items()):
        name = model
        for target, measured in found["targets"].items():
            rows.append([name, target, *_cells(measured)])
            name = ""
        if model in arm64:
            rows.append([name, "ONNX Runtime, ARM64 (emulated)", *_cells(arm64[model])])
            name = ""
        if found.get("plan"):
            rows.append([name, f"TensorRT-RTX {found['plan']['version']}, ahead of time", "built, not run",
                         *[""] * 5])  # fmt: skip
    header = ["network", "target", "class equal", "codes moved", "largest difference of a code",
              "map, codes equal", "map, all", "class and map, ms"]  # fmt: skip
    return markdown(header, rows, "llrrrrrr")


def _cells(measured: Record) -> list[str]:
    equal = measured["images"] - measured["classes_differing"]
    milliseconds = measured.get("latency_p50_ms")
    moved = f"{measured['codes_moved'] / measured['codes']:.2g}" if measured["codes"] else "none compared"
    return [
        f"{equal:,} of {measured['images']:,}", moved,
        str(measured["largest_step"]), _exponent(measured["map_of_equal_codes"]), _exponent(measured["map"]),
        "" if milliseconds is None else f"{milliseconds:.2f}",
    ]  # fmt: skip


def _exponent(value: Any) -> str:
    if value is None:
        return "-"
    return "equal" if value == 0 else f"{value:.0e}"
