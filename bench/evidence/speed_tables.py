"""What docs/results.md shows of recorded times: one function a table, from records to Markdown.

Of several records of the same thing the last one counts, so that measuring again replaces a figure.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from bench.evidence.markdown import markdown, marked
from bench.measure.ratios import read_ratio
from bench.measure.record import Record
from bench.peers.names import PTQ

NETWORK = "resnet20"  # whose latency is shown
PORTABLE = "0..127"  # codes of every engine
_OURS = {
    "ONNX Runtime INT8": "ours, ONNX Runtime INT8",
    "OpenVINO INT8": "**ours, OpenVINO INT8**",
    "TensorRT INT8": "ours, TensorRT INT8",
    "ONNX Runtime INT8 + map": "ours, ONNX Runtime INT8",
    "OpenVINO INT8 + map": "**ours, OpenVINO INT8**",
    "TensorRT INT8 + map": "ours, TensorRT INT8",
}
ENGINES = {"openvino": "OpenVINO", "ort": "ONNX Runtime", "tensorrt": "TensorRT"}
_ARM64_DIFFERENCES = ("logits_of_equal_codes", "map_of_equal_codes", "logits", "map")
_CLASS_ONLY, _PLAIN_MAP = "OpenVINO INT8", "OpenVINO INT8 + f32 map"


def environment(records: Sequence[Record]) -> str:
    """Return where the latest latencies were measured, as one sentence."""
    compared = _compared(records)
    if not compared:
        return "Nothing is recorded yet."
    where = list(compared.values())[-1]["environment"]
    runtime = where.get("onnxruntime") or where["onnxruntime-gpu"]
    gpu = f", GPU {where['gpu']}" if "gpu" in where else ""
    return (
        f"On {where['processor']}, {where['cores']} virtual cores, {where['system']}, Python {where['python']}, "
        f"torch {where['torch']}, ONNX Runtime {runtime}, OpenVINO {where['openvino']}{gpu}."
    )


def latency(records: Sequence[Record]) -> str:
    """Return median times of every contender on one thread, class only and class with map, slowest first."""
    compared = _compared(records)
    halves = []
    for bench in ("compare", "compare-explain"):
        times = [compared[bench, batch]["latency"] if (bench, batch) in compared else {} for batch in (1, 32)]
        left_out = {_PLAIN_MAP, _CLASS_ONLY} if bench == "compare-explain" else set()
        names = sorted(set(times[0]) - left_out, key=lambda name: -times[0][name]["p50_ms"])
        halves.append([
            [_OURS.get(name, name.removesuffix(" + map")), *(_milliseconds(t.get(name), name) for t in times)]
            for name in names
        ])  # fmt: skip
    height = max(map(len, halves))
    left, right = ([*half, *[["", "", ""]] * (height - len(half))] for half in halves)
    (one, many), (one_map, many_map) = (
        [marked(f"batch {batch}", *([compared[bench, batch]] if (bench, batch) in compared else []))
         for batch in (1, 32)]
        for bench in ("compare", "compare-explain")
    )  # fmt: skip
    header = ["class only", one, many, "", "class and map", one_map, many_map]
    return markdown(header, [[*a, "", *b] for a, b in zip(left, right, strict=True)], "lrrllrr")


def against_ptq(records: Sequence[Record]) -> str:
    """Return what ours take beside the same engine's own quantization after training, and both accuracies."""
    latest: dict[tuple[str, str], dict[tuple[int, int], Record]] = {}
    for found in records:
        if found["bench"] == "compare" and found.get("ratio_to_ptq"):
            network = f"{found['arch']}, {found['trained_on']}"
            latest.setdefault((network, found["grid"]), {})[found["threads"], found["input"][0]] = found
    rows = []
    for (network, grid), runs in latest.items():
        for (threads, batch), found in sorted(runs.items()):
            cells = [str(found.get("instances", 1))]
            for ours, ptq in PTQ.items():
                by = found["ratio_to_ptq"].get(ours)
                cells.append(_ratio(by) if by else "-")
                quality = [found["quality"].get(name) for name in (ours, ptq)]
                cells.append(", ".join(f"{row['accuracy']:.2f}" if row else "-" for row in quality))
            rows.append([network, grid, str(threads), marked(str(batch), found), *cells])
            network = grid = ""
    header = ["network", "codes", "threads", "batch", "instances", "OpenVINO: ours / NNCF", "accuracies, %",
              "ONNX Runtime: ours / its PTQ", "accuracies, %"]  # fmt: skip
    return markdown(header, rows, "llrrrrrrr")


