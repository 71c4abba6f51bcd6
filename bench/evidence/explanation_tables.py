"""What docs/results.md shows of recorded explanations: what each is worth and costs, and how much smoot masks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath

from bench.evidence.markdown import markdown, marked
from bench.evidence.speed_tables import ENGINES
from bench.measure.record import Record
from train.data.names import short_name

# In percent of 224 x 224 pixels. The median is printed as "236885" pixels, which no image has: read as 23,688.5.
_TABLE_IV = ("caltech101, resnet18, float", "19.9, 47.2, 56.7", "95.10", "Karkehabadi et al. 2024, Table IV")


def latest_methods(records: Sequence[Record]) -> dict[str, Record]:
    """Return the last record of `bench.saliency --method` of each data set, by its name without its split."""
    return {
        short_name(found["data"]).partition("@")[0]: found
        for found in records
        if found["bench"] == "saliency-methods"
    }


def methods(records: Sequence[Record]) -> str:
    """Return what every way to explain a file is worth and costs; of a data set the last record counts."""
    rows = []
    for data, found in latest_methods(records).items():
        for row in found["methods"]:
            located = ["" if row[key] is None else f"{row[key]:.2f}" for key in ("energy", "pointing")]
            rows.append([
                data, f"{PurePath(row['model']).stem}, {row['precision']}", method_in_words(row["method"]),
                f"{found['n']:,}", f"{row['accuracy']:.1f}", f"{row['masked_auc']:.2f}", f"{row['road']:.1f}",
                f"{row['insertion_auc']:.3f}", f"{row['deletion_auc']:.3f}", *located,
                f"{row['times_class']:.2f}",
            ])  # fmt: skip
    header = ["data", "file", "method", "images", "accuracy, %", "masked accuracy", "ROAD, %", "insertion",
              "deletion", "energy", "pointing", "times the class"]  # fmt: skip
    return markdown(header, rows, "lllrrrrrrrrr")


def mask_shares(records: Sequence[Record]) -> str:
    """Return K of smoot, its smallest, median and largest over the training images, beside the printed one."""
    latest = {
        found["row"]: found for found in records if found["bench"] == "training row" and "mask_percent" in found
    }
    rows = [
        [name, ", ".join(f"{found['mask_percent'][end]:.1f}" for end in ("min", "median", "max")),
         f"{found['test_accuracy']:.2f}", f"ours, {found['epochs']} epochs"]
        for name, found in latest.items()
    ]  # fmt: skip
    header = ["run", "K: minimum, median, maximum, %", "test accuracy, %", "from"]
    return markdown(header, [list(_TABLE_IV), *rows], "lrrl")


def cost(records: Sequence[Record]) -> str:
    """Return what the class takes with each map of a file, as times the class alone: one image, one thread."""
    latest = {}
    for found in records:
        # A record of --frame is of files with the gradient alone: of one network both kinds count.
        if found["bench"] == "latency" and found["threads"] == 1 and not found.get("frame"):
            times = found["latency"].get("1", {})
            if len(times) > 1:
                latest[found["arch"], found["precision"], found["engine"].split()[0]] = found
    rows = []
    for (arch, precision, engine), found in latest.items():
        times = found["latency"]["1"]
        maps = found.get("maps", {})
        alone = times["class"]["p50_ms"]
        size = f", {found['input'][0]} pixels" if "input" in found else ""
        network = marked(f"{arch}, {precision.upper()} on {ENGINES[engine]}{size}", found)
        for name, row in times.items():
            if name == "class":
                continue
            rows.append([
                network, method_in_words(maps.get(name, name.removeprefix("class + "))), f"{alone:.3f}",
                f"{row['p50_ms']:.3f}", f"{row['p50_ms'] / alone:.2f}",
            ])  # fmt: skip
            network = ""
    header = ["network", "map", "class, ms", "class and map, ms", "times the class"]
    return markdown(header, rows, "llrrr")


def method_in_words(name: str) -> str:
    """Return "gradcam of conv2" for "gradcam:conv2", and words for underscores."""
    method, _, layer = name.partition(":")
    words = method.replace("_x_", " x ").replace("_", " ")
    return f"{words} of {layer}" if layer else words
