"""What docs/results.md shows of recorded accuracies and maps: one function a table, from records to Markdown.

Of several records of the same thing the last one counts, so that measuring again replaces a figure. Runs that
differ in their seed alone are one line with mean and spread.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from bench.evidence.markdown import markdown, marked
from bench.evidence.published import PUBLISHED
from bench.evidence.speed_tables import ENGINES
from bench.measure.record import Record
from train.choices import FLOAT_BITS
from train.data.names import short_name

_SEED = re.compile(r"-(?:s|seed)?\d+(?=/|$)")


def results(records: Sequence[Record]) -> str:
    """Return the test accuracy of our training rows, over their seeds, between those that others have printed."""
    lines: list[tuple[tuple[object, ...], list[str]]] = []
    for runs in _seeds(records):
        last = runs[-1]
        recipe, bits = last["recipe"], last["bits"]
        accuracies = [run["test_accuracy"] for run in runs]
        data = short_name(recipe["data"])
        cells = [*_setting(data, _arch(last), bits, recipe["method"]), str(last.get("epochs", ""))]
        lines.append((_order(data, bits, statistics.fmean(accuracies)), [
            *cells, f"**{_mean_and_spread(accuracies, 2)}**", str(len(runs)), "last epoch",
            marked(_source(last), *runs),
        ]))  # fmt: skip
    for row in PUBLISHED:
        cells = [*_setting(row.data, row.network, row.bits, row.method), ""]
        lines.append(
            (_order(row.data, row.bits, row.accuracy), [*cells, f"{row.accuracy:.2f}", "", "", row.source])
        )
    header = ["data", "network", "bits", "method", "epochs", "test accuracy, %", "seeds", "chosen", "from"]
    return markdown(header, [cells for _, cells in sorted(lines, key=lambda line: line[0])], "llllrrrll")


def two_classes(records: Sequence[Record]) -> str:
    """Return what exported networks of two classes reach on their engines, over the seeds of their training."""
    latest: dict[str, dict[str, Record]] = {}
    for found in records:
        if found["bench"] == "accuracy" and found.get("auc") is not None:
            latest.setdefault(_any_seed(found["model"].removesuffix(".onnx")), {})[found["model"]] = found
    rows = []
    for name, by_seed in latest.items():
        runs = list(by_seed.values())
        confusions = [run["confusion"] for run in runs]
        sensitivities, specificities = (
            [100 * confusion[i][i] / sum(confusion[i]) for confusion in confusions] for i in (1, 0)
        )
        rows.append([
            marked(f"{name}, {runs[-1]['precision']} on {ENGINES[runs[-1]['engine'].split()[0]]}", *runs),
            str(len(runs)),
            *(_mean_and_spread(values, 2) for values in
              ([run["accuracy"] for run in runs], sensitivities, specificities)),
            _mean_and_spread([run["auc"] for run in runs], 4),
        ])  # fmt: skip
    header = ["run, precision", "seeds", "accuracy, %", "sensitivity, %", "specificity, %", "ROC AUC"]
    return markdown(header, rows, "lrrrrr")


def engines(records: Sequence[Record]) -> str:
    """Return the accuracy of exported files on their engines beside their checkpoints'."""
    latest = {}
    for found in records:
        if found["bench"] == "accuracy" and found.get("classified_differently") is not None:
            engine = found["engine"].split()[0]
            # Before bits were recorded, all were of 8.
            bits = found.get("bits", 8) or FLOAT_BITS
            latest[found["data"], found["arch"], bits, found["precision"], found["target"], engine] = found
    rows = [
        [marked(f"{arch}, {data}, {_bits(bits)}", found),
         f"{precision.upper()} on {ENGINES[engine]}", f"{found['checkpoint_accuracy']:.2f}",
         f"{found['accuracy']:.2f}", f"{found['classified_differently']:,} of {found['n']:,}"]
        for (data, arch, bits, precision, _, engine), found in latest.items()
    ]  # fmt: skip
    header = ["network, data, bits", "file", "checkpoint, %", "file, %", "images classified differently"]
    return markdown(header, rows, "llrrr")


