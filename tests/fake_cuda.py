"""A strict model of the part of the CUDA runtime that runtime/engines uses, for machines without a GPU.

Work given to a stream is done only when somebody waits for it, as late as CUDA allows: a result read too early is
stale, and memory that is written again too early spoils what an app's kernel has yet to read. The legacy default
stream (handles 0 and 1) and the blocking streams wait for each other; those made with `cudaStreamNonBlocking` wait
for nobody. Wrong order, use after release, release of memory that enqueued work needs, copies beyond a buffer,
calls without a current GPU and use in another context than the one of creation are `Violation`s. `fail_at` lets
one call fail.
"""

from __future__ import annotations

import ctypes
import enum
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

POISON = 0xDD
_PREFIXES = ("cuda", "cuInit", "cuDevice", "cuCtx")
_WITHOUT_CONTEXT = {
    "cudaGetDeviceCount", "cudaSetDevice", "cudaDeviceGetAttribute", "cudaGetDeviceProperties",
    "cudaDriverGetVersion", "cudaDeviceGetPCIBusId", "cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain",
    "cuDevicePrimaryCtxRelease", "cuCtxPushCurrent", "cuCtxPopCurrent",
}  # fmt: skip


class Violation(AssertionError):
    """The program broke a rule of CUDA or TensorRT."""


