"""The device of the model of CUDA in fake_cuda.py: contexts, what it says of itself, and calls that fail."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from tests.fake_cuda_parts import CUresult, Violation, cudaError_t

PREFIXES = ("cuda", "cuInit", "cuDevice", "cuCtx")
_WITHOUT_CONTEXT = {
    "cudaGetDeviceCount", "cudaSetDevice", "cudaDeviceGetAttribute", "cudaGetDeviceProperties",
    "cudaDriverGetVersion", "cudaDeviceGetPCIBusId", "cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain",
    "cuDevicePrimaryCtxRelease", "cuCtxPushCurrent", "cuCtxPopCurrent",
}  # fmt: skip


class FakeDevice:
    """A GPU and its contexts. Every function of CUDA, a method `cu...`, is called through `_call`."""

    cudaError_t = cudaError_t
    CUresult = CUresult
    cudaDeviceAttr = SimpleNamespace(cudaDevAttrComputeCapabilityMajor=75, cudaDevAttrComputeCapabilityMinor=76)

    def __init__(self, *, devices: int = 1, capability: tuple[int, int] = (8, 7)) -> None:
        self.devices, self.capability = devices, capability
        self.retained: list[int] = []  # numbers of devices whose primary context is held
        self.addresses = [b"0000:01:00.0"]  # on the PCI bus
        self.objects: list[str] = []
        self.violations: list[str] = []
        self.calls: list[str] = []
        self.fail_at: int | None = None
        self.stays_broken = False  # from that call on, as after an error inside a kernel
        self._next = 0x7F00_0000_0000
        self.lock = threading.RLock()
        self._thread = threading.local()

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if not name.startswith(PREFIXES) or not callable(value) or isinstance(value, type):
            return value
        return lambda *arguments: self._call(name, value, arguments)

    def contexts(self) -> list[object]:
        """Return the stack of contexts of the calling thread."""
        if not hasattr(self._thread, "stack"):
            self._thread.stack = []
        stack: list[object] = self._thread.stack
        return stack

    def current_context(self) -> object:
        context = self.contexts()[-1] if self.contexts() else getattr(self._thread, "primary", None)
        if context is None:
            raise self.violated("a call in a thread where no GPU is current")
        return context

    def violated(self, text: str) -> Violation:
        self.violations.append(text)
        return Violation(text)

    def fails(self, name: str) -> bool:
        """Count a call; return whether it is the one that has to fail."""
        with self.lock:
            self.calls.append(name)
            index = len(self.calls) - 1
            return self.fail_at is not None and (
                index == self.fail_at
                # A thread's contexts are the driver's own list, which an error inside a kernel leaves alone.
                or (self.stays_broken and index > self.fail_at and not name.startswith("cuCtx"))
            )

    def cudaGetDeviceCount(self) -> Any:
        return (cudaError_t.cudaSuccess, self.devices) if self.devices else (cudaError_t.cudaErrorNoDevice, None)

    def cudaSetDevice(self, device: int) -> Any:
        if device >= self.devices:
            return (cudaError_t.cudaErrorInvalidDevice,)
        self._thread.primary = f"primary {device}"
        return (cudaError_t.cudaSuccess,)

    # The driver's functions, `cuda.bindings.driver`.

    def cuInit(self, flags: int) -> Any:
        return (CUresult.CUDA_SUCCESS,)

    def cuDeviceGet(self, ordinal: int) -> Any:
        return CUresult.CUDA_SUCCESS, ordinal

    def cuDevicePrimaryCtxRetain(self, dev: int) -> Any:
        self.retained.append(dev)
        return CUresult.CUDA_SUCCESS, f"primary {dev}"

    def cuDevicePrimaryCtxRelease(self, dev: int) -> Any:
        self.retained.remove(dev)
        return (CUresult.CUDA_SUCCESS,)

    def cuCtxPushCurrent(self, ctx: object) -> Any:
        if str(ctx).startswith("primary") and int(str(ctx).split()[1]) not in self.retained:
            raise self.violated("a primary context that is not held becomes current")
        self.contexts().append(ctx)
        return (CUresult.CUDA_SUCCESS,)

    def cuCtxPopCurrent(self) -> Any:
        return CUresult.CUDA_SUCCESS, self.contexts().pop()

    # What it says of itself.

    def cudaDeviceGetAttribute(self, attribute: int, device: int) -> Any:
        return cudaError_t.cudaSuccess, self.capability[attribute - 75]

    def cudaGetDeviceProperties(self, device: int) -> Any:
        return cudaError_t.cudaSuccess, SimpleNamespace(name=b"Orin\0\0")

    def cudaDeviceGetPCIBusId(self, length: int, device: int) -> Any:
        return cudaError_t.cudaSuccess, self.addresses[device].ljust(length, b"\0")

    def cudaDriverGetVersion(self) -> Any:
        return cudaError_t.cudaSuccess, 12060

    def cudaGetErrorString(self, error: cudaError_t) -> Any:
        return cudaError_t.cudaSuccess, error.name.removeprefix("cudaError").lower().encode()

    def cudaGetLastError(self) -> Any:
        return (cudaError_t.cudaSuccess,)

    # How it works.

    def _call(self, name: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        with self.lock:
            if name in ("cudaGetErrorString", "cudaGetLastError"):
                return function(*arguments)
            if name not in _WITHOUT_CONTEXT:
                self.current_context()
            if not self.fails(name):
                return function(*arguments)
            # What releases does so even where it reports an error: it may be one of work before.
            gives_back = ("Destroy", "Free", "EndCapture", "Release", "PopCurrent")
            if any(word in name for word in gives_back):
                value = function(*arguments)
                self._forget(name, value)
            if name.endswith("Synchronize"):
                function(*arguments)
            if not name.startswith("cuda"):
                return (CUresult.CUDA_ERROR_UNKNOWN, None)
            out_of_memory = "Alloc" in name
            error = cudaError_t.cudaErrorMemoryAllocation if out_of_memory else cudaError_t.cudaErrorLaunchFailure
            return (error, None)

    def _forget(self, name: str, value: Any) -> None:
        """Undo what a function that is made to report an error has given nevertheless."""

    def _handle(self) -> int:
        self._next += 256
        return self._next

    def _new(self, table: dict[int, Any], thing: Any) -> int:
        handle = self._handle()
        table[handle] = thing
        return handle

    def _find(self, table: dict[int, Any], handle: int, kind: str) -> Any:
        if handle not in table:
            raise self.violated(f"{kind} {handle:#x} is used, but there is none")
        self._check_context(table[handle])
        return table[handle]

    def _check_context(self, thing: object) -> None:
        if getattr(thing, "context", self.current_context()) != self.current_context():
            raise self.violated(f"a {type(thing).__name__.lower()} is used in another context than its own")
