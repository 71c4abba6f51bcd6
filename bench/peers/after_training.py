"""One float network, quantized after training by clearpact, NNCF and ONNX Runtime, on the same images.

Each is called as its own documentation recommends; what a user has to write for it is counted.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from torch import nn

from bench.peers.cpu import Classify, nncf_ptq, onnx_runtime_ptq, run_on_onnx_runtime, run_on_openvino
from export.own_network import quantized_model
from export.pipeline import export
from export.sources.images import RealImages
from runtime.manifest import INPUT_NAME
from runtime.session import open_session
from train.choices import FLOAT_BITS
from train.input_spec import InputSpec

CLEARPACT, NNCF, ONNX_RUNTIME, FLOAT = "clearpact", "NNCF", "ONNX Runtime", "float"
_OUR_LINES = 1  # the command of docs/your-model.md


@dataclass(frozen=True)
class Quantized:
    """A network as one of them made it.

    Args:
        maker: CLEARPACT, NNCF, ONNX_RUNTIME, or FLOAT: not quantized.
        engine: that it runs on, one of runtime.session.ENGINES.
        bits: of weights and activations.
        classify: images uint8 [N, H, W, C] -> logits float32 [N, K].
        quantizing_s: seconds until it is quantized.
        file_s: seconds from there to the file; ours is verified on real images, and has its map.
        lines: statements that a user writes, once a float file and the images are there.
    """

    maker: str
    engine: str
    bits: int
    classify: Classify
    quantizing_s: float
    file_s: float
    lines: int


def made(
    network: nn.Module,
    input_spec: InputSpec,
    images: RealImages,
    classes: Sequence[str],
    *,
    bits: Sequence[int],
    engines: Sequence[str],
    threads: int,
    status: Callable[[str], None],
) -> dict[str, Quantized]:
    """Return the float network and what each maker makes of it, by name.

    Args:
        network: float, as `export.own_network.quantized_model` takes it.
        input_spec: how pixels become what it takes.
        images: `calibration` of them is shown to all makers.
        classes: names, in the order of the logits.
        bits: of ours, one file each; the others know 8 bits.
        engines: "openvino", on which NNCF is measured, and "ort", on which ONNX Runtime's own is.
        threads: CPU threads of one inference.
        status: told what is being done, step by step.
    """
    status("writing the float network ...")
    floating, _ = quantized_model(network, input_spec, images, classes, bits=FLOAT_BITS)
    given = export(floating, int8=False, saliency=False).data
    found = {FLOAT: Quantized(FLOAT, "openvino", FLOAT_BITS, _opened(given, "openvino", threads), 0.0, 0.0, 0)}
    pixels = np.ascontiguousarray(images.calibration.permute(0, 2, 3, 1).numpy())
    for engine in engines:
        for width in bits:
            status(f"{CLEARPACT}, {width} bit, {engine} ...")
            found[f"{CLEARPACT}, {width} bit, {engine}"] = _ours(
                network, input_spec, images, classes, bits=width, engine=engine, threads=threads
            )
        maker, quantize, run = _PEERS[engine]
        status(f"{maker} ...")
        began = time.perf_counter()
        quantized = quantize(onnx.load_model_from_string(given), pixels)
        seconds = time.perf_counter() - began
        found[f"{maker}, 8 bit, {engine}"] = Quantized(
            maker, engine, 8, run(quantized, threads), seconds, 0.0, statements(quantize)
        )
    status("")
    return found


def statements(function: Callable[..., object]) -> int:
    """Return how many statements a function's body has, without its docstring and what silences its library."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    count = 0
    for node in ast.walk(definition):
        text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        count += isinstance(node, ast.stmt) and not text and not isinstance(node, ast.With)
    return count - 1  # the function's own


def _ours(
    network: nn.Module,
    input_spec: InputSpec,
    images: RealImages,
    classes: Sequence[str],
    *,
    bits: int,
    engine: str,
    threads: int,
) -> Quantized:
    times = [time.perf_counter()]
    model, _ = quantized_model(network, input_spec, images, classes, bits=bits, target=engine)
    times.append(time.perf_counter())
    data = export(model, target=engine).data
    times.append(time.perf_counter())
    quantizing, file = map(float, np.diff(times))
    return Quantized(CLEARPACT, engine, bits, _opened(data, engine, threads), quantizing, file, _OUR_LINES)


def _opened(data: bytes, engine: str, threads: int) -> Classify:
    session = open_session(data, engine=engine, threads=threads)
    return lambda images: session.run({INPUT_NAME: images})["logits"]


_PEERS: dict[str, tuple[str, Callable[[onnx.ModelProto, np.ndarray], Any], Callable[[Any, int], Classify]]] = {
    "openvino": (NNCF, nncf_ptq, run_on_openvino),
    "ort": (ONNX_RUNTIME, onnx_runtime_ptq, run_on_onnx_runtime),
}