class cudaError_t(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorNoDevice = 100
    cudaErrorInvalidDevice = 101
    cudaErrorLaunchFailure = 719
    cudaErrorStreamCaptureInvalidated = 901
    cudaErrorStreamCaptureImplicit = 906


class CUresult(enum.IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_UNKNOWN = 999


@dataclass
class Memory:
    """An allocation; `data` stays readable after release, so that use after it is seen and does not crash."""

    address: int
    data: Any
    kind: str
    context: object
    released: bool = False


@dataclass
class Operation:
    """Work in a stream: what it does, how long that takes, and the memory it needs."""

    run: Callable[[], None]
    ms: float
    memory: tuple[Memory, ...] = ()
    allowed: Callable[[], None] = lambda: None


@dataclass
class Stream:
    context: object
    blocking: bool = False
    queue: list[Operation] = field(default_factory=list)
    recording: list[Operation] | None = None
    recorder: int = 0  # the thread that records
    invalidated: bool = False


@dataclass
class Event:
    context: object
    timing: bool
    recorded_in: Stream | None = None
    operation: Operation | None = None
    at_ms: float = 0.0


class FakeContext:
    """A PyCUDA context: `push` and `pop` for the calling thread."""

    def __init__(self, gpu: FakeGpu) -> None:
        self._gpu = gpu

    def push(self) -> None:
        self._gpu.contexts().append(self)

    def pop(self) -> None:
        assert self._gpu.contexts().pop() is self


class FakeGpu:
    """A GPU and `cuda.bindings.runtime` for it: every function of that module is a method `cuda...` here."""

    cudaError_t = cudaError_t
    CUresult = CUresult
    cudaMemcpyKind = SimpleNamespace(
        cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2, cudaMemcpyDeviceToDevice=3
    )
    cudaStreamCaptureStatus = SimpleNamespace(cudaStreamCaptureStatusNone=0, cudaStreamCaptureStatusActive=1)
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)
    cudaDeviceAttr = SimpleNamespace(cudaDevAttrComputeCapabilityMajor=75, cudaDevAttrComputeCapabilityMinor=76)
    cudaStreamNonBlocking = 1
    cudaEventDisableTiming, cudaEventBlockingSync = 2, 1
    cudaHostAllocDefault = 0

    def __init__(self, *, devices: int = 1, capability: tuple[int, int] = (8, 7)) -> None:
        self.devices, self.capability = devices, capability
        self.memory: dict[int, Memory] = {}
        self.streams: dict[int, Stream] = {}
        self.legacy: dict[object, Stream] = {}  # by context
        self.retained: list[int] = []  # numbers of devices whose primary context is held
        self.device_bytes_left: int | None = None  # None: there is always enough
        self.addresses = [b"0000:01:00.0"]  # on the PCI bus
        self.captures = True  # whether streams can be recorded
        self.events: dict[int, Event] = {}
        self.graphs: dict[int, list[Operation]] = {}
        self.executables: dict[int, list[Operation]] = {}
        self.objects: list[str] = []
        self.violations: list[str] = []
        self.calls: list[str] = []
        self.fail_at: int | None = None
        self.stays_broken = False  # from that call on, as after an error inside a kernel
        self.clock_ms = 0.0
        self.bytes_copied = 0
        self._next = 0x7F00_0000_0000
        self.lock = threading.RLock()
        self._thread = threading.local()

    # What tests and the fake TensorRT use.

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if not name.startswith(_PREFIXES) or not callable(value) or isinstance(value, type):
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

    def enqueue(self, handle: int, operation: Operation) -> None:
        stream = self._stream(handle)
        if stream.recording is not None:
            stream.recording.append(operation)
            return
        # The legacy stream waits for what blocking streams were given before, and they for what it was.
        legacy = self.legacy.get(stream.context)
        others = [] if legacy is None else [legacy]
        if stream is legacy:
            others = [s for s in self.streams.values() if s.blocking and s.context == stream.context]
        elif not stream.blocking:
            others = []
        before = [(other, other.queue[-1]) for other in others if other.queue]
        if before:
            stream.queue.append(Operation(lambda: [self._drain(*last) for last in before] and None, 0.0))
        stream.queue.append(operation)

    def app_reads(self, array: Any, stream: int) -> Callable[[], np.ndarray]:
        """Enqueue an app's kernel that reads a device array; returns what it has read, once it has run."""
        interface = array.__cuda_array_interface__
        shape, dtype, address = interface["shape"], np.dtype(interface["typestr"]), interface["data"][0]
        n_bytes, found = int(np.prod(shape)) * dtype.itemsize, []
        memory = self.allocation(address, n_bytes)

        def read() -> None:
            if memory.released:
                raise self.violated("an app's kernel reads memory that was released")
            found.append(np.frombuffer(bytes(self.bytes_at(address, n_bytes)), dtype).reshape(shape))

        with self.lock:
            self.enqueue(stream, Operation(read, 0.0, (memory,)))
        return lambda: found[0]

    def allocation(self, address: int, n_bytes: int) -> Memory:
        """Return the live allocation that holds all of a range."""
        for found in self.memory.values():
            if not found.released and found.address <= address < found.address + len(found.data):
                if address + n_bytes > found.address + len(found.data):
                    raise self.violated(f"{n_bytes} bytes at {address:#x} run over the end of their allocation")
                return found
        raise self.violated(f"{n_bytes} bytes at {address:#x} are not allocated")

    def bytes_at(self, address: int, n_bytes: int) -> memoryview:
        found = self.allocation(address, n_bytes)
        start = address - found.address
        return memoryview(found.data).cast("B")[start : start + n_bytes]

    def assert_clean(self) -> None:
        """Assert that everything was given back and no rule was broken."""
        live = [f"{m.kind} memory of {len(m.data)} bytes" for m in self.memory.values() if not m.released]
        live += [f"primary context {number}" for number in self.retained]
        live += ["stream"] * len(self.streams) + ["event"] * len(self.events)
        live += ["graph"] * len(self.graphs) + ["executable graph"] * len(self.executables) + self.objects
        assert not live, live
        assert not self.violations, self.violations
        assert not self.contexts(), "contexts are left pushed"
        for memory in self.memory.values():
            assert set(bytes(memory.data)) <= {POISON}, "released memory was written"

    # Device.

    def cudaGetDeviceCount(self) -> Any:
        return (cudaError_t.cudaSuccess, self.devices) if self.devices else (cudaError_t.cudaErrorNoDevice, None)

    def cudaSetDevice(self, device: int) -> Any:
        if device >= self.devices:
            return (cudaError_t.cudaErrorInvalidDevice,)
        self._thread.primary = f"primary {device}"
        return (cudaError_t.cudaSuccess,)

    def cudaDeviceSynchronize(self) -> Any:
        for stream in self._streams():
            if stream.context == self.current_context() and stream.recording is None:
                self._drain(stream)
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

    # Memory.

    def cudaMalloc(self, n_bytes: int) -> Any:
        if self.device_bytes_left is not None:
            self.device_bytes_left -= n_bytes
            if self.device_bytes_left < 0:
                return cudaError_t.cudaErrorMemoryAllocation, None
        return cudaError_t.cudaSuccess, self._allocate(bytearray(n_bytes), "device")

    def cudaHostAlloc(self, n_bytes: int, flags: int) -> Any:
        return cudaError_t.cudaSuccess, self._allocate((ctypes.c_uint8 * n_bytes)(), "host")

    def cudaFree(self, address: int) -> Any:
        return self._release(address, "device")

    def cudaFreeHost(self, address: int) -> Any:
        return self._release(address, "host")

    def cudaMemcpyAsync(self, target: int, source: int, n_bytes: int, kind: int, stream: int) -> Any:
        into, out_of = self.allocation(target, n_bytes), self.allocation(source, n_bytes)
        kinds = {1: ("host", "device"), 2: ("device", "host"), 3: ("device", "device")}
        if (out_of.kind, into.kind) != kinds[kind]:
            raise self.violated(f"copy of kind {kind} from {out_of.kind} to {into.kind} memory")

        def copy() -> None:
            self.bytes_at(target, n_bytes)[:] = self.bytes_at(source, n_bytes)
            self.bytes_copied += n_bytes if kind != 3 else 0  # over the bus

        self.enqueue(stream, Operation(copy, n_bytes / 1e6, (into, out_of)))
        return (cudaError_t.cudaSuccess,)

    # Streams and events.

    def cudaStreamCreateWithFlags(self, flags: int) -> Any:
        blocking = flags != self.cudaStreamNonBlocking
        return cudaError_t.cudaSuccess, self._new(self.streams, Stream(self.current_context(), blocking))

    def cudaStreamIsCapturing(self, stream: int) -> Any:
        found = self._stream(stream)
        if self._implicit(found):
            return cudaError_t.cudaErrorStreamCaptureImplicit, None
        return cudaError_t.cudaSuccess, int(found.recording is not None)

    def cudaStreamDestroy(self, handle: int) -> Any:
        stream = self._stream(handle)
        if stream.queue or stream.recording is not None:
            raise self.violated("a stream is destroyed before its work is done")
        del self.streams[handle]
        return (cudaError_t.cudaSuccess,)

    def cudaStreamSynchronize(self, handle: int) -> Any:
        stream = self._stream(handle)
        self._refuse_recording(stream)
        self._drain(stream)
        return (cudaError_t.cudaSuccess,)

    def cudaEventCreateWithFlags(self, flags: int) -> Any:
        return cudaError_t.cudaSuccess, self._new(self.events, Event(self.current_context(), not flags & 2))

    def cudaEventDestroy(self, handle: int) -> Any:
        self._find(self.events, handle, "event")
        del self.events[handle]
        return (cudaError_t.cudaSuccess,)

    def cudaEventRecord(self, handle: int, stream: int) -> Any:
        event = self._find(self.events, handle, "event")
        self._refuse_recording(self._stream(stream))
        if self._implicit(self._stream(stream)):
            raise self.violated("the legacy stream is used while a blocking stream is recorded")

        def reached() -> None:
            event.at_ms = self.clock_ms

        event.recorded_in, event.operation = self._stream(stream), Operation(reached, 0.0)
        self.enqueue(stream, event.operation)
        return (cudaError_t.cudaSuccess,)

    def cudaEventSynchronize(self, handle: int) -> Any:
        event = self._find(self.events, handle, "event")
        if event.recorded_in is None:
            raise self.violated("waits for an event that was never recorded")
        self._drain(event.recorded_in, event.operation)
        return (cudaError_t.cudaSuccess,)

    def cudaEventElapsedTime(self, start: int, end: int) -> Any:
        events = [self._find(self.events, handle, "event") for handle in (start, end)]
        for event in events:
            stream = event.recorded_in
            if not event.timing or stream is None or any(found is event.operation for found in stream.queue):
                raise self.violated("elapsed time of an event without timing, or one not reached yet")
        return cudaError_t.cudaSuccess, events[1].at_ms - events[0].at_ms

    def cudaStreamWaitEvent(self, handle: int, event: int, flags: int) -> Any:
        found = self._find(self.events, event, "event")
        stream, operation = found.recorded_in, found.operation
        if stream is not None:
            self.enqueue(handle, Operation(lambda: self._drain(stream, operation), 0.0))
        return (cudaError_t.cudaSuccess,)

    # Graphs.

    def cudaStreamBeginCapture(self, handle: int, mode: int) -> Any:
        stream = self._stream(handle)
        self._refuse_recording(stream)
        if not self.captures:
            return (cudaError_t.cudaErrorStreamCaptureInvalidated,)
        stream.recording, stream.invalidated, stream.recorder = [], False, threading.get_ident()
        return (cudaError_t.cudaSuccess,)

    def cudaStreamEndCapture(self, handle: int) -> Any:
        stream = self._stream(handle)
        recorded, stream.recording = stream.recording, None
        if recorded is None:
            raise self.violated("ends a recording that did not begin")
        if stream.invalidated:
            return cudaError_t.cudaErrorStreamCaptureInvalidated, None
        return cudaError_t.cudaSuccess, self._new(self.graphs, recorded)

    def cudaGraphInstantiate(self, handle: int, flags: int) -> Any:
        graph = self._find(self.graphs, handle, "graph")
        return cudaError_t.cudaSuccess, self._new(self.executables, list(graph))

    def cudaGraphDestroy(self, handle: int) -> Any:
        self._find(self.graphs, handle, "graph")
        del self.graphs[handle]
        return (cudaError_t.cudaSuccess,)

    def cudaGraphExecDestroy(self, handle: int) -> Any:
        graph = self._find(self.executables, handle, "executable graph")
        if any(
            operation is queued for stream in self._streams() for queued in stream.queue for operation in graph
        ):
            raise self.violated("an executable graph is destroyed before its work is done")
        del self.executables[handle]
        return (cudaError_t.cudaSuccess,)

    def cudaGraphLaunch(self, handle: int, stream: int) -> Any:
        for operation in self._find(self.executables, handle, "executable graph"):
            operation.allowed()
            self.enqueue(stream, operation)
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
                if name == "cudaStreamEndCapture":
                    self.graphs.pop(value[1], None)
            if name.endswith("Synchronize"):
                function(*arguments)
            if not name.startswith("cuda"):
                return (CUresult.CUDA_ERROR_UNKNOWN, None)
            out_of_memory = "Alloc" in name
            error = cudaError_t.cudaErrorMemoryAllocation if out_of_memory else cudaError_t.cudaErrorLaunchFailure
            return (error, None)

    def _allocate(self, data: Any, kind: str) -> int:
        here = threading.get_ident()
        if any(stream.recording is not None and stream.recorder == here for stream in self.streams.values()):
            raise self.violated("allocates while this thread records a stream")
        address = ctypes.addressof(data) if kind == "host" else self._handle()
        if kind == "device":
            self._next += (len(data) + 255) // 256 * 256
            data[:] = bytes([0xCD]) * len(data)
        self.memory[address] = Memory(address, data, kind, self.current_context())
        return address

    def _release(self, address: int, kind: str) -> Any:
        memory = self.memory.get(address)
        if memory is None or memory.released or memory.kind != kind:
            raise self.violated(f"{kind} memory at {address:#x} is released, but is not allocated")
        self._check_context(memory)
        if any(memory is used for s in self._streams() for operation in s.queue for used in operation.memory):
            raise self.violated(f"{kind} memory is released before the work that needs it is done")
        memory.released = True
        memory.data[:] = bytes([POISON]) * len(memory.data)
        return (cudaError_t.cudaSuccess,)

    def _drain(self, stream: Stream, until: Operation | None = None) -> None:
        """Do a stream's work, all of it or up to an operation that is in it."""
        if until is not None and not any(operation is until for operation in stream.queue):
            return
        while stream.queue:
            operation = stream.queue.pop(0)
            operation.run()
            self.clock_ms += operation.ms
            if operation is until:
                return

    def _handle(self) -> int:
        self._next += 256
        return self._next

    def _new(self, table: dict[int, Any], thing: Any) -> int:
        handle = self._handle()
        table[handle] = thing
        return handle

    def _streams(self) -> list[Stream]:
        return [*self.streams.values(), *self.legacy.values()]

    def _implicit(self, stream: Stream) -> bool:
        """Return whether a stream is the legacy one while a blocking one is recorded."""
        legacy = any(stream is found for found in self.legacy.values())
        return legacy and any(s.blocking and s.recording is not None for s in self.streams.values())

    def _stream(self, handle: int) -> Stream:
        if handle in (0, 1):
            context = self.current_context()
            return self.legacy.setdefault(context, Stream(context, blocking=True))
        stream: Stream = self._find(self.streams, handle, "stream")
        return stream

    def _find(self, table: dict[int, Any], handle: int, kind: str) -> Any:
        if handle not in table:
            raise self.violated(f"{kind} {handle:#x} is used, but there is none")
        self._check_context(table[handle])
        return table[handle]

    def _check_context(self, thing: object) -> None:
        if getattr(thing, "context", self.current_context()) != self.current_context():
            raise self.violated(f"a {type(thing).__name__.lower()} is used in another context than its own")

    def _refuse_recording(self, stream: Stream) -> None:
        if stream.recording is not None:
            raise self.violated("a call that a stream being recorded does not allow")


def all_failures(run: Callable[[FakeGpu], None], *, stays_broken: bool) -> Iterator[tuple[str, FakeGpu]]:
    """Yield a GPU for every call that `run` makes, on which this call fails, with the name of the call.

    With `stays_broken` all later calls fail too.
    """
    whole = FakeGpu()
    run(whole)
    for index, name in enumerate(whole.calls):
        gpu = FakeGpu()
        gpu.fail_at, gpu.stays_broken = index, stays_broken
        yield name, gpu


def to_device(
    gpu: FakeGpu, array: np.ndarray, stream: int | None = None, *, version: int = 3, offset: int = 0
) -> Any:
    """Return an array in GPU memory as CuPy or PyTorch would hold it.

    Version 2 of the interface, PyTorch's, has no stream. With an offset, it lies so many bytes into its memory.
    """
    start = gpu.cudaMalloc(array.nbytes + offset)[1]
    address = start + offset
    gpu.bytes_at(address, array.nbytes)[:] = array.tobytes()
    if version == 2:
        interface = {"version": 2, "shape": array.shape, "typestr": array.dtype.str, "data": (address, False)}
        return SimpleNamespace(__cuda_array_interface__=interface, address=start)
    interface = {"version": 3, "shape": array.shape, "typestr": array.dtype.str, "data": (address, False)}
    return SimpleNamespace(__cuda_array_interface__={**interface, "stream": stream}, address=start)


def on_host(gpu: FakeGpu, array: Any) -> np.ndarray:
    interface = array.__cuda_array_interface__
    shape, dtype = interface["shape"], np.dtype(interface["typestr"])
    data = gpu.bytes_at(interface["data"][0], int(np.prod(shape)) * dtype.itemsize)
    return np.frombuffer(bytes(data), dtype).reshape(shape)
