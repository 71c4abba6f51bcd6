"""Sessions on TensorRT: plans that `python -m export.engine` built, on an NVIDIA GPU.

Needs `tensorrt` (10 or 11) and CUDA (see cuda_choice.py); of TensorRT only names that both releases have are used.
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

from runtime.engines.tensorrt.cuda import Cuda, PrimaryContext, stream_handle
from runtime.engines.tensorrt.cuda_choice import find_cuda
from runtime.engines.tensorrt.device_array import DeviceArray, DeviceView, device_view
from runtime.engines.tensorrt.engine import Engine, import_first
from runtime.engines.tensorrt.plan import BUILDERS, PlanSidecar, read_sidecar_bytes, sidecar_path
from runtime.engines.tensorrt.worker import Worker
from runtime.engines.tensorrt.workers import Workers
from runtime.errors import EngineError, ImageError, ModelError, OptionError
from runtime.files import read_bytes
from runtime.manifest import INPUT_NAME, TARGET_NAME
from runtime.signature import check_signature

# Builder in the sidecar -> the modules that run its plans, the first one installed is taken.
_MODULES = {"tensorrt": ("tensorrt",), "tensorrt_rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings")}
_PACKAGES = {"tensorrt": "clearpact[tensorrt]", "tensorrt_rtx": "tensorrt-rtx"}


class TensorRTSession:
    """A plan on one GPU; see runtime.session.Session.

    Every thread that runs it at the same time gets an execution context, memory and a stream of its own, and so
    does every batch size, up to a few. Arrays in GPU memory are taken as inputs too (anything with
    `__cuda_array_interface__`); where `image` is one, the outputs are `DeviceArray`s. Fewer images than the plan
    takes are filled up.

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
        # Streams of our own serve one thread each; work for the app's goes in one run after the other.
        self._turn: contextlib.AbstractContextManager[Any] = (
            contextlib.nullcontext() if stream is None else threading.RLock()
        )
        with cuda.current():
            sidecar.verify(
                plan,
                source,
                builder=sidecar.builder,
                version=self.version,
                compute_capability=cuda.compute_capability(),
            )
            self.plan = Engine(trt, plan, sidecar, source)
            self._workers = Workers(cuda, self.plan, stream=stream, graphs=graphs, spin=spin)
            weakref.finalize(self, self._workers.close_quietly).atexit = False  # then the driver may be gone
        self.outputs = self.plan.outputs

    @property
    def _smallest(self) -> int:
        return next(tensor.smallest[0] for tensor in self.plan.tensors if tensor.name == INPUT_NAME)

    @property
    def max_batch(self) -> int:
        """The most images the plan takes at a time."""
        return next(tensor.largest[0] for tensor in self.plan.tensors if tensor.name == INPUT_NAME)

    def run(
        self, inputs: Mapping[str, Any], outputs: tuple[str, ...] = ("logits",), *, to_host: bool = False
    ) -> dict[str, Any]:
        """Run the plan once; see runtime.session.Session.

        Args:
            inputs: by name, as numpy arrays or arrays in GPU memory; without `target`, the predicted class is
                explained.
            outputs: names among `self.outputs`. A plan computes all it has; what is not asked for is not copied.
            to_host: give numpy arrays also where `image` is in GPU memory.

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
        on_device = isinstance(taken[INPUT_NAME], DeviceView) and not to_host
        with self._turn, self.cuda.current():
            worker = self._workers.take(max(taken[INPUT_NAME].shape[0], self._smallest))
            try:
                worker.prepare(taken)
                worker.launch(() if on_device else outputs)
                found: dict[str, Any] = {name: self._copied(worker, name) for name in outputs if on_device}
                if not on_device or self._stream is None:
                    worker.wait()
                if not on_device:
                    found = worker.results(outputs)
            except BaseException:
                # What failed half-way, or was interrupted, is not used again.
                with contextlib.suppress(EngineError):
                    self._workers.retire(worker)
                raise
            self._workers.give_back(worker)
            return found

    def _copied(self, worker: Worker, name: str) -> DeviceArray:
        """Return an output of a worker's run in memory of its own."""
        shape, dtype = worker.output_of(name)
        piece = self._workers.pool.take(int(np.prod(shape)) * dtype.itemsize, worker.stream)
        found = DeviceArray(self._workers.pool, piece, shape, dtype, self._stream)
        worker.copy_out(name, piece.address)
        worker.mark()
        return found

    def close(self) -> None:
        """Free the plan, once runs of other threads are done; device outputs that somebody has stay."""
        self._workers.close()

    @contextlib.contextmanager
    def worker(self) -> Iterator[Worker]:
        """Give a worker of one's own, for measuring; the GPU is current in this thread meanwhile."""
        with self.cuda.current():
            worker = self._workers.new()
            try:
                yield worker
            finally:
                self._workers.retire(worker)

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
        n = taken[INPUT_NAME].shape[0]
        for name, value in taken.items():
            if value.shape[0] != n:
                raise ImageError(f"{name} of shape {list(value.shape)}: {n} images; give one for each")
        return taken


