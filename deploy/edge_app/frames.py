"""Where frames come from: images of a folder, and videos, which are films that end or live sources that do not."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deploy.edge_app.opencv import opencv
from runtime.errors import ClearpactError, EngineError, FileError, ImageError, OptionError
from runtime.images import folders_in, list_images, load_image

_MOST_LOST = 100  # frames without pixels, one after the other
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 10.0  # before a live source is opened again: each pause doubles the last


@dataclass(frozen=True)
class Frame:
    """One frame.

    Args:
        name: to print.
        pixels: uint8 [H, W], [H, W, 1] or RGB [H, W, 3]; or why there are none.
    """

    name: str
    pixels: np.ndarray | ClearpactError


@dataclass(frozen=True)
class Waiting:
    """A live source gives nothing and is opened again soon.

    Args:
        reason: one line for a person.
    """

    reason: str


def folder_frames(path: str) -> Iterator[Frame]:
    """Yield every image of a folder, or why it cannot be read."""
    files = list_images([path])
    for folder in folders_in([path]):
        print(f"note: {folder}: a folder in a folder is not looked into", file=sys.stderr)
    for file in files:
        try:
            yield Frame(file.name, load_image(file))
        except ClearpactError as error:
            yield Frame(file.name, error)


class Video:
    """A camera, a film or a stream that OpenCV has opened.

    Args:
        source: number of a camera; path of a film or a device; an address such as rtsp://host/stream; or a
            pipeline of GStreamer, such as "videotestsrc ! videoconvert ! appsink".
        timeout_s: how long a stream may take to open, or to give a frame, where FFmpeg reads it.

    Raises:
        OptionError: OpenCV is not installed, or has no GStreamer.
        FileError: there is no such file.
        EngineError: there is no such camera or stream, or the file is no video.
    """

    def __init__(self, source: int | str, *, timeout_s: float = 10.0) -> None:
        camera = isinstance(source, int)
        self._cv2 = opencv("--camera" if camera else "--video")
        self.name = f"camera {source}" if camera else str(source)
        self._open_with, self._remedies = _way_to_open(self._cv2, source, timeout_s)
        self._problem = ""
        self._capture: Any = self._cv2.VideoCapture(*self._open_with)
        if not self._capture.isOpened():
            raise EngineError(f"{self.name}: not found; {self._remedies[0]}")
        # A stream whose length is known is a film on a server: it ends, and no frame of it is dropped.
        self.live = camera or not (
            Path(str(source)).is_file() or self._capture.get(self._cv2.CAP_PROP_FRAME_COUNT) > 0
        )
        fps = 0.0 if camera else float(self._capture.get(self._cv2.CAP_PROP_FPS))
        self.frames_per_s = fps if 1 <= fps <= 240 else None

    def frames(self, stop: threading.Event, *, retry_s: float = 0.0) -> Iterator[Frame | Waiting]:
        """Yield frames, RGB or grey, an error in place of one that was lost; a live source is opened again.

        Args:
            stop: ends the frames, also during a pause.
            retry_s: how long a live source that gave frames may give none until it is an error; each failure
                yields `Waiting`, and the pauses between them grow.

        Raises:
            EngineError: it gave no frame at all, or none for longer than `retry_s`.
        """
        count = lost = 0
        pause_s, last_frame = _FIRST_PAUSE_S, time.monotonic()
        try:
            while not stop.is_set():
                there, pixels = self._read()
                lost = lost + 1 if pixels is None else 0
                if there and lost <= _MOST_LOST:
                    if pixels is not None:
                        pause_s, last_frame = _FIRST_PAUSE_S, time.monotonic()
                    lost_one = ImageError("the camera gave no pixels")
                    yield Frame(f"frame {count}", lost_one if pixels is None else _rgb(pixels))
                    count += 1
                    continue
                if not there and count and not self.live:
                    return
                said = f"{self.name}: {self._problem or f'ended after {count} frames'}"
                left_s = last_frame + retry_s - time.monotonic()
                if not (self.live and count) or left_s <= 0:
                    raise EngineError(f"{said}; {'check its driver' if self._problem else self._remedies[1]}")
                pause_s = min(pause_s, left_s)
                yield Waiting(f"{said}; trying again in {pause_s:.1f} s")
                stop.wait(pause_s)
                pause_s, lost = min(2 * pause_s, _LONGEST_PAUSE_S), 0
                self._capture.release()
                self._capture = self._cv2.VideoCapture(*self._open_with)
        finally:
            self._capture.release()

    def close(self) -> None:
        """Release the source; for one whose frames nobody began to read."""
        self._capture.release()

    def _read(self) -> tuple[bool, np.ndarray | None]:
        """Return whether the source goes on, and the next frame, None where it was lost."""
        self._problem = ""
        try:
            there, pixels = self._capture.read()
        except self._cv2.error as error:
            self._problem = " ".join(str(error).split())
            return False, None
        return there, pixels


def _way_to_open(cv2: Any, source: int | str, timeout_s: float) -> tuple[tuple[Any, ...], tuple[str, str]]:
    """Return the arguments of VideoCapture, and what to do where it does not open and where it ends."""
    if isinstance(source, int):
        return (source,), ("check its number and your permission to use it", "check its cable")
    if "://" in source:
        remedies = ("check the address, or that it is a video", "check the network")
        if not cv2.videoio_registry.hasBackend(cv2.CAP_FFMPEG):
            return (source,), remedies
        timeout_ms = round(1000 * timeout_s)
        limits = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, timeout_ms, cv2.CAP_PROP_READ_TIMEOUT_MSEC, timeout_ms]
        return (source, cv2.CAP_FFMPEG, limits), remedies
    if Path(source).exists():
        if Path(source).is_file():
            return (source,), ("check that it is a video", "convert it")
        return (source,), ("check your permission to use it", "check its cable")
    if "!" not in source:
        raise FileError(f"{source}: no such file; check the path")
    if not cv2.videoio_registry.hasBackend(cv2.CAP_GSTREAMER):
        raise OptionError(
            f"{source}: a pipeline needs an OpenCV with GStreamer, which pip's has not; use python3-opencv of "
            "your distribution or of JetPack, or an address such as rtsp://host/stream"
        )
    return (source, cv2.CAP_GSTREAMER), (
        "try it with gst-launch-1.0, and end it with '! videoconvert ! appsink'",
        "check its source",
    )


def _rgb(frame: np.ndarray) -> np.ndarray:
    """Return a frame of OpenCV, [H, W], [H, W, 1], BGR or BGRA, as grey or RGB; another one as it is."""
    if frame.ndim == 3 and frame.shape[2] in (3, 4):
        frame = frame[:, :, 2::-1]
    return np.ascontiguousarray(frame)
