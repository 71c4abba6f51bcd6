"""Every command's help comes at once: importing a command does not import torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from runtime.console import COMMANDS

ROOT = Path(__file__).parents[1]
OTHERS = {f"bench.{path.stem}" for path in (ROOT / "bench").glob("[a-z]*.py")} | {"bench.report.__main__"}
MODULES = sorted({module for module, _ in COMMANDS.values()} | OTHERS)


@pytest.mark.parametrize("module", MODULES)
def test_a_commands_help_needs_no_torch(module: str) -> None:
    code = f"import sys, {module}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "False"
