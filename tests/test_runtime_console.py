"""`clearpact COMMAND`: the same mains, which a user's own files cannot shadow."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from runtime import console
from runtime.errors import OptionError

ROOT = Path(__file__).parents[1]
# What pip writes as the script, with the project on the path as an installation puts it there.
SCRIPT = f"import sys; sys.path.append({str(ROOT)!r}); from runtime.console import run; run()"


def clearpact(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments], cwd=folder, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("name", console.COMMANDS)
def test_every_command_is_a_main_with_help_and_version(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    module, _ = console.COMMANDS[name]
    for option, start in (
        ("--help", f"usage: python -m {module.removesuffix('.__main__')} "),
        ("--version", "clear"),
    ):
        with pytest.raises(SystemExit) as raised:
            console.main([name, option])
        assert raised.value.code == 0
        said = capsys.readouterr().out
        assert said.startswith(start)
        # argparse does not break a usage of options that exclude each other; examples are copied whole.
        told = said.partition("\nexamples:")[0].partition("\n\n")[2]
        assert all(len(line) <= 80 for line in told.splitlines())
    assert callable(importlib.import_module(module).main)


def test_a_users_own_files_are_not_run(tmp_path: Path) -> None:
    for stage in ("train", "export", "runtime", "bench"):
        (tmp_path / f"{stage}.py").write_text("raise SystemExit('the file of the current folder')\n")
    # As a script of an environment starts: the current folder is not on the path.
    for command in ("train", "export", "classify", "latency"):
        done = subprocess.run(
            [sys.executable, "-c", f"import sys; sys.path[0] = {str(ROOT)!r}; {SCRIPT}", command, "--help"],
            cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith("usage: python -m ")


def test_a_stage_that_a_slim_image_leaves_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(OptionError, match=r"^export: this installation leaves it out; install the whole wheel"):
        console.main(["export", "ckpt.pt"])


def test_a_file_in_the_place_of_a_stage_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deploy.py").write_text("raise SystemExit('run')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "deploy"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(OptionError, match=r"deploy: .*deploy\.py stands in the place of ours; rename it, or"):
        console.main(["edge-app", "--help"])


def test_commands_are_listed_and_others_refused(tmp_path: Path) -> None:
    done = clearpact(tmp_path, "--help")
    assert done.returncode == 0
    assert all(f"  {name} " in done.stdout for name in console.COMMANDS)
    done = clearpact(tmp_path, "explode")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: argument COMMAND: invalid choice: 'explode'")
