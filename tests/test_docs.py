"""The pages of docs/ are run as a reader would: their Python in order, in one folder; their commands by name."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "docs" / f"{name}.md" for name in ("train", "export", "embed", "live", "your-model")]
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FILE = re.compile(r"# (\w+\.py)\n")


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """Return (line it starts on, text) of every block of a language."""
    text = page.read_text()
    return [(text.count("\n", 0, m.start(2)), m[2]) for m in _BLOCK.finditer(text) if m[1] == language]


def script(page: Path, folder: Path) -> str:
    """Return the page's Python on the lines where it stands; blocks that name a file are written to it."""
    lines = [""] * page.read_text().count("\n")
    for start, text in blocks(page, "python"):
        named = _FILE.match(text)
        if named:
            (folder / named[1]).write_text(text)
        else:
            lines[start : start + text.count("\n")] = text.splitlines()
    return "\n".join(lines)


def test_the_pages_python_runs_in_order(tmp_path: Path) -> None:
    scripts = []
    for page in PAGES:
        scripts.append(f"page_{page.stem.replace('-', '_')}.py")
        (tmp_path / scripts[-1]).write_text(script(page, tmp_path))
    # One process for all pages, since importing torch takes seconds; each page gets names of its own.
    (tmp_path / "pages.py").write_text(
        "import runpy, sys\n"
        "for name in sys.argv[1:]:\n"
        "    runpy.run_path(name, run_name='__main__')\n"
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-W", "error", "pages.py", *scripts],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "heat.png").exists()


def environment() -> dict[str, str]:
    # The project's folder, as if it were installed; one thread, since the networks are tiny.
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def is_package(module: str) -> bool:
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.submodule_search_locations is not None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_pages_commands_exist_with_their_options(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line for _, text in blocks(page, "sh") for line in text.splitlines()]
    assert lines
    for line in lines:
        python, dash, module, *arguments = shlex.split(line, comments=True)
        assert (python, dash) == ("python", "-m")
        with pytest.raises(SystemExit):
            importlib.import_module(f"{module}.__main__" if is_package(module) else module).main(["--help"])
        known = set(re.findall(r"(?<![\w-])--?[a-z][a-z0-9-]*", capsys.readouterr().out))
        assert {word for word in arguments if word.startswith("-")} <= known, line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_pages_link_to_pages_that_are_there(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target
