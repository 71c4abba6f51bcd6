"""Where a number was measured: without it, no number is kept."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

PACKAGES = ("numpy", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "torch", "onnx")


def environment() -> dict[str, str | int]:
    """Return processor, cores, system, Python, library versions, the commit of this code and the command."""
    found: dict[str, str | int] = {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "commit": _commit(),
    }
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    # Python by its name: where it is installed says nothing about the number.
    found["command"] = shlex.join(["python", *sys.orig_argv[1:]])
    return found


def describe(found: dict[str, str | int]) -> str:
    """Return the environment as one line for people, who know what they typed."""
    return ", ".join(
        f"{value}" if key in ("processor", "system") else f"{key} {value}"
        for key, value in found.items()
        if key != "command"
    )


def peak_memory_bytes() -> int:
    """Return the largest resident size this process has had, in bytes; 0 where the system does not say."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    for line in status.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = {line.split(":", 1)[0].strip(): line.split(":", 1)[1].strip() for line in lines if ":" in line}
    name = named.get("model name") or named.get("Model") or platform.processor() or "unknown processor"
    # What decides the speed of INT8: dot-product instructions.
    useful = {"avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "asimddp", "i8mm"}
    flags = useful & set((named.get("flags") or named.get("Features") or "").split())
    return f"{name} ({' '.join(sorted(flags))})" if flags else name


def _commit() -> str:
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()
