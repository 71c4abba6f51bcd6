"""GPU memory for outputs: the app keeps it as long as it likes, and what it drops is written again only in order.

What an app enqueued before it dropped an array may still have to read it. So when a piece comes back, events are
recorded in the streams that may use it, and the stream that writes the piece next waits for them on the GPU.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from runtime.engines.tensorrt.cuda import LEGACY_STREAM, Cuda
from runtime.errors import EngineError

_MOST_FREE = 16  # pieces that wait to be used again; more are given back to CUDA
_ALIGNMENT_BYTES = 256


@dataclass
class Piece:
    """Some GPU memory, its events, and how many of them what is written next must wait for."""

    address: int
    n_bytes: int
    events: list[int] = field(default_factory=list)
    pending: int = 0


class DevicePool:
    """Pieces of one GPU's memory. Safe to call from several threads, and while Python collects garbage.

    Args:
        cuda: the GPU, current in the calling thread of `take` and `close`.
    """

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._free: list[Piece] = []
        self._late: list[Piece] = []  # came back while the app was recording, which nothing may disturb
        self._closed = False
        # Reentrant: Python may collect an array in the middle of a call.
        self._lock = threading.RLock()

    def take(self, n_bytes: int, stream: int) -> Piece:
        """Return memory that work in `stream` may write from now on.

        Raises:
            EngineError: there is not enough memory.
        """
        n_bytes = max(1, -(-n_bytes // _ALIGNMENT_BYTES)) * _ALIGNMENT_BYTES
        with self._lock:
            late, self._late = self._late, []
            found = next((piece for piece in self._free if piece.n_bytes == n_bytes), None)
            if found is not None:
                self._free.remove(found)
        self._release(late)
        if found is None:
            return Piece(int(self._cuda.call("cudaMalloc", n_bytes)), n_bytes)
        for event in found.events[: found.pending]:
            self._cuda.call("cudaStreamWaitEvent", stream, event, 0)
        return found

    def give_back(self, piece: Piece, streams: Iterable[int]) -> None:
        """Take a piece that the app has dropped; `streams` are those that it said use it."""
        with self._cuda.current(closing=True):
            ordered = self._order(piece, {LEGACY_STREAM, *streams, *_current_streams()})
            with self._lock:
                if not ordered and not self._closed:
                    self._late.append(piece)
                    return
                if not self._closed:
                    self._free.append(piece)
                    surplus = [self._free.pop(0)] if len(self._free) > _MOST_FREE else []
                else:
                    surplus = [piece]
            self._release(surplus)

    def close(self) -> None:
        """Free what nobody has; what somebody has goes when it comes back."""
        with self._lock:
            self._closed = True
            pieces, self._free, self._late = [*self._free, *self._late], [], []
        self._release(pieces)

    def _order(self, piece: Piece, streams: Iterable[int]) -> bool:
        """Record what the streams have been given so far; return False where that cannot be done now."""
        cuda = self._cuda
        try:
            if any(cuda.is_recording(stream) for stream in streams):
                return False
            piece.pending = 0
            for stream in streams:
                if piece.pending == len(piece.events):
                    piece.events.append(cuda.event())
                cuda.call("cudaEventRecord", piece.events[piece.pending], stream)
                piece.pending += 1
        except EngineError:
            return False
        return True

    def _release(self, pieces: list[Piece]) -> None:
        if not pieces:
            return
        with contextlib.suppress(EngineError):  # an error of work before, which whoever waits for it is told
            self._cuda.call("cudaDeviceSynchronize")
        for piece in pieces:
            for event in piece.events:
                with contextlib.suppress(EngineError):
                    self._cuda.call("cudaEventDestroy", event)
            with contextlib.suppress(EngineError):
                self._cuda.call("cudaFree", piece.address)


def _current_streams() -> list[int]:
    """Return the streams that PyTorch and CuPy, where the app has loaded them, give this thread's work to."""
    found: list[Any] = []
    torch, cupy = sys.modules.get("torch"), sys.modules.get("cupy")
    with contextlib.suppress(Exception):  # half-loaded, or on a machine without a GPU
        if torch is not None and torch.cuda.is_initialized():
            found.append(torch.cuda.current_stream().cuda_stream)
    with contextlib.suppress(Exception):
        if cupy is not None:
            found.append(cupy.cuda.get_current_stream().ptr)
    return [int(stream) for stream in found if int(stream)]
