"""Who may import whom: stages, folders, and no module in a circle. Read from the sources."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Stage -> the others that it may import.
STAGES = {
    "runtime": set(),
    "train": {"runtime"},
    "export": {"runtime", "train"},
    "bench": {"runtime", "train", "export"},
    "deploy": {"runtime"},
}
# Folder -> the folders of its own stage that it may import; a stage's own modules are ".".
FOLDERS: dict[str, dict[str, set[str]]] = {
    "runtime": {
        "images": {"."},
        "explanations": {".", "images"},
        "engines": {"."},
        "engines/tensorrt": {".", "images"},
    },
    "train": {
        "cpu": {"."},
        "quantization": {"."},
        "data": {"."},
        "models": {"."},
        "losses": {".", "cpu", "quantization"},
        "post_training": {".", "quantization"},
    },
    "export": {
        "passes": {"."},
        "gradient": {".", "gradient/rules", "passes"},
        "gradient/rules": {".", "gradient"},
        "verification": {".", "gradient"},
        "engine": {"."},
        "sources": {".", "gradient"},
    },
    "bench": {
        "measure": set(),
        "layers": {"measure"},
        "networks": {"measure"},
        "pictures": {"measure", "networks"},
        "peers": {".", "measure", "networks"},
        "evidence": {"measure", "peers"},
        "report": {".", "layers", "measure", "networks", "pictures"},
        "causes": {"measure", "networks"},
        "processes": {".", "measure", "networks"},
    },
    "deploy": {"batch": {"."}, "edge_app": {"."}, "web": {"."}},
}


@functools.cache
def modules() -> dict[str, Path]:
    """Return every module by its dotted name; a package by its own."""
    found = {}
    for stage in STAGES:
        for path in sorted((ROOT / stage).rglob("*.py")):
            found[".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")] = path
    return found


@functools.cache
def imports(module: str) -> frozenset[str]:
    """Return the modules of the project that one imports, anywhere in its source."""
    found = set()
    for node in ast.walk(ast.parse(modules()[module].read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert not node.level, f"{module}: imports are absolute here"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in modules() else node.module)
    return frozenset(found & modules().keys() - {module})


def folder(module: str) -> str:
    """Return the folder below its stage that a module lies in: "losses", "gradient/rules", or "." for none."""
    parts = modules()[module].relative_to(ROOT).parts[1:-1]
    return "/".join(parts) or "."


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_imports_only_those_before_it(stage: str) -> None:
    for module in modules():
        if module.split(".")[0] == stage:
            others = {name for name in imports(module) if name.split(".")[0] not in STAGES[stage] | {stage}}
            assert not others, f"{module} imports {others}"


def test_no_module_stands_in_a_circle() -> None:
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, f"a circle: {' -> '.join([*way[way.index(module) :], module])}"
        if module not in done:
            for other in sorted(imports(module)):
                visit(other, (*way, module))
            done.add(module)

    for module in modules():
        visit(module, ())


@pytest.mark.parametrize("stage", STAGES)
def test_a_folder_imports_only_what_stands_beside_its_name(stage: str) -> None:
    for module in modules():
        if module.split(".")[0] == stage and folder(module) != ".":
            allowed = FOLDERS[stage][folder(module)] | {folder(module)}
            others = {n for n in imports(module) if n.split(".")[0] == stage and folder(n) not in allowed}
            assert not others, f"{module} imports {others}"
    present = {folder(module) for module in modules() if module.split(".")[0] == stage} - {"."}
    assert present == FOLDERS.get(stage, {}).keys()


def test_a_target_of_make_collects_every_test_of_its_marker() -> None:
    lines = re.findall(r"pytest -m (\w+) (tests/\S+)", (ROOT / "Makefile").read_text())
    assert {marker for marker, _ in lines} == {"arm64", "browser", "cpp", "ray"}
    for marker, place in lines:
        marked = [p for p in (ROOT / "tests").rglob("*.py") if f"pytest.mark.{marker}\n" in p.read_text()]
        assert marked, marker
        assert all(path.is_relative_to(ROOT / place) for path in marked), marker
