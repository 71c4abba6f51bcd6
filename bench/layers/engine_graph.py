"""Ask an engine what it made of a model: which products of the graph run on integer codes, by which kernel."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import onnx

from runtime.errors import ModelError, OptionError

# Of ONNX Runtime's operators, those that multiply codes.
_INTEGER_OPERATORS = {"QLinearConv", "QGemm", "QLinearMatMul", "ConvInteger", "MatMulInteger"}


def openvino_names(operation: Any) -> list[str]:
    """Return the names in the file of all that an operation of OpenVINO's runtime model computes."""
    names = str(operation.get_rt_info()["originalLayersNames"].astype(str)).split(",")
    # A bias that is part of its product leaves the product this ending.
    return list(dict.fromkeys(name.split("/WithoutBiases")[0] for name in names))


def openvino_kernel(primitive: str) -> str:
    """Return how OpenVINO executes an operation, "INT8" or "F32" first."""
    precision = "INT8" if primitive.lower().endswith("i8") else primitive.rsplit("_", 1)[-1].upper()
    return f"{precision} {primitive}"


def ort_name(optimized: str) -> str:
    """Return the name in the file of a node of ONNX Runtime's optimized graph.

    What replaces a node keeps its name or that of its output; a change of layout puts something behind it.
    """
    return optimized.split("_token_")[0].removesuffix("_nchwc")


def ort_kernel(operator: str) -> str:
    """Return how ONNX Runtime executes an operator, "INT8" or "F32" first."""
    return f"{'INT8' if operator in _INTEGER_OPERATORS else 'F32'} {operator}"


def executed(model: bytes, engine: str, *, threads: int = 1) -> dict[str, str]:
    """Return node or output name -> how the engine executes it on the CPU, such as "INT8 brgconv_avx512_I8".

    Args:
        model: contents of an ONNX file.
        engine: "openvino" or "ort".
        threads: CPU threads of one inference; engines choose kernels by them.

    Raises:
        ModelError: the engine cannot load the model.
        OptionError: the engine is not installed.
    """
    ask = {"openvino": _executed_by_openvino, "ort": _executed_by_ort}[engine]
    try:
        return ask(model, threads)
    except ImportError as error:
        raise OptionError(f"--engine {engine}: needs {error.name}; pip install 'clearpact[{engine}]'") from None
    except RuntimeError as error:
        raise ModelError(f"{engine} cannot load it ({str(error).strip().splitlines()[0]})") from None


def _executed_by_openvino(model: bytes, threads: int) -> dict[str, str]:
    import openvino

    core = openvino.Core()
    whole = core.read_model(model=model)
    # Of what is asked for, as the runtime does: all of the outputs but the raw gradient.
    names = [n for n in (o.get_any_name() for o in whole.outputs) if n != "gradient"]
    asked = openvino.Model([whole.output(n) for n in names], whole.get_parameters())
    shapes = {port.get_any_name(): port.get_partial_shape() for port in asked.inputs}
    for shape in shapes.values():
        shape[0] = 1
    asked.reshape(shapes)
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    found = {}
    for operation in core.compile_model(asked, "CPU", settings).get_runtime_model().get_ordered_ops():
        facts = operation.get_rt_info()
        for name in openvino_names(operation):
            found[name] = openvino_kernel(str(facts["primitiveType"].astype(str)))
    return found


def _executed_by_ort(model: bytes, threads: int) -> dict[str, str]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # it warns that the optimized file fits this machine only
    options.intra_op_num_threads = threads
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        optimized = onnx.load(options.optimized_model_filepath)
    return {ort_name(node.name): ort_kernel(node.op_type) for node in optimized.graph.node}
