"""CUDA through ctypes: every argument crosses whole, and a real libcudart answers as cuda-bindings do."""

from __future__ import annotations

import ast
import ctypes
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from runtime.engines.tensorrt import cudart
from runtime.engines.tensorrt.cuda import Cuda, PrimaryContext
from runtime.engines.tensorrt.cudart import CudaDriver, CudaRuntime
from runtime.errors import EngineError
from tests.cuda_stub import STUB, compiled
from tests.tensorrt_names import ROOT

# What the stub returns, and addresses and sizes that lose bits in anything smaller than 64.
MALLOC, STREAM, GRAPH, EVENT, EXECUTABLE, CONTEXT = (0x7FEDCBA900000000 + n for n in range(1, 7))
A, B, C, SIZE = 0xFEDCBA9876543210, 0x0123456789ABCDEF, 0x8000000000000001, 0x123456789A
# Function -> arguments, what C was called with, and what it wrote.
CALLS: dict[str, tuple[tuple[int, ...], str, Any]] = {
    "cudaGetLastError": ((), "", None),
    "cudaGetDeviceCount": ((), "", 3),
    "cudaDeviceGetAttribute": ((76, 1), "76 1", 9),
    "cudaDeviceSynchronize": ((), "", None),
    "cudaMalloc": ((SIZE,), "123456789a", MALLOC),
    "cudaFree": ((A,), "fedcba9876543210", None),
    "cudaFreeHost": ((B,), "123456789abcdef", None),
    "cudaMemcpyAsync": (
        (A, B, SIZE, 2, C),
        "fedcba9876543210 123456789abcdef 123456789a 2 8000000000000001",
        None,
    ),
    "cudaStreamCreateWithFlags": ((1,), "1", STREAM),
    "cudaStreamDestroy": ((A,), "fedcba9876543210", None),
    "cudaStreamSynchronize": ((1,), "1", None),
    "cudaStreamWaitEvent": ((A, B, 0), "fedcba9876543210 123456789abcdef 0", None),
    "cudaStreamIsCapturing": ((A,), "fedcba9876543210", 1),
    "cudaStreamBeginCapture": ((A, 1), "fedcba9876543210 1", None),
    "cudaStreamEndCapture": ((A,), "fedcba9876543210", GRAPH),
    "cudaEventCreateWithFlags": ((3,), "3", EVENT),
    "cudaEventDestroy": ((B,), "123456789abcdef", None),
    "cudaEventRecord": ((A, B), "fedcba9876543210 123456789abcdef", None),
    "cudaEventSynchronize": ((C,), "8000000000000001", None),
    "cudaEventElapsedTime": ((A, B), "fedcba9876543210 123456789abcdef", 1.5),
    "cudaGraphInstantiate": ((A, C), "fedcba9876543210 8000000000000001", EXECUTABLE),
    "cudaGraphDestroy": ((A,), "fedcba9876543210", None),
    "cudaGraphExecDestroy": ((B,), "123456789abcdef", None),
    "cudaGraphLaunch": ((A, B), "fedcba9876543210 123456789abcdef", None),
    "cudaDeviceGetPCIBusId": ((16, 1), "16 1", b"0001:02:03.0\0\0\0\0"),
    "cuInit": ((0,), "0", None),
    "cuDeviceGet": ((1,), "1", 7),
    "cuDevicePrimaryCtxRetain": ((7,), "7", CONTEXT),
    "cuDevicePrimaryCtxRelease": ((7,), "7", None),
    "cuCtxPushCurrent": ((A,), "fedcba9876543210", None),
    "cuCtxPopCurrent": ((), "", CONTEXT),
}


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("cuda") / "libcudart.so.12")


def called(stub: Path) -> str:
    """Return the last call that the stub wrote down."""
    read = ctypes.CDLL(str(stub)).stub_called
    read.restype = ctypes.c_char_p
    return str(read().decode())


def fail(stub: Path, code: int) -> None:
    ctypes.CDLL(str(stub)).stub_fail(code)


def found_libraries() -> list[Path]:
    """Return NVIDIA's own libraries: the one that came with torch, and what `make tensorrt-bindings` fetched."""
    spec = importlib.util.find_spec("nvidia")
    folders = [*(spec.submodule_search_locations or [] if spec else []), str(ROOT / "build" / "cuda-runtime")]
    return sorted(path for folder in folders for path in Path(folder).glob("**/libcudart.so.1[23]"))


