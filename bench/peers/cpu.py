"""Other makers' ways to a fast classifier, each set up as its own documentation recommends.

All of them start from the same float network as ours and take the same bytes: image uint8 [N, H, W, C].
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from runtime.manifest import INPUT_NAME

Classify = Callable[[np.ndarray], np.ndarray]
"""Images uint8 [N, H, W, C] -> logits float32 [N, K]."""


def onnx_runtime_ptq(model: onnx.ModelProto, samples: np.ndarray) -> bytes:
    """Return a float graph quantized by ONNX Runtime after training: static, QDQ, weights for each channel.

    Args:
        model: float graph.
        samples: images to calibrate on, uint8 [n, H, W, C].
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.samples = iter(samples)

        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(self.samples, None)
            return None if image is None else {INPUT_NAME: image[None]}

    with tempfile.TemporaryDirectory() as folder, _quiet():
        given, prepared, quantized = (str(Path(folder) / f"{n}.onnx") for n in ("given", "prepared", "quantized"))
        onnx.save(model, given)
        quant_pre_process(given, prepared)
        quantize_static(
            prepared,
            quantized,
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        return Path(quantized).read_bytes()


def run_on_onnx_runtime(model: bytes, threads: int) -> Classify:
    """Return a session of ONNX Runtime as a function."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(["logits"], {INPUT_NAME: images})[0]


def nncf_ptq(model: onnx.ModelProto, samples: np.ndarray) -> Any:
    """Return a float graph quantized by NNCF after training, as an openvino.Model."""
    import openvino

    with _quiet():
        import nncf

        whole = openvino.Core().read_model(model=model.SerializeToString())
        images = [image[None] for image in samples]
        return nncf.quantize(whole, nncf.Dataset(images), subset_size=len(images))


def run_on_openvino(model: Any, threads: int, *, precision: str = "f32") -> Classify:
    """Return an openvino.Model as a function, compiled for each batch size as ours are.

    Args:
        model: from one image input to logits.
        threads: CPU threads of one inference.
        precision: of what is not quantized, "f32" or "bf16".
    """
    import openvino

    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,
    }
    requests: dict[int, Any] = {}

    def classify(images: np.ndarray) -> np.ndarray:
        if len(images) not in requests:
            fixed = model.clone()
            fixed.reshape(images.shape)
            requests[len(images)] = openvino.Core().compile_model(fixed, "CPU", settings).create_infer_request()
        request = requests[len(images)]
        np.copyto(request.get_input_tensor().data, images)
        request.infer(share_outputs=True)
        logits: np.ndarray = request.get_output_tensor().data.copy()
        return logits

    return classify


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep progress bars and advice to their own users off the terminal."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
