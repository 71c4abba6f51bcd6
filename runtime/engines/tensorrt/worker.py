"""One execution context of a TensorRT engine with its memory, its stream and its CUDA graphs.

A run is: upload (host to device), compute, download (device to host), all in one stream. The first run of a shape
is enqueued call by call, since TensorRT sets itself up during it; the next one is recorded into a CUDA graph, and
those that follow are one launch each. Arrays in GPU memory are copied into the worker's own, which takes less than
the launches that a graph saves: a graph holds for fixed addresses, and TensorRT wants them aligned.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from runtime.engines.tensorrt.cuda import LEGACY_STREAMS, Cuda, Resources
from runtime.engines.tensorrt.device_array import DeviceView
from runtime.engines.tensorrt.engine import Engine, Tensor
from runtime.errors import EngineError

_MAX_GRAPHS = 8


class Worker:
    """An execution context for one thread at a time.

    Args:
        cuda: the GPU, current in the calling thread, as in every method.
        plan: loaded, which must be unloaded after its workers are closed.
        stream: handle of the app's stream; None makes one of its own.
        graphs: record repeated shapes into CUDA graphs.
        spin: wait for the GPU on a busy core instead of asleep.

    Raises:
        EngineError: CUDA or TensorRT fails; nothing is left behind.
    """

    def __init__(
        self,
        cuda: Cuda,
        plan: Engine,
        *,
        stream: int | None = None,
        graphs: bool = True,
        spin: bool = False,
    ) -> None:
        self.cuda = cuda
        self._failed = plan.failed
        self._resources = Resources(cuda)
        self._context: Any = None
        self._graphs: dict[tuple[Any, ...], int] = {}
        self._seen: set[tuple[Any, ...]] = set()
        self._pending = False
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._images = 0  # of a run; the shapes may have room for more
        self._given: dict[str, DeviceView] = {}  # inputs in the app's GPU memory
        self._owns_stream = stream is None
        self._host: dict[str, tuple[int, np.ndarray]] = {}
        self._views: dict[str, np.ndarray] = {}
        # The legacy default stream cannot be recorded.
        self._records = graphs and stream not in LEGACY_STREAMS
        hold = self._resources.hold
        try:
            self.stream = hold("cudaStreamDestroy", cuda.stream()) if stream is None else stream
            self._done = hold("cudaEventDestroy", cuda.event(spin=spin))
            self._ready = hold("cudaEventDestroy", cuda.event())
            self._context = plan.new_context()
            self._tensors = self._with_largest_outputs(plan.tensors)
            self._device = {
                t.name: hold("cudaFree", int(cuda.call("cudaMalloc", t.n_bytes))) for t in self._tensors
            }
            for tensor in self._tensors:
                address, memory = cuda.pinned((tensor.n_bytes // tensor.dtype.itemsize,), tensor.dtype)
                self._host[tensor.name] = hold("cudaFreeHost", address), memory
            for name, address in self._device.items():
                if not self._context.set_tensor_address(name, address):
                    raise self._failed(f"takes no memory for {name}", "build the plan again")
        except EngineError:
            with contextlib.suppress(EngineError):
                self.close()
            raise

    @property
    def batch(self) -> int:
        """Images that the shapes have room for, 0 before the first run."""
        return next(iter(self.shapes.values()))[0] if self._images else 0

    def prepare(self, inputs: Mapping[str, np.ndarray | DeviceView]) -> None:
        """Take the next run's checked inputs: host arrays into page-locked memory, device arrays with `upload`.

        Where the plan takes no batch as small, it is filled up with black images, whose outputs nobody gets.
        """
        self.wait()
        self._images = next(iter(inputs.values())).shape[0]
        smallest = {tensor.name: tensor.smallest[0] for tensor in self._tensors if tensor.is_input}
        self._set_shapes({
            name: (max(value.shape[0], smallest[name]), *value.shape[1:]) for name, value in inputs.items()
        })  # fmt: skip
        self._given = {}
        for name, value in inputs.items():
            if isinstance(value, DeviceView):
                self._given[name] = value
            else:
                view = self._view(name)
                np.copyto(view[: self._images], value, casting="no")
                view[self._images :] = 0

    def upload(self) -> None:
        """Enqueue the copies of the inputs into this worker's GPU memory."""
        self._copy_in()
        self._upload()

    def compute(self, *, graph: bool = False) -> None:
        """Enqueue the network alone, with `graph` by its CUDA graph where there is one."""
        self._pending = True
        self._enqueue(self._compute, ("compute",), graph=graph)

    def download(self, outputs: tuple[str, ...]) -> None:
        """Enqueue the copies of outputs to page-locked memory."""
        self._pending = True
        for name in outputs:
            host, _ = self._host[name]
            self.cuda.download(host, self._device[name], self._view(name).nbytes, self.stream)

    def launch(self, outputs: tuple[str, ...]) -> None:
        """Enqueue a whole run that ends with these outputs on the host."""

        def whole() -> bool:
            self._upload()
            done = self._compute()
            if done:
                self.download(outputs)
            return done

        self._copy_in()
        self._enqueue(whole, (tuple(sorted(self._given)), tuple(sorted(outputs))), graph=True)
        self.mark()

    def mark(self) -> None:
        """Note the end of what has been enqueued, which `wait` waits for."""
        self._pending = True
        self.cuda.call("cudaEventRecord", self._done, self.stream)

    def wait(self) -> None:
        """Wait until the GPU has done what was enqueued before `mark`."""
        if self._pending:
            self.cuda.call("cudaEventSynchronize", self._done)
            self._pending = False

    def results(self, outputs: tuple[str, ...]) -> dict[str, np.ndarray]:
        """Return copies of downloaded outputs."""
        return {name: self._view(name)[: self._images].copy() for name in outputs}

    def output_of(self, name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
        """Return shape and dtype of an output of the present run."""
        view = self._view(name)
        return (self._images, *view.shape[1:]), view.dtype

    def copy_out(self, name: str, address: int) -> None:
        """Enqueue the copy of an output to other GPU memory; the next run writes this worker's own again."""
        self._pending = True
        self.cuda.copy(address, self._device[name], self._view(name)[: self._images].nbytes, self.stream)

    def report_to(self, profiler: Any) -> None:
        """Report every layer's time to a `tensorrt.IProfiler` from now on; each run then waits for its end."""
        self._context.profiler = profiler

    def close(self) -> None:
        """Give everything back, after what is enqueued is done.

        Raises:
            EngineError: CUDA reports an error; everything was given back all the same.
        """
        failed = None
        if self._pending:
            self._pending = False
            try:
                # Not the event: where a run broke off half-way, nothing was marked.
                self.cuda.call("cudaStreamSynchronize", self.stream)
            except EngineError as error:
                failed = error
        for graph in self._graphs.values():
            self._resources.hold("cudaGraphExecDestroy", graph)
        self._graphs = {}
        self._context = None
        self._host, self._views = {}, {}  # of memory that goes now
        try:
            self._resources.close()
        except EngineError as error:
            failed = failed or error
        if failed is not None:
            try:
                raise failed
            finally:
                del failed  # it would hold this frame, and with it what is to go

    def _with_largest_outputs(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        self._set_shapes({tensor.name: tensor.largest for tensor in tensors if tensor.is_input})
        sized = []
        for tensor in tensors:
            shape = tuple(self._context.get_tensor_shape(tensor.name))
            if min(shape, default=1) < 0:
                raise self._failed(f"gives no shape for {tensor.name}", "build it again")
            sized.append(tensor if tensor.is_input else Tensor(tensor.name, False, tensor.dtype, shape, shape))
        return tuple(sized)

    def _set_shapes(self, shapes: dict[str, tuple[int, ...]]) -> None:
        if shapes == self.shapes:
            return
        # What was recorded holds for the context's state at that time.
        self._drop_graphs()
        self._seen.clear()
        self.shapes, self._views = {}, {}
        for name, shape in shapes.items():
            if not self._context.set_input_shape(name, shape):
                raise self._failed(f"takes no {name} of shape {list(shape)}", "build it for such batches")
        self.shapes = shapes

    def _copy_in(self) -> None:
        """Enqueue the copies of inputs in the app's GPU memory, behind the work that writes them."""
        self._pending = True
        for name, value in self._given.items():
            producer = value.stream if value.stream != self.stream else None
            if producer is not None:
                self.cuda.order(self._ready, producer, self.stream)
            n_bytes = int(np.prod(value.shape)) * value.dtype.itemsize
            self.cuda.copy(self._device[name], value.address, n_bytes, self.stream)
            if producer is not None and not self._owns_stream:  # else the run is waited for before it returns
                self.cuda.order(self._ready, self.stream, producer)

    def _upload(self) -> None:
        """Enqueue the copies of host inputs, which a graph can hold."""
        for tensor in self._tensors:
            if tensor.is_input and tensor.name not in self._given:
                host, _ = self._host[tensor.name]
                self.cuda.upload(self._device[tensor.name], host, self._view(tensor.name).nbytes, self.stream)

    def _enqueue(self, work: Callable[[], bool], key: tuple[Any, ...], *, graph: bool) -> None:
        if graph and self._records and key in self._seen and key not in self._graphs:
            try:
                recorded = self.cuda.capture(self.stream, work)
            except EngineError:  # what is wrong beyond recording shows when the work is enqueued
                recorded = None
            if recorded is None:
                self._records = False  # a layer that needs the host half-way, or a driver that cannot
            else:
                if len(self._graphs) == _MAX_GRAPHS:
                    self._drop_graph(next(iter(self._graphs)))
                self._graphs[key] = recorded
        if graph and key in self._graphs:
            self._graphs[key] = self._graphs.pop(key)  # used last
            self.cuda.call("cudaGraphLaunch", self._graphs[key], self.stream)
        elif work():
            self._seen.add(key)
        else:
            raise self._failed("failed to run", "check the GPU with nvidia-smi, and build it again")

    def _compute(self) -> bool:
        return bool(self._context.execute_async_v3(self.stream))

    def _drop_graphs(self) -> None:
        for key in list(self._graphs):
            self._drop_graph(key)

    def _drop_graph(self, key: tuple[Any, ...]) -> None:
        self.cuda.call("cudaGraphExecDestroy", self._graphs.pop(key))

    def _view(self, name: str) -> np.ndarray:
        """Return the part of a tensor's page-locked memory that the present shapes take."""
        if name not in self._views:
            shape = tuple(self._context.get_tensor_shape(name))
            _, memory = self._host[name]
            self._views[name] = memory[: int(np.prod(shape))].reshape(shape)
        return self._views[name]
