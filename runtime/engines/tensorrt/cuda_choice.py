"""Which CUDA runtime is called: that of cuda-bindings, or the machine's own libcudart.

A desktop's driver also serves newer runtimes of the same major version, so that cuda-bindings, whose runtime is
built in, mostly run. A Jetson's driver comes with JetPack and serves no newer runtime (error 35,
cudaErrorInsufficientDriver), but JetPack brings the libcudart that fits. So the machine's own is taken on a
Jetson, where the bindings' runtime is newer than the driver, and where there are no bindings.

Not cuda.core: it needs the driver module of cuda-bindings all the same, and would be a second interface to
streams, events and graphs.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.engines.tensorrt.cudart import CudaDriver, CudaRuntime
from runtime.errors import EngineError

VARIABLE = "CLEARPACT_CUDART"
_BINDINGS = "cuda-bindings"
# The releases whose functions cudart.py declares, newest first.
_LIBRARIES = ("libcudart.so.13", "libcudart.so.12")
_FOLDERS = ("lib64", "lib", "targets/*/lib")
_JETSON_LINUX = Path("/etc/nv_tegra_release")
_DEVICE_TREE = Path("/proc/device-tree/compatible")


@dataclass(frozen=True)
class CudaFunctions:
    """CUDA's functions.

    Args:
        runtime: the module `cuda.bindings.runtime`, or what stands in for it.
        driver: returns the module `cuda.bindings.driver`, or what stands in for it.
        source: where the runtime is from.
    """

    runtime: Any
    driver: Callable[[], Any]
    source: str


def find_cuda(what: str) -> CudaFunctions:
    """Return CUDA's functions; the variable CLEARPACT_CUDART names a libcudart, or "cuda-bindings", for all.

    Args:
        what: needs them, for messages.

    Raises:
        EngineError: there are none; the text says what to install.
    """
    wanted = os.environ.get(VARIABLE)
    if wanted and wanted != _BINDINGS:
        try:
            return _own(CudaRuntime(wanted))
        except EngineError as error:
            raise EngineError(f"{VARIABLE}: {error}, or unset it") from None
    try:
        found = _bindings()
    except ImportError as error:
        reason = f"{what}: cuda.bindings.runtime cannot be imported ({error})"
    else:
        if wanted or not (is_jetson() or _is_newer_than_driver(found.runtime)):
            return found
        return _machines_own() or found
    if wanted:
        raise EngineError(f"{reason}; pip install {_BINDINGS}, or unset {VARIABLE}")
    own = _machines_own(any_version=True)
    if own is None:
        raise EngineError(
            f"{reason}, and no libcudart.so.12 or .13 was found (CUDA_HOME, the loader's folders, "
            f"/usr/local/cuda); pip install 'clearpact[tensorrt]', on a Jetson apt install nvidia-jetpack, or set "
            f"{VARIABLE} to its path"
        )
    return own


def is_jetson() -> bool:
    """Return whether this is a Jetson, in a container or not."""
    try:
        return _JETSON_LINUX.exists() or b"nvidia,tegra" in _DEVICE_TREE.read_bytes()
    except OSError:
        return False


def libraries() -> Iterator[str]:
    """Yield where a libcudart may be: under CUDA_HOME and CUDA_PATH, where the loader looks, under /usr/local."""
    yield from _under(*(os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)))
    yield from _LIBRARIES
    yield from _under(*sorted(Path("/usr/local").glob("cuda*"), reverse=True))


def _under(*homes: str | Path) -> Iterator[str]:
    for home in homes:
        for name in _LIBRARIES:
            for folder in _FOLDERS:
                yield from map(str, sorted(Path(home).glob(f"{folder}/{name}")))


def _bindings() -> CudaFunctions:
    runtime = importlib.import_module("cuda.bindings.runtime")
    return CudaFunctions(runtime, lambda: importlib.import_module("cuda.bindings.driver"), _BINDINGS)


def _own(runtime: CudaRuntime) -> CudaFunctions:
    return CudaFunctions(runtime, CudaDriver, runtime.path)


def _machines_own(*, any_version: bool = False) -> CudaFunctions | None:
    """Return the first libcudart that is not newer than the driver; with `any_version` otherwise the first one."""
    newer = None
    for path in libraries():
        try:
            runtime = CudaRuntime(path)
        except EngineError:
            continue
        if not _is_newer_than_driver(runtime):
            return _own(runtime)
        newer = newer or runtime
    return _own(newer) if any_version and newer is not None else None


def _is_newer_than_driver(runtime: Any) -> bool:
    """Return whether a runtime is newer than the driver, which is unknown where there is none."""
    (failed, own), (failed_too, driver) = runtime.cudaRuntimeGetVersion(), runtime.cudaDriverGetVersion()
    return not int(failed) and not int(failed_too) and 0 < driver < own
