"""The CUDA runtime as this project uses it: whole numbers for handles, one-line errors for failures.

`api` is the module `cuda.bindings.runtime`, or what stands in for it (see cuda_choice.py); every function of it
returns (error, values...). It is handed in, so that importing this module needs no CUDA.
"""

from __future__ import annotations

import contextlib
import ctypes
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from runtime.engines.tensorrt.cudart import version_text
from runtime.errors import EngineError

# The names an app may give the stream it wants its work on (cuda.core; PyTorch; CuPy; PyCUDA).
_STREAM_ATTRIBUTES = ("cuda_stream", "ptr", "handle")
# The default stream that blocking streams wait for, `cudaStreamLegacy`; 0 is another name of it.
LEGACY_STREAM = 1
LEGACY_STREAMS = (0, LEGACY_STREAM)

_REMEDIES = {
    "cudaErrorMemoryAllocation": "free GPU memory, or build the plan for smaller batches",
    "cudaErrorNoDevice": "check that nvidia-smi (on Jetson: tegrastats) shows the GPU",
    "cudaErrorInvalidDevice": "check --device against the GPUs that nvidia-smi lists",
    "cudaErrorInsufficientDriver": "install a driver as new as this CUDA, or name a libcudart that is "
    "not newer than the driver (CLEARPACT_CUDART)",
}


class PrimaryContext:
    """The context of a GPU that PyTorch, CuPy and everything else on the CUDA runtime share.

    `cudaSetDevice` would leave this GPU current in the caller's thread, and setting back the one before would
    start a context there where there was none. A context that is pushed and popped leaves the thread as it was.

    Args:
        driver: the module `cuda.bindings.driver`, or what stands in for it.
        device: number of the GPU, which must be there.

    Raises:
        EngineError: the driver reports an error.
    """

    def __init__(self, driver: Any, device: int) -> None:
        self._driver = driver
        self._call("cuInit", 0)
        number = self._call("cuDeviceGet", device)
        self._context = self._call("cuDevicePrimaryCtxRetain", number)
        weakref.finalize(self, driver.cuDevicePrimaryCtxRelease, number).atexit = False

    def push(self) -> None:
        """Make it current in the calling thread, over what was current there."""
        self._call("cuCtxPushCurrent", self._context)

    def pop(self) -> None:
        """Make current again what was before."""
        self._call("cuCtxPopCurrent")

    def _call(self, name: str, *arguments: Any) -> Any:
        error, *values = getattr(self._driver, name)(*arguments)
        if int(error):
            raise EngineError(f"CUDA: {name} failed ({error.name}); check the GPU with nvidia-smi and its driver")
        return values[0] if values else None


