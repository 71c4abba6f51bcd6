"""Arrays in GPU memory, taken and given without a copy (`__cuda_array_interface__`, version 3).

The interface is specified at https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html; PyCUDA, CuPy,
PyTorch and Numba all speak it.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from runtime.engines.tensorrt.cuda import LEGACY_STREAM, stream_handle
from runtime.engines.tensorrt.device_memory import DevicePool, Piece
from runtime.errors import ImageError
from runtime.images.lists import is_single_shape
from runtime.manifest import ImageInput


class DeviceArray:
    """An output in GPU memory; `torch.as_tensor` and `cupy.asarray` make it theirs without a copy.

    The memory is its own while anything refers to the array, as those two functions do. After that it is used
    again, behind what the legacy default stream, blocking streams, and the current streams of PyTorch and CuPy
    were given before; of another stream that uses it, tell `record_stream`.

    Args:
        pool: where the memory is from.
        piece: the memory.
        shape: of the array.
        dtype: of its elements.
        stream: handle of the stream whose work must be done before it may be read; None where it may be read now.
    """

    def __init__(
        self, pool: DevicePool, piece: Piece, shape: tuple[int, ...], dtype: np.dtype[Any], stream: int | None
    ) -> None:
        self.address = piece.address
        self.shape = shape
        self.dtype = dtype
        self._stream = stream
        self._used_by: list[int] = []
        weakref.finalize(self, pool.give_back, piece, self._used_by).atexit = False

    def record_stream(self, stream: Any) -> None:
        """Say that work in a non-blocking stream uses the array, before it is dropped; see `stream_handle`.

        The name and the meaning are those of PyTorch's `Tensor.record_stream`.
        """
        self._used_by.append(stream_handle(stream))

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        interface = {
            "version": 3, "shape": self.shape, "typestr": self.dtype.str, "data": (self.address, False),
            "strides": None,
        }  # fmt: skip
        # 0 is not allowed there, since it could mean two things.
        return interface if self._stream is None else {**interface, "stream": self._stream or LEGACY_STREAM}


@dataclass(frozen=True)
class DeviceView:
    """A C-contiguous array in GPU memory that belongs to the caller.

    Args:
        address: of its first element.
        shape: of the array.
        dtype: of its elements.
        stream: handle of the stream whose work must be done before it may be read; None where it may be read now.
        owner: keeps the memory.
    """

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    stream: int | None
    owner: object

    def __getitem__(self, rows: slice) -> DeviceView:
        """Return consecutive rows, of the same memory."""
        start, stop, _ = rows.indices(self.shape[0])
        row_bytes = int(np.prod(self.shape[1:])) * self.dtype.itemsize
        return replace(self, address=self.address + start * row_bytes, shape=(stop - start, *self.shape[1:]))


def device_view(value: object, name: str) -> DeviceView | None:
    """Return a view of an array in GPU memory; None where `value` has no `__cuda_array_interface__`.

    Raises:
        ImageError: it is masked or not C-contiguous, or refuses to be read.
    """
    if isinstance(value, DeviceView):
        return value
    try:
        interface = getattr(value, "__cuda_array_interface__", None)
    except Exception as error:  # PyTorch, of a tensor that requires its gradient
        raise ImageError(f"{name}: a device array that cannot be taken ({error})") from None
    if interface is None:
        return None
    shape, dtype = tuple(interface["shape"]), np.dtype(interface["typestr"])
    strides = interface.get("strides")
    if interface.get("mask") is not None or (strides is not None and tuple(strides) != _strides(shape, dtype)):
        raise ImageError(
            f"{name}: a device array with strides {strides}, expected a C-contiguous one; copy it first"
        )
    return DeviceView(int(interface["data"][0]), shape, dtype, _written_by(value, interface), value)


def device_batch(images: object, expected: ImageInput) -> tuple[DeviceView, bool] | None:
    """Return images in GPU memory as the batch [N, H, W, C] that a plan takes, and whether it is a single image.

    Returns:
        None where they are not in GPU memory, or are not uint8 of the size and channels that the plan takes.

    Raises:
        ImageError: they are masked or not C-contiguous.
    """
    view = device_view(images, "image")
    if view is None:
        return None
    shape = view.shape
    single = is_single_shape(shape)
    if len(shape) in (2, 3) and not (single and len(shape) == 3):
        shape = (*shape, 1)  # grey
    if single:
        shape = (1, *shape)
    if view.dtype != np.uint8 or shape[1:] != (*expected.size, expected.channels) or not shape[0]:
        return None
    return replace(view, shape=shape), single


def _written_by(value: object, interface: Mapping[str, Any]) -> int | None:
    """Return the stream that a device array is written in; None where it is written.

    Before version 3 the interface says nothing of it, and PyTorch still gives version 2: its arrays are written in
    its current stream, others in the default one.
    """
    if interface.get("version", 0) >= 3:
        stream = interface.get("stream")
        return LEGACY_STREAM if stream == 0 else stream
    torch = sys.modules.get("torch")
    if torch is not None and type(value).__module__.partition(".")[0] == "torch":
        return int(torch.cuda.current_stream(getattr(value, "device", None)).cuda_stream) or LEGACY_STREAM
    return LEGACY_STREAM


def _strides(shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[int, ...]:
    strides, step = [], dtype.itemsize
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))
