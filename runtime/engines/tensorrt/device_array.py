"""Arrays in GPU memory, taken and given without a copy (`__cuda_array_interface__`, version 3).

The interface is specified at https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html; PyCUDA, CuPy,
PyTorch and Numba all speak it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from runtime.errors import ImageError


class DeviceArray:
    """An output in GPU memory; `torch.as_tensor` and `cupy.asarray` make it theirs without a copy.

    The memory is the session's. It is kept for this array while anything refers to the array, as those two
    functions do, and is written again after that.
    """

    def __init__(
        self, address: int, shape: tuple[int, ...], dtype: np.dtype[Any], stream: int | None, owner: object
    ) -> None:
        self.address = address
        self.shape = shape
        self.dtype = dtype
        self._stream = stream
        self._owner = owner

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        interface = {
            "version": 3, "shape": self.shape, "typestr": self.dtype.str, "data": (self.address, False),
            "strides": None,
        }  # fmt: skip
        return interface if self._stream is None else {**interface, "stream": self._stream}


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


def device_view(value: object, name: str) -> DeviceView | None:
    """Return a view of an array in GPU memory; None where `value` has no `__cuda_array_interface__`.

    Raises:
        ImageError: it is masked or not C-contiguous.
    """
    interface = getattr(value, "__cuda_array_interface__", None)
    if interface is None:
        return None
    shape, dtype = tuple(interface["shape"]), np.dtype(interface["typestr"])
    strides = interface.get("strides")
    if interface.get("mask") is not None or (strides is not None and tuple(strides) != _strides(shape, dtype)):
        raise ImageError(
            f"{name}: a device array with strides {strides}, expected a C-contiguous one; copy it first"
        )
    return DeviceView(int(interface["data"][0]), shape, dtype, interface.get("stream"), value)


def _strides(shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[int, ...]:
    strides, step = [], dtype.itemsize
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))