class Cuda:
    """One GPU.

    Args:
        api: the module `cuda.bindings.runtime`, or what stands in for it.
        device: number of the GPU.
        context: a `PrimaryContext`, a PyCUDA context, or any object with `push()` and `pop()`, that work is done
            in; None does only what needs no context, or what the caller has made one current for.
    """

    def __init__(self, api: Any, device: int = 0, context: Any = None) -> None:
        self.api = api
        self.device = device
        self._context = context

    def call(self, name: str, *arguments: Any) -> Any:
        """Call a function of the CUDA runtime and return its value, None where it has none.

        Raises:
            EngineError: it reports an error.
        """
        error, *values = getattr(self.api, name)(*arguments)
        if error != self.api.cudaError_t.cudaSuccess:
            raise EngineError(self._explain(name, error))
        return values[0] if values else None

    @contextlib.contextmanager
    def current(self, *, closing: bool = False) -> Iterator[None]:
        """Make the context the calling thread's for a while.

        Args:
            closing: try again where that fails, since everything has to be given back whatever happens.
        """
        if self._context is None:
            yield
            return
        try:
            self._context.push()
        except EngineError:
            if not closing:
                raise
            self._context.push()  # once more: without it nothing can be given back
        try:
            yield
        finally:
            self._context.pop()

    def compute_capability(self) -> str:
        """Return the GPU's compute capability, such as "8.7"."""
        attribute = self.api.cudaDeviceAttr
        major = self.call("cudaDeviceGetAttribute", attribute.cudaDevAttrComputeCapabilityMajor, self.device)
        minor = self.call("cudaDeviceGetAttribute", attribute.cudaDevAttrComputeCapabilityMinor, self.device)
        return f"{major}.{minor}"

    def name(self) -> str:
        """Return the GPU's name, such as "Orin"."""
        properties = self.call("cudaGetDeviceProperties", self.device)
        return str(properties.name.split(b"\0")[0].decode("utf-8", "replace"))

    def driver(self) -> str:
        """Return the newest version of CUDA that the driver knows, such as "12.6"."""
        return version_text(self.call("cudaDriverGetVersion"))

    def check_device(self) -> None:
        """Raise EngineError unless the GPU is there."""
        count = self.call("cudaGetDeviceCount")
        if not 0 <= self.device < count:
            found = ", ".join(f"cuda:{n}" for n in range(count)) or "none"
            raise EngineError(f"device cuda:{self.device}: not there; expected one of: {found}")

    def stream(self) -> int:
        """Return a new stream that does not wait for the legacy default stream."""
        return int(self.call("cudaStreamCreateWithFlags", self.api.cudaStreamNonBlocking))

    def event(self, *, timing: bool = False, spin: bool = False) -> int:
        """Return a new event; a thread that waits for it sleeps, or with `spin` keeps its core."""
        flags = (0 if timing else self.api.cudaEventDisableTiming) | (
            0 if spin else self.api.cudaEventBlockingSync
        )
        return int(self.call("cudaEventCreateWithFlags", flags))

    def elapsed_ms(self, start: int, end: int) -> float:
        """Return the milliseconds between two recorded and completed events."""
        return float(self.call("cudaEventElapsedTime", start, end))

    def upload(self, target: int, source: int, n_bytes: int, stream: int) -> None:
        """Copy from pinned host memory to the GPU, in a stream."""
        kind = self.api.cudaMemcpyKind.cudaMemcpyHostToDevice
        self.call("cudaMemcpyAsync", target, source, n_bytes, kind, stream)

    def download(self, target: int, source: int, n_bytes: int, stream: int) -> None:
        """Copy from the GPU to pinned host memory, in a stream."""
        kind = self.api.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self.call("cudaMemcpyAsync", target, source, n_bytes, kind, stream)

    def copy(self, target: int, source: int, n_bytes: int, stream: int) -> None:
        """Copy within GPU memory, in a stream."""
        kind = self.api.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self.call("cudaMemcpyAsync", target, source, n_bytes, kind, stream)

    def order(self, event: int, before: int, after: int) -> None:
        """Let what `after` is given from now on wait for what the stream `before` has been given so far."""
        self.call("cudaEventRecord", event, before)
        self.call("cudaStreamWaitEvent", after, event, 0)

    def is_recording(self, stream: int) -> bool:
        """Return whether a stream is recorded into a graph, or kept from being used by such a recording."""
        error, status = self.api.cudaStreamIsCapturing(stream)
        none = self.api.cudaStreamCaptureStatus.cudaStreamCaptureStatusNone
        return bool(error != self.api.cudaError_t.cudaSuccess or status != none)

    def pinned(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[int, np.ndarray]:
        """Return page-locked host memory and a view of it; the view must not outlive `cudaFreeHost`."""
        n_bytes = max(1, int(np.prod(shape)) * dtype.itemsize)
        address = int(self.call("cudaHostAlloc", n_bytes, self.api.cudaHostAllocDefault))
        memory = (ctypes.c_uint8 * n_bytes).from_address(address)
        return address, np.frombuffer(memoryview(memory), dtype, int(np.prod(shape))).reshape(shape)

    def capture(self, stream: int, record: Callable[[], bool]) -> int | None:
        """Record the work that `record` gives to a stream and return it as a graph that can be launched.

        Returns:
            None where `record` returns False: it came upon work that cannot be recorded.

        Raises:
            EngineError: a CUDA call fails, in here or in `record`; nothing is left recording.
        """
        # Of this thread only: what others allocate or copy meanwhile does not break the recording.
        mode = self.api.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self.call("cudaStreamBeginCapture", stream, mode)
        whole = False
        try:
            whole = record()
        finally:
            if not whole:
                self._abandon_capture(stream)
        if not whole:
            return None
        held = Resources(self)
        try:
            graph = held.hold("cudaGraphDestroy", int(self.call("cudaStreamEndCapture", stream)))
            executable = held.hold("cudaGraphExecDestroy", int(self.call("cudaGraphInstantiate", graph, 0)))
            held.drop(graph)
        except EngineError:
            with contextlib.suppress(EngineError):
                held.close()
            raise
        return executable

    def _abandon_capture(self, stream: int) -> None:
        """End a recording that failed; that it is invalid is known, and not to be reported again later."""
        error, graph = self.api.cudaStreamEndCapture(stream)
        if error == self.api.cudaError_t.cudaSuccess and graph is not None and int(graph):
            self.api.cudaGraphDestroy(int(graph))
        self.api.cudaGetLastError()

    def _explain(self, name: str, error: Any) -> str:
        _, text = self.api.cudaGetErrorString(error)
        reason = text.decode("utf-8", "replace") if isinstance(text, bytes) else str(text)
        remedy = _REMEDIES.get(error.name, "check the GPU and its driver, then open the model again")
        return f"CUDA: {name} failed ({error.name}: {reason}); {remedy}"


class Resources:
    """What must be given back, in the order opposite to that in which it was taken."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._held: list[tuple[str, int]] = []

    def hold(self, release: str, handle: int) -> int:
        """Remember the function that gives a handle back; returns the handle."""
        self._held.append((release, handle))
        return handle

    def drop(self, handle: int) -> None:
        """Give one handle back now.

        Raises:
            EngineError: CUDA reports an error, perhaps one of work before.
        """
        release = next(name for name, held in self._held if held == handle)
        self._held.remove((release, handle))
        self._cuda.call(release, handle)

    def close(self) -> None:
        """Give all back.

        Raises:
            EngineError: CUDA reports an error; everything was given back all the same.
        """
        failed = None
        while self._held:
            release, handle = self._held.pop()
            try:
                self._cuda.call(release, handle)
            except EngineError as error:
                failed = failed or error
        if failed is not None:
            try:
                raise failed
            finally:
                del failed  # it would hold this frame, and with it what is to go


def stream_handle(stream: Any) -> int:
    """Return the handle of a stream: a whole number, or an object of cuda.core, PyTorch, CuPy or PyCUDA.

    Raises:
        EngineError: it is no stream.
    """
    if isinstance(stream, int):
        return stream
    protocol = getattr(stream, "__cuda_stream__", None)
    if protocol is not None:
        _version, handle = protocol() if callable(protocol) else protocol
        return int(handle)
    for name in _STREAM_ATTRIBUTES:
        if hasattr(stream, name):
            return int(getattr(stream, name))
    raise EngineError(
        f"stream of type {type(stream).__name__}: expected a handle, or one of PyCUDA, CuPy, PyTorch or cuda.core"
    )
