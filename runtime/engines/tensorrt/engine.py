"""A TensorRT plan, loaded: its inputs and outputs, and its execution contexts.

Only names that TensorRT 10 and 11 both have are used.
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from runtime.engines.tensorrt.device_array import DeviceView
from runtime.engines.tensorrt.plan import PlanSidecar
from runtime.errors import EngineError, ImageError, ModelError
from runtime.manifest import INPUT_NAME, TARGET_NAME

_PROFILE = 0
_NO_REASON = "no reason given"


@dataclass(frozen=True)
class Tensor:
    """An input or output of a plan.

    Args:
        name: of the tensor.
        is_input: whether it is an input.
        dtype: of its elements.
        smallest: the smallest shape an input may have; the largest of an output.
        largest: the largest shape.
    """

    name: str
    is_input: bool
    dtype: np.dtype[Any]
    smallest: tuple[int, ...]
    largest: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        """Bytes of the largest shape."""
        return max(1, int(np.prod(self.largest)) * self.dtype.itemsize)

    def check(self, value: np.ndarray | DeviceView, source: str) -> None:
        """Raise ImageError unless `value` is an input that the plan called `source` takes."""
        if value.dtype != self.dtype:
            raise ImageError(f"{self.name} of dtype {value.dtype}: expected {self.dtype}; convert it")
        ranges = list(zip(self.smallest, self.largest, strict=True))
        shape = tuple(value.shape)
        if ranges:
            ranges[0] = (1, ranges[0][1])  # fewer images than the plan takes are filled up
        if len(shape) != len(ranges) or not all(
            low <= size <= high for size, (low, high) in zip(shape, ranges, strict=True)
        ):
            expected = ", ".join(f"{low}" if low == high else f"{low} to {high}" for low, high in ranges)
            raise ImageError(
                f"{self.name} of shape {list(shape)}: {source} takes [{expected}]; "
                f"pass such batches, or build it for others"
            )


class Engine:
    """A plan that TensorRT has loaded.

    Args:
        trt: the module `tensorrt`.
        plan: contents of the plan, which its sidecar was held against.
        sidecar: of the plan.
        source: its name, for messages.

    Raises:
        EngineError: TensorRT cannot load it.
        ModelError: its inputs are not those of an exported model.
    """

    def __init__(self, trt: Any, plan: bytes, sidecar: PlanSidecar, source: str) -> None:
        self.trt = trt
        self.source = source
        self._logger = _logger(trt)
        self._logger.last = _NO_REASON
        self._runtime = trt.Runtime(self._logger)
        if sidecar.dla_core is not None:
            self._runtime.DLA_core = sidecar.dla_core
        if sidecar.version_compatible:
            # Such a plan carries host code, the lean runtime it was built with; its checksum is the sidecar's.
            self._runtime.engine_host_code_allowed = True
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise self.failed("cannot load it", f"build it again: {sidecar.rebuild}")
        self.tensors = self._io_tensors()
        self.inputs = tuple(tensor.name for tensor in self.tensors if tensor.is_input)
        self.outputs = tuple(tensor.name for tensor in self.tensors if not tensor.is_input)
        if set(self.inputs) not in ({INPUT_NAME}, {INPUT_NAME, TARGET_NAME}):
            raise ModelError(
                f"{source}: takes {', '.join(self.inputs)}, expected image and perhaps target; "
                f"build it from a file of python -m export.onnx"
            )

    def new_context(self) -> Any:
        """Return a new execution context, which must go before `unload`.

        Raises:
            EngineError: there is not enough memory for it.
        """
        context = self._engine.create_execution_context()
        if context is None:
            raise self.failed("makes no execution context", "free GPU memory, or build it for smaller batches")
        return context

    def layer_information(self) -> str:
        """Return what TensorRT's inspector says of the layers, as JSON."""
        inspector = self._engine.create_engine_inspector()
        return str(inspector.get_engine_information(self.trt.LayerInformationFormat.JSON))

    def failed(self, what: str, remedy: str) -> EngineError:
        """Return an error that says what TensorRT failed to do, with the last error it logged."""
        return EngineError(f"{self.source}: TensorRT {what} ({self._logger.last}); {remedy}")

    def unload(self) -> None:
        """Free the engine, then its runtime."""
        self._engine = None
        self._runtime = None

    def _io_tensors(self) -> tuple[Tensor, ...]:
        """Return the inputs, then the outputs; the outputs' shapes have -1 where the inputs decide."""
        found = []
        for name in (self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)):
            is_input = self._engine.get_tensor_mode(name) == self.trt.TensorIOMode.INPUT
            smallest = largest = tuple(self._engine.get_tensor_shape(name))
            if is_input and -1 in smallest:
                shapes = self._engine.get_tensor_profile_shape(name, _PROFILE)
                smallest, _, largest = (tuple(shape) for shape in shapes)
            dtype = np.dtype(self.trt.nptype(self._engine.get_tensor_dtype(name)))
            found.append(Tensor(name, is_input, dtype, smallest, largest))
        return tuple(sorted(found, key=lambda tensor: not tensor.is_input))


def import_first(names: tuple[str, ...], what: str, package: str) -> ModuleType:
    """Return the first of some modules that is installed.

    Raises:
        EngineError: none is; the text names the package.
    """
    reason = ""
    for name in names:
        try:
            return importlib.import_module(name)
        except ImportError as error:
            reason = reason or str(error)
    raise EngineError(f"{what}: {names[0]} cannot be imported ({reason}); pip install '{package}'")


@functools.cache
def _logger(trt: Any) -> Any:
    """Return a logger that keeps TensorRT's last error for messages of our own and prints nothing.

    There is one, since TensorRT keeps the first it is given for the life of the process.
    """

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.last = _NO_REASON

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.last = " ".join(message.split())

    return Logger()
