"""The pipeline at a glance: what was trained and exported, and the figures that count."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bench.report.maps import ExplainedImages
from bench.report.page import Content, Html, Section, join, tag
from bench.report.sources import HERE, Model, Run, Sources, reading
from bench.report.speed import is_ours, milliseconds
from bench.report.subjects import Subject, role
from runtime.explanations.agreement import spearman
from train.choices import FLOAT_BITS

# Of the contenders of bench.compare, what an image is classified or explained with without this project: on the
# CPU, and on the GPU, where TensorRT is ours.
_USUAL = {
    "compare": ("PyTorch FP32", "PyTorch CUDA FP32"),
    "compare-explain": ("Captum Saliency", "Captum CUDA"),
}
_STAGES = {
    "Train": "PACT and saliency guidance",
    "Checkpoint": "weights, alphas, recipe",
    "Export": "INT8 Q/DQ, verified",
    "Model file": "ONNX with its input gradient",
    "Runtime": "numpy and one engine",
    "Answer": "class and saliency map",
}


def glance_section(
    sources: Sources, subjects: Sequence[Subject], explained: Sequence[ExplainedImages | None]
) -> Section:
    """Return the pipeline of each subject and the figures that count."""
    figures = [*_accuracies(subjects, sources), *_speeds(sources, subjects), *_agreements(explained)]
    tiles = tag("div", figures, class_="tiles") if figures else None
    pipelines: list[Content] = []
    for subject in subjects:
        pipelines += [tag("h3", subject.name) if len(subjects) > 1 else None, _pipeline(_facts(subject, sources))]
    return Section("At a glance", join(tiles, pipelines or _pipeline({})))


def _tile(figure: str, what: str, *details: str) -> Html:
    return tag(
        "div", tag("span", what, class_="what"), tag("b", figure), tag("span", " ".join(details)), class_="tile"
    )


def _accuracies(subjects: Sequence[Subject], sources: Sources) -> list[Html]:
    tiles = []
    for subject in subjects:
        name = f"Test accuracy, {subject.name}" if len(subjects) > 1 else "Test accuracy"
        checkpoint = subject.run.checkpoint if subject.run is not None else None
        before = f"{checkpoint.test_accuracy:.2f} %" if checkpoint is not None and checkpoint.history else ""
        measured = _measured_accuracy(subject, sources)
        if measured is not None:
            tiles.append(
                _tile(
                    f"{measured:.2f} %", name, role(subject.networks[-1]), f"(checkpoint {before})" * bool(before)
                )
            )
        elif before:
            tiles.append(_tile(before, name, "after the last epoch"))
    return tiles


def _measured_accuracy(subject: Subject, sources: Sources) -> float | None:
    names = {network.name for network in subject.networks[-1:]}
    trained_on = {network.data for network in subject.networks[-1:]}
    for record in reversed(sources.latest("accuracy")):
        with reading(record) as values:
            if values["model"] in names and (record.source == HERE or values.get("data") in trained_on):
                return float(values["accuracy"])
    return None


def _speeds(sources: Sources, subjects: Sequence[Subject]) -> list[Html]:
    """Return our fastest times of one image: of the subjects' networks alone, where there are any."""
    tiles = []
    own = {
        (s.run.checkpoint.arch["name"], s.run.checkpoint.recipe.data_name) for s in subjects if s.run is not None
    }
    own |= {(s.model.manifest.arch, s.model.manifest.data) for s in subjects if s.model is not None}
    for bench, usual in _USUAL.items():
        best: Html | None = None
        for record in sources.latest(bench):
            with reading(record) as values:
                times = {name: float(row["p50_ms"]) for name, row in values["latency"].items()}
                beside = {n: usual["TensorRT" in n] for n in times
                          if is_ours(n) and ("map" in n) == (bench != "compare")}  # fmt: skip
                ours = [n for n, other in beside.items() if other in times]
                if not ours or values["input"][0] != 1:
                    continue
                if own and (values["arch"], values.get("trained_on")) not in own:
                    continue
                name = min(ours, key=lambda name: times[name])
                what = "Class and map of one image" if "map" in name else "Class of one image"
                faster = times[beside[name]] / times[name]
                said = f"{values['arch']} on {name.removesuffix(' + map')}, {faster:.1f} times as fast"
                best = _tile(f"{milliseconds(times[name])} ms", what, said, f"as {beside[name]}")
        tiles += [best] if best is not None else []
    return tiles


def _agreements(explained: Sequence[ExplainedImages | None]) -> list[Html]:
    tiles = []
    for found in explained:
        if found is not None and len(found.maps) > 1:
            first, *_, last = found.subject.networks
            ranks = spearman(found.maps[0], found.maps[-1])
            what = f"Maps, {found.subject.name}" if len(explained) > 1 else "Agreement of maps"
            tiles.append(_tile(f"{np.mean(ranks):.3f}", what, f"Spearman, {role(first)} and {role(last)},",
                               f"{len(ranks):,} images"))  # fmt: skip
    return tiles


def _pipeline(facts: dict[str, list[str]]) -> Html:
    return tag("ol", (
        tag("li", tag("b", stage), (tag("span", fact) for fact in facts.get(stage, [general])))
        for stage, general in _STAGES.items()
    ), class_="pipeline")  # fmt: skip


def _facts(subject: Subject, sources: Sources) -> dict[str, list[str]]:
    """Return stage -> what is known of it."""
    run = {} if subject.run is None else _run_facts(subject.run)
    return run if subject.model is None else run | _model_facts(subject, subject.model, sources)


def _run_facts(run: Run) -> dict[str, list[str]]:
    checkpoint = run.checkpoint
    recipe, quant = checkpoint.recipe, checkpoint.quant
    parameters = sum(tensor.numel() for tensor in checkpoint.float_state().values())
    reached = [f"test accuracy {checkpoint.test_accuracy:.2f} %"] if checkpoint.history else []
    return {
        "Train": [
            f"{checkpoint.arch['name']} on {recipe.data}",
            f"method {recipe.method}",
            "float" if quant.bits == FLOAT_BITS else f"{quant.bits} bit, weights by {quant.weight_quantizer}",
            f"{len(checkpoint.history)} of {recipe.epochs} epochs",
        ],
        "Checkpoint": [*reached, f"{parameters:,} parameters", f"sha256 {run.sha256[:12]}…"],
    }


def _model_facts(subject: Subject, model: Model, sources: Sources) -> dict[str, list[str]]:
    manifest = model.manifest
    height, width = manifest.input.size
    quantized = sum(layer.get("bits") is not None for layer in manifest.layers)
    measured = _measured_accuracy(subject, sources)
    facts = {
        "Export": [
            f"{manifest.precision.upper()} for {manifest.target}",
            f"{quantized} of {len(manifest.layers)} layers quantized",
            subject.remark,
        ],
        "Model file": [
            f"{len(model.contents) / 1e6:.2f} MB",
            f"image uint8 {height}×{width}×{manifest.input.channels}",
            "with its input gradient" if subject.networks else "class only",
        ],
        "Runtime": [network.engine for network in subject.networks[-1:]],
        "Answer": [
            f"{len(manifest.classes)} classes",
            "" if measured is None else f"accuracy {measured:.2f} %",
            "saliency map" if subject.networks else "",
        ],
    }
    return {stage: [line for line in lines if line] for stage, lines in facts.items()}