def open(
    plan: str | os.PathLike[str] | bytes,
    *,
    device: str = "cuda",
    stream: Any = None,
    context: Any = None,
    sidecar: str | os.PathLike[str] | bytes | None = None,
    version_compatible: bool = False,
    key: str | os.PathLike[str] | bytes | None = None,
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
        version_compatible: run the code for the CPU that a version-compatible plan carries.
        key: public key that plan and sidecar must be signed with; see runtime/signature.py.
        graphs: record repeated shapes into CUDA graphs.
        spin: wait for the GPU on a busy core instead of asleep.

    Raises:
        FileError: the plan cannot be read.
        ModelError: its sidecar is missing or says that it cannot run here, or it is not signed with `key`.
        EngineError: TensorRT, CUDA or the GPU is not there, or one of them fails.
        OptionError: no such device, or a version-compatible plan without `version_compatible`.
    """
    source = "plan bytes" if isinstance(plan, bytes) else str(plan)
    described_by = _sidecar(plan, sidecar)
    contents = plan if isinstance(plan, bytes) else read_bytes(plan)
    if key is not None:
        if isinstance(plan, bytes):
            raise OptionError("key: the signature of plan bytes is nowhere; give the path of the file")
        check_signature(plan, contents, described_by, key)
    beside = sidecar_path(plan) if sidecar is None and not isinstance(plan, bytes) else sidecar
    where = "sidecar bytes" if isinstance(beside, bytes) else str(beside)
    described = PlanSidecar.from_json(described_by.decode("utf-8", "replace"), where)
    if described.version_compatible and not version_compatible:
        raise OptionError(
            f"{source}: carries code for the CPU, which runs only where that is wanted; open it with "
            "version_compatible=True (--version-compatible), or build it without"
        )
    number = re.fullmatch(r"cuda(?::(\d+))?", device.lower())
    if number is None:
        raise OptionError(f"device {device!r}: a plan runs on a GPU, expected cuda or cuda:1")
    builder = described.builder
    trt = import_first(_MODULES[builder], f"{BUILDERS[builder]} plan", _PACKAGES[builder])
    device_number = int(number[1] or 0)
    functions = find_cuda("a plan")
    Cuda(functions.runtime, device_number).check_device()
    if context is None:
        context = PrimaryContext(functions.driver(), device_number)
    return TensorRTSession(
        contents,
        described,
        source,
        trt=trt,
        cuda=Cuda(functions.runtime, device_number, context),
        stream=None if stream is None else stream_handle(stream),
        graphs=graphs,
        spin=spin,
    )


def _sidecar(plan: str | os.PathLike[str] | bytes, sidecar: str | os.PathLike[str] | bytes | None) -> bytes:
    """Return the contents of a plan's sidecar."""
    if isinstance(sidecar, bytes):
        return sidecar
    if sidecar is not None:
        return read_bytes(sidecar)
    if isinstance(plan, bytes):
        raise OptionError(
            "plan bytes: nothing says what they are; give sidecar, which lies beside the plan as .json"
        )
    return read_sidecar_bytes(plan)
