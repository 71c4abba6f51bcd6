"""Which of NVIDIA's names the code uses, and whether bindings have them.

As a program: `python tests/tensorrt_names.py FOLDER` imports the bindings unpacked in FOLDER and prints their
version and the names that they lack, one a line.
"""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# The code calls NVIDIA's objects by these names, so that what is used of them can be read from its source.
CLASSES = {
    "builder": "Builder",
    "cache": "ITimingCache",
    "config": "IBuilderConfig",
    "context": "IExecutionContext",
    "engine": "ICudaEngine",
    "error": "ParserError",
    "inspector": "EngineInspector",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "profile": "IOptimizationProfile",
    "runtime": "Runtime",
    "tensor": "ITensor",
}


def used_names(source: str) -> set[str]:
    """Return the dotted names below the bindings' module that a module uses, such as "IBuilderConfig.set_flag"."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        path = _dotted(node)
        if path[:1] == ["self"]:
            path = [name.removeprefix("_") for name in path[1:]]
        if len(path) > 1 and path[0] == "trt":
            found.add(".".join(path[1:3]))
        elif len(path) > 1 and path[0] in CLASSES:
            found.add(f"{CLASSES[path[0]]}.{path[1]}")
    return found


def names_of_the_builder() -> set[str]:
    """Return the names that building plans uses, with those it composes at run time."""
    from export.engine import builder as plan_builder

    levels = set(plan_builder._HARDWARE.values()) - {"SAME_COMPUTE_CAPABILITY"}  # refused where it is missing
    composed = {f"HardwareCompatibilityLevel.{name}" for name in levels}
    return used_names((ROOT / "export" / "engine" / "builder.py").read_text()) | composed


def names_of_the_session() -> set[str]:
    """Return the names that running plans uses."""
    files = (
        "runtime/engines/tensorrt/engine.py",
        "runtime/engines/tensorrt/worker.py",
        "runtime/engines/tensorrt/session.py",
        "bench/layers/profile.py",
    )
    names = set().union(*(used_names((ROOT / file).read_text()) for file in files))
    # There a tensor is one of ours.
    return {name for name in names if not name.startswith("ITensor.")}


def missing(bindings: Any, names: set[str]) -> Iterator[str]:
    """Yield the names that bindings lack."""
    for name in sorted(names):
        value = bindings
        for part in name.split("."):
            value = getattr(value, part, None)
        if value is None:
            yield name


def _dotted(node: ast.AST) -> list[str]:
    """Return ["trt", "BuilderFlag", "TF32"] for that expression, [] for one that is no chain of attributes."""
    if isinstance(node, ast.Attribute):
        path = _dotted(node.value)
        return [*path, node.attr] if path else []
    return [node.id] if isinstance(node, ast.Name) else []


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    sys.path.insert(1, str(ROOT))
    tensorrt = importlib.import_module("tensorrt_bindings")
    print("\n".join([tensorrt.__version__, *missing(tensorrt, names_of_the_builder() | names_of_the_session())]))
    from export.engine.builder import hardware_level
    from runtime.errors import OptionError

    try:
        hardware_level(tensorrt, "same-compute-capability")
    except OptionError as refused:
        print(f"refused: {refused}")
