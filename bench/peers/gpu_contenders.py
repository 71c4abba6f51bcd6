"""Who is compared where there is an NVIDIA GPU: PyTorch and ONNX Runtime on CUDA, and our TensorRT plans.

All go from pixels in host memory to results in host memory, so that the copies count for everybody alike. FP32 is
what PyTorch and ONNX Runtime call so: from Ampere on, both may multiply it in TF32.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from bench.measure.cold_start import Loading
from bench.networks.network import Network
from bench.networks.opened import open_networks
from bench.peers.contenders import Contender, Found, T, loading_torch, write_exports
from bench.peers.opening import classifying
from bench.peers.plans import build_plan, in_plans
from export.engine.gpu import find_gpu
from runtime.classifier import MAX_BATCH
from runtime.errors import EngineError, ModelError
from runtime.session import PLAN_ENGINE, open_session
from train.checkpoint import Checkpoint

OURS_ON_GPU = "TensorRT INT8"
OURS_ON_GPU_WITH_MAP = "TensorRT INT8 + map"

# Name -> whether from the integer codes, and --precision of export.engine. FP16 is the float network: the grids on
# the activations of ours, which layers in FP16 have no use for, would only slow it down.
_IN_TORCH = {
    "PyTorch CUDA FP32": "eager",
    "PyTorch CUDA graph FP16": "graph",
    "torch.compile CUDA FP16": "max-autotune",
}
_PLANS = {"TensorRT FP16": (False, "fp16"), OURS_ON_GPU: (True, "mixed")}
_INSTALL_TORCH = "install its build for this GPU's CUDA, see pytorch.org"


def gpu_contenders(
    checkpoint: Checkpoint, folder: Path, *, batches: Sequence[int], threads: int, peers: bool = True
) -> Found[Contender]:
    """Return the contenders on the first GPU; without one, all are missing for the same reason.

    Args:
        checkpoint: quantized.
        folder: where `bench.peers.contenders.contenders` has written its files; plans are added.
        batches: a plan is built for each of these numbers of images.
        threads: CPU threads of one inference of ONNX Runtime.
        peers: also PyTorch, plain and as its tuning guide has it, and ONNX Runtime.
    """
    makers: dict[str, Callable[[], Contender]] = {}
    if peers:
        makers |= {
            name: functools.partial(_in_torch, checkpoint, folder, way, batches, threads)
            for name, way in _IN_TORCH.items()
        }
        makers["ONNX Runtime CUDA FP32"] = functools.partial(_in_onnx_runtime, folder, threads)
    makers |= {name: functools.partial(_in_tensorrt, checkpoint, folder, name, batches) for name in _PLANS}
    return found_on_gpu(makers, folder)


def gpu_explaining_networks(checkpoint: Checkpoint, folder: Path) -> Found[Network]:
    """Return the plan that gives maps, by the name it has among the contenders.

    Args:
        checkpoint: quantized.
        folder: where files are written.
    """

    def make() -> Network:
        (network,) = open_networks(str(plan_with_map(checkpoint, folder, batch=MAX_BATCH)))
        return network

    found = found_on_gpu({OURS_ON_GPU_WITH_MAP: make}, folder)
    return Found({name.removesuffix(" + map"): network for name, network in found.ready.items()}, found.missing)


def found_on_gpu(makers: Mapping[str, Callable[[], T]], folder: Path) -> Found[T]:
    """Make each thing that a GPU runs; what fails is missing, for the reason that the error tells.

    Args:
        makers: name -> function that makes it.
        folder: temporary; its name is left out of reasons, which outlive it.
    """
    try:
        find_gpu()
    except EngineError as error:
        return Found({}, dict.fromkeys(makers, str(error)))
    found: Found[T] = Found({}, {})
    for name, make in makers.items():
        try:
            found.ready[name] = make()
        except (EngineError, ModelError) as error:
            found.missing[name] = str(error).replace(f"{folder}/", "")
    return found


def gpu_name() -> str:
    """Return the first GPU's name, compute capability and driver, for records.

    Raises:
        EngineError: there is none.
    """
    gpu = find_gpu()
    return f"{gpu.name}, compute capability {gpu.compute_capability}, driver for CUDA {gpu.driver}"


@contextlib.contextmanager
def torch_on_cuda() -> Iterator[None]:
    """Set PyTorch up for CUDA, with cuDNN's search for the fastest convolution as its tuning guide recommends.

    Raises:
        EngineError: PyTorch does not find the GPU, or fails on it in here.
    """
    if not torch.cuda.is_available():
        raise EngineError(f"PyTorch does not find the GPU; {_INSTALL_TORCH}")
    torch.backends.cudnn.benchmark = True
    try:
        yield
    except RuntimeError as error:
        raise EngineError(f"PyTorch fails on the GPU ({str(error).splitlines()[0]}); {_INSTALL_TORCH}") from None


def plan_with_map(checkpoint: Checkpoint, folder: Path, *, batch: int) -> Path:
    """Build the INT8 plan that gives class and map of `batch` images, or fewer; return its path."""
    _, model = write_exports(folder, OURS_ON_GPU, checkpoint, PLAN_ENGINE, int8=True)
    return build_plan(model, folder / f"{OURS_ON_GPU_WITH_MAP}, {batch}.plan", batch=batch, precision="mixed")


def _in_torch(checkpoint: Checkpoint, folder: Path, way: str, batches: Sequence[int], threads: int) -> Contender:
    loading = loading_torch(checkpoint, folder, way=way, device="cuda")
    with torch_on_cuda():
        classify = classifying(loading, threads=threads)
        for batch in sorted(set(batches)):
            # A GPU too new for this PyTorch shows with the first kernel only.
            classify(np.zeros((batch, *checkpoint.input.size, checkpoint.input.channels), np.uint8))
    return Contender(classify, loading)


def _in_onnx_runtime(folder: Path, threads: int) -> Contender:
    path = folder / "ONNX Runtime FP32.onnx"  # the same file that runs on the CPU
    loading = Loading("runtime", path, "ort", "cuda")
    return Contender(classifying(loading, threads=threads), loading, path.stat().st_size)


def _in_tensorrt(checkpoint: Checkpoint, folder: Path, name: str, batches: Sequence[int]) -> Contender:
    int8, precision = _PLANS[name]
    model, _ = write_exports(folder, name, checkpoint, PLAN_ENGINE, int8=int8)
    plans = {
        batch: build_plan(model, folder / f"{name}, {batch}.plan", batch=batch, precision=precision)
        for batch in sorted(set(batches))
    }
    first = next(iter(plans.values()))
    loading = Loading("runtime", first, PLAN_ENGINE, "cuda")
    return Contender(
        in_plans([open_session(plan) for plan in plans.values()]), loading, first.stat().st_size, plans
    )
