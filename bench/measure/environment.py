"""Where a number was measured: without it, no number is kept."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path

PACKAGES = ("numpy", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "torch", "onnx")
DIRTY = "-dirty"  # ends the commit's name where the code differs from it

# What no figure depends on: results that were just recorded, and text.
_NOT_CODE = (":(top,exclude)bench/results", ":(top,exclude,glob)**/*.md")

Environment = dict[str, str | int | float]


def environment() -> Environment:
    """Return what a number depends on: machine and its state, Python, libraries, commit of this code, command.

    The state is the load of the last minute, and where the system says them the CPU's governor and clock, and a
    Jetson's power mode.
    """
    found: Environment = {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "commit": commit(),
        **_state(),
    }
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    # Python by its name: where it is installed says nothing about the number.
    found["command"] = shlex.join(["python", *sys.orig_argv[1:]])
    return found


def describe(found: Environment) -> str:
    """Return the environment as one line for people, who know what they typed."""
    return ", ".join(
        f"{value}" if key in ("processor", "system") else f"{key} {value}"
        for key, value in found.items()
        if key != "command"
    )


def commit(folder: Path = Path(__file__).parent) -> str:
    """Return the commit of the code in a folder, "unknown" outside of a repository.

    Its name ends in DIRTY where tracked files differ from it, but for recorded results and Markdown: of two
    records in a row, the first does not make the second one dirty.
    """
    try:
        name = _git(folder, "describe", "--always", "--abbrev=12").stdout.strip()
        same = _git(folder, "diff", "--quiet", "HEAD", "--", ":(top)", *_NOT_CODE, check=False).returncode == 0
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return name if same else name + DIRTY


def peak_memory_bytes() -> int:
    """Return the largest resident size this process has had, in bytes; 0 where the system does not say."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    for line in status.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def _state(cpu: Path = Path("/sys/devices/system/cpu"), nvpmodel: str = "nvpmodel") -> Environment:
    """Return what the machine is set to and how busy it is, as far as the system says."""
    found: Environment = {}
    if hasattr(os, "getloadavg"):
        found["load_1min"] = round(os.getloadavg()[0], 2)
    clocks = cpu / "cpu0" / "cpufreq"
    with contextlib.suppress(OSError):
        found["governor"] = (clocks / "scaling_governor").read_text().strip()
    with contextlib.suppress(OSError, ValueError):
        found["clock_mhz"] = int((clocks / "scaling_cur_freq").read_text()) // 1000
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run([nvpmodel, "-q"], capture_output=True, text=True, timeout=5, check=True)
        mode = re.search(r"NV Power Mode: *(\S+)", done.stdout)
        if mode:
            found["power_mode"] = mode[1]
    return found


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = {line.split(":", 1)[0].strip(): line.split(":", 1)[1].strip() for line in lines if ":" in line}
    name = named.get("model name") or named.get("Model") or platform.processor() or "unknown processor"
    # What decides the speed of INT8: dot-product instructions.
    useful = {"avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "asimddp", "i8mm"}
    flags = useful & set((named.get("flags") or named.get("Features") or "").split())
    return f"{name} ({' '.join(sorted(flags))})" if flags else name


def _git(folder: Path, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=check)
