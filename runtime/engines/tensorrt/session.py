"""Sessions on TensorRT: plans that `python -m export.engine` built, on an NVIDIA GPU.

Needs `tensorrt` (10 or 11) and `cuda-bindings`; of TensorRT only names that both releases have are used.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from runtime.engines.tensorrt.cuda import Cuda, stream_handle
from runtime.engines.tensorrt.device_array import DeviceArray, DeviceView, device_view
from runtime.engines.tensorrt.engine import Engine, import_first
from runtime.engines.tensorrt.plan import BUILDERS, PlanSidecar, read_sidecar, sidecar_from
from runtime.engines.tensorrt.worker import Worker
from runtime.errors import EngineError, ModelError, OptionError
from runtime.files import read_bytes
from runtime.manifest import INPUT_NAME, TARGET_NAME

# Builder in the sidecar -> the modules that run its plans, the first one installed is taken.
_MODULES = {"tensorrt": ("tensorrt",), "tensorrt_rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings")}
_PACKAGES = {"tensorrt": "clearpact[tensorrt]", "tensorrt_rtx": "tensorrt-rtx"}


class TensorRTSession:
    """A plan on one GPU; see runtime.session.Session.

    Every thread that runs it at the same time gets an execution context, memory and a stream of its own. Arrays in
    GPU memory are taken as inputs too (anything with `__cuda_array_interface__`); where `image` is one, the
    outputs are `DeviceArray`s.

    Args:
        plan: contents of the plan.
        sidecar: of the plan.
        source: its name, for messages.
        trt: the module `tensorrt`.
        cuda: the GPU.
        stream: handle of the stream that all work is enqueued to; None makes one for each thread. With a stream of
            the app's, device outputs are returned at once, ordered by that stream.
        graphs: record repeated shapes into CUDA graphs.
        spin: wait for the GPU on a busy core instead of asleep.

    Raises:
        EngineError: the GPU is not there, or CUDA or TensorRT fails; nothing is left behind.
        ModelError: the plan was altered, or is for another version, platform or GPU.
    """

    engine = "tensorrt"

    def __init__(
        self,
        plan: bytes,
        sidecar: PlanSidecar,
        source: str,
        *,
        trt: Any,
        cuda: Cuda,
        stream: int | None = None,
        graphs: bool = True,
        spin: bool = False,
    ) -> None:
        self.version: str = trt.__version__
        self.sidecar = sidecar
        self.manifest = sidecar.manifest
        self.device = f"cuda:{cuda.device}"
        self.cuda = cuda
        self._source = source
        self._stream = stream
        self._graphs, self._spin = graphs, spin
        self._closed = False
        self._idle: list[Worker] = []
        self._workers = 0
        # Reentrant: Python may collect an old output in the middle of a run, which gives its worker back.
        self._lock = threading.RLock()
        # Streams of our own serve one thread each; work for the app's goes in one run after the other.
        self._turn: contextlib.AbstractContextManager[Any] = (
            contextlib.nullcontext() if stream is None else threading.RLock()
        )
        with cuda.current():
            cuda.check_device()
            sidecar.verify(
                plan,
                source,
                builder=sidecar.builder,
                version=self.version,
                compute_capability=cuda.compute_capability(),
            )
            self.plan = Engine(trt, plan, sidecar, source)
            try:
                # What does not fit is found now, not with the first frame.
                self._idle.append(self._new_worker())
            except EngineError:
                self.plan.unload()
                raise
        self.outputs = self.plan.outputs

    @property
    def max_batch(self) -> int:
        """The most images the plan takes at a time."""
        return next(tensor.largest[0] for tensor in self.plan.tensors if tensor.name == INPUT_NAME)

    def run(self, inputs: Mapping[str, Any], outputs: tuple[str, ...] = ("logits",)) -> dict[str, Any]:
        """Run the plan once; see runtime.session.Session.

        Args:
            inputs: by name, as numpy arrays or arrays in GPU memory; without `target`, the predicted class is
                explained.
            outputs: names among `self.outputs`. A plan computes all it has; what is not asked for is not copied.

        Returns:
            Numpy arrays; where `image` is in GPU memory, `DeviceArray`s.

        Raises:
            ImageError: a shape or dtype is not one that the plan takes.
            EngineError: CUDA or TensorRT fails, or the session is closed.
        """
        unknown = set(outputs) - set(self.outputs)
        if unknown:
            raise ModelError(
                f"{self._source}: gives no {min(unknown)} but {', '.join(self.outputs)}; build it with that output"
            )
        taken = self._inputs(inputs)
        on_device = isinstance(taken[INPUT_NAME], DeviceView)
        with self._turn, self.cuda.current():
            worker = self._take(taken[INPUT_NAME].shape[0])
            try:
                worker.prepare(taken)
                worker.launch(() if on_device else outputs)
                if not on_device or self._stream is None:
                    worker.wait()
                found: dict[str, Any] = {} if on_device else worker.results(outputs)
            except BaseException:
                # What failed half-way, or was interrupted, is not used again.
                with contextlib.suppress(EngineError):
                    self._retire(worker)
                raise
            if on_device:
                lease = _Lease(self, worker)
                return {name: DeviceArray(*worker.on_device(name), self._stream, lease) for name in outputs}
            self._give_back(worker)
            return found

    def close(self) -> None:
        """Free the plan, once runs of other threads are done and all device outputs are gone."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        failed = None
        with self.cuda.current(closing=True):
            while idle:
                try:
                    self._retire(idle.pop())
                except EngineError as error:
                    failed = failed or error
            with self._lock:
                self._unload_when_unused()
        if failed is not None:
            raise failed

    @contextlib.contextmanager
    def worker(self) -> Iterator[Worker]:
        """Give a worker of one's own, for measuring; the GPU is current in this thread meanwhile."""
        with self.cuda.current():
            worker = self._new_worker()
            try:
                yield worker
            finally:
                self._retire(worker)

    def complete(self, images: np.ndarray) -> dict[str, np.ndarray | DeviceView]:
        """Return the inputs of a run on images uint8 [N, H, W, C] that explains the predicted classes."""
        return self._inputs({INPUT_NAME: images})

    def _inputs(self, inputs: Mapping[str, Any]) -> dict[str, np.ndarray | DeviceView]:
        taken: dict[str, np.ndarray | DeviceView] = {}
        for name in sorted(self.plan.inputs):  # image before target
            if name == TARGET_NAME and name not in inputs:
                taken[name] = np.full(taken[INPUT_NAME].shape[0], -1, np.int64)
            else:
                view = device_view(inputs[name], name)
                taken[name] = np.asarray(inputs[name]) if view is None else view
        for tensor in self.plan.tensors:
            if tensor.is_input:
                tensor.check(taken[tensor.name], self._source)
        return taken

    def _new_worker(self) -> Worker:
        with self._lock:
            if self._closed:
                raise EngineError(f"{self._source}: the model is closed; open it again")
            self._workers += 1
        try:
            return Worker(self.cuda, self.plan, stream=self._stream, graphs=self._graphs, spin=self._spin)
        except BaseException:
            self._without_worker()
            raise

    def _retire(self, worker: Worker) -> None:
        try:
            worker.close()
        finally:
            self._without_worker()

    def _without_worker(self) -> None:
        with self._lock:
            self._workers -= 1
            self._unload_when_unused()

    def _unload_when_unused(self) -> None:
        if self._closed and not self._workers:
            self.plan.unload()

    def _take(self, batch: int) -> Worker:
        """Return an idle worker, one that did such a batch before where there is one, or a new one."""
        with self._lock:
            if self._idle:
                same = (index for index, worker in enumerate(self._idle) if worker.batch == batch)
                return self._idle.pop(next(same, -1))
        return self._new_worker()

    def _give_back(self, worker: Worker) -> None:
        with self._lock:
            if not self._closed:
                self._idle.append(worker)
                return
        self._retire(worker)


