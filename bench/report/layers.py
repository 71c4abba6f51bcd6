"""Layer by layer: bits, alpha, scale, codes in use, noise, and what each takes on the engine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from bench.measure.data import LabelledImages
from bench.report.page import Content, Html, Section, join, missing, paragraph, table, tag
from bench.report.sources import Sources, reading
from bench.report.speed import milliseconds
from bench.report.subjects import Subject
from runtime import command
from runtime.errors import OptionError

if TYPE_CHECKING:
    from bench.inspect import Product
    from bench.layers.statistics import GridUse, LayerStatistics
    from bench.layers.times import Kernel

_CPU_ENGINES = ("openvino", "ort")


@dataclass(frozen=True)
class ExecutedProduct:
    """A product of an exported file on its engine.

    Args:
        product: as it is in the file.
        kernel: that computes it; None where the engine does not say.
        others: layers that the kernel computes too and that come before.
    """

    product: Product
    kernel: Kernel | None
    others: tuple[str, ...]


@dataclass(frozen=True)
class Layers:
    """The layers of a subject.

    Args:
        subject: whose they are.
        statistics: of the checkpoint's layers; empty without a run.
        samples: images that the activations were measured on; None without a run.
        executed: by name of the layer; empty where no engine of this machine runs the file.
        engine: that does.
    """

    subject: Subject
    statistics: tuple[LayerStatistics, ...]
    samples: LabelledImages | None
    executed: dict[str, ExecutedProduct]
    engine: str


def look_into(subject: Subject, samples: LabelledImages | None, *, engine: str | None) -> Layers:
    """Return the layers of a subject.

    Args:
        subject: a run, a file, or both.
        samples: images for the activations of a run.
        engine: of the file; None takes the one that it was exported for.
    """
    statistics: tuple[LayerStatistics, ...] = ()
    if subject.run is not None and samples is not None:
        import torch

        from bench.layers.statistics import layer_statistics

        command.status(f"layers of {subject.name} ...")
        images = torch.from_numpy(samples.images).permute(0, 3, 1, 2)
        statistics = tuple(layer_statistics(subject.run.checkpoint, images))
    executed: dict[str, ExecutedProduct] = {}
    used = engine or (subject.model.manifest.target if subject.model is not None else "")
    if subject.model is not None and used in _CPU_ENGINES:
        executed = _executed(subject, used)
    command.status("")
    return Layers(subject, statistics, samples, executed, used)


def layers_section(found: Sequence[Layers], sources: Sources) -> Section:
    """Return one table for each subject, and the layers of plans that `bench.latency --profile` recorded."""
    parts: list[Content] = []
    for layers in found:
        if layers.statistics or layers.executed:
            parts += [tag("h3", layers.subject.name) if len(found) > 1 else None, _table(layers)]
    parts += _plans(sources)
    if not parts:
        remedy = "python -m bench.report runs/NAME -o report.html"
        return Section("Layers", missing("No run and no exported file was given:", remedy))
    note = paragraph(
        "SQNR: signal-to-quantization-noise ratio, 10 log10 (signal / noise); what alpha clips is noise "
        "too. 6 dB are one bit. Codes used: how many of the grid occur. Time: of one image on one thread, "
        "with what the engine fused into the layer, by its own clock of microseconds."
    )
    return Section("Layers", join(note, parts))


def _executed(subject: Subject, engine: str) -> dict[str, ExecutedProduct]:
    try:
        from bench.inspect import contents
        from bench.layers.times import kernels
    except ImportError as error:
        raise OptionError(
            f"{subject.name}: the layers of a file need {error.name}; pip install 'clearpact[export]'"
        ) from None
    assert subject.model is not None
    image = subject.model.manifest.input
    blank = np.zeros((1, *image.size, image.channels), np.uint8)
    kernel_of = {node: k for k in kernels(subject.model.contents, engine, blank) for node in k.nodes}
    found: dict[str, ExecutedProduct] = {}
    for product in contents(subject.model.contents, engine).products:
        if product.part == "forward":
            kernel = kernel_of.get(product.node)
            others = tuple(name for name, e in found.items() if kernel is not None and e.kernel is kernel)
            found[product.layer] = ExecutedProduct(product, kernel, others)
    return found


def _table(layers: Layers) -> Html:
    caption = layers.subject.name
    if layers.samples is not None and layers.statistics:
        caption += f"; activations on {len(layers.samples.labels):,} images of {layers.samples.name}"
    caption += f"; time on {layers.engine}" if layers.executed else ""
    if not layers.statistics:
        header = ["layer", "weight", "codes used", "scale", "time ms", "kernel"]
        rows = [_product_row(name, executed) for name, executed in layers.executed.items()]
        return table(caption, header, rows, align="llrrrl")
    weight = ["weight", "bits", "codes used", "scale", "SQNR dB"]
    inputs = ["input from", "input bits", "alpha", "input scale", "input codes used", "clipped %", "input SQNR dB"]
    header = ["layer", *weight, *inputs, "time ms", "kernel"]
    rows = [_row(layer, layers.executed.get(layer.name)) for layer in layers.statistics]
    return table(caption, header, rows, align="llrrrrlrrrrrrrl")


def _row(layer: LayerStatistics, executed: ExecutedProduct | None) -> list[Content]:
    grid = layer.input
    alpha, clipped = "-", "-"
    if grid is not None and grid.alpha is not None:
        alpha, clipped = f"{grid.alpha:.4g}", f"{100 * grid.clipped_share:.2f}"
    bits, codes, scale, noise = _grid(layer.weight)
    input_bits, input_codes, input_scale, input_noise = _grid(grid)
    shape = f"{layer.kind} {_shape(layer.shape)}" + (f": {layer.reason}" if layer.reason else "")
    return [layer.name, shape, bits, codes, scale, noise, layer.quantizer or "-", input_bits, alpha, input_scale,
            input_codes, clipped, input_noise, *_execution(executed)]  # fmt: skip


def _grid(use: GridUse | None) -> tuple[str, str, str, str]:
    """Return bits, codes used, scale and noise of a tensor, as they stand in the table."""
    if use is None:
        return "float", "-", "-", "-"
    low, high = use.scale
    scale = f"{low:.3g}" if low == high else f"{low:.2g} to {high:.2g}"
    noise = "exact" if math.isinf(use.sqnr_db) else f"{use.sqnr_db:.1f}"
    return str(use.bits), f"{use.codes_used} of {use.codes}", scale, noise


def _product_row(name: str, executed: ExecutedProduct) -> list[Content]:
    product = executed.product
    codes = "-" if product.codes is None else f"{product.codes[2]} in {product.codes[0]}..{product.codes[1]}"
    scale = "-" if product.scale is None else f"{product.scale[0]:.2g} to {product.scale[1]:.2g}"
    weight = f"{product.operator} {_shape(product.weight)}, {product.stored}"
    return [name, weight, codes, scale, *_execution(executed)]


def _execution(executed: ExecutedProduct | None) -> list[str]:
    if executed is None or executed.kernel is None:
        return ["-", "-"]
    if executed.others:
        return [f"with {executed.others[0]}", executed.kernel.name]
    return [milliseconds(executed.kernel.ms), executed.kernel.name]


def _shape(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))


def _plans(sources: Sources) -> list[Html]:
    tables = []
    for record in sources.latest("latency"):
        with reading(record) as values:
            rows = [[layer["name"], layer["precision"], milliseconds(layer["ms"]), ", ".join(layer["nodes"])]
                    for layer in values.get("layers") or ()]  # fmt: skip
            if rows:
                caption = f"{values['model']}: layers of the plan, by TensorRT's profiler"
                tables.append(table(caption, ["layer", "type", "time ms", "ONNX nodes"], rows, align="llrl"))
    return tables
