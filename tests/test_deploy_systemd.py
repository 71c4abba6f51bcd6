"""The unit that keeps the edge app running, read by systemd's own tool and run as it says."""

from __future__ import annotations

import argparse
import configparser
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runtime.console import COMMANDS

ROOT = Path(__file__).parents[1]
UNIT = ROOT / "deploy" / "systemd" / "clearpact-edge.service"
ENVIRONMENT = UNIT.with_name("clearpact-edge.env")
PROGRAM = "/opt/clearpact/bin/clearpact"
needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")


def unit() -> dict[str, str]:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read_string(UNIT.read_text())
    return dict(parser["Service"])


def environment() -> dict[str, str]:
    lines = [line for line in ENVIRONMENT.read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


def expanded(command: str, variables: dict[str, str]) -> list[str]:
    """Return the words of ExecStart as systemd parts them: $NAME at spaces, ${NAME} as one word."""
    words: list[str] = []
    for word in shlex.split(command):
        if re.fullmatch(r"\$\w+", word):
            words += variables[word[1:]].split()
        else:
            words.append(re.sub(r"\$\{(\w+)\}", lambda found: variables[found[1]], word))
    return words


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """The unit with a program that exists on this machine."""
    path = tmp_path / UNIT.name
    path.write_text(UNIT.read_text().replace(PROGRAM, sys.executable))
    return path


@needs_systemd
def test_systemd_finds_nothing_wrong_with_the_unit(here: Path) -> None:
    done = subprocess.run(["systemd-analyze", "verify", here], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    here.write_text(here.read_text().replace("WatchdogSec", "WatchdogSeconds"))
    done = subprocess.run(["systemd-analyze", "verify", here], capture_output=True, text=True, check=False)
    assert re.search("Unknown key (name )?'WatchdogSeconds'", done.stderr)  # it would have told


@needs_systemd
def test_the_service_is_exposed_little(here: Path) -> None:
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=yes", "--no-pager", here],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    level = re.search(r"Overall exposure level for \S+: ([\d.]+)", done.stdout)
    assert level, done.stderr
    assert float(level[1]) <= 2.0  # of 10; 1.8 when written, and 9.6 without the options


def test_the_watchdog_waits_longer_than_the_app_is_silent() -> None:
    """A stream may take ten seconds to open and a pause lasts ten: see deploy.edge_app.frames."""
    service = unit()
    assert (service["Type"], service["NotifyAccess"]) == ("notify", "main")
    assert int(service["WatchdogSec"]) >= 2 * (10 + 10)
    assert service["SuccessExitStatus"] == "143"
    assert service["Restart"] == "on-failure"


def test_the_command_of_the_unit_runs_as_it_stands(digits_models: dict[str, Path], tmp_path: Path) -> None:
    """With a folder of images in the place of the camera, and the folders that systemd would make."""
    frames = tmp_path / "frames"
    frames.mkdir()
    for n in range(3):
        Image.fromarray(np.full((8, 8), 40 * n, np.uint8)).save(frames / f"{n}.png")
    given = environment()
    assert given.keys() == {"MODEL", "SOURCE", "OPTIONS"}
    cache = tmp_path / "cache"
    cache.mkdir(mode=int(unit()["CacheDirectoryMode"], 8))
    variables = {
        **given, "MODEL": str(digits_models["openvino"]), "SOURCE": str(frames),
        "RUNTIME_DIRECTORY": str(tmp_path / "run"), "CACHE_DIRECTORY": str(cache),
    }  # fmt: skip
    program, *arguments = expanded(unit()["ExecStart"], variables)
    assert program == PROGRAM
    assert arguments[0] in COMMANDS
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(30)
        done = subprocess.run(
            [sys.executable, "-c", "from runtime.console import run; run()", *arguments],
            env={**os.environ, "PYTHONPATH": str(ROOT), "NOTIFY_SOCKET": str(tmp_path / "notify")},
            cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip
        told = [manager.recv(1000).decode() for _ in range(3)]
    assert (done.returncode, done.stderr) == (0, "")
    assert told[0] == "READY=1"
    assert told[1].startswith("WATCHDOG=1\nSTATUS=")
    assert json.loads((tmp_path / "run" / "health.json").read_text())["frames"] == 3
    assert any(cache.iterdir())


def test_the_command_of_the_unit_takes_the_camera_of_the_example() -> None:
    variables = {**environment(), "RUNTIME_DIRECTORY": "/run/clearpact", "CACHE_DIRECTORY": "/var/cache/clearpact"}
    _, _, *arguments = expanded(unit()["ExecStart"], variables)
    from deploy.edge_app.__main__ import _options

    options = _options(arguments)
    assert isinstance(options, argparse.Namespace)
    assert (options.model, options.camera, options.threads) == ("/etc/clearpact/model.onnx", 0, 2)
    assert options.health == Path("/run/clearpact/health.json")
