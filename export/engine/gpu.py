"""The GPU that plans are built on, as their sidecars name it."""

from __future__ import annotations

from dataclasses import dataclass

from runtime.engines.tensorrt.cuda import Cuda
from runtime.engines.tensorrt.cuda_choice import find_cuda


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
        EngineError: there is no CUDA, no GPU or no driver.
    """
    cuda = Cuda(find_cuda("the GPU cannot be asked").runtime)
    cuda.check_device()
    return GPU(name=cuda.name(), compute_capability=cuda.compute_capability(), driver=cuda.driver())
