"""Who is compared on the CPU: the same checkpoint, made ready by us and by others.

bench/peers/gpu_contenders.py adds those that need a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
import onnx

from bench.measure.cold_start import Loading
from bench.networks.checkpoint import as_network
from bench.networks.network import CHECKPOINT_NAME, Network
from bench.networks.opened import open_networks
from bench.peers.cpu import Classify, nncf_ptq, onnx_runtime_ptq
from bench.peers.names import OURS
from bench.peers.opening import classifying
from bench.peers.torch_ways import INSTALL_PEERS
from export.deploy_form import deploy_form
from export.pipeline import export
from runtime.files import write_atomically
from runtime.onnx_bytes import without_gradient
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
        plans: batch size -> file that was made for it, where one file does not serve all.
    """

    classify: Classify
    loading: Loading
    file_bytes: int = 0
    plans: Mapping[int, Path] = field(default_factory=dict)

    def loading_of(self, batch: int) -> Loading:
        """Return how a fresh process gets ready for batches of this size."""
        return replace(self.loading, path=self.plans.get(batch, self.loading.path))


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
    checkpoints.save(checkpoint, folder / CHECKPOINT_NAME)
    found = {"PyTorch FP32": _contender(loading_torch(checkpoint, folder), threads)}
    for name, (engine, int8) in _EXPORTS.items():
        path, _ = write_exports(folder, name, checkpoint, engine, int8=int8)
        found[name] = _contender(Loading("runtime", path, engine), threads, path)
    missing = {}
    for name, make in _PEERS.items() if peers else ():
        try:
            found[name] = make(checkpoint, folder, threads)
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


def loading_torch(
    checkpoint: Checkpoint, folder: Path, *, way: str = "eager", device: str = "cpu", explain: bool = False
) -> Loading:
    """Return how a fresh process loads the checkpoint that `contenders` wrote, and sets PyTorch up.

    Raises:
        OptionError: its network is code that the user has not named.
    """
    arch = str(checkpoint.arch["name"])
    own = arch if factory.is_factory(arch) else ""
    if own:
        factory.check_named(own)  # the fresh process obeys this name, as it is given by a user
    return Loading("torch", folder / CHECKPOINT_NAME, own, device, explain=explain, way=way)


def _contender(loading: Loading, threads: int, *files: Path) -> Contender:
    return Contender(classifying(loading, threads=threads), loading, sum(file.stat().st_size for file in files))


def _torch_compile(checkpoint: Checkpoint, folder: Path, threads: int) -> Contender:
    return _contender(loading_torch(checkpoint, folder, way="compiled"), threads)


def _openvino_bf16(checkpoint: Checkpoint, folder: Path, threads: int) -> Contender:
    path = _float_file(checkpoint, folder, "OpenVINO FP32")
    return _contender(Loading("openvino", path, "bf16"), threads, path)


def _onnx_runtime_ptq(checkpoint: Checkpoint, folder: Path, threads: int) -> Contender:
    model = onnx.load(_float_file(checkpoint, folder, "ONNX Runtime FP32"))
    path = folder / "onnxruntime_ptq.onnx"
    write_atomically(path, onnx_runtime_ptq(model, _samples(checkpoint)))
    return _contender(Loading("onnxruntime", path), threads, path)


def _nncf_ptq(checkpoint: Checkpoint, folder: Path, threads: int) -> Contender:
    import openvino

    quantized = nncf_ptq(onnx.load(_float_file(checkpoint, folder, "OpenVINO FP32")), _samples(checkpoint))
    path = folder / "nncf.xml"
    openvino.save_model(quantized, path, compress_to_fp16=False)
    return _contender(Loading("openvino", path, "f32"), threads, path, path.with_suffix(".bin"))


def _float_file(checkpoint: Checkpoint, folder: Path, name: str) -> Path:
    engine, int8 = _EXPORTS[name]
    path, _ = write_exports(folder, name, checkpoint, engine, int8=int8)
    return path


def _samples(checkpoint: Checkpoint) -> np.ndarray:
    return checkpoint.samples["images"].permute(0, 2, 3, 1).contiguous().numpy()


# Name -> engine, and whether in INT8.
_EXPORTS = {
    "ONNX Runtime FP32": ("ort", False),
    "OpenVINO FP32": ("openvino", False),
    "ONNX Runtime INT8": ("ort", True),
    OURS: ("openvino", True),
}
_PEERS: dict[str, Callable[[Checkpoint, Path, int], Contender]] = {
    "torch.compile FP32": _torch_compile,
    "OpenVINO bf16": _openvino_bf16,
    "ONNX Runtime PTQ": _onnx_runtime_ptq,
    "NNCF PTQ": _nncf_ptq,
}