def startup(records: Sequence[Record]) -> str:
    """Return time and memory of a fresh process up to its first prediction, or map."""
    latest = {}
    for found in records:
        if found["bench"] == "startup":
            latest[found["arch"], found["precision"], found["engine"].split()[0], found["explain"]] = found
    rows = []
    for (arch, precision, engine, explain), found in latest.items():
        what = f"{arch}, {precision.upper()} on {ENGINES[engine]}{', with map' if explain else ''}"
        for name, row in found["cold_start"].items():
            memory = [f"{row[f'{part}_bytes'] / 1e6:.0f}" for part in ("above_interpreter", "above_numpy")]
            of = what and marked(what, found)
            rows.append([of, name, f"{row['import_ms']:.0f}", f"{row['classifier_ms']:.0f}",
                         f"{row['first_prediction_ms']:.0f}", *memory])  # fmt: skip
            what = ""
    header = ["file", "start", "imports, ms", "`Classifier` to prediction, ms", "all, ms",
              "MB above the interpreter", "MB above numpy"]  # fmt: skip
    return markdown(header, rows, "llrrrrr")


def frames(records: Sequence[Record]) -> str:
    """Return the time from a frame to its answer beside the network alone, for every frame size."""
    latest = {}
    for found in records:
        if found["bench"] == "latency" and found.get("frame"):
            engine = found["engine"].split()[0]
            latest[found["arch"], found["precision"], engine, tuple(found["frame"]), found["threads"]] = found
    names = ["network", "frame to class", "network + map", "frame to class + map"]
    rows = []
    for (arch, precision, engine, frame, threads), found in latest.items():
        times = [found["frame_latency"].get(name) for name in names]
        rows.append([
            marked(f"{arch}, {precision.upper()} on {ENGINES[engine]}", found),
            f"{frame[1]}x{frame[0]}", str(threads),
            *(f"{row['p50_ms']:.2f}" if row else "" for row in times),
        ])  # fmt: skip
    header = ["network", "frame", "threads", *names]
    return markdown(header, rows, "llr" + "r" * len(names))


def throughput(records: Sequence[Record]) -> str:
    """Return images a second with requests in parallel, ours beside OpenVINO's own tool, medians over rounds."""
    latest = {
        (
            found["arch"],
            found["data"],
            found["precision"],
            found["threads"],
            found["benchmark_app"]["batch"],
        ): found
        for found in records
        if found["bench"] == "latency" and found.get("benchmark_app")
    }
    rows = []
    for (arch, data, precision, threads, batch), found in latest.items():
        beside = found["benchmark_app"]
        rates = [f"{statistics.median(beside[by]):,.0f}" for by in ("ours", "tool")]
        rows.append([
            marked(f"{arch}, {data}, {precision.upper()} on OpenVINO", found), str(batch),
            f"{found['requests']} of {threads}", *rates, f"{beside['ratio']:.2f}",
        ])  # fmt: skip
    header = ["network", "batch", "requests, threads of each", "ours, images/s", "benchmark_app, images/s",
              "ours / benchmark_app"]  # fmt: skip
    return markdown(header, rows, "lrrrrr")


