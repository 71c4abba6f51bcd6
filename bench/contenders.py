"""Who is compared: the same checkpoint, made ready for the CPU by us and by others."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from bench.peers import (
    Classify,
    nncf_ptq,
    onnx_runtime_ptq,
    run_on_onnx_runtime,
    run_on_openvino,
)
from export.deploy_form import deploy_form
from export.onnx import export
from runtime.classifier import Classifier
from runtime.manifest import INPUT_NAME
from train.checkpoint import Checkpoint

OURS = "OpenVINO INT8"


@dataclass(frozen=True)
class Contender:
    """One way to classify with a checkpoint's network.

    Args:
        classify: images uint8 [N, H, W, C] -> logits float32 [N, K].
        file_bytes: what has to be copied to a device; 0 where there is no file.
    """

    classify: Classify
    file_bytes: int = 0


def contenders(checkpoint: Checkpoint, *, threads: int, peers: bool = True) -> dict[str, Contender]:
    """Return the contenders by name: the float network, ours, and where they are installed the peers'.

    Args:
        checkpoint: quantized.
        threads: CPU threads of one inference.
        peers: also torch.compile, bfloat16, and quantization after training by ONNX Runtime and NNCF.
    """
    network = deploy_form(checkpoint.network(), checkpoint.input, int8=False)
    found = {
        "PyTorch FP32": Contender(_in_torch(network)),
        "ONNX Runtime FP32": _ours(checkpoint, "ort", threads, int8=False),
        "OpenVINO FP32": _ours(checkpoint, "openvino", threads, int8=False),
        "ONNX Runtime INT8": _ours(checkpoint, "ort", threads, int8=True),
        OURS: _ours(checkpoint, "openvino", threads, int8=True),
    }
    for name, make in _PEERS.items() if peers else ():
        with contextlib.suppress(ImportError):  # `missing_peers` tells
            found[name] = make(checkpoint, network, threads)
    return found


def missing_peers(found: dict[str, Contender]) -> list[str]:
    """Return the names of the peers that are not among the contenders, for want of their packages."""
    return [name for name in _PEERS if name not in found]


def _ours(checkpoint: Checkpoint, engine: str, threads: int, *, int8: bool) -> Contender:
    model = export(checkpoint, int8=int8, target=engine, saliency=False).model.SerializeToString()
    session = Classifier(model, engine=engine, threads=threads).session
    return Contender(lambda images: session.run({INPUT_NAME: images})["logits"], len(model))


def _in_torch(network: nn.Module) -> Classify:
    def classify(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            logits: np.ndarray = network(torch.from_numpy(images)).numpy()
        return logits

    return classify


def _torch_compile(checkpoint: Checkpoint, network: nn.Module, threads: int) -> Contender:
    return Contender(_in_torch(torch.compile(network)))  # type: ignore[arg-type]


def _openvino_bf16(checkpoint: Checkpoint, network: nn.Module, threads: int) -> Contender:
    import openvino

    model = export(checkpoint, int8=False, saliency=False).model.SerializeToString()
    whole = openvino.Core().read_model(model=model)
    return Contender(run_on_openvino(whole, threads, precision="bf16"), len(model))


def _onnx_runtime_ptq(checkpoint: Checkpoint, network: nn.Module, threads: int) -> Contender:
    model = export(checkpoint, int8=False, target="ort", saliency=False).model
    quantized = onnx_runtime_ptq(model, _samples(checkpoint))
    return Contender(run_on_onnx_runtime(quantized, threads), len(quantized))


def _nncf_ptq(checkpoint: Checkpoint, network: nn.Module, threads: int) -> Contender:
    import openvino

    quantized = nncf_ptq(export(checkpoint, int8=False, saliency=False).model, _samples(checkpoint))
    with tempfile.TemporaryDirectory() as folder:
        openvino.save_model(quantized, Path(folder) / "model.xml", compress_to_fp16=False)
        file_bytes = sum(path.stat().st_size for path in Path(folder).iterdir())
    return Contender(run_on_openvino(quantized, threads), file_bytes)


def _samples(checkpoint: Checkpoint) -> np.ndarray:
    return checkpoint.samples["images"].permute(0, 2, 3, 1).contiguous().numpy()


_PEERS: dict[str, Callable[[Checkpoint, nn.Module, int], Contender]] = {
    "torch.compile FP32": _torch_compile,
    "OpenVINO bf16": _openvino_bf16,
    "ONNX Runtime PTQ": _onnx_runtime_ptq,
    "NNCF PTQ": _nncf_ptq,
}
