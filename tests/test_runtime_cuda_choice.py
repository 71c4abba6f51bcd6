"""Which CUDA runtime a plan's session calls, on a desktop, on a Jetson, and where there is none."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from runtime.engines.tensorrt import cuda_choice
from runtime.errors import EngineError
from tests.cuda_stub import compiled
from tests.tensorrt_names import ROOT

SIZE, MALLOC = 0x123456789A, 0x7FEDCBA900000001


def bindings_of(monkeypatch: pytest.MonkeyPatch, runtime: int | None, driver: int = 12060) -> Any:
    """Let `import cuda.bindings.runtime` find one of this version; None lets it fail."""
    module = None
    if runtime is not None:
        module = SimpleNamespace(
            cudaRuntimeGetVersion=lambda: (0, runtime), cudaDriverGetVersion=lambda: (0, driver)
        )
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", module)  # type: ignore[arg-type]
    return module


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine that is no Jetson and has no libcudart but what a test puts under CUDA_HOME, which is returned."""
    for variable in (cuda_choice.VARIABLE, "CUDA_PATH"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    searched = cuda_choice.libraries
    monkeypatch.setattr(
        cuda_choice, "libraries", lambda: (path for path in searched() if path.startswith(str(tmp_path)))
    )
    monkeypatch.setattr(cuda_choice, "_JETSON_LINUX", tmp_path / "nv_tegra_release")
    monkeypatch.setattr(cuda_choice, "_DEVICE_TREE", tmp_path / "compatible")
    return tmp_path


def test_bindings_that_fit_the_driver_are_called(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled(machine / "lib64" / "libcudart.so.12")
    for runtime, driver in ((12060, 12060), (12040, 12060), (13000, 0)):
        module = bindings_of(monkeypatch, runtime, driver)
        found = cuda_choice.find_cuda("a plan")
        assert (found.runtime, found.source) == (module, "cuda-bindings")


@pytest.mark.parametrize("kind", ["release", "device tree", "newer bindings", "no bindings", "variable"])
def test_the_machines_own_runtime_is_called(kind: str, machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = compiled(machine / "targets" / "aarch64-linux" / "lib" / "libcudart.so.12")
    bindings_of(monkeypatch, {"newer bindings": 12090, "no bindings": None}.get(kind, 12060))
    if kind == "release":
        (machine / "nv_tegra_release").write_text("# R36 (release)")
    elif kind == "device tree":
        (machine / "compatible").write_bytes(b"nvidia,p3768-0000+p3767-0005\0nvidia,p3767-0005\0nvidia,tegra234\0")
    elif kind == "variable":
        own = compiled(machine / "elsewhere" / "cudart.so")
        monkeypatch.setenv(cuda_choice.VARIABLE, str(own))
    found = cuda_choice.find_cuda("a plan")
    assert (found.source, found.runtime.version) == (str(own), 12060)
    assert found.runtime.cudaMalloc(SIZE) == (0, MALLOC)


def test_a_libcudart_that_does_not_fit_is_passed_over(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled(machine / "lib64" / "libcudart.so.13", runtime=13000)
    (machine / "lib64" / "libcudart.so.12").write_bytes(b"no library")
    compiled(machine / "targets" / "old" / "lib" / "libcudart.so.12", runtime=11080)
    module = bindings_of(monkeypatch, 12090)
    assert cuda_choice.find_cuda("a plan").runtime is module  # none better
    fits = compiled(machine / "lib" / "libcudart.so.12", runtime=12040)
    assert cuda_choice.find_cuda("a plan").source == str(fits)
    fits.unlink()
    bindings_of(monkeypatch, None)
    # A driver may serve a newer runtime of its major version; it says so itself where it does not.
    assert cuda_choice.find_cuda("a plan").runtime.version == 13000


def test_no_cuda_is_one_line(machine: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bindings_of(monkeypatch, None)
    with pytest.raises(EngineError) as caught:
        cuda_choice.find_cuda("a plan")
    assert str(caught.value) == (
        "a plan: cuda.bindings.runtime cannot be imported (import of cuda.bindings.runtime halted; None in "
        "sys.modules), and no libcudart.so.12 or .13 was found (CUDA_HOME, the loader's folders, "
        "/usr/local/cuda); pip install 'clearpact[tensorrt]', on a Jetson apt install nvidia-jetpack, or set "
        "CLEARPACT_CUDART to its path"
    )
    for value, text in (
        (
            "cuda-bindings",
            r"^a plan: cuda\.bindings\.runtime cannot be .*; pip install cuda-bindings, or unset CLEA",
        ),
        (str(tmp_path / "no.so"), r"^CLEARPACT_CUDART: \S+no\.so: cannot be loaded \(.*\); name .*, or unset it$"),
        ("libm.so.6", r"^CLEARPACT_CUDART: libm\.so\.6: no CUDA runtime \(.*cudaGetErrorName\); name"),
        (
            str(compiled(tmp_path / "old.so", runtime=11080)),
            r"old\.so: CUDA 11\.8, expected CUDA 12 or later; name another libcudart, or unset it$",
        ),
    ):
        monkeypatch.setenv(cuda_choice.VARIABLE, value)
        with pytest.raises(EngineError, match=text):
            cuda_choice.find_cuda("a plan")


def test_the_searched_places(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "a[1]"))
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "b"))
    places = [tmp_path / "a[1]/lib64/libcudart.so.12", tmp_path / "b/targets/sbsa-linux/lib/libcudart.so.13"]
    for place in places:
        place.parent.mkdir(parents=True)
        place.touch()
    found = list(cuda_choice.libraries())
    assert found[:4] == [*map(str, places), "libcudart.so.13", "libcudart.so.12"]
    assert all(path.startswith("/usr/local/cuda") for path in found[4:])


def test_the_jetsons_image_is_built_without_a_gpu() -> None:
    lines = (ROOT / "deploy" / "Dockerfile.jetson").read_text().replace("\\\n", " ").splitlines()
    run = [line for line in lines if line.startswith("RUN")]
    assert len(run) == 3
    # TensorRT's libraries and the driver come with `--runtime nvidia`, when it runs.
    started = re.findall(r"python3 -m (\w+)", " ".join(run))
    assert started == ["venv", "pip"]
    assert not [line for line in run if "tensorrt" in line or "cuda" in line or "python3 -c" in line]
