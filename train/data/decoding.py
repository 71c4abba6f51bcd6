"""Image files to pixels of one size, in worker processes; needs Pillow and numpy, not torch."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor

import numpy as np

from runtime import command
from runtime.errors import FileError
from runtime.images import load_image
from runtime.images.resizing import middle

_AHEAD = 3  # batches being decoded while one is used
_SCAN = 64  # images a batch where all are read once
# A worker takes half a second to start: fewer images than this for each are decoded sooner without it.
_IMAGES_PER_WORKER = 250

# Pixels uint8 [n, H, W, 3], and position -> why an image could not be read; its pixels are then 0.
Decoded = tuple[np.ndarray, dict[int, str]]


def decode(path: str, size: tuple[int, int]) -> np.ndarray:
    """Return an image file as uint8 [H, W, 3] of `size`: its middle, cropped to that shape, then resized.

    In other words: the shorter side is resized, and the longer one cropped around its centre. The filter is
    Pillow's antialiased bilinear one, as in the runtime. Grey images become RGB, turned photographs stand upright.

    Raises:
        FileError: missing, or not an image that Pillow can read.
    """
    pixels = load_image(path)
    from PIL import Image

    top, left, height, width = middle(pixels.shape[:2], size)
    image = Image.fromarray(pixels).crop((left, top, left + width, top + height)).convert("RGB")
    return np.asarray(image.resize(size[::-1], Image.Resampling.BILINEAR))


def worker_count(images: int) -> int:
    """Return how many worker processes are worth their start for so many images; 0: none."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 16, images // _IMAGES_PER_WORKER)


class Decoder:
    """Decodes files to one size, some batches ahead of who reads them.

    The processes start with the first batch, know neither torch nor a GPU, and end with this one, however it ends.

    Args:
        size: height and width in pixels.
        workers: processes; 0 decodes in this one.
    """

    def __init__(self, size: tuple[int, int], workers: int) -> None:
        self.size, self.workers = size, workers
        self._pool: ProcessPoolExecutor | None = None

    def batches(self, batches: Iterable[Sequence[str]]) -> Iterator[Decoded]:
        """Yield the images of each batch of paths, in order."""
        if not self.workers:
            yield from (_decode_all(paths, self.size) for paths in batches)
            return
        waiting: deque[list[Future[Decoded]]] = deque()
        try:
            for paths in batches:
                waiting.append(self._submit(paths))
                if len(waiting) > _AHEAD:
                    yield _joined(waiting.popleft())
            while waiting:
                yield _joined(waiting.popleft())
        finally:
            for future in itertools.chain.from_iterable(waiting):
                future.cancel()

    def scan(self, paths: Sequence[str], label: str) -> Iterator[tuple[int, np.ndarray, dict[int, str]]]:
        """Yield (position of the first, pixels, failures by position) of all files, in parts, with progress."""
        starts = range(0, len(paths), _SCAN)
        parts = self.batches(paths[start : start + _SCAN] for start in starts)
        for start, (pixels, failures) in command.progress(
            zip(starts, parts, strict=True), label=label, total=len(starts)
        ):
            yield start, pixels, {start + position: reason for position, reason in failures.items()}

    def close(self) -> None:
        """End the processes."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def _submit(self, paths: Sequence[str]) -> list[Future[Decoded]]:
        if self._pool is None:
            # Never forked from this process: its threads (OpenMP's, a GPU driver's) do not survive that.
            method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
            self._pool = ProcessPoolExecutor(
                self.workers, mp_context=multiprocessing.get_context(method), initializer=_begin
            )
        share = max(1, -(-len(paths) // self.workers))
        return [
            self._pool.submit(_decode_all, paths[start : start + share], self.size)
            for start in range(0, len(paths), share)
        ]


def read_all(paths: Sequence[str], decoder: Decoder, label: str) -> tuple[np.ndarray, dict[int, str]]:
    """Return all files as uint8 [N, H, W, 3], and position -> reason of those that cannot be read (all 0)."""
    pixels = np.zeros((len(paths), *decoder.size, 3), np.uint8)
    failures: dict[int, str] = {}
    for start, part, failed in decoder.scan(paths, label):
        pixels[start : start + len(part)] = part
        failures |= failed
    return pixels, failures


def _decode_all(paths: Sequence[str], size: tuple[int, int]) -> Decoded:
    pixels = np.zeros((len(paths), *size, 3), np.uint8)
    failures: dict[int, str] = {}
    for position, path in enumerate(paths):
        try:
            pixels[position] = decode(path, size)
        except FileError as error:
            failures[position] = str(error)
    return pixels, failures


def _joined(futures: list[Future[Decoded]]) -> Decoded:
    parts = [future.result() for future in futures]
    failures: dict[int, str] = {}
    start = 0
    for pixels, failed in parts:
        failures |= {start + position: reason for position, reason in failed.items()}
        start += len(pixels)
    return np.concatenate([pixels for pixels, _ in parts]), failures


def _begin() -> None:
    """Leave Ctrl-C to the process that started this one, and end when it does, even by SIGKILL."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_follow, daemon=True).start()


def _follow() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
