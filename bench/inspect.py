"""`python -m bench.inspect`: what is in a model file, and what an engine makes of it.

The manifest, the bytes, the layers with their grids, and for each product, forward and of the gradient, whether
the engine multiplies integers: asked of the engine, not of the file.
"""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module: python -m bench.inspect")

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import onnx
from onnx import numpy_helper

from bench.layers.engine_graph import executed
from runtime import command
from runtime.files import read_bytes
from runtime.manifest import Manifest, read_manifest

EXAMPLES = """
  python -m bench.inspect ckpt.onnx
  python -m bench.inspect ckpt.onnx --engine ort      # as ONNX Runtime would run it
  python -m bench.inspect ckpt.onnx --json
"""

_PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_WEIGHT = re.compile(r"network\.(.+)\.(codes|weight)$")


@dataclass(frozen=True)
class Product:
    """A product with a weight, and how it is stored and executed.

    Args:
        node: its name in the graph.
        layer: of the network.
        part: "forward" or "gradient".
        operator: in the file.
        weight: shape of the weight.
        stored: "int8" or "float32".
        codes: smallest and largest code of an int8 weight, and how many different ones.
        scale: smallest and largest scale of an int8 weight.
        executed: "INT8" or "F32" and the engine's kernel; "not found" where it does not say.
        remark: why a product of an INT8 file is a float island, where the file tells.
    """

    node: str
    layer: str
    part: str
    operator: str
    weight: tuple[int, ...]
    stored: str
    codes: tuple[int, int, int] | None
    scale: tuple[float, float] | None
    executed: str
    remark: str


@dataclass(frozen=True)
class Contents:
    """What is in a file.

    Args:
        bytes: of the file: forward weights, gradient weights, and all else.
        operators: how many of each, forward and of the gradient.
        products: with weights, in the order of the graph.
    """

    bytes: dict[str, int]
    operators: dict[str, dict[str, int]]
    products: tuple[Product, ...]


def contents(model: bytes, engine: str, *, threads: int = 1) -> Contents:
    """Return what is in an ONNX file of this project, and how an engine executes its products.

    Raises:
        ModelError: the engine cannot load it.
        OptionError: the engine is not installed.
    """
    graph = onnx.load_from_string(model).graph
    stored = {t.name: t for t in graph.initializer}
    producer = {name: node for node in graph.node for name in node.output}
    kernels = executed(model, engine, threads=threads)
    layers: dict[str, str] = {}  # name of a forward node -> layer
    products, weight_bytes = [], {"forward": 0, "gradient": 0}
    for node in graph.node:
        if node.op_type == "Gather" and node.name.startswith("grad/") and node.input[0] in stored:
            # The gradient of the logits is one row of the last matrix: the engine stores that matrix whole.
            weight_bytes["gradient"] += len(stored[node.input[0]].raw_data)
        if node.op_type not in _PRODUCTS:
            continue
        dequantize = producer.get(node.input[1])
        tensor = stored.get(dequantize.input[0] if dequantize is not None else node.input[1])
        if tensor is None:
            continue
        part = "gradient" if node.name.startswith("grad/") else "forward"
        if (named := _WEIGHT.match(tensor.name)) is not None:
            layers[node.name] = named[1]
        origin = node.name.split("/")[1] if part == "gradient" else node.name
        scale = None if dequantize is None else numpy_helper.to_array(stored[dequantize.input[1]])
        weight_bytes[part] += len(tensor.raw_data)
        kernel = kernels.get(node.name) or kernels.get(node.output[0]) or "not found"
        products.append(_product(node, layers.get(origin, origin), part, tensor, scale, kernel, producer))
    forward = [n for n in graph.node if not n.name.startswith("grad/")]
    gradient = [n for n in graph.node if n.name.startswith("grad/")]
    return Contents(
        bytes={
            "forward weights": weight_bytes["forward"],
            "gradient weights": weight_bytes["gradient"],
            "all else": len(model) - sum(weight_bytes.values()),
        },
        operators={
            part: dict(Counter(n.op_type for n in nodes).most_common())
            for part, nodes in (("forward", forward), ("gradient", gradient))
        },
        products=tuple(products),
    )


def _product(
    node: onnx.NodeProto,
    layer: str,
    part: str,
    tensor: onnx.TensorProto,
    scale: np.ndarray | None,
    kernel: str,
    producer: dict[str, onnx.NodeProto],
) -> Product:
    values = numpy_helper.to_array(tensor)
    codes = None if scale is None else (int(values.min()), int(values.max()), len(np.unique(values)))
    source = producer.get(node.input[0])
    remark = ""
    if not kernel.startswith("INT8"):
        if scale is None:
            remark = "its weight is stored in float"
        elif source is None or source.op_type != "DequantizeLinear":
            remark = "its input is on no grid"
        else:
            remark = "the engine's choice"
    return Product(
        node=node.name,
        layer=layer,
        part=part,
        operator=node.op_type,
        weight=tuple(tensor.dims),
        stored="float32" if scale is None else str(values.dtype),
        codes=codes,
        scale=None if scale is None else (float(scale.min()), float(scale.max())),
        executed=kernel,
        remark=remark,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Print what is in one file."""
    parser = command.parser("bench.inspect", "Show what is in a model file and how an engine runs it.", EXAMPLES)
    parser.add_argument("model", help="ONNX file written by python -m export.onnx")
    parser.add_argument("--engine", choices=("openvino", "ort"), help="default: the one it was exported for")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of one inference (default: 1)")
    parser.add_argument("--json", action="store_true", help="one JSON line")
    options = parser.parse_args(argv)
    model = read_bytes(options.model)
    manifest = read_manifest(model, options.model)
    engine = options.engine or (manifest.target if manifest.target in ("openvino", "ort") else "ort")
    found = contents(model, engine, threads=options.threads)
    if options.json:
        print(json.dumps({"model": options.model, "engine": engine, "manifest": json.loads(manifest.to_json()),
                          **asdict(found)}))  # fmt: skip
        return
    print(*map(command.printable, _text(options.model, engine, manifest, found).splitlines()), sep="\n")


def _text(name: str, engine: str, manifest: Manifest, found: Contents) -> str:
    height, width = manifest.input.size
    lines = [
        f"{name}  {manifest.arch}, {manifest.precision} for {manifest.target}",
        f"image uint8 [N, {height}, {width}, {manifest.input.channels}] -> {len(manifest.classes)} classes: "
        f"{', '.join(manifest.classes[:5])}{', ...' if len(manifest.classes) > 5 else ''}",
        "bytes      " + ", ".join(f"{what} {size:,}" for what, size in found.bytes.items()),
    ]
    for part, counts in found.operators.items():
        if counts:
            most = ", ".join(f"{count} {name}" for name, count in list(counts.items())[:6])
            lines.append(f"{part:10} {sum(counts.values())} nodes: {most}{', ...' if len(counts) > 6 else ''}")
    for part in ("forward", "gradient"):
        products = [p for p in found.products if p.part == part]
        if not products:
            continue
        integer = sum(p.executed.startswith("INT8") for p in products)
        lines.append(f"\n{part}: {integer} of {len(products)} products on integer codes ({engine})")
        width = max(len(p.layer) for p in products)
        for p in products:
            codes = f"{p.codes[0]:4}..{p.codes[1]:<4}{p.codes[2]:4} codes" if p.codes else "float32" + 10 * " "
            remark = f"  ({p.remark})" if p.remark else ""
            lines.append(f"  {p.layer:{width}} {p.operator:6}{codes}  {p.executed}{remark}")
    return "\n".join(lines)


if __name__ == "__main__":
    command.run(main)
