"""The workers of a plan: one for each thread and batch size at the same time, a few kept for the next runs."""

from __future__ import annotations

import contextlib
import threading

from runtime.engines.tensorrt.cuda import Cuda
from runtime.engines.tensorrt.device_memory import DevicePool
from runtime.engines.tensorrt.engine import Engine
from runtime.engines.tensorrt.worker import Worker
from runtime.errors import EngineError

# Contexts with their memory for batch sizes in turns; more threads at the same time get one each all the same.
_MOST_WORKERS = 4


class Workers:
    """What has to be given back of a session, apart from it: a session that is dropped is closed through this.

    Args:
        cuda: the GPU, current in the calling thread of every method but `close`.
        plan: loaded; it is unloaded with the last worker after `close`, and where the first worker cannot be made.
        stream: handle of the app's stream; None makes one for each worker.
        graphs: record repeated shapes into CUDA graphs.
        spin: wait for the GPU on a busy core instead of asleep.

    Raises:
        EngineError: there is no memory for one worker; nothing is left behind.
    """

    def __init__(self, cuda: Cuda, plan: Engine, *, stream: int | None, graphs: bool, spin: bool) -> None:
        self.pool = DevicePool(cuda)
        self._cuda, self._plan = cuda, plan
        self._stream, self._graphs, self._spin = stream, graphs, spin
        self._idle: list[Worker] = []  # the one that was used longest ago first
        self._count = 0
        self._closed = False
        # Reentrant: Python may collect a session in the middle of a call.
        self._lock = threading.RLock()
        try:
            # What does not fit is found now, not with the first frame.
            self._idle.append(self.new())
        except EngineError:
            plan.unload()
            raise

    def new(self) -> Worker:
        """Return a new worker.

        Raises:
            EngineError: the session is closed, or there is no memory for it.
        """
        with self._lock:
            if self._closed:
                raise EngineError(f"{self._plan.source}: the model is closed; open it again")
            self._count += 1
        try:
            return Worker(self._cuda, self._plan, stream=self._stream, graphs=self._graphs, spin=self._spin)
        except BaseException:
            self._one_less()
            raise

    def take(self, batch: int) -> Worker:
        """Return an idle worker that did such a batch before, a new one, or the one that was used longest ago.

        A worker that changes its batch loses its graphs, so batch sizes that take turns each get one.
        """
        with self._lock:
            fitting = (index for index, worker in enumerate(self._idle) if worker.batch in (batch, 0))
            found = next(fitting, None)
            if found is None and self._idle and self._count >= _MOST_WORKERS:
                found = 0
            if found is not None:
                return self._idle.pop(found)
        try:
            return self.new()
        except EngineError:
            with self._lock:
                if self._idle and not self._closed:  # there is no memory for one more
                    return self._idle.pop(0)
            raise

    def give_back(self, worker: Worker) -> None:
        """Keep a worker whose run went well for the next one."""
        with self._lock:
            if not self._closed:
                self._idle.append(worker)
                return
        self.retire(worker)

    def retire(self, worker: Worker) -> None:
        """Close a worker.

        Raises:
            EngineError: CUDA reports an error; everything was given back all the same.
        """
        try:
            worker.close()
        finally:
            self._one_less()

    def close(self) -> None:
        """Close the idle workers; the plan goes with the last of the others. Calling it again does nothing.

        Raises:
            EngineError: CUDA reports an error; everything was given back all the same.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
            idle, self._idle = self._idle, []
        failed = None
        with self._cuda.current(closing=True):
            while idle:
                try:
                    self.retire(idle.pop())
                except EngineError as error:
                    failed = failed or error
            with self._lock:
                self._unload_when_unused()
            self.pool.close()
        if failed is not None:
            try:
                raise failed
            finally:
                del failed  # it would hold this frame, and with it what is to go

    def close_quietly(self) -> None:
        """Close where nobody is left to be told of an error."""
        with contextlib.suppress(EngineError):
            self.close()

    def _one_less(self) -> None:
        with self._lock:
            self._count -= 1
            self._unload_when_unused()

    def _unload_when_unused(self) -> None:
        if self._closed and not self._count:
            self._plan.unload()