def arm64(records: Sequence[Record]) -> str:
    """Return how far each network on an emulated ARM64 is from x86: codes, classes, logits and maps."""
    latest = {found["model"]: found for found in records if found["bench"] == "arm64"}
    rows = [
        [
            marked(model, found), str(found["images"]), str(found["images"] - found["classes_differing"]),
            f"{found['codes_moved']:,} of {found['codes']:,}", str(found["largest_step"]),
            str(found["images_with_moved_codes"]), *(_exponent(found[name]) for name in _ARM64_DIFFERENCES),
        ]
        for model, found in sorted(latest.items())
    ]  # fmt: skip
    header = ["network", "images", "classes equal", "codes moved", "largest step", "images with moved codes",
              "logits, others", "maps, others", "logits, all", "maps, all"]  # fmt: skip
    return markdown(header, rows, "lrrrrrrrrr")


def _exponent(value: float) -> str:
    return "equal" if value == 0 else f"{value:.0e}"


def training_step(records: Sequence[Record]) -> str:
    """Return what a training step of every method takes, in milliseconds and in plain steps."""
    latest = {}
    for found in records:
        if found["bench"] == "training step" and found["device"] == "cpu":
            setting = tuple(found[name] for name in ("arch", "data", "bits", "batch", "threads", "precision"))
            latest[setting] = found
    methods = list(dict.fromkeys(name for found in latest.values() for name in found["step"]))
    rows = []
    for (arch, data, bits, batch, threads, precision), found in latest.items():
        cells = [
            f"{found['step'][name]['p50_ms']:.1f} ({found['plain_steps'][name]:.2f})"
            if name in found["step"]
            else ""
            for name in methods
        ]
        rows.append([marked(f"{arch}, {data}, {bits} bit", found), str(batch), str(threads), precision, *cells])
    return markdown(["network", "batch", "threads", "precision", *methods], rows, "lrrl" + "r" * len(methods))


def compiled_step(records: Sequence[Record]) -> str:
    """Return what torch.compile makes of a training step, or why it does not run it."""
    latest = {}
    for found in records:
        if found["bench"] == "compiled step":
            setting = tuple(found[name] for name in ("arch", "data", "bits", "batch", "threads", "precision"))
            latest[setting] = found
    rows = []
    for (arch, data, bits, batch, threads, precision), found in latest.items():
        for method, first in found["first"].items():
            compiled = found["step"].get(f"{method}, compiled")
            times = f"{found['times_eager'][method]:.2f}" if compiled else "-"
            left = f"{sum(first['graph_breaks'].values())} parts left to Python"
            rows.append([
                marked(f"{arch}, {data}, {bits} bit", found), str(batch), str(threads), precision, method,
                f"{found['step'][method]['p50_ms']:.1f}",
                f"{compiled['p50_ms']:.1f}" if compiled else "-", times, f"{first['seconds']:.0f}",
                first["failure"].replace("|", "/") or left,
            ])  # fmt: skip
    header = ["network", "batch", "threads", "precision", "method", "eager, ms", "compiled, ms", "times eager",
              "first step, s", "what became of it"]  # fmt: skip
    return markdown(header, rows, "lrrllrrrrl")


def _compared(records: Sequence[Record]) -> dict[tuple[str, int], Record]:
    """Return the latest comparison of all contenders by (bench, batch), of one network, thread and processor."""
    fitting = [
        found for found in records
        if found["bench"] in ("compare", "compare-explain") and found["arch"] == NETWORK and found["threads"] == 1
        and found.get("grid", PORTABLE) == PORTABLE and not found.get("only_ptq")
    ]  # fmt: skip
    latest: dict[tuple[str, int], Record] = {}
    for found in fitting:
        if found["environment"]["processor"] == fitting[-1]["environment"]["processor"]:
            latest.pop((found["bench"], found["input"][0]), None)
            latest[found["bench"], found["input"][0]] = found
    return latest


def _ratio(recorded: Mapping[str, float]) -> str:
    """Return a ratio; of an instance, which the next one may miss by a percent, without its third digit."""
    found = read_ratio(recorded)
    return found.told(2 if found.low is None else 3)


def _milliseconds(row: Mapping[str, float] | None, name: str) -> str:
    if row is None:
        return "-"
    text = f"{row['p50_ms']:.{3 if row['p50_ms'] < 10 else 2}f}"
    return f"**{text}**" if _OURS.get(name, "").startswith("**") else text
