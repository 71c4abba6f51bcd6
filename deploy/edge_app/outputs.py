"""Where pictures go on this machine: a window, or a video file that is there as a whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from deploy.edge_app.opencv import opencv
from deploy.edge_app.picture import Picture
from runtime.errors import FileError, OptionError
from runtime.files import check_writable

CODECS = {".mp4": "mp4v", ".mkv": "mp4v", ".avi": "MJPG"}
_USUAL_FRAMES_PER_S = 25.0
# Of a live source, whose video repeats pictures where none came: a slow processor must not spend its time on them.
_MOST_LIVE_FRAMES_PER_S = 10.0
_LONGEST_STILL_S = 1.0  # that a video shows while no frame comes; more is cut
_LEAST_FREE_BYTES = 64 * 2**20  # of the disk: what a video leaves to others
_CHECKED_EVERY = 100  # frames
_TITLE = "clearpact"
_ESCAPE = 27


class Output(Protocol):
    """Something that takes pictures."""

    def show(self, picture: Picture) -> bool:
        """Take the newest picture; return False where nobody wants another one."""

    def close(self) -> None:
        """Finish what was begun."""


class Window:
    """A window on the desktop; q, Escape or its button end the app.

    Raises:
        OptionError: there is no desktop, or OpenCV was built without windows.
    """

    def __init__(self) -> None:
        self._cv2 = opencv("--show")
        # In a process of its own: where no display answers, Qt ends the process that asks.
        probe = "import cv2; cv2.namedWindow('probe'); cv2.waitKey(1)"
        tried = subprocess.run([sys.executable, "-c", probe], capture_output=True, check=False)
        if tried.returncode:
            raise OptionError(
                "--show: no window opens here; use --serve 8080, or a desktop and "
                "opencv-python in the place of opencv-python-headless"
            )
        os.environ.setdefault("QT_LOGGING_RULES", "default.warning=false")  # that pip's OpenCV brings no fonts
        self._cv2.namedWindow(_TITLE, self._cv2.WINDOW_AUTOSIZE | self._cv2.WINDOW_GUI_NORMAL)
        self._shown = False

    def show(self, picture: Picture) -> bool:
        """Show a picture; return False where the person closed the window."""
        if self._shown and self._cv2.getWindowProperty(_TITLE, self._cv2.WND_PROP_VISIBLE) < 1:
            return False
        self._cv2.imshow(_TITLE, picture.pixels)
        self._shown = True
        return self._cv2.waitKey(1) & 0xFF not in (_ESCAPE, ord("q"))

    def close(self) -> None:
        """Close the window."""
        self._cv2.destroyAllWindows()


class VideoFile:
    """A video file of pictures, which takes its name when it is closed.

    All pictures get the size of the first. Those of a live source are shown for as long as they were the newest,
    up to a second.

    Args:
        path: ends with one of CODECS.
        frames_per_s: of the source; None takes 25.
        live: pictures come when they come, and the video has 10 frames per second at most; otherwise each is one
            frame.

    Raises:
        OptionError: the name ends otherwise, or OpenCV is not installed or cannot write such files.
        FileError: the file cannot be written.
    """

    def __init__(self, path: Path, *, frames_per_s: float | None, live: bool) -> None:
        if path.suffix.lower() not in CODECS:
            raise OptionError(f"--save {path}: expected a name that ends with {', '.join(CODECS)}")
        self._cv2 = opencv("--save")
        check_writable(path)
        self._path, self._live = path, live
        rate = frames_per_s or _USUAL_FRAMES_PER_S
        self._rate = min(rate, _MOST_LIVE_FRAMES_PER_S) if live else rate
        self._temporary = path.with_name(f".clearpact-{os.urandom(8).hex()}{path.suffix}")
        self._writer: Any = None
        self._last: np.ndarray | None = None
        self._size, self._began, self._count = (0, 0), 0.0, 0

    def show(self, picture: Picture) -> bool:
        """Append a picture."""
        pixels, now = picture.pixels, time.monotonic()
        if self._writer is None:
            self._writer = self._opened(pixels)
            self._began = now
        height, width = self._size
        if pixels.shape[:2] != (height, width):
            pixels = self._cv2.resize(pixels, (width, height))
        if self._live and self._last is not None:
            missing = round((now - self._began) * self._rate) - self._count
            if missing < 0:  # the video has a picture of this moment
                self._last = pixels
                return True
            self._fill(missing)
        if self._count % _CHECKED_EVERY == 0 and shutil.disk_usage(self._path.parent).free < _LEAST_FREE_BYTES:
            raise FileError(f"{self._path}: its disk is full; free space, or choose another folder")
        self._write(pixels)
        self._last = pixels
        return True

    def close(self) -> None:
        """Finish the file and give it its name; without a picture there is none.

        Raises:
            FileError: the file cannot be written.
        """
        if self._writer is None:
            return
        self._writer.release()
        self._writer = None
        try:
            self._temporary.replace(self._path)
        except OSError as error:
            raise FileError(f"{self._path}: cannot be written ({error.strerror}); choose another folder") from None
        finally:
            with contextlib.suppress(OSError):  # gone where all went well
                self._temporary.unlink()

    def _opened(self, pixels: np.ndarray) -> Any:
        cv2 = self._cv2
        self._size = (pixels.shape[0], pixels.shape[1])
        code = cv2.VideoWriter_fourcc(*CODECS[self._path.suffix.lower()])
        writer = cv2.VideoWriter(str(self._temporary), code, self._rate, self._size[::-1])
        if not writer.isOpened():
            raise OptionError(f"--save {self._path}: this OpenCV cannot write such files; try a name with .avi")
        return writer

    def _fill(self, missing: int) -> None:
        """Repeat the last picture for as long as it was the newest."""
        longest = round(_LONGEST_STILL_S * self._rate)
        if missing > longest:  # the rest of the pause is cut
            self._began += (missing - longest) / self._rate
        for _ in range(min(missing, longest)):
            self._write(self._last)

    def _write(self, pixels: np.ndarray | None) -> None:
        self._writer.write(pixels)
        self._count += 1
