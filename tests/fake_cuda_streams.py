"""Streams, events and graphs of the model of CUDA in fake_cuda.py: work is done when somebody waits for it."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

from tests.fake_cuda_device import FakeDevice
from tests.fake_cuda_parts import Event, Operation, Stream, cudaError_t


class FakeStreams(FakeDevice):
    """A GPU that does work in streams."""

    cudaStreamCaptureStatus = SimpleNamespace(cudaStreamCaptureStatusNone=0, cudaStreamCaptureStatusActive=1)
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)
    cudaStreamNonBlocking = 1
    cudaEventDisableTiming, cudaEventBlockingSync = 2, 1

    def __init__(self, *, devices: int = 1, capability: tuple[int, int] = (8, 7)) -> None:
        super().__init__(devices=devices, capability=capability)
        self.streams: dict[int, Stream] = {}
        self.legacy: dict[object, Stream] = {}  # by context
        self.captures = True  # whether streams can be recorded
        self.events: dict[int, Event] = {}
        self.graphs: dict[int, list[Operation]] = {}
        self.executables: dict[int, list[Operation]] = {}
        self.clock_ms = 0.0

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

    def cudaDeviceSynchronize(self) -> Any:
        for stream in self._streams():
            if stream.context == self.current_context() and stream.recording is None:
                self._drain(stream)
        return (cudaError_t.cudaSuccess,)

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

    # Events.

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

    def _refuse_recording(self, stream: Stream) -> None:
        if stream.recording is not None:
            raise self.violated("a call that a stream being recorded does not allow")

    def _forget(self, name: str, value: Any) -> None:
        if name == "cudaStreamEndCapture":
            self.graphs.pop(value[1], None)
