"""What tells others that the app is at work: its health file, and systemd's watchdog (sd_notify(3))."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from deploy.edge_app.times import FrameTimes
from runtime.classifier import Classifier
from runtime.errors import FileError
from runtime.files import check_writable, write_atomically

_EVERY_S = 1.0


def notify(message: str, environment: Mapping[str, str] | None = None) -> bool:
    """Tell systemd a message such as "READY=1"; return whether it was sent.

    Only a service of Type=notify has the variable NOTIFY_SOCKET. A failure is no reason to stop the app.
    """
    address = (os.environ if environment is None else environment).get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    if address.startswith("@"):  # a name that is in no file system
        address = f"\0{address[1:]}"
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            sender.connect(address)
            sender.sendall(message.encode())
    except OSError:
        return False
    return True


def watchdog_s(environment: Mapping[str, str] | None = None) -> float | None:
    """Return how often, in seconds, systemd expects a sign of life of this process; None where it does not."""
    environment = os.environ if environment is None else environment
    if environment.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    microseconds = environment.get("WATCHDOG_USEC", "")
    return int(microseconds) / 1e6 if microseconds.isdigit() and int(microseconds) else None


class Pulse:
    """Says that the app goes on, when it does: each call follows a frame, or an attempt to open the source again.

    So an inference or a driver that hangs is silence, and systemd starts the app again.

    Args:
        health: file to write; None for none.
        classifier: what answers.
        source: name of what is watched.

    Attributes:
        report: what the health file holds; a new one each second, which any thread may read.

    Raises:
        FileError: the file cannot be written.
    """

    def __init__(self, health: Path | None, classifier: Classifier, source: str) -> None:
        if health is not None:
            check_writable(health)
        self._file = health
        session = classifier.session
        self._about = {
            "source": source,
            "model": f"{session.manifest.arch}, {session.manifest.precision}",
            "engine": f"{session.engine} {session.version} on {session.device}",
        }
        self._answer: dict[str, Any] = {"label": None, "probability": None}
        self._last_frame: str | None = None
        self._state, self._failed, self._dropped = "waiting", 0, 0
        self._times = FrameTimes()
        expected_s = watchdog_s()
        self._every_s = _EVERY_S if expected_s is None else min(_EVERY_S, expected_s / 4)
        self._due = 0.0
        self.report = self.reported()

    def answered(self, times: FrameTimes, label: str, probability: float) -> None:
        """Take the answer to a frame."""
        if self._last_frame is None:
            self._due = 0.0
            notify("READY=1")
        self._times, self._state = times, "running"
        self._answer = {"label": label, "probability": probability}
        self._last_frame = _now()

    def beat(self, *, failed: int, dropped: int, waiting: str = "") -> None:
        """Tell systemd and write the file, once a second at most.

        Args:
            failed: frames that could not be classified.
            dropped: frames that came while another one was classified.
            waiting: why the source gives nothing; empty where it does.
        """
        self._failed, self._dropped = failed, dropped
        if waiting:
            self._state, self._due = "waiting", 0.0
        now = time.monotonic()
        if now < self._due:
            return
        self._due = now + self._every_s
        rate, label = self._times.frames_per_s(), self._answer["label"]
        notify(f"WATCHDOG=1\nSTATUS={waiting or f'{label}, {rate:.1f} frames/s, {dropped} dropped'}")
        self._write()

    def close(self) -> None:
        """Tell systemd that the app ends, and write that it has."""
        notify("STOPPING=1")
        self._state = "ended"
        with contextlib.suppress(FileError):  # why the app ends says more
            self._write()

    def _write(self) -> None:
        self.report = self.reported()  # a new value, which other threads may read meanwhile
        if self._file is not None:
            write_atomically(self._file, json.dumps(self.report) + "\n")

    def reported(self) -> dict[str, Any]:
        """Return how it goes at this moment; for the app's own thread."""
        times = self._times
        return {
            "time": _now(), "last_frame": self._last_frame, "state": self._state,
            "frames": times.count, "failed": self._failed, "dropped": self._dropped,
            "frames_per_s": round(times.frames_per_s(), 2), "median_ms": round(times.median_ms(), 3),
            "last_ms": round(times.last_ms, 3), **self._answer, **self._about,
        }  # fmt: skip


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")
