"""The card of a shipped checkpoint: what it is, what it reached, what its maps are worth, how it was made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.measure.environment import describe
from train.choices import FLOAT_BITS

_FILL = "black"


def card(result: dict[str, Any], records: Sequence[dict[str, Any]], n_bytes: int) -> str:
    """Return the card as Markdown.

    Args:
        result: of `bench.rows.result`.
        records: from `record.read`; the newest of `bench.saliency` on a run of the row's name is shown.
        n_bytes: size of the shipped file.
    """
    recipe = result["recipe"]
    bits = "float" if result["bits"] == FLOAT_BITS else f"{result['bits']} bit"
    facts = {
        "data": recipe["data"],
        "network": f"{result['arch']}, {bits}",
        "method": f"{recipe['method']}, {result['epochs']} epochs, seed {recipe['seed']}",
        "test accuracy": f"{result['test_accuracy']:.2f} %",
        **_maps(result["row"], bits, records),
        **_confidence(result["row"], records),
        "file": f"{n_bytes:,} bytes",
        "made by": f"`{result['command']}`",
        "on": describe(result["environment"]),
    }
    if recipe["init"]:
        facts["starts from"] = f"`{recipe['init']}`"
    held_out = recipe.get("validation", 0)
    compared = f"accuracy on {held_out:,} training images held out" if held_out else "test accuracy"
    precision = "--fp32" if bits == "float" else "--int8"
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    return (
        f"# {result['row']}\n\n| | |\n| --- | --- |\n{rows}\n\n"
        f"The weights are those after the last epoch; recipes were compared by their {compared}.\n\n"
        f"```\npython -m export.onnx deploy/models/{result['row']}.pt {precision} -o model.onnx\n"
        f"python -m runtime.classify model.onnx photo.png --explain heat.png\n```\n"
    )


def _confidence(row: str, records: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Return the line of the newest `bench.accuracy` of a row's exported file, or nothing.

    One of the images that its temperature was not fitted on goes before one of all.
    """
    for record in sorted(records, key=lambda one: one.get("part") == "odd")[::-1]:
        if record["bench"] == "accuracy" and "raw" in record and record["model"] == f"{row}.onnx":
            raw, calibrated = (
                f"ECE {found['ece_percent']:.2f} %, NLL {found['nll']:.4f}, Brier {found['brier']:.4f}"
                for found in (record["raw"], record["calibrated"])
            )
            part = "not of the fit" if record.get("part") == "odd" else ""
            engine = f"{record['precision']} on {record['engine']}, {record['n']:,} images {part}".rstrip()
            return {"confidence": f"{raw}; at temperature {record['temperature']:.3f} {calibrated} ({engine})"}
    return {}


def _maps(row: str, bits: str, records: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Return the line of the newest masked-accuracy curve of a row, or nothing."""
    for record in reversed(records):
        if record["bench"] != "saliency" or record["fill"] != _FILL:
            continue
        for network in record["networks"]:
            if (network["model"], network["precision"]) == (row, bits):
                area = f"{network['masked_auc']:.2f} ± {network['masked_auc_error']:.2f}"
                return {"masked-accuracy AUC": f"{area} ({record['n']:,} images, {_FILL} fill, predicted class)"}
    return {}