@pytest.mark.parametrize("name", CALLS)
def test_arguments_and_results_cross_ctypes_whole(name: str, stub: Path) -> None:
    functions: Any = CudaRuntime(str(stub)) if name.startswith("cuda") else CudaDriver(str(stub))
    arguments, written, value = CALLS[name]
    assert getattr(functions, name)(*arguments) == ((0,) if value is None else (0, value))
    assert called(stub) == f"{name} {written}".strip()
    fail(stub, 2)
    try:
        code, *values = getattr(functions, name)(*arguments)
    finally:
        fail(stub, 0)
    expected = "cudaErrorMemoryAllocation" if name.startswith("cuda") else "CUDA_ERROR_OUT_OF_MEMORY"
    assert (code, code.name, values) == (2, expected, [] if value is None else [None])


def test_every_function_is_called_above() -> None:
    # cudaHostAlloc gives real memory, below; the versions are asked for at opening.
    elsewhere = {"cudaRuntimeGetVersion", "cudaDriverGetVersion", "cudaHostAlloc"}
    assert {*cudart._RUNTIME, *cudart._DRIVER} - elsewhere == set(CALLS) - {"cudaDeviceGetPCIBusId"}


def test_the_gpu_is_described_through_it(stub: Path) -> None:
    cuda = Cuda(CudaRuntime(str(stub)), 1)
    assert (cuda.name(), cuda.compute_capability(), cuda.driver()) == ("Orin", "8.9", "12.6")
    assert called(stub) == "cudaDeviceGetAttribute 76 1"
    cuda.check_device()
    with pytest.raises(EngineError, match=r"^device cuda:3: not there; expected one of: cuda:0, cuda:1, cuda:2$"):
        Cuda(CudaRuntime(str(stub)), 3).check_device()
    fail(stub, 2)
    try:
        with pytest.raises(
            EngineError, match=r"^CUDA: cudaMalloc failed \(cudaErrorMemoryAllocation: out of memory\)"
        ):
            cuda.call("cudaMalloc", 1)
        with pytest.raises(EngineError, match=r"^CUDA: cuInit failed \(CUDA_ERROR_OUT_OF_MEMORY\)"):
            PrimaryContext(CudaDriver(str(stub)), 0)
    finally:
        fail(stub, 0)


def test_memory_streams_and_graphs_work_through_it(stub: Path) -> None:
    context = PrimaryContext(CudaDriver(str(stub)), 1)
    cuda = Cuda(CudaRuntime(str(stub)), 1, context)
    with cuda.current():
        assert called(stub) == f"cuCtxPushCurrent {CONTEXT:x}"
        address, memory = cuda.pinned((4, 2), np.dtype(np.float32))
        assert called(stub) == "cudaHostAlloc 20 0"
        assert (memory.shape, memory.ctypes.data) == ((4, 2), address)
        memory[:] = 3  # it is memory
        assert cuda.stream() == STREAM
        assert called(stub) == "cudaStreamCreateWithFlags 1"
        assert cuda.event() == EVENT
        assert called(stub) == "cudaEventCreateWithFlags 3"
        cuda.event(timing=True, spin=True)
        assert called(stub) == "cudaEventCreateWithFlags 0"
        for copy, kind in ((cuda.upload, 1), (cuda.download, 2), (cuda.copy, 3)):
            copy(A, address, 32, STREAM)
            assert called(stub) == f"cudaMemcpyAsync {A:x} {address:x} 20 {kind} {STREAM:x}"
        assert cuda.is_recording(A)
        assert cuda.elapsed_ms(A, B) == 1.5
        begun = []
        assert cuda.capture(STREAM, lambda: begun.append(called(stub)) or True) == EXECUTABLE  # type: ignore[func-returns-value]
        assert begun == [f"cudaStreamBeginCapture {STREAM:x} 1"]
        assert called(stub) == f"cudaGraphDestroy {GRAPH:x}"
        assert cuda.capture(STREAM, lambda: False) is None
        assert called(stub) == "cudaGetLastError"
    assert called(stub) == "cuCtxPopCurrent"