def saliency(records: Sequence[Record]) -> str:
    """Return what the maps of every measured network are worth, over the seeds of its training."""
    measured = [
        found for found in records
        if found["bench"] == "saliency" and (found["canvas"], found["target"]) == ("blur", "predicted")
    ]  # fmt: skip
    # A run that was measured again may be another one of the same name: none of its older rows counts.
    newest = {
        (found["data"], found["fill"], _run(network)): found for found in measured for network in found["networks"]
    }
    latest: dict[tuple[str, ...], dict[str, tuple[Mapping[str, Any], Record]]] = {}
    for found in measured:
        for number, network in enumerate(found["networks"]):
            if newest[found["data"], found["fill"], _run(network)] is found:
                key = (found["data"], found["fill"], _any_seed(network["model"]), network["precision"])
                row = network | {"agreement": _agreement_with_float(found, number)}
                latest.setdefault(key, {})[network["model"]] = (row, found)
    rows = []
    for (data, fill, model, precision), by_seed in latest.items():
        runs = [row for row, _ in by_seed.values()]
        _, last = list(by_seed.values())[-1]
        auc = _mean_and_spread([run["masked_auc"] for run in runs], 2, error=runs[-1]["masked_auc_error"])
        means = [statistics.fmean(run[name] for run in runs)
                 for name in ("accuracy", "insertion_auc", "deletion_auc")]  # fmt: skip
        name = marked(f"{model}, {precision}", *(found for _, found in by_seed.values()))
        rows.append([data, name, str(len(runs)), f"{last['n']:,}", fill, f"{means[0]:.2f}", auc,
                     f"{means[1]:.3f}", f"{means[2]:.3f}", runs[-1]["agreement"]])  # fmt: skip
    rows += [
        [row.data, f"{row.method}, {_bits(row.bits)} ({row.source})", "", "", "not told", f"{row.accuracy:.2f}",
         f"{row.masked_auc:.2f}", "", "", ""]
        for row in PUBLISHED if row.masked_auc is not None
    ]  # fmt: skip
    rows.sort(key=lambda row: _position(row[0]))
    header = ["data", "run, precision", "seeds", "images", "removed", "accuracy, %", "masked accuracy",
              "insertion", "deletion", "maps against float"]  # fmt: skip
    return markdown(header, rows, "llrrlrrrrr")


def _seeds(records: Sequence[Record]) -> list[list[Record]]:
    """Return the training rows, each as its runs of different seeds.

    A name's newest run says with which recipe it counts; names that differ in their seed and have one recipe are
    one row.
    """
    by_name: dict[str, list[Record]] = {}
    for found in records:
        if found["bench"] == "training row":
            by_name.setdefault(found["row"], []).append(found)
    groups: dict[str, dict[int, Record]] = {}
    for name, runs in by_name.items():
        for run in runs:
            if _but_seed(run) == _but_seed(runs[-1]):
                group = groups.setdefault(f"{_any_seed(name)} {_but_seed(run)}", {})
                group[run["recipe"]["seed"]] = run
    return [list(group.values()) for group in groups.values()]


def _source(run: Record) -> str:
    """Return the row that bench.rows trains, with its table where the record knows it."""
    name = _any_seed(run["row"])
    return f"ours: `{run['table']} --only {name}`" if "table" in run else f"ours: `{name}`"


def _but_seed(run: Record) -> dict[str, Any]:
    recipe = {name: value for name, value in run["recipe"].items() if name != "seed"}
    # These runs too have their seeds in their names.
    files = {name: _SEED.sub("", recipe.get(name, "")) for name in ("init", "teacher")}
    return {**recipe, **files, "bits": run["bits"]}


def _any_seed(name: str) -> str:
    """Return a run's name with a * for the seed that may end it: "sgt-*" of "sgt-2" or "sgt-seed2"."""
    folder, slash, file = name.partition("/")
    return _SEED.sub("-*", folder) + slash + file


def _arch(run: Record) -> str:
    """Return the architecture of a training row; before it was recorded, the row's name alone held it."""
    named: str = run["row"].removeprefix(f"{run['recipe']['data']}-").split("-")[0]
    return str(run.get("arch", named))


def _agreement_with_float(found: Record, number: int) -> str:
    """Return how much a network's maps agree with the float network's: its run's own, or the only one there."""
    networks = found["networks"]
    floats = [n for n, network in enumerate(networks) if network["precision"] == "float" and n != number]
    own = [n for n in floats if _run(networks[n]) == _run(networks[number])]
    chosen = own or (floats if len(floats) == 1 else [])
    for agreement in found["agreement"]:
        if chosen and sorted(agreement["pair"]) == sorted((chosen[0], number)):
            return f"{agreement['spearman']:.3f}, {agreement['top_overlap']:.3f}"
    return ""


def _run(network: Mapping[str, Any]) -> str:
    """Return the run that a network of a saliency record belongs to, as checkpoint or as exported file."""
    return str(network["model"].partition("/")[0])


def _mean_and_spread(values: Sequence[float], digits: int, *, error: float | None = None) -> str:
    """Return the mean with the sample standard deviation, or, of a single value, with its own error."""
    spread = statistics.stdev(values) if len(values) > 1 else error
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if spread is None else f"{mean} ± {spread:.{digits}f}"


def _setting(data: str, network: str, bits: int | None, method: str) -> list[str]:
    return [data, network or "not told", _bits(bits), method]


def _bits(bits: int | None) -> str:
    return "float" if bits == FLOAT_BITS else str(bits or "not told")


def _order(data: str, bits: int | None, accuracy: float) -> tuple[int, str, int, float]:
    return (_position(data), data, -(bits or 0), -accuracy)


def _position(data: str) -> int:
    known = list(dict.fromkeys(row.data for row in PUBLISHED))
    return known.index(data) if data in known else len(known)