class _Lease:
    """Keeps a worker for the device outputs of one run, until the last of them is gone."""

    def __init__(self, session: TensorRTSession, worker: Worker) -> None:
        weakref.finalize(self, _end_lease, session, worker)


def _end_lease(session: TensorRTSession, worker: Worker) -> None:
    with session.cuda.current(closing=True):
        session._give_back(worker)


def open(
    plan: str | os.PathLike[str] | bytes,
    *,
    device: str = "cuda",
    stream: Any = None,
    context: Any = None,
    sidecar: str | os.PathLike[str] | bytes | None = None,
    graphs: bool = True,
    spin: bool = False,
) -> TensorRTSession:
    """Load a plan on TensorRT.

    Args:
        plan: its path or contents.
        device: "cuda", or "cuda:1" for the second GPU.
        stream: the app's stream, see `stream_handle` of cuda.py; None makes one for each thread.
        context: the app's PyCUDA context.
        sidecar: its path or contents; None takes the one beside the plan.
        graphs: record repeated shapes into CUDA graphs.
        spin: wait for the GPU on a busy core instead of asleep.

    Raises:
        FileError: the plan cannot be read.
        ModelError: its sidecar is missing or says that it cannot run here.
        EngineError: TensorRT, cuda-bindings or the GPU is not there, or one of them fails.
        OptionError: no such device.
    """
    source = "plan bytes" if isinstance(plan, bytes) else str(plan)
    described = _sidecar(plan, sidecar)
    contents = plan if isinstance(plan, bytes) else read_bytes(plan)
    number = re.fullmatch(r"cuda(?::(\d+))?", device.lower())
    if number is None:
        raise OptionError(f"device {device!r}: a plan runs on a GPU, expected cuda or cuda:1")
    builder = described.builder
    trt = import_first(_MODULES[builder], f"{BUILDERS[builder]} plan", _PACKAGES[builder])
    api = import_first(("cuda.bindings.runtime",), "a plan", "cuda-bindings")
    return TensorRTSession(
        contents,
        described,
        source,
        trt=trt,
        cuda=Cuda(api, int(number[1] or 0), context),
        stream=None if stream is None else stream_handle(stream),
        graphs=graphs,
        spin=spin,
    )


def _sidecar(plan: str | os.PathLike[str] | bytes, sidecar: str | os.PathLike[str] | bytes | None) -> PlanSidecar:
    """Return what is known of a plan."""
    if sidecar is not None:
        return sidecar_from(sidecar)
    if isinstance(plan, bytes):
        raise OptionError(
            "plan bytes: nothing says what they are; give sidecar, which lies beside the plan as .json"
        )
    return read_sidecar(plan)