def test_the_stub_has_nvidias_prototypes(tmp_path: Path) -> None:
    spec = importlib.util.find_spec("triton")
    include = Path(spec.origin or "").parent / "backends" / "nvidia" / "include" if spec else tmp_path
    compiler = shutil.which("cc")
    if compiler is None or not (include / "cuda_runtime_api.h").exists():
        pytest.skip("no C compiler, or no headers of CUDA (they come with torch for Linux on x86-64)")
    options = ["-std=c11", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", "-DRUNTIME=0", "-DDRIVER=0"]
    subprocess.run([compiler, *options, "-DNVIDIA_HEADERS", f"-I{include}", str(STUB)], check=True)


@pytest.mark.parametrize("path", found_libraries(), ids=lambda path: "/".join(path.parts[-3:]))
def test_a_real_libcudart_answers_as_cuda_bindings_do(path: Path) -> None:
    bindings = pytest.importorskip(
        "cuda.bindings.runtime", reason="no cuda-bindings here: pip install cuda-bindings"
    )
    ours: Any = CudaRuntime(str(path))
    if ours.cudaDriverGetVersion() != (0, 0):
        pytest.skip("there is a driver, which the made-up handles of this test would crash")
    assert ours.version // 1000 == int(path.suffix[1:])
    for name, (arguments, _, _) in CALLS.items():
        if not name.startswith("cuda") or name == "cudaGetErrorString":
            continue
        given = arguments
        if name in ("cudaDeviceGetAttribute", "cudaMemcpyAsync", "cudaStreamBeginCapture"):
            given = _with_enums(name, arguments, bindings)
        theirs = getattr(bindings, name)(*given)
        code, *values = getattr(ours, name)(*arguments)
        # Without a driver nothing else can be asked, so each of them must have come to the library itself.
        assert (code.name, int(code)) == ("cudaErrorInsufficientDriver", 35), name
        assert (theirs[0].name, int(theirs[0]), list(theirs[1:])) == (code.name, int(code), values), name
    for error in bindings.cudaError_t:
        assert ours.cudaGetErrorString(error)[0] == 0
    for error in (0, 1, 2, 35, 100, 101, 719, 901, 906):
        assert ours._error(error).name == bindings.cudaError_t(error).name
        assert ours.cudaGetErrorString(error) == (0, bindings.cudaGetErrorString(bindings.cudaError_t(error))[1])
    assert ours.cudaGetDeviceProperties(0) == (35, None)
    assert ours.cudaHostAlloc(8, 0) == (35, None)
    with pytest.raises(
        EngineError, match=r"^CUDA: cudaGetDeviceCount failed \(cudaErrorInsufficientDriver: CUDA "
    ):
        Cuda(ours).check_device()


def _with_enums(name: str, arguments: tuple[int, ...], bindings: Any) -> tuple[Any, ...]:
    """Return arguments as cuda-bindings want them: enumerations instead of their numbers."""
    if name == "cudaDeviceGetAttribute":
        return bindings.cudaDeviceAttr(arguments[0]), arguments[1]
    if name == "cudaMemcpyAsync":
        return (*arguments[:3], bindings.cudaMemcpyKind(arguments[3]), arguments[4])
    return arguments[0], bindings.cudaStreamCaptureMode(arguments[1])


def test_the_constants_are_cudas() -> None:
    bindings = pytest.importorskip(
        "cuda.bindings.runtime", reason="no cuda-bindings here: pip install cuda-bindings"
    )
    compared = 0
    for name, value in vars(CudaRuntime).items():
        if not name.startswith("cuda") or callable(value):
            continue
        members = vars(value) if isinstance(value, SimpleNamespace) else {None: value}
        for member, number in members.items():
            real = getattr(bindings, name) if member is None else getattr(getattr(bindings, name), member)
            assert int(real) == number, (name, member)
            compared += 1
    assert compared == 12


def test_it_has_every_name_of_cuda_that_the_code_uses(stub: Path) -> None:
    files = [
        *(ROOT / "runtime/engines/tensorrt").glob("*.py"),
        *(ROOT / "bench").rglob("*.py"),
        ROOT / "export/engine/gpu.py",
    ]
    used = set()
    for file in files:
        if file.name == "cudart.py":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "value", None)
            if isinstance(name, str) and re.fullmatch(r"cu(da|Init|Device|Ctx)[A-Z]?\w*", name):
                used.add(name)
    used = {name for name in used if re.match(r"cuda[A-Z]\w+|cu[A-Z]", name) and not name.startswith("cudaError")}
    runtime, driver = CudaRuntime(str(stub)), CudaDriver(str(stub))
    members = {
        member
        for value in vars(CudaRuntime).values()
        if isinstance(value, SimpleNamespace)
        for member in vars(value)
    }
    assert len(used) > 40
    assert {
        name for name in used - members if not hasattr(runtime if name.startswith("cuda") else driver, name)
    } == set()


def test_no_driver_is_one_line() -> None:
    with pytest.raises(
        EngineError, match=r"^libcuda\.so\.999: cannot be loaded \(.*\); install NVIDIA's driver \(in "
    ):
        CudaDriver("libcuda.so.999")
