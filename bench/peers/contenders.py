"""Who is compared on the CPU: the same checkpoint, made ready by us and by others.

bench/peers/gpu_contenders.py adds those that need a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import onnx
import torch
from torch import nn

from bench.measure.cold_start import Loading
from bench.networks.checkpoint import as_network
from bench.networks.network import CHECKPOINT_NAME, Network
from bench.networks.opened import open_networks
from bench.peers.cpu import (
    Classify,
    nncf_ptq,
    onnx_runtime_ptq,
    run_on_onnx_runtime,
    run_on_openvino,
)
from bench.peers.names import OURS
from export.deploy_form import deploy_form
from export.pipeline import export
from runtime.classifier import Classifier
from runtime.files import write_atomically
from runtime.manifest import INPUT_NAME
from runtime.onnx_bytes import without_gradient
from runtime.session import Session
from train import checkpoint as checkpoints
from train.checkpoint import Checkpoint
from train.models import factory

T = TypeVar("T")


@dataclass(frozen=True)
class Contender:
    """One way to classify with a checkpoint's network.

    Args:
        classify: images uint8 [N, H, W, C] -> logits float32 [N, K].
        loading: how a fresh process gets there.
        file_bytes: what has to be copied to a device; 0 where that is PyTorch and the checkpoint.
    """

    classify: Classify
    loading: Loading
    file_bytes: int = 0


@dataclass(frozen=True)
class Found(Generic[T]):
    """What is compared, and what cannot be.

    Args:
        ready: by name.
        missing: name -> what is wrong and what to do, one line.
    """

    ready: dict[str, T]
    missing: dict[str, str]

    def __or__(self, other: Found[T]) -> Found[T]:
        return Found(self.ready | other.ready, self.missing | other.missing)


def contenders(checkpoint: Checkpoint, folder: Path, *, threads: int, peers: bool = True) -> Found[Contender]:
    """Return the contenders on the CPU: the float network, ours, and where they are installed the peers'.

    Args:
        checkpoint: quantized.
        folder: where the file of each is written.
        threads: CPU threads of one inference.
        peers: also torch.compile, bfloat16, and quantization after training by ONNX Runtime and NNCF.
    """
    network = deploy_form(checkpoint.network(), checkpoint.input, int8=False)
    checkpoints.save(checkpoint, folder / CHECKPOINT_NAME)
    found = {"PyTorch FP32": Contender(in_torch(network), loading_torch(checkpoint, folder))}
    for name, (engine, int8) in _EXPORTS.items():
        path, _ = write_exports(folder, name, checkpoint, engine, int8=int8)
        session = Classifier(path, engine=engine, threads=threads).session
        found[name] = Contender(in_session(session), Loading("runtime", path, engine), path.stat().st_size)
    missing = {}
    for name, make in _PEERS.items() if peers else ():
        try:
            found[name] = make(checkpoint, network, folder, threads)
        except ImportError:
            missing[name] = INSTALL_PEERS
    return Found(found, missing)


def explaining_networks(checkpoint: Checkpoint, folder: Path, *, workers: int) -> dict[str, Network]:
    """Return those of the contenders that give maps, by the same names; the float network in PyTorch first.

    Args:
        checkpoint: quantized.
        folder: where files are written.
        workers: threads that will call at the same time.
    """
    network = deploy_form(checkpoint.network(), checkpoint.input, int8=False).network
    found = {"PyTorch FP32": as_network(network, checkpoint, "PyTorch FP32", "float")}
    for name, (engine, int8) in _EXPORTS.items():
        _, path = write_exports(folder, name, checkpoint, engine, int8=int8)
        (found[name],) = open_networks(str(path), engine=engine, threads=1, parallel_runs=workers)
    return found


def write_exports(
    folder: Path, name: str, checkpoint: Checkpoint, engine: str, *, int8: bool
) -> tuple[Path, Path]:
    """Export a checkpoint, once, and return two files: one with the class alone, one with its map too."""
    path, with_map = folder / f"{name}.onnx", folder / f"{name} with map.onnx"
    if not with_map.exists():
        data = export(checkpoint, int8=int8, target=engine).data
        write_atomically(path, without_gradient(data))
        write_atomically(with_map, data)
    return path, with_map


def in_session(session: Session) -> Classify:
    """Return a session as a function."""
    return lambda images: session.run({INPUT_NAME: images})["logits"]


def loading_torch(checkpoint: Checkpoint, folder: Path, *, program: str = "torch", device: str = "cpu") -> Loading:
    """Return how a fresh process loads the checkpoint that `contenders` wrote."""
    arch = str(checkpoint.arch["name"])
    return Loading(program, folder / CHECKPOINT_NAME, arch if factory.is_factory(arch) else "", device)


def in_torch(network: nn.Module, device: str = "cpu") -> Classify:
    """Return a deploy form on a device as a function between arrays in host memory."""

    def classify(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            # The copy back waits for a GPU, which works while the host goes on.
            logits: np.ndarray = network(torch.from_numpy(images).to(device)).cpu().numpy()
        return logits

    return classify


def _torch_compile(checkpoint: Checkpoint, network: nn.Module, folder: Path, threads: int) -> Contender:
    compiled: Any = torch.compile(network)
    return Contender(in_torch(compiled), loading_torch(checkpoint, folder, program="torch.compile"))


def _openvino_bf16(checkpoint: Checkpoint, network: nn.Module, folder: Path, threads: int) -> Contender:
    import openvino

    path = _float_file(checkpoint, folder, "OpenVINO FP32")
    whole = openvino.Core().read_model(path)
    loading = Loading("openvino", path, "bf16")
    return Contender(run_on_openvino(whole, threads, precision="bf16"), loading, path.stat().st_size)


def _onnx_runtime_ptq(checkpoint: Checkpoint, network: nn.Module, folder: Path, threads: int) -> Contender:
    model = onnx.load(_float_file(checkpoint, folder, "ONNX Runtime FP32"))
    quantized = onnx_runtime_ptq(model, _samples(checkpoint))
    path = folder / "onnxruntime_ptq.onnx"
    write_atomically(path, quantized)
    return Contender(run_on_onnx_runtime(quantized, threads), Loading("onnxruntime", path), len(quantized))


def _nncf_ptq(checkpoint: Checkpoint, network: nn.Module, folder: Path, threads: int) -> Contender:
    import openvino

    quantized = nncf_ptq(onnx.load(_float_file(checkpoint, folder, "OpenVINO FP32")), _samples(checkpoint))
    path = folder / "nncf.xml"
    openvino.save_model(quantized, path, compress_to_fp16=False)
    file_bytes = sum(file.stat().st_size for file in (path, path.with_suffix(".bin")))
    return Contender(run_on_openvino(quantized, threads), Loading("openvino", path, "f32"), file_bytes)


def _float_file(checkpoint: Checkpoint, folder: Path, name: str) -> Path:
    engine, int8 = _EXPORTS[name]
    path, _ = write_exports(folder, name, checkpoint, engine, int8=int8)
    return path


def _samples(checkpoint: Checkpoint) -> np.ndarray:
    return checkpoint.samples["images"].permute(0, 2, 3, 1).contiguous().numpy()


INSTALL_PEERS = "pip install 'clearpact[peers]'"

# Name -> engine, and whether in INT8.
_EXPORTS = {
    "ONNX Runtime FP32": ("ort", False),
    "OpenVINO FP32": ("openvino", False),
    "ONNX Runtime INT8": ("ort", True),
    OURS: ("openvino", True),
}
_PEERS: dict[str, Callable[[Checkpoint, nn.Module, Path, int], Contender]] = {
    "torch.compile FP32": _torch_compile,
    "OpenVINO bf16": _openvino_bf16,
    "ONNX Runtime PTQ": _onnx_runtime_ptq,
    "NNCF PTQ": _nncf_ptq,
}
