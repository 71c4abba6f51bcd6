"""What docs/results.md shows of how far an answer and its map can be trusted.

One function a table, from records to Markdown. Of several records of the same thing the last one counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath

from bench.evidence.explanation_tables import method_in_words
from bench.evidence.markdown import markdown, marked
from bench.measure.record import Record
from train.data.names import short_name

_MEASURES = ("spearman", "pearson", "ssim", "top_overlap", "top_20_overlap")


def sanity(records: Sequence[Record]) -> str:
    """Return how much each method's maps still agree with the trained network's once all weights are random."""
    latest = {
        (found["data"], _file(found["model"], found["precision"])): found
        for found in records
        if found["bench"] == "sanity"
    }
    rows = []
    for (_, file), found in latest.items():
        last = {row["method"]: row for row in found["rows"]}
        name = marked(f"{file}, {found['n']} images", found)
        for method, row in last.items():
            verdict = "yes" if found["passed"][method] else "**no**"
            rows.append([
                name, method_in_words(method), f"{row['spearman']:.2f}", f"{row['ssim']:.2f}", verdict
            ])  # fmt: skip
            name = ""
    return markdown(["file", "method", "Spearman", "SSIM", "changes with the weights"], rows, "llrrl")


def drift(records: Sequence[Record]) -> str:
    """Return how much the maps of exported files agree with those of the same network unrounded."""
    latest = {}
    for found in records:
        if found["bench"] == "agreement" and found["networks"][1]["precision"] == "float":
            file = found["networks"][0]
            latest[found["data"], _file(file["model"], file["precision"])] = found
    rows = []
    for (_, file), found in latest.items():
        same = found["same_class"]
        rows.append([
            marked(file, found), f"{found['images']:,}", f"{found['differing']:,}",
            *(f"{found[name]['mean']:.3f}" for name in _MEASURES), f"{same['Spearman']:.3f}" if same else "",
        ])  # fmt: skip
    header = ["file", "images", "in another class", "Spearman", "Pearson", "SSIM", "top-10 % overlap",
              "top-20 % overlap", "Spearman, same class"]  # fmt: skip
    return markdown(header, rows, "l" + "r" * 8)


def calibration(records: Sequence[Record]) -> str:
    """Return how far a file's probabilities are to be believed, without its temperature and with it."""
    latest: dict[tuple[str, str], Record] = {}
    # Whenever they were measured, images that the temperature was not fitted on say more than all of them.
    for found in sorted(records, key=lambda one: one.get("part") == "odd"):
        if found["bench"] == "accuracy" and found.get("temperature", 1) != 1:
            latest[found["data"], _file(found["model"], found["precision"])] = found
    rows = []
    for (data, file), found in sorted(latest.items(), key=lambda item: item[0]):
        raw, calibrated = found["raw"], found["calibrated"]
        images = f"{found['n']:,}" + ("" if found.get("part") == "odd" else ", those of the fit among them")
        rows.append([
            marked(f"{file}, {short_name(data)}", found), images, f"{found['temperature']:.3f}",
            f"{raw['ece_percent']:.2f} -> {calibrated['ece_percent']:.2f}",
            *(f"{raw[name]:.4f} -> {calibrated[name]:.4f}" for name in ("nll", "brier")),
        ])  # fmt: skip
    return markdown(["file", "images", "temperature", "ECE, %", "NLL", "Brier"], rows, "lrrrrr")


def outliers(records: Sequence[Record]) -> str:
    """Return how well a file tells images of another kind from its own, by energy and by probability."""
    latest = {
        (found["data"], short_name(found["against"]), found["precision"]): found
        for found in records
        if found["bench"] == "outliers"
    }
    rows = []
    for (data, against, precision), found in latest.items():
        energy, softmax = found["energy"], found["softmax"]
        flagged = found["flagged"]
        rows.append([
            marked(_file(found["model"], precision), found), f"{data}, {found['n'][0]:,}",
            f"{against}, {found['n'][1]:,}", f"{energy['auroc']:.2f} ({softmax['auroc']:.2f})",
            f"{energy['fpr95']:.1f} ({softmax['fpr95']:.1f})",
            ", ".join(f"{share:.1f}" for share in flagged) if flagged else "",
        ])  # fmt: skip
    header = ["file", "its own, images", "others, images", "AUROC, %", "FPR95, %",
              "flagged by the file's threshold, own and others, %"]  # fmt: skip
    return markdown(header, rows, "lllrrr")


def robustness(records: Sequence[Record]) -> str:
    """Return accuracies without and under each attack; of a data set the last record counts."""
    latest = {found["data"]: found for found in records if found["bench"] == "robustness"}
    attacks = list(dict.fromkeys(
        name for found in latest.values() for network in found["networks"] for name in network["accuracy"]
    ))  # fmt: skip
    rows = [
        [
            marked(f"{_file(network['model'], network['precision'])}, {short_name(data)}", found),
            f"{found['n']:,}",
            *(f"{network['accuracy'][name]:.1f}" if name in network["accuracy"] else "" for name in attacks),
        ]
        for data, found in latest.items()
        for network in found["networks"]
    ]
    return markdown(["file", "images", *attacks], rows, "lr" + "r" * len(attacks))


def _file(model: str, precision: str) -> str:
    """Return how the tables call a network: an exported file's name without ".onnx", with its precision.

    A file called ckpt.onnx lies in the folder of its run, which says which one it is.
    """
    path = PurePath(model)
    name = path.parent.name if path.stem == "ckpt" else path.name.removesuffix(".onnx")
    return f"{name or path.stem}, {precision}"
