"""One execution context of a TensorRT engine with its memory, its stream and its CUDA graphs.

A run is: upload (host to device), compute, download (device to host), all in one stream. The first run of a shape
is enqueued call by call, since TensorRT sets itself up during it; the next one is recorded into a CUDA graph, and
those that follow are one launch each.
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
        self._addresses: dict[str, int] = {}
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
        except EngineError:
            with contextlib.suppress(EngineError):
                self.close()
            raise

    @property
    def batch(self) -> int:
        """Images of the run before, 0 before the first."""
        return next(iter(self.shapes.values()), (0,))[0]

    def prepare(self, inputs: Mapping[str, np.ndarray | DeviceView]) -> None:
        """Take the next run's checked inputs: host arrays into page-locked memory, device arrays as they are."""
        self.wait()
        self._set_shapes({name: tuple(value.shape) for name, value in inputs.items()})
        addresses = dict(self._device)
        for name, value in inputs.items():
            if isinstance(value, DeviceView):
                addresses[name] = value.address
                self._wait_for(value.stream)
            else:
                np.copyto(self._view(name), value, casting="no")
        self._bind(addresses)

    def upload(self) -> None:
        """Enqueue the copies of host inputs to the GPU."""
        self._pending = True
        for tensor in self._tensors:
            if tensor.is_input and self._addresses[tensor.name] == self._device[tensor.name]:
                host, _ = self._host[tensor.name]
                self.cuda.upload(self._device[tensor.name], host, self._view(tensor.name).nbytes, self.stream)

    def compute(self, *, graph: bool = False) -> None:
        """Enqueue the network alone, with `graph` by its CUDA graph where there is one."""
        self._pending = True
        self._enqueue(self._compute, (), graph=graph)

    def download(self, outputs: tuple[str, ...]) -> None:
        """Enqueue the copies of outputs to page-locked memory."""
        self._pending = True
        for name in outputs:
            host, _ = self._host[name]
            self.cuda.download(host, self._device[name], self._view(name).nbytes, self.stream)

    def launch(self, outputs: tuple[str, ...]) -> None:
        """Enqueue a whole run that ends with these outputs on the host."""

        def whole() -> bool:
            self.upload()
            done = self._compute()
            if done:
                self.download(outputs)
            return done

        self._pending = True
        self._enqueue(whole, outputs, graph=True)
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
        return {name: self._view(name).copy() for name in outputs}

    def on_device(self, output: str) -> tuple[int, tuple[int, ...], np.dtype[Any]]:
        """Return address, shape and dtype of an output in GPU memory, which the next run writes again."""
        return self._device[output], self._view(output).shape, self._view(output).dtype

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
            raise failed

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

    def _bind(self, addresses: dict[str, int]) -> None:
        for name, address in addresses.items():
            if self._addresses.get(name) != address:
                if not self._context.set_tensor_address(name, address):
                    raise self._failed(f"takes no memory for {name}", "pass memory aligned to 256 bytes")
                self._addresses[name] = address

    def _wait_for(self, stream: int | None) -> None:
        """Let the work that follows wait for what another stream has been given so far."""
        if stream is not None and stream != self.stream:
            self.cuda.call("cudaEventRecord", self._ready, stream)
            self.cuda.call("cudaStreamWaitEvent", self.stream, self._ready, 0)

    def _enqueue(self, work: Callable[[], bool], what: tuple[str, ...], *, graph: bool) -> None:
        key = (what, *self._addresses.values())
        if graph and self._records and key in self._seen and key not in self._graphs:
            recorded = self.cuda.capture(self.stream, work)
            if recorded is None:
                self._records = False  # a layer that needs the host half-way
            else:
                if len(self._graphs) == _MAX_GRAPHS:
                    self._drop_graph(next(iter(self._graphs)))
                self._graphs[key] = recorded
        if graph and key in self._graphs:
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
