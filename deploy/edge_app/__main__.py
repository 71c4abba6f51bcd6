"""`python -m deploy.edge_app`: the smallest honest app that embeds `runtime.Classifier`.

Reads frames from a folder of images, a camera, a video file or a stream, prints class and latency of each, and
shows them with their maps in a window, a video file or a page.
"""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module: python -m deploy.edge_app")

import argparse
import contextlib
import json
import math
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from deploy.edge_app.answers import Answer, Answerer
from deploy.edge_app.frames import Frame, Video, Waiting, folder_frames
from deploy.edge_app.newest import Newest
from deploy.edge_app.outputs import Output, VideoFile, Window
from deploy.edge_app.page import Page
from deploy.edge_app.service import Pulse
from deploy.edge_app.times import FrameTimes
from runtime import Classifier, ClearpactError, command
from runtime.errors import FileError, ImageError, OptionError
from runtime.explanations.attribution import METHODS
from runtime.manifest import CAM_METHODS
from runtime.session import ENGINES

_TERMINATED = 128 + signal.SIGTERM  # what a process manager expects of one that it has ended

EXAMPLES = """
  python -m deploy.edge_app model.onnx photos/
  python -m deploy.edge_app model.onnx --camera 0 --explain --show
  python -m deploy.edge_app model.onnx --video film.mp4 --explain --save explained.mp4
  python -m deploy.edge_app engine.plan --video rtsp://10.0.0.7/stream --explain --serve 8080
  python -m deploy.edge_app model.onnx --video 'v4l2src ! videoconvert ! appsink' --frames 100
  python -m deploy.edge_app model.onnx --camera 0 --report 60 --health /run/clearpact/health.json
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Classify frame after frame until they end or Ctrl-C; one that cannot be is reported and passed over."""
    options = _options(argv)
    # As an end like any other: the camera is released, a video is finished, and the times are printed.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(_TERMINATED))
    try:
        with contextlib.ExitStack() as opened:
            classifier = opened.enter_context(
                Classifier(
                    options.model, engine=options.engine, device=options.device, threads=options.threads,
                    cache=options.cache,
                )
            )  # fmt: skip
            return _App(options, classifier, opened).run()
    finally:
        signal.signal(signal.SIGTERM, before)


