"""CUDA's runtime and driver through ctypes, called as cuda-bindings are: each function returns (error, values...).

cuda-bindings have a CUDA runtime built in, which may be newer than the driver of a machine whose driver cannot be
changed (JetPack 6: runtime 12.9, driver 12.6). Here the runtime is the shared library that the machine itself has.
Only what this project calls is here. Handles and addresses are whole numbers, 0 for none; where a function fails,
its value is None. The prototypes are those of `cuda_runtime_api.h` and `cuda.h` of CUDA 12 and 13.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from ctypes import c_char_p, c_float, c_int, c_size_t, c_uint, c_ulonglong, c_void_p
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from runtime.errors import EngineError

_OLDEST = 12000  # before CUDA 12, cudaGraphInstantiate has other arguments
# `cudaDeviceProp` takes about 1 kB and grows; its first field is the name, in all releases.
_PROPERTIES_BYTES, _NAME_BYTES = 1 << 14, 256


@dataclass(frozen=True)
class _Out:
    """An argument that the function writes, by its type."""

    kind: Any


# Function -> its arguments, in the order of C.
_RUNTIME: Mapping[str, tuple[Any, ...]] = {
    "cudaRuntimeGetVersion": (_Out(c_int),),
    "cudaDriverGetVersion": (_Out(c_int),),
    "cudaGetLastError": (),
    "cudaGetDeviceCount": (_Out(c_int),),
    "cudaDeviceGetAttribute": (_Out(c_int), c_int, c_int),
    "cudaDeviceSynchronize": (),
    "cudaMalloc": (_Out(c_void_p), c_size_t),
    "cudaFree": (c_void_p,),
    "cudaHostAlloc": (_Out(c_void_p), c_size_t, c_uint),
    "cudaFreeHost": (c_void_p,),
    "cudaMemcpyAsync": (c_void_p, c_void_p, c_size_t, c_int, c_void_p),
    "cudaStreamCreateWithFlags": (_Out(c_void_p), c_uint),
    "cudaStreamDestroy": (c_void_p,),
    "cudaStreamSynchronize": (c_void_p,),
    "cudaStreamWaitEvent": (c_void_p, c_void_p, c_uint),
    "cudaStreamIsCapturing": (c_void_p, _Out(c_int)),
    "cudaStreamBeginCapture": (c_void_p, c_int),
    "cudaStreamEndCapture": (c_void_p, _Out(c_void_p)),
    "cudaEventCreateWithFlags": (_Out(c_void_p), c_uint),
    "cudaEventDestroy": (c_void_p,),
    "cudaEventRecord": (c_void_p, c_void_p),
    "cudaEventSynchronize": (c_void_p,),
    "cudaEventElapsedTime": (_Out(c_float), c_void_p, c_void_p),
    "cudaGraphInstantiate": (_Out(c_void_p), c_void_p, c_ulonglong),
    "cudaGraphDestroy": (c_void_p,),
    "cudaGraphExecDestroy": (c_void_p,),
    "cudaGraphLaunch": (c_void_p, c_void_p),
}
_DRIVER: Mapping[str, tuple[Any, ...]] = {
    "cuInit": (c_uint,),
    "cuDeviceGet": (_Out(c_int), c_int),
    "cuDevicePrimaryCtxRetain": (_Out(c_void_p), c_int),
    "cuDevicePrimaryCtxRelease": (c_int,),
    "cuCtxPushCurrent": (c_void_p,),
    "cuCtxPopCurrent": (_Out(c_void_p),),
}
# `cuda.h` gives these functions their present meaning by the name of a second version.
_SYMBOLS = {name: f"{name}_v2" for name in ("cuDevicePrimaryCtxRelease", "cuCtxPushCurrent", "cuCtxPopCurrent")}


class ErrorCode(int):
    """What a function of CUDA returns; `name` is what the library calls it, such as "cudaErrorNoDevice"."""

    name: str


class CudaRuntime:
    """A libcudart, as the part of the module `cuda.bindings.runtime` that this project uses.

    Args:
        path: of the library, or its name for the loader.

    Raises:
        EngineError: it cannot be loaded, is no libcudart, or is older than CUDA 12.
    """

    cudaError_t = SimpleNamespace(cudaSuccess=0)
    cudaDeviceAttr = SimpleNamespace(cudaDevAttrComputeCapabilityMajor=75, cudaDevAttrComputeCapabilityMinor=76)
    cudaMemcpyKind = SimpleNamespace(
        cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2, cudaMemcpyDeviceToDevice=3
    )
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)
    cudaStreamCaptureStatus = SimpleNamespace(cudaStreamCaptureStatusNone=0)
    cudaStreamNonBlocking = 1
    cudaEventBlockingSync = 1
    cudaEventDisableTiming = 2
    cudaHostAllocDefault = 0

    def __init__(self, path: str) -> None:
        self.path = path
        library = _load(path, "name another libcudart")
        try:
            self._name_of = _declared(library, "cudaGetErrorName", c_char_p, (c_int,))
            self._text_of = _declared(library, "cudaGetErrorString", c_char_p, (c_int,))
            self._properties = _declared(library, "cudaGetDeviceProperties", c_int, (c_void_p, c_int))
            self._address = _declared(library, "cudaDeviceGetPCIBusId", c_int, (c_char_p, c_int, c_int))
            functions = {name: _function(library, name, types, self._error) for name, types in _RUNTIME.items()}
        except AttributeError as error:
            raise EngineError(f"{path}: no CUDA runtime ({error}); name another libcudart") from None
        vars(self).update(functions)
        code, version = functions["cudaRuntimeGetVersion"]()
        if code or version < _OLDEST:
            found = f"error {code.name}" if code else f"CUDA {version_text(version)}"
            raise EngineError(f"{path}: {found}, expected CUDA 12 or later; name another libcudart")
        self.version: int = version

    def cudaGetErrorString(self, error: int) -> tuple[int, bytes]:
        """Return 0 and what an error means."""
        return 0, self._text_of(error)

    def cudaGetDeviceProperties(self, device: int) -> tuple[Any, ...]:
        """Return the error and, of the properties, the `name` as bytes [256]."""
        properties = ctypes.create_string_buffer(_PROPERTIES_BYTES)
        code = self._properties(properties, device)
        name = properties.raw[:_NAME_BYTES]
        return (self._error(code), None) if code else (code, SimpleNamespace(name=name))

    def cudaDeviceGetPCIBusId(self, length: int, device: int) -> tuple[Any, ...]:
        """Return the error and the address on the PCI bus, in bytes [length] that end with zeros."""
        address = ctypes.create_string_buffer(length)
        code = self._address(address, length, device)
        return (self._error(code), None) if code else (code, address.raw)

    def _error(self, code: int) -> ErrorCode:
        return _named(code, self._name_of(code))


class CudaDriver:
    """The driver's library, as the part of the module `cuda.bindings.driver` that this project uses.

    Raises:
        EngineError: there is no driver.
    """

    def __init__(self, path: str = "libcuda.so.1") -> None:
        library = _load(path, "install NVIDIA's driver (in a container: --runtime nvidia, or --gpus all)")
        try:
            self._get_name = _function(library, "cuGetErrorName", (c_int, _Out(c_char_p)), int)
            functions = {name: _function(library, name, types, self._error) for name, types in _DRIVER.items()}
        except AttributeError as error:
            raise EngineError(f"{path}: no CUDA driver ({error}); update NVIDIA's driver") from None
        vars(self).update(functions)

    def _error(self, code: int) -> ErrorCode:
        failed, name = self._get_name(code)
        return _named(code, b"unknown error" if failed else name)


def version_text(version: int) -> str:
    """Return CUDA's number of a version as people write it: 12060 is "12.6"."""
    return f"{version // 1000}.{version % 1000 // 10}"


