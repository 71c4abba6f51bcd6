"""The model of CUDA itself: strict, late, and of the functions that the real one has."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable

import numpy as np
import pytest

from runtime.engines.tensorrt.cuda import Cuda
from tests.fake_cuda import FakeGpu
from tests.fake_cuda_device import PREFIXES
from tests.fake_cuda_parts import CUresult, Operation, Violation, cudaError_t


@pytest.mark.parametrize(
    ("broken", "rule"),
    [
        (lambda gpu: gpu.cudaFree(4096), "released, but is not allocated"),
        (
            lambda gpu: (a := gpu.cudaMalloc(8)[1], gpu.cudaFree(a), gpu.cudaFree(a)),
            "released, but is not allocated",
        ),
        (lambda gpu: gpu.cudaStreamSynchronize(5), "there is none"),
        (lambda gpu: gpu.cudaMemcpyAsync(gpu.cudaMalloc(8)[1], gpu.cudaHostAlloc(16, 0)[1], 16, 1, 0), "run over"),
    ],
)
def test_the_model_of_cuda_is_strict(broken: Callable[[FakeGpu], object], rule: str) -> None:
    gpu = FakeGpu()
    gpu.cudaSetDevice(0)
    with pytest.raises(Violation, match=rule):
        broken(gpu)
    with pytest.raises(AssertionError):
        gpu.assert_clean()


def test_the_model_of_cuda_does_work_only_when_somebody_waits() -> None:
    gpu = FakeGpu()
    gpu.cudaSetDevice(0)
    stream, device = gpu.cudaStreamCreateWithFlags(0)[1], gpu.cudaMalloc(4)[1]
    address, host = Cuda(gpu).pinned((4,), np.dtype(np.uint8))
    host[:] = 9
    gpu.cudaMemcpyAsync(device, address, 4, 1, stream)
    host[:] = 1  # overwritten before it was copied
    assert bytes(gpu.bytes_at(device, 4)) == b"\xcd" * 4
    with pytest.raises(Violation, match="before the work that needs it is done"):
        gpu.cudaFree(device)
    assert gpu.cudaStreamSynchronize(stream) == (cudaError_t.cudaSuccess,)
    assert bytes(gpu.bytes_at(device, 4)) == b"\x01" * 4


def test_the_model_has_the_functions_of_cuda_bindings_with_their_arguments() -> None:
    pytest.importorskip("cuda.bindings", reason="no cuda-bindings here: pip install cuda-bindings")
    from cuda.bindings import driver, runtime

    model = {name: value for part in FakeGpu.__mro__ for name, value in vars(part).items()}
    modelled = [name for name in model if name.startswith(PREFIXES)]
    assert len(modelled) > 32
    for name in modelled:
        real = runtime if name.startswith("cuda") else driver
        assert hasattr(real, name), name
        if inspect.isfunction(model[name]):
            documented = re.match(rf"{name}\((.*)\)", getattr(real, name).__doc__)
            assert documented is not None, name
            arguments = [argument for argument in documented[1].split(",") if argument.strip()]
            assert len(arguments) == len(inspect.signature(model[name]).parameters) - 1, name
    for name in ("cudaMemcpyKind", "cudaStreamCaptureMode", "cudaStreamCaptureStatus"):
        for member in vars(getattr(FakeGpu, name)):
            assert hasattr(getattr(runtime, name), member)
    assert {error.name for error in cudaError_t} <= set(runtime.cudaError_t.__members__)
    assert {error.name for error in CUresult} <= set(driver.CUresult.__members__)


def test_the_legacy_stream_and_blocking_ones_wait_for_each_other() -> None:
    gpu = FakeGpu()
    gpu.cudaSetDevice(0)
    order: list[str] = []
    blocking, other = gpu.cudaStreamCreateWithFlags(0)[1], gpu.cudaStreamCreateWithFlags(1)[1]
    for name, stream in (("blocking", blocking), ("other", other), ("legacy", 1), ("after", blocking)):
        gpu.enqueue(stream, Operation(lambda name=name: order.append(name), 0.0))
    gpu.cudaStreamSynchronize(blocking)
    assert order == ["blocking", "legacy", "after"]
    gpu.cudaStreamBeginCapture(blocking, 1)
    assert gpu.cudaStreamIsCapturing(0)[0] == cudaError_t.cudaErrorStreamCaptureImplicit
    assert gpu.cudaStreamIsCapturing(blocking) == (cudaError_t.cudaSuccess, 1)
    with pytest.raises(Violation, match="while a blocking stream is recorded"):
        gpu.cudaEventRecord(gpu.cudaEventCreateWithFlags(2)[1], 0)
