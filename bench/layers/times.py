"""What each kernel of an engine takes to classify an image on the CPU, by the engine's own clock."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.layers.engine_graph import openvino_kernel, openvino_names, ort_kernel, ort_name
from runtime.errors import OptionError
from runtime.manifest import INPUT_NAME
from runtime.onnx_bytes import without_gradient

_RUNS = 50


@dataclass(frozen=True)
class Kernel:
    """What an engine runs in one piece.

    Args:
        name: such as "INT8 brgconv_avx512_I8".
        nodes: names in the file of all that it computes.
        ms: median time.
    """

    name: str
    nodes: tuple[str, ...]
    ms: float


def kernels(model: bytes, engine: str, image: np.ndarray, *, threads: int = 1) -> list[Kernel]:
    """Return the kernels that compute the class alone, in the order in which they run.

    The clocks tick in microseconds and cost a little themselves.

    Args:
        model: contents of an ONNX file.
        engine: "openvino" or "ort".
        image: uint8 [1, H, W, C].
        threads: CPU threads of one inference.

    Raises:
        OptionError: the engine is not installed.
    """
    measure = {"openvino": _openvino_runs, "ort": _ort_runs}[engine]
    times: dict[tuple[str, tuple[str, ...]], list[float]] = {}
    try:
        for name, nodes, ms in measure(without_gradient(model), image, threads):
            times.setdefault((name, nodes), []).append(ms)
    except ImportError as error:
        raise OptionError(f"engine {engine}: needs {error.name}; pip install 'clearpact[{engine}]'") from None
    return [Kernel(*kernel, float(np.median(of_runs))) for kernel, of_runs in times.items()]


def _openvino_runs(model: bytes, image: np.ndarray, threads: int) -> Iterable[tuple[str, tuple[str, ...], float]]:
    import openvino

    core = openvino.Core()
    graph = core.read_model(model=model)
    graph.reshape({INPUT_NAME: list(image.shape)})
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads,
                "PERF_COUNT": True}  # fmt: skip
    compiled = core.compile_model(graph, "CPU", settings)
    operations = compiled.get_runtime_model().get_ordered_ops()
    nodes = {operation.get_friendly_name(): tuple(openvino_names(operation)) for operation in operations}
    request = compiled.create_infer_request()
    for _ in range(_RUNS):
        request.infer({INPUT_NAME: image})
        for run in request.profiling_info:
            if run.status == openvino.ProfilingInfo.Status.EXECUTED:
                ms = run.real_time.total_seconds() * 1000
                yield openvino_kernel(run.exec_type), nodes.get(run.node_name, (run.node_name,)), ms


def _ort_runs(model: bytes, image: np.ndarray, threads: int) -> Iterable[tuple[str, tuple[str, ...], float]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.enable_profiling = True
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        for _ in range(_RUNS):
            session.run(["logits"], {INPUT_NAME: image})
        events = json.loads(Path(session.end_profiling()).read_bytes())
    ending = "_kernel_time"
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith(ending):
            node = ort_name(event["name"].removesuffix(ending))
            yield ort_kernel(event["args"]["op_name"]), (node,), event["dur"] / 1000
