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
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np

from tests.fake_cuda_parts import Memory, Operation, cudaError_t
from tests.fake_cuda_streams import FakeStreams

POISON = 0xDD


class FakeContext:
    """A PyCUDA context: `push` and `pop` for the calling thread."""

    def __init__(self, gpu: FakeGpu) -> None:
        self._gpu = gpu

    def push(self) -> None:
        self._gpu.contexts().append(self)

    def pop(self) -> None:
        assert self._gpu.contexts().pop() is self


class FakeGpu(FakeStreams):
    """A GPU and `cuda.bindings.runtime` for it: every function of that module is a method `cuda...` here."""

    cudaMemcpyKind = SimpleNamespace(
        cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2, cudaMemcpyDeviceToDevice=3
    )
    cudaHostAllocDefault = 0

    def __init__(self, *, devices: int = 1, capability: tuple[int, int] = (8, 7)) -> None:
        super().__init__(devices=devices, capability=capability)
        self.memory: dict[int, Memory] = {}
        self.device_bytes_left: int | None = None  # None: there is always enough
        self.bytes_copied = 0

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

    # How it works.

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
