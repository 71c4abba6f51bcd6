"""`python -m deploy.edge_app`: the smallest honest app that embeds `runtime.Classifier`.

Reads frames from a folder of images, a camera, a video file or a stream and prints class and latency of each.
"""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module: python -m deploy.edge_app")

import itertools
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from runtime import Classifier, ClearpactError, command
from runtime.errors import EngineError, FileError, ImageError, OptionError
from runtime.images import folders_in, list_images, load_image
from runtime.session import ENGINES

_REMEMBERED = 1000  # frames whose times the median is of: a camera may run for years
_TERMINATED = 128 + signal.SIGTERM  # what a process manager expects of one that it has ended
_MOST_LOST = 100  # frames without pixels, one after the other

EXAMPLES = """
  python -m deploy.edge_app model.onnx photos/
  python -m deploy.edge_app model.onnx --camera 0 --frames 100
  python -m deploy.edge_app model.onnx --video film.mp4
  python -m deploy.edge_app engine.plan --video rtsp://10.0.0.7/stream
"""


class FrameTimes:
    """Times of frames in ms: how many there were, the first, the last, and a median of the latest ones."""

    def __init__(self) -> None:
        self.count, self.first_ms, self.last_ms = 0, 0.0, 0.0
        self.latest_ms: deque[float] = deque(maxlen=_REMEMBERED)

    def add(self, time_ms: float) -> None:
        """Take the time of one more frame."""
        self.first_ms = self.first_ms if self.count else time_ms
        self.count, self.last_ms = self.count + 1, time_ms
        self.latest_ms.append(time_ms)

    def __str__(self) -> str:
        of = f" of the last {_REMEMBERED}" if self.count > _REMEMBERED else ""
        return f"{self.count} frames, median{of} {np.median(self.latest_ms):.2f} ms, first {self.first_ms:.2f} ms"


def folder_frames(path: str) -> Iterator[tuple[str, np.ndarray | ClearpactError]]:
    """Yield name and pixels of every image in a folder, or why it cannot be read."""
    files = list_images([path])
    for folder in folders_in([path]):
        print(f"note: {folder}: a folder in a folder is not looked into", file=sys.stderr)
    for file in files:
        try:
            yield file.name, load_image(file)
        except ClearpactError as error:
            yield file.name, error


def video_frames(source: int | str) -> Iterator[tuple[str, np.ndarray | ClearpactError]]:
    """Yield frames, RGB or grey; an error in place of one that was lost.

    Args:
        source: number of a camera, which gives frames for ever; path of a video file, which ends; or what OpenCV
            opens as a stream, such as an RTSP address.

    Raises:
        OptionError: OpenCV is not installed.
        FileError: there is no such file.
        EngineError: there is no such camera or stream, the file is no video, or a camera gives no more frames.
    """
    live = isinstance(source, int) or "://" in source
    name = f"camera {source}" if isinstance(source, int) else str(source)
    remedies = ("check its number and your permission to use it", "check its cable")
    if not isinstance(source, int):
        remedies = ("check the address, or that it is a video", "check the network" if live else "convert it")
        if not live and not Path(source).exists():
            raise FileError(f"{source}: no such file; check the path")
    try:
        import cv2
    except ImportError:
        option = "--camera" if isinstance(source, int) else "--video"
        raise OptionError(f"{option} needs OpenCV; pip install 'clearpact[camera]'") from None
    camera = cv2.VideoCapture(source)
    if not camera.isOpened():
        raise EngineError(f"{name}: not found; {remedies[0]}")
    lost = 0
    try:
        for index in itertools.count():
            try:
                there, frame = camera.read()
            except cv2.error as error:
                raise EngineError(f"{name}: {' '.join(str(error).split())}; check its driver") from None
            lost = lost + 1 if frame is None else 0
            if not there and index and not live:
                return
            if not there or lost > _MOST_LOST:
                raise EngineError(f"{name}: ended after {index} frames; {remedies[1]}")
            yield f"frame {index}", ImageError("the camera gave no pixels") if frame is None else _rgb(frame)
    finally:
        camera.release()


def _rgb(frame: np.ndarray) -> np.ndarray:
    """Return a frame of OpenCV, [H, W], [H, W, 1], BGR or BGRA, as grey or RGB; another one as it is."""
    if frame.ndim == 3 and frame.shape[2] in (3, 4):
        frame = frame[:, :, 2::-1]
    return np.ascontiguousarray(frame)


def main(argv: Sequence[str] | None = None) -> int:
    """Classify frame after frame until they end or Ctrl-C; one that cannot be is reported and passed over."""
    parser = command.parser("deploy.edge_app", "Classify the images of a folder or a camera.", EXAMPLES)
    parser.add_argument("model", help="ONNX file written by python -m export.onnx")
    parser.add_argument("folder", nargs="?", help="folder of images")
    parser.add_argument("--camera", type=int, help="number of a camera")
    parser.add_argument("--video", metavar="SOURCE", help="video file, or a stream such as rtsp://...")
    parser.add_argument("--frames", type=int, help="stop after so many frames")
    parser.add_argument("--engine", choices=tuple(ENGINES), help="default: the one the model was exported for")
    parser.add_argument("--device", help="default: cpu; cuda for a plan")
    parser.add_argument("--threads", type=int, help="CPU threads of one inference (default: the engine's choice)")
    parser.add_argument("--cache", metavar="FOLDER", help="keep compiled models there, to start faster next time")
    options = parser.parse_args(argv)
    given = [source for source in (options.folder, options.camera, options.video) if source is not None]
    if len(given) != 1:
        raise OptionError("expected either a folder of images, --camera NUMBER or --video SOURCE; see --help")
    if options.frames is not None and options.frames < 1:
        raise OptionError(f"--frames {options.frames}: expected a whole number from 1")
    # As an end like any other: the camera is released, and the times are printed.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(_TERMINATED))
    with Classifier(
        options.model, engine=options.engine, device=options.device, threads=options.threads, cache=options.cache
    ) as classifier:
        frames = folder_frames(options.folder) if options.folder is not None else video_frames(given[0])
        times = FrameTimes()
        failed = 0
        try:
            for name, frame in itertools.islice(frames, options.frames):
                began = time.perf_counter()
                try:
                    if isinstance(frame, ClearpactError):
                        raise frame
                    (prediction,) = classifier.predict([frame], top_k=1)
                except (FileError, ImageError) as error:
                    print(f"error: {error}" if name in str(error) else f"error: {name}: {error}", file=sys.stderr)
                    failed += 1
                    continue
                times.add(1000 * (time.perf_counter() - began))
                label = command.printable(prediction.label)
                print(f"{name:24}  {label:16} {prediction.probability:6.1%}  {times.last_ms:8.2f} ms", flush=True)
        finally:  # also when the camera is gone
            if times.count:
                print(times)
            signal.signal(signal.SIGTERM, before)
    return command.USER_ERROR if failed else 0


if __name__ == "__main__":
    command.run(main)
