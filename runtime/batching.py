"""Images that arrive one by one, run together: a thread that waits a little for more of them.

An engine does 32 images in far less than 32 times the time of one. A batch is one of a few sizes, the ladder 1, 2,
4, ..., so that an engine which compiles every size compiles few; seven images that wait run as 4, 2 and 1.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from runtime.errors import EngineError, OptionError

_WAITING_BATCHES = 16  # more than so many wait: whoever submits waits too, so that memory stays bounded
_CHECK_S = 0.5  # how often an idle thread looks whether anybody still has its batcher


@dataclass(frozen=True)
class Batching:
    """How images that are submitted one by one are put together.

    Args:
        max_batch: most images in one run.
        max_wait_ms: how long an image waits at most for others, in milliseconds; 0 takes those that are there.
    """

    max_batch: int = 8
    max_wait_ms: float = 2.0

    def __post_init__(self) -> None:
        if not isinstance(self.max_batch, int) or self.max_batch < 1:
            raise OptionError(f"max_batch {self.max_batch!r}: expected a whole number from 1")
        if not 0 <= self.max_wait_ms < float("inf"):
            raise OptionError(f"max_wait_ms {self.max_wait_ms!r}: expected a number from 0")

    def ladder(self) -> tuple[int, ...]:
        """Return the sizes of a run, largest first."""
        sizes = [self.max_batch]
        sizes += [2**power for power in reversed(range(self.max_batch.bit_length())) if 2**power < self.max_batch]
        return tuple(sizes)


@dataclass
class _Waiting:
    image: np.ndarray
    finish: Callable[[np.ndarray], Any]
    future: Future[Any] = field(default_factory=Future)


class MicroBatcher:
    """Runs images that are submitted one by one in batches, in a thread of its own.

    Args:
        run: takes uint8 [N, H, W, C] and returns an array with a row for each; called in that thread alone.
        batching: sizes and patience.
    """

    def __init__(self, run: Callable[[np.ndarray], np.ndarray], batching: Batching) -> None:
        self._queue: queue.Queue[_Waiting | None] = queue.Queue(_WAITING_BATCHES * batching.max_batch)
        self._lock = threading.Lock()
        self._closed = False
        # The thread holds no reference to this object, so that one that is dropped without `close` ends too.
        arguments = weakref.ref(self), self._queue, run, batching
        self._thread = threading.Thread(target=_work, args=arguments, name="clearpact-batches", daemon=True)
        self._thread.start()

    def submit(self, image: np.ndarray, finish: Callable[[np.ndarray], Any]) -> Future[Any]:
        """Return the future result of one image; waits while very many others do.

        Args:
            image: uint8 [1, H, W, C].
            finish: makes the result of the image's row.

        Raises:
            EngineError: it is closed.
        """
        waiting = _Waiting(image, finish)
        while True:
            with self._lock:
                if self._closed:
                    raise EngineError("the model is closed; open it again")
                with contextlib.suppress(queue.Full):
                    self._queue.put_nowait(waiting)
                    return waiting.future
            time.sleep(0.001)

    def close(self) -> None:
        """Finish what was submitted, and end the thread."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._queue.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()


def _work(
    owner: weakref.ref[MicroBatcher],
    waiting: queue.Queue[_Waiting | None],
    run: Callable[[np.ndarray], np.ndarray],
    batching: Batching,
) -> None:
    ladder = batching.ladder()
    ends = False
    while not ends:
        try:
            first = waiting.get(timeout=_CHECK_S)
        except queue.Empty:
            if owner() is None:
                return
            continue
        taken, ends = _taken(first, waiting, batching)
        while taken:
            size = next(size for size in ladder if size <= len(taken))
            _run(run, taken[:size])
            del taken[:size]


def _taken(
    first: _Waiting | None, waiting: queue.Queue[_Waiting | None], batching: Batching
) -> tuple[list[_Waiting], bool]:
    """Return the images of the next runs, and whether they are the last."""
    taken, found = [], first
    until = time.monotonic() + batching.max_wait_ms / 1000
    while found is not None:
        if found.future.set_running_or_notify_cancel():
            taken.append(found)
        if len(taken) == batching.max_batch:
            return taken, False
        try:
            found = waiting.get(timeout=max(0.0, until - time.monotonic()))
        except queue.Empty:
            return taken, False
    return taken, True


def _run(run: Callable[[np.ndarray], np.ndarray], taken: list[_Waiting]) -> None:
    """Run images and give each its result, or the error that it or the run ended in."""
    try:
        rows = run(np.concatenate([one.image for one in taken]))
    except BaseException as error:
        for one in taken:
            one.future.set_exception(error)
        return
    for one, row in zip(taken, rows, strict=True):
        try:
            one.future.set_result(one.finish(row))
        except Exception as error:
            one.future.set_exception(error)
