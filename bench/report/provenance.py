"""Where the numbers come from: machines, versions, and the commands that make them again."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from bench.report.page import Html, Section, code, folded, join, paragraph, table, tag
from bench.report.sources import Run, Sources
from train.choices import FLOAT_BITS

if TYPE_CHECKING:
    from train.checkpoint import Checkpoint


def environment_section(sources: Sources, here: Mapping[str, Any]) -> Section:
    """Return where each measurement was made, and this report."""
    found: dict[str, list[tuple[str, Mapping[str, Any]]]] = {_place(here): [("this report", here)]}
    for record in sources.latest(*{record.bench for record in sources.records}):
        where = _environment(record.values)
        if where:
            found.setdefault(_place(where), []).append((record.bench, where))
    columns = []
    for group in found.values():
        benches, commits = (
            ", ".join(dict.fromkeys(values))
            for values in ((bench for bench, _ in group), (str(where.get("commit", "-")) for _, where in group))
        )
        columns.append((benches, {**group[0][1], "commit": commits}))
    facts = dict.fromkeys(name for _, where in columns for name in where if name != "command")
    rows = [[name, *(str(where.get(name, "-")) for _, where in columns)] for name in facts]
    header = ["measured", *(benches for benches, _ in columns)]
    shown = table("Machines and versions", header, rows, align="l" * len(header), class_="prose")
    return Section("Environment", shown)


def commands_section(sources: Sources, here: Mapping[str, Any]) -> Section:
    """Return the commands that train, export, measure and write this report again."""
    parts = [tag("h3", "This report"), code(str(here["command"]))]
    for run in sources.runs:
        parts += [tag("h3", f"Training and export of {run.name}"), *_run_commands(run)]
    recorded = [command for command in _recorded(sources) if command != here["command"]]
    if recorded:
        parts += [tag("h3", "Measurements"), *(code(command) for command in recorded)]
    silent = sum("command" not in _environment(record.values) for record in sources.records)
    if silent:
        parts.append(paragraph(f"{silent} records come from releases that did not keep their command."))
    return Section("Commands", join(parts))


def train_command(checkpoint: Checkpoint) -> str:
    """Return the command that trains such a network again: what differs from the defaults, as options.

    What only a file can say, the bits of single layers, is in `bits.json`.
    """
    from train.quantization.spec import QuantSpec
    from train.recipe import default_recipe

    recipe, quant, usual = checkpoint.recipe, checkpoint.quant, QuantSpec()
    words = ["python", "-m", "train", "--data", recipe.data, "--arch", str(checkpoint.arch["name"])]
    words += ["--bits", str(quant.bits), "--method", recipe.method]
    if quant.weight_quantizer != usual.weight_quantizer:
        words += ["--weight-quantizer", quant.weight_quantizer]
    words += ["--full-range"] * quant.full_range + ["--bits-file", "bits.json"] * bool(quant.layer_bits)
    default = default_recipe(recipe.data, recipe.method)
    for name in (field.name for field in fields(recipe)):
        value = getattr(recipe, name)
        if value == getattr(default, name):
            continue
        option = name.replace("_", "-")
        words += (
            [f"--{'' if value else 'no-'}{option}"] if isinstance(value, bool) else [f"--{option}", str(value)]
        )
    return shlex.join(words)


def _run_commands(run: Run) -> list[Html]:
    quant = run.checkpoint.quant
    parts = [code(train_command(run.checkpoint))]
    if quant.layer_bits:
        parts.append(folded("bits.json", code(json.dumps(quant.layer_bits))))
    precision = "--fp32" if quant.bits == FLOAT_BITS else "--int8"
    return [*parts, code(shlex.join(["python", "-m", "export.onnx", str(run.file), precision]))]


def _recorded(sources: Sources) -> list[str]:
    found: dict[str, None] = {}
    for record in sources.records:
        if record.bench == "training row" and isinstance(record.values.get("command"), str):
            found[record.values["command"]] = None
        elif "command" in _environment(record.values):
            found[str(_environment(record.values)["command"])] = None
    return list(found)


def _place(where: Mapping[str, Any]) -> str:
    """Return what two measurements share that were made on one machine with the same libraries."""
    return json.dumps({name: value for name, value in where.items() if name not in ("command", "commit")})


def _environment(values: Mapping[str, Any]) -> Mapping[str, Any]:
    where = values.get("environment")
    return where if isinstance(where, dict) else {}