class _App:
    """What is opened for a run, each thing closed by the stack it is given."""

    def __init__(self, options: argparse.Namespace, classifier: Classifier, opened: contextlib.ExitStack) -> None:
        self._options = options
        self._answerer = Answerer(classifier, explain=options.explain, method=options.explain_method)
        self._newest: Newest[Frame | Waiting] | None = None
        self._times, self._failed = FrameTimes(), 0
        self._reported = time.monotonic()
        self._frames, video = self._source(opened)
        name = options.folder if video is None else video.name
        self._pulse = Pulse(options.health, classifier, name)
        opened.callback(self._pulse.close)
        self._outputs = self._destinations(video, opened)

    def run(self) -> int:
        """Go through the frames; return the exit status."""
        try:
            for item in self._wanted():
                if isinstance(item, Waiting):
                    self._say_error(f"note: {item.reason}")
                    self._beat(item.reason)
                elif not self._answer(item):
                    break
        finally:  # also when the camera is gone
            if self._times.count:
                print(self._summary(), flush=True)
        return command.USER_ERROR if self._failed else 0

    def _answer(self, frame: Frame) -> bool:
        """Classify a frame, print and show it; return False where nobody wants another one."""
        began = time.perf_counter()
        try:
            if isinstance(frame.pixels, ClearpactError):
                raise frame.pixels
            answer = self._answerer.answer(frame.pixels)
        except (FileError, ImageError) as error:
            text = str(error)
            self._say_error(f"error: {text}" if frame.name in text else f"error: {frame.name}: {text}")
            self._failed += 1
            self._beat()
            return True
        self._times.add(1000 * (time.perf_counter() - began))
        self._pulse.answered(self._times, answer.label, answer.probability)
        self._beat()
        self._print(frame.name, answer)
        if not self._outputs:
            return True
        picture = answer.picture(frame.pixels)
        wanted = [output.show(picture) for output in self._outputs]
        return all(wanted)

    def _source(self, opened: contextlib.ExitStack) -> tuple[Iterator[Frame | Waiting], Video | None]:
        options = self._options
        if options.folder is not None:
            return iter(folder_frames(options.folder)), None
        video = Video(options.video if options.camera is None else options.camera, timeout_s=options.timeout)
        stop = threading.Event()
        frames = video.frames(stop, retry_s=options.retry)
        if not video.live:
            opened.callback(video.close)
            return frames, video
        self._newest = Newest(frames, stop)
        opened.callback(self._newest.close)
        # A live frame that waited for the engine to compile would be an old one.
        self._answerer.warm_up()
        return iter(self._newest), video

    def _destinations(self, video: Video | None, opened: contextlib.ExitStack) -> list[Output]:
        options = self._options
        made: list[Output] = []

        def add(output: Output) -> None:
            made.append(output)
            opened.callback(output.close)

        if options.show:
            add(Window())
        if options.save is not None:
            rate = None if video is None else video.frames_per_s
            add(VideoFile(options.save, frames_per_s=rate, live=video is not None and video.live))
        if options.serve is not None:
            page = Page(options.host, options.serve, lambda: self._pulse.report)
            add(page)
            whom = "" if page.loopback else "; the whole network can see it"
            print(f"watch at {page.address}{whom}", file=sys.stderr, flush=True)
        return made

    def _wanted(self) -> Iterator[Frame | Waiting]:
        """Yield until there were as many frames as are wanted."""
        left = math.inf if self._options.frames is None else self._options.frames
        for item in self._frames:
            yield item
            left -= isinstance(item, Frame)
            if left <= 0:
                return

    def _beat(self, waiting: str = "") -> None:
        dropped = self._newest.dropped[Frame] if self._newest else 0
        self._pulse.beat(failed=self._failed, dropped=dropped, waiting=waiting)

    def _print(self, name: str, answer: Answer) -> None:
        every_s, now = self._options.report, time.monotonic()
        if every_s is not None:
            if now - self._reported >= every_s:
                self._reported = now
                print(json.dumps(self._pulse.reported()) if self._options.json else self._summary(), flush=True)
            return
        if self._options.json:
            row = {
                "frame": name, "label": answer.label, "probability": answer.probability,
                "ms": round(self._times.last_ms, 3),
            }  # fmt: skip
            line = json.dumps(row)
        else:
            label = command.printable(answer.label)
            line = f"{name:24}  {label:16} {answer.probability:6.1%}  {self._times.last_ms:8.2f} ms"
        print(f"{line}\n", end="", flush=True)  # as one write, which no signal divides

    def _summary(self) -> str:
        dropped = self._newest.dropped[Frame] if self._newest else 0
        if self._options.json:
            return json.dumps(
                {
                    "frames": self._times.count, "median_ms": round(self._times.median_ms(), 3),
                    "first_ms": round(self._times.first_ms, 3), "failed": self._failed, "dropped": dropped,
                }
            )  # fmt: skip
        return f"{self._times}{f', {dropped} dropped' if self._newest else ''}"

    def _say_error(self, text: str) -> None:
        print(command.printable(text), file=sys.stderr, flush=True)


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options, checked.

    Raises:
        OptionError: one is unknown or out of range, or they do not fit together.
    """
    parser = command.parser(
        "deploy.edge_app", "Classify the images of a folder, a film, a camera or a stream.", EXAMPLES
    )
    parser.add_argument("model", help="ONNX file written by python -m export.onnx")
    parser.add_argument("folder", nargs="?", help="folder of images")
    source = parser.add_argument_group("source")
    source.add_argument("--camera", type=int, help="number of a camera")
    source.add_argument("--video", metavar="SOURCE",
                        help="film, stream such as rtsp://..., device, or pipeline of GStreamer")  # fmt: skip
    source.add_argument("--frames", type=int, help="stop after so many frames")
    source.add_argument("--retry", type=float, default=60, metavar="SECONDS",
                        help="how long to open a live source again that gives no more frames "
                        "(default: 60; 0: not at all; inf: for ever)")  # fmt: skip
    source.add_argument("--timeout", type=float, default=10, metavar="SECONDS",
                        help="that a stream may take to open or for a frame (default: 10)")  # fmt: skip
    engine = parser.add_argument_group("engine")
    engine.add_argument("--engine", choices=tuple(ENGINES), help="default: the one the model was exported for")
    engine.add_argument("--device", help="default: cpu; cuda for a plan")
    engine.add_argument("--threads", type=int, help="CPU threads of one inference (default: the engine's choice)")
    engine.add_argument("--cache", metavar="FOLDER", help="keep compiled models there, to start faster next time")
    shown = parser.add_argument_group("pictures")
    shown.add_argument("--explain", action="store_true", help="draw the map that explains the class over frames")
    shown.add_argument("--explain-method", choices=(*METHODS, *CAM_METHODS), metavar="METHOD",
                       help=f"{', '.join((*METHODS, *CAM_METHODS))} "
                       "(default: gradient, or the map that the file has)")  # fmt: skip
    shown.add_argument("--show", action="store_true", help="in a window; q ends")
    shown.add_argument("--save", type=Path, metavar="FILE", help="in a video file: .mp4, .mkv or .avi")
    shown.add_argument("--serve", type=int, metavar="PORT", help="in a page for browsers on this machine")
    shown.add_argument("--host", metavar="ADDRESS",
                       help="of --serve (default: 127.0.0.1; 0.0.0.0 shows it to the whole network)")  # fmt: skip
    told = parser.add_argument_group("reports")
    told.add_argument("--report", type=float, metavar="SECONDS",
                      help="print the times so often, instead of a line a frame")  # fmt: skip
    told.add_argument("--json", action="store_true", help="print lines of JSON")
    told.add_argument("--health", type=Path, metavar="FILE",
                      help="to write each second how it goes; see python -m deploy.edge_app.health")  # fmt: skip
    options = parser.parse_args(argv)
    given = [value for value in (options.folder, options.camera, options.video) if value is not None]
    if len(given) != 1:
        raise OptionError("expected either a folder of images, --camera NUMBER or --video SOURCE; see --help")
    command.check_counts(options, frames=1)
    if not options.retry >= 0:
        raise OptionError(f"--retry {options.retry:g}: expected a number of seconds from 0")
    for name in ("timeout", "report"):
        seconds = getattr(options, name)
        if seconds is not None and not 0 < seconds < math.inf:
            raise OptionError(f"--{name} {seconds:g}: expected a number of seconds above 0")
    if options.serve is not None and not 0 <= options.serve <= 65535:
        raise OptionError(f"--serve {options.serve}: expected a port, 1 to 65535, or 0 for a free one")
    if options.host is not None and options.serve is None:
        raise OptionError("--host is for --serve PORT; add it")
    options.host = options.host or "127.0.0.1"
    shows = options.show or options.save is not None or options.serve is not None
    options.explain = options.explain or options.explain_method is not None
    if options.explain and not shows:
        raise OptionError("--explain draws maps that nobody would see; add --show, --save FILE or --serve PORT")
    return options


if __name__ == "__main__":
    command.run(main)
