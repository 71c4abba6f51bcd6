"""`python -m deploy.edge_app`: the smallest honest app that embeds `runtime.Classifier`.

Reads frames from a folder of images or from a camera and prints class and latency of each.
"""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module: python -m deploy.edge_app")

import itertools
import sys
import time
from collections.abc import Iterator, Sequence

import numpy as np

from runtime import Classifier, ClearpactError, command
from runtime.errors import EngineError, OptionError
from runtime.images import list_images, load_image

EXAMPLES = """
  python -m deploy.edge_app model.onnx photos/
  python -m deploy.edge_app model.onnx --camera 0 --frames 100
"""


def folder_frames(path: str) -> Iterator[tuple[str, np.ndarray]]:
    """Yield name and pixels of every image in a folder; an unreadable one is reported and passed over."""
    for file in list_images([path]):
        try:
            yield file.name, load_image(file)
        except ClearpactError as error:
            print(f"error: {error}", file=sys.stderr)


def camera_frames(number: int) -> Iterator[tuple[str, np.ndarray]]:
    """Yield RGB frames of a camera until it stops.

    Raises:
        OptionError: OpenCV is not installed.
        EngineError: there is no such camera.
    """
    try:
        import cv2
    except ImportError:
        raise OptionError("--camera needs OpenCV; pip install 'clearpact[camera]'") from None
    camera = cv2.VideoCapture(number)
    if not camera.isOpened():
        raise EngineError(f"camera {number}: not found; check its number and your permission to use it")
    try:
        for index in itertools.count():
            there, frame = camera.read()
            if not there:
                return
            yield f"frame {index}", np.ascontiguousarray(frame[:, :, ::-1])  # OpenCV gives BGR
    finally:
        camera.release()


def main(argv: Sequence[str] | None = None) -> None:
    """Classify frame after frame until they end or Ctrl-C."""
    parser = command.parser("deploy.edge_app", "Classify the images of a folder or a camera.", EXAMPLES)
    parser.add_argument("model", help="ONNX file written by python -m export.onnx")
    parser.add_argument("folder", nargs="?", help="folder of images")
    parser.add_argument("--camera", type=int, help="number of a camera")
    parser.add_argument("--frames", type=int, help="stop after so many frames")
    parser.add_argument("--threads", type=int, help="CPU threads of one inference (default: the engine's choice)")
    parser.add_argument("--cache", metavar="FOLDER", help="keep compiled models there, to start faster next time")
    options = parser.parse_args(argv)
    if (options.folder is None) == (options.camera is None):
        raise OptionError("expected either a folder of images or --camera NUMBER; see --help")
    if options.frames is not None and options.frames < 1:
        raise OptionError(f"--frames {options.frames}: expected a whole number from 1")
    with Classifier(options.model, threads=options.threads, cache=options.cache) as classifier:
        frames = folder_frames(options.folder) if options.camera is None else camera_frames(options.camera)
        times_ms = []
        for name, frame in itertools.islice(frames, options.frames):
            began = time.perf_counter()
            (prediction,) = classifier.predict([frame], top_k=1)
            times_ms.append(1000 * (time.perf_counter() - began))
            print(
                f"{name:24}  {prediction.label:16} {prediction.probability:6.1%}  {times_ms[-1]:8.2f} ms",
                flush=True,
            )
    if times_ms:
        print(f"{len(times_ms)} frames, median {np.median(times_ms):.2f} ms, first {times_ms[0]:.2f} ms")


if __name__ == "__main__":
    command.run(main)
