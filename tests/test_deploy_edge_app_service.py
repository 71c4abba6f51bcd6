"""What tells a service manager that the app is at work: sd_notify and the health file."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deploy.edge_app import health
from deploy.edge_app.__main__ import main
from deploy.edge_app.service import notify, watchdog_s
from deploy.edge_app.times import FrameTimes
from runtime.errors import FileError, OptionError
from tests.live_pictures import LivePictures

ROOT = Path(__file__).parents[1]


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    """A socket such as systemd's."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(tmp_path / "notify"))
        receiver.settimeout(60)
        yield receiver


@pytest.fixture
def frames(tmp_path: Path) -> Path:
    folder = tmp_path / "frames"
    folder.mkdir()
    for n in range(3):
        Image.fromarray(np.full((8, 8), 40 * n, np.uint8)).save(folder / f"{n}.png")
    return folder


def receive(manager: socket.socket, count: int) -> list[bytes]:
    return [manager.recv(1000) for _ in range(count)]


def test_a_message_arrives_as_one_datagram(manager: socket.socket) -> None:
    assert notify("READY=1\nSTATUS=at work", {"NOTIFY_SOCKET": manager.getsockname()})
    assert manager.recv(1000) == b"READY=1\nSTATUS=at work"


def test_a_name_that_is_in_no_file_system_is_reached() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(f"\0clearpact-{os.getpid()}")
        assert notify("READY=1", {"NOTIFY_SOCKET": f"@clearpact-{os.getpid()}"})
        assert receiver.recv(100) == b"READY=1"


@pytest.mark.parametrize("address", ["", "notify", "vsock:2:1234", "/absent/notify"])
def test_where_nobody_listens_nothing_happens(address: str) -> None:
    assert not notify("READY=1", {"NOTIFY_SOCKET": address} if address else {})


@pytest.mark.parametrize(
    ("environment", "expected_s"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "30000000"}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_the_watchdog_is_for_this_process_only(environment: dict[str, str], expected_s: float | None) -> None:
    assert watchdog_s(environment) == expected_s


def watched(manager: socket.socket, model: Path, address: str, *options: str) -> subprocess.Popen[bytes]:
    """Start the app as systemd does, with a watchdog of 0.4 s."""
    return subprocess.Popen(
        [sys.executable, "-m", "deploy.edge_app", str(model), "--video", address, *options],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env={**os.environ, "NOTIFY_SOCKET": manager.getsockname(), "WATCHDOG_USEC": "400000"},
    )  # fmt: skip


def test_a_service_is_ready_after_its_first_frame_and_then_gives_signs_of_life(
    digits_models: dict[str, Path], tmp_path: Path, manager: socket.socket
) -> None:
    pytest.importorskip("cv2", reason="no OpenCV here: pip install 'clearpact[camera]'")
    with LivePictures([np.zeros((64, 64, 3), np.uint8)]) as source:
        health = str(tmp_path / "run" / "health.json")
        options = ["--threads", "1", "--report", "60", "--health", health]
        app = watched(manager, digits_models["ort"], source.address, *options)
        assert manager.recv(1000) == b"READY=1"
        told = [message.decode() for message in receive(manager, 3)]
        assert all(message.startswith("WATCHDOG=1\nSTATUS=") for message in told)
        assert re.search(r"STATUS=\S+, [\d.]+ frames/s, \d+ dropped$", told[-1])
        app.send_signal(signal.SIGTERM)
        assert app.wait(30) == 143
    while not (last := manager.recv(1000).decode()).startswith("STOPPING"):
        assert last.startswith("WATCHDOG=1\n")
    report = json.loads((tmp_path / "run" / "health.json").read_text())
    assert (report["state"], report["frames"] >= 1) == ("ended", True)
    assert report["engine"].startswith("ort ")


def test_a_source_that_hangs_is_silence(digits_models: dict[str, Path], manager: socket.socket) -> None:
    """Then systemd starts the app again; a timer that says "alive" would hide it."""
    pytest.importorskip("cv2", reason="no OpenCV here: pip install 'clearpact[camera]'")
    with LivePictures([np.zeros((64, 64, 3), np.uint8)]) as source:
        app = watched(manager, digits_models["ort"], source.address, "--timeout", "60")
        assert manager.recv(1000) == b"READY=1"
        assert all(message.startswith(b"WATCHDOG=1\n") for message in receive(manager, 3))
        source.silent.set()
        manager.settimeout(1.0)  # of signs of life that come every 0.1 s
        with pytest.raises(TimeoutError):
            receive(manager, 20)
        assert app.poll() is None
        app.kill()
        app.wait()


def test_the_health_file_tells_what_the_app_last_saw(
    digits_models: dict[str, Path], frames: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "health.json"
    (frames / "1.png").write_bytes(b"")
    main([str(digits_models["ort"]), str(frames), "--health", str(file), "--json"])
    *rows, summary = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    report = json.loads(file.read_text())
    assert (report["frames"], report["failed"]) == (2, 1) == (summary["frames"], summary["failed"])
    assert (report["label"], report["probability"]) == (rows[-1]["label"], rows[-1]["probability"])
    assert report["source"] == str(frames)
    age = datetime.now(timezone.utc) - datetime.fromisoformat(report["last_frame"])
    assert timedelta() <= age < timedelta(minutes=1)
    assert health.main([str(file)]) == 0
    assert capsys.readouterr().out.startswith("the last frame was answered ")


def test_a_health_file_that_cannot_be_written_is_an_error_before_the_first_frame(
    digits_models: dict[str, Path], frames: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(FileError, match=f"^{frames}: is a folder, expected the name of a file"):
        main([str(digits_models["ort"]), str(frames), "--health", str(frames)])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"last_frame": null}', "no frame was answered yet; see what the app prints$"),
        ('{"last_frame": "2020-01-01T00:00:00.000+00:00"}', r"answered \d+ s ago, expected at most 30; see"),
        ('{"last_frame": "2020-01-01T00:00:00.000"}', r"answered \d+ s ago, expected at most 30; see"),
        ('{"last_frame": "today"}', "no health file, expected JSON with last_frame"),
        ('{"last_frame": 5}', "no health file"),
        ("{}", "no health file"),
        ("[]", "no health file"),
        ("{", "no health file"),
    ],
)
def test_an_app_that_is_not_at_work_is_told(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "health.json"
    file.write_text(content)
    with pytest.raises(FileError, match=rf"^{file}: .*{message}"):
        health.main([str(file)])


def test_an_age_is_above_0(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"^--max-age 0: expected a number above 0$"):
        health.main([str(tmp_path), "--max-age", "0"])


def test_the_rate_is_of_the_last_seconds_and_falls_to_0(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    times = FrameTimes()
    assert (times.frames_per_s(), times.median_ms()) == (0, 0)
    for _ in range(21):
        now += 0.5
        times.add(3.0)
    assert times.frames_per_s() == pytest.approx(2)
    now += 60
    assert times.frames_per_s() == 0
    assert (times.count, times.median_ms()) == (21, 3)
