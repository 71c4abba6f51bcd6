from __future__ import annotations

import argparse
import json
import re
import subprocess
from pathlib import Path

import pytest

from bench.measure import environment, record
from bench.measure.environment import DIRTY, commit
from runtime.errors import FileError, OptionError


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with a file of code, one of results and one of text, all committed."""
    root = tmp_path / "repository"
    (root / "bench" / "results").mkdir(parents=True)
    for name in ("bench/code.py", "bench/results/cpu.jsonl", "README.md"):
        (root / name).write_text("0\n")
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
    for arguments in (["init", "-q"], ["add", "."], [*identity, "commit", "-q", "-m", "all"]):
        subprocess.run(["git", *arguments], cwd=root, check=True)
    return root


def _options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    record.add_options(parser)
    return parser.parse_args(arguments)


def test_code_that_differs_from_its_commit_is_dirty_and_results_and_text_are_none(repository: Path) -> None:
    name = commit(repository / "bench")
    assert len(name) == 12
    int(name, 16)
    for harmless in ("bench/results/cpu.jsonl", "README.md"):
        (repository / harmless).write_text("1\n")
        assert commit(repository / "bench") == name
    (repository / "bench" / "code.py").write_text("1\n")
    assert commit(repository / "bench") == name + DIRTY
    subprocess.run(["git", "add", "bench/code.py"], cwd=repository, check=True)
    assert commit(repository / "bench") == name + DIRTY
    assert commit(repository.parent) == "unknown"


def test_a_record_of_code_that_is_not_committed_is_refused_unless_asked_for(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (repository / "bench" / "code.py").write_text("1\n")
    monkeypatch.setattr(record, "commit", lambda: commit(repository))
    path = tmp_path / "results.jsonl"
    options = _options("--record", str(path))
    refused = f"^--record {path}: the code is not what commit [0-9a-f]{{12}} holds, expected committed code"
    with pytest.raises(OptionError, match=refused):
        record.check(options)  # before the work
    dirty = {"bench": "any", "environment": {"commit": commit(repository)}}
    with pytest.raises(OptionError, match=refused):
        record.deliver(options, dirty)  # what became dirty meanwhile
    assert not path.exists()
    asked = _options("--record", str(path), "--allow-dirty")
    record.check(asked)
    assert not record.deliver(asked, dirty)
    clean = {"bench": "any", "environment": {"commit": "0123456789ab"}}
    record.deliver(options, clean)
    assert record.read(tmp_path) == [dirty, clean]
    assert [record.is_dirty(found) for found in (dirty, clean, {"bench": "old"})] == [True, False, False]
    record.check(_options())  # what is only printed may come from any code


def test_a_result_is_printed_as_one_line_where_json_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    result = {"bench": "any", "values": [1.5, None]}
    assert not record.deliver(_options(), result)
    assert capsys.readouterr().out == ""
    assert record.deliver(_options("--json"), result)
    assert json.loads(capsys.readouterr().out) == result


def test_what_a_command_writes_beside_the_record_is_checked_with_it(tmp_path: Path) -> None:
    path = str(tmp_path / "one")
    options = _options("--record", path, "--allow-dirty")
    with pytest.raises(FileError, match="would be written twice"):
        record.check(options, outputs=[path])
    with pytest.raises(FileError, match="is an input"):
        record.check(options, inputs=[path])


def test_the_environment_names_the_commit_of_this_code() -> None:
    assert environment.environment()["commit"] == commit()


def test_no_record_names_a_place_on_the_machine_that_made_it() -> None:
    files = sorted((Path(__file__).parents[1] / "bench" / "results").glob("*.jsonl"))
    lines = [(file.name, line) for file in files for line in file.read_text().splitlines()]
    assert len(lines) > 50
    places = re.compile(r"/(?:tmp|root|home|work|mnt|Users)/")
    assert [(name, found[0]) for name, line in lines if (found := places.search(line))] == []
