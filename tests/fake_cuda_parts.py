"""What the model of CUDA in fake_cuda.py is made of: errors, memory, streams with their work, events."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


class Violation(AssertionError):
    """The program broke a rule of CUDA or TensorRT."""


class cudaError_t(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorNoDevice = 100
    cudaErrorInvalidDevice = 101
    cudaErrorLaunchFailure = 719
    cudaErrorStreamCaptureInvalidated = 901
    cudaErrorStreamCaptureImplicit = 906


class CUresult(enum.IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_UNKNOWN = 999


@dataclass
class Memory:
    """An allocation; `data` stays readable after release, so that use after it is seen and does not crash."""

    address: int
    data: Any
    kind: str
    context: object
    released: bool = False


@dataclass
class Operation:
    """Work in a stream: what it does, how long that takes, and the memory it needs."""

    run: Callable[[], None]
    ms: float
    memory: tuple[Memory, ...] = ()
    allowed: Callable[[], None] = lambda: None


@dataclass
class Stream:
    context: object
    blocking: bool = False
    queue: list[Operation] = field(default_factory=list)
    recording: list[Operation] | None = None
    recorder: int = 0  # the thread that records
    invalidated: bool = False


@dataclass
class Event:
    context: object
    timing: bool
    recorded_in: Stream | None = None
    operation: Operation | None = None
    at_ms: float = 0.0
