"""The GPU that plans are built on, as their sidecars name it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from runtime.errors import EngineError


@dataclass(frozen=True)
class GPU:
    """A GPU and its driver.

    Args:
        name: such as "Orin".
        compute_capability: such as "8.7".
        driver: newest CUDA version of the driver, such as "12.6".
    """

    name: str
    compute_capability: str
    driver: str


def find_gpu() -> GPU:
    """Return the GPU that this process builds for, the first one that it sees.

    Raises:
        EngineError: cuda-bindings is not installed, or there is no GPU or no driver.
    """
    try:
        from cuda.bindings import runtime as cuda
    except ImportError as error:
        raise EngineError(
            f"the GPU cannot be asked: cuda-bindings is not there ({error}); pip install 'clearpact[tensorrt]'"
        ) from None

    def ask(function: Any, *arguments: Any) -> Any:
        code, *values = function(*arguments)
        if code != cuda.cudaError_t.cudaSuccess:
            raise EngineError(f"no GPU to build for ({code.name}); check that nvidia-smi shows it and its driver")
        return values[0]

    if not ask(cuda.cudaGetDeviceCount):
        raise EngineError("no GPU to build for; check that nvidia-smi shows it")
    device = ask(cuda.cudaGetDevice)
    properties = ask(cuda.cudaGetDeviceProperties, device)
    version = ask(cuda.cudaDriverGetVersion)
    return GPU(
        name=properties.name.split(b"\0")[0].decode("utf-8", "replace"),
        compute_capability=f"{properties.major}.{properties.minor}",
        driver=f"{version // 1000}.{version % 1000 // 10}",
    )