def _named(code: int, name: bytes) -> ErrorCode:
    found = ErrorCode(code)
    found.name = name.decode("ascii", "replace")
    return found


def _load(path: str, remedy: str) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(path)
    except OSError as error:
        raise EngineError(f"{path}: cannot be loaded ({error}); {remedy}") from None


def _declared(library: ctypes.CDLL, symbol: str, result: Any, arguments: tuple[Any, ...]) -> Any:
    function = getattr(library, symbol)
    function.restype, function.argtypes = result, list(arguments)
    return function


def _function(
    library: ctypes.CDLL, name: str, types: tuple[Any, ...], failure: Callable[[int], int]
) -> Callable[..., tuple[Any, ...]]:
    """Return a C function that takes what C reads and returns its error, then what C writes."""
    declared = tuple(ctypes.POINTER(kind.kind) if isinstance(kind, _Out) else kind for kind in types)
    function = _declared(library, _SYMBOLS.get(name, name), c_int, declared)
    index = next((index for index, kind in enumerate(types) if isinstance(kind, _Out)), None)
    if index is None:

        def call(*arguments: Any) -> tuple[Any, ...]:
            code = function(*arguments)
            return (failure(code) if code else code,)

        return call
    written = types[index].kind

    def call_and_read(*arguments: Any) -> tuple[Any, ...]:
        value = written()
        code = function(*arguments[:index], ctypes.byref(value), *arguments[index:])
        if code:
            return failure(code), None
        return code, value.value or 0  # ctypes makes None of a null pointer

    return call_and_read
