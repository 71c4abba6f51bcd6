"""Labelled images that are read as they are measured: sets of any size in bounded memory, on all cores."""

from __future__ import annotations

import os
import sys
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TypeVar

import numpy as np
from numpy.lib import format as npy

from bench.measure.environment import peak_memory_bytes
from runtime.classifier import MAX_BATCH
from runtime.errors import ClearpactError, FileError, OptionError
from train.data.decoding import Decoder, worker_count
from train.data.splits import Split

Batch = tuple[np.ndarray, np.ndarray]
"""Images uint8 [n, H, W, C], n at most MAX_BATCH, and labels int64 [n]."""

T = TypeVar("T")
U = TypeVar("U")

_AHEAD = 2  # batches waiting for each core
_EXPECTED = "expected an .npz file written by `python -m train.data`"


@dataclass(frozen=True)
class ImageStream:
    """A data set, or some of it.

    Args:
        name: where it comes from.
        shape: height, width and channels of its images.
        labels: of all its images, int64 [N].
        positions: of those that are read, ascending, int64 [n].
        read: positions -> their batches, in order; images that cannot be read are left out.
        classes: names of the classes that the labels number; empty where the data do not name them.
    """

    name: str
    shape: tuple[int, int, int]
    labels: np.ndarray
    positions: np.ndarray
    read: Callable[[np.ndarray], Iterator[Batch]]
    classes: tuple[str, ...] = ()

    def batches(self) -> Iterator[Batch]:
        """Yield all images that are read."""
        return self.read(self.positions)

    @property
    def batch_count(self) -> int:
        """How many batches that is, at most."""
        return -(-len(self.positions) // MAX_BATCH)

    def evenly_spaced(self, count: int) -> ImageStream:
        """Return `count` of the images, evenly spaced over the set.

        Raises:
            OptionError: there are not as many.
        """
        n = len(self.labels)
        if not 1 <= count <= n:
            raise OptionError(f"--images {count}: expected a whole number from 1 to {n}")
        return replace(self, positions=np.arange(count) * n // count)

    def odd(self) -> ImageStream:
        """Return every second image, from the second on: `export.onnx --validation` fits on the others.

        Raises:
            OptionError: there is one image only.
        """
        if len(self.positions) < 2:
            raise OptionError(f"--odd-images: {self.name} has {len(self.positions)} image, expected two at least")
        return replace(self, positions=self.positions[1::2])

    def renumbered(self, classes: tuple[str, ...]) -> ImageStream:
        """Return the same images, whose labels number `classes`; every name of its own has to be among them."""
        if self.classes in ((), classes):
            return self
        number = np.array([classes.index(name) for name in self.classes], np.int64)

        def read(positions: np.ndarray) -> Iterator[Batch]:
            for images, labels in self.read(positions):
                yield images, number[labels]

        return replace(self, labels=number[self.labels], read=read, classes=classes)


def watched(test: ImageStream, peaks: dict[int, int]) -> ImageStream:
    """Return the same images; reading them notes in `peaks`, in place, the largest size so far of this process.

    In bytes, after 1,000, 2,000, 5,000, 10,000, ... images, and after the last: where memory does not grow with
    the images, these are the same.
    """

    def read(positions: np.ndarray) -> Iterator[Batch]:
        count = 0
        next_count = iter(sorted(n * 10**k for n in (1, 2, 5) for k in range(3, 12)))
        wanted = next(next_count)
        for images, labels in test.read(positions):
            count += len(labels)
            yield images, labels
            while count >= wanted:
                peaks[wanted] = peak_memory_bytes()
                wanted = next(next_count)
        peaks[count] = peak_memory_bytes()

    return replace(test, read=read)


def in_memory(name: str, images: np.ndarray, labels: np.ndarray, classes: tuple[str, ...] = ()) -> ImageStream:
    """Return images uint8 [N, H, W, C] and labels int64 [N] as a stream."""

    def read(positions: np.ndarray) -> Iterator[Batch]:
        for part in _parts(positions):
            yield images[part], labels[part]

    height, width, channels = images.shape[1:]
    return ImageStream(name, (height, width, channels), labels, np.arange(len(labels)), read, classes)


def in_npz(path: Path) -> ImageStream:
    """Return the images of an .npz file, which are read from it, and unpacked, a batch at a time.

    Nothing in the file is executed. Each pass reads it from its start; its checksum is known at its end.

    Raises:
        FileError: the file is missing, damaged or holds something else. While it is read: it is damaged there.
    """
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            with archive.open("labels.npy") as member:
                labels = npy.read_array(member, allow_pickle=False)
            classes: tuple[str, ...] = ()
            if "classes.npy" in archive.namelist():
                with archive.open("classes.npy") as member:
                    classes = tuple(map(str, npy.read_array(member, allow_pickle=False)))
            with archive.open("images.npy") as member:
                dtype, shape, rows = _header(member)
        if dtype.hasobject:
            raise ValueError("pickled objects")
    except FileNotFoundError:
        raise FileError(f"{path}: no such file; check the path") from None
    except Exception:  # numpy, zipfile and zlib each have errors of their own for damaged files
        raise _damaged(path) from None
    if dtype != np.uint8 or len(shape) != 4 or labels.shape != shape[:1] or not len(labels):
        raise FileError(
            f"{path}: images {dtype} {list(shape)} and labels {list(labels.shape)}, {_EXPECTED}: "
            "images uint8 [N, H, W, C] and labels [N]"
        )
    if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
        raise FileError(f"{path}: labels {labels.dtype}, {_EXPECTED}: class numbers from 0; write it again")
    if classes and (len(set(classes)) < len(classes) or labels.max() >= len(classes)):
        raise FileError(
            f"{path}: labels up to {labels.max()} and {len(classes)} class names, {_EXPECTED}: a name of its own "
            "for every label; write it again"
        )
    if not rows:
        raise FileError(f"{path}: images in column-major order, {_EXPECTED}; write it again")
    labels = labels.astype(np.int64)

    def read(positions: np.ndarray) -> Iterator[Batch]:
        try:
            with zipfile.ZipFile(path) as archive, archive.open("images.npy") as member:
                _header(member)
                for part, images in zip(_parts(positions), _rows(member, positions, shape), strict=True):
                    yield images, labels[part]
        except ClearpactError:
            raise
        except Exception:
            raise _damaged(path) from None

    return ImageStream(path.name, (shape[1], shape[2], shape[3]), labels, np.arange(len(labels)), read, classes)


def in_files(split: Split, size: tuple[int, int]) -> ImageStream:
    """Return the test images of a folder, cropped and resized, and decoded by worker processes ahead of time.

    Raises:
        FileError: while it is read, at its end: none of its images can be.
    """
    paths, given = split.part("test")
    labels = np.array(given, np.int64)

    def read(positions: np.ndarray) -> Iterator[Batch]:
        decoder = Decoder(size, worker_count(len(positions)))
        failures: list[str] = []
        try:
            batches = decoder.batches([paths[position] for position in part] for part in _parts(positions))
            for part, (images, failed) in zip(_parts(positions), batches, strict=True):
                failures += failed.values()
                kept = np.setdiff1d(np.arange(len(part)), list(failed))
                if len(kept):
                    yield images[kept], labels[part[kept]]
        finally:
            decoder.close()
        if len(failures) == len(positions):
            raise FileError(f"{split.root}: no readable test image, expected some; check the folder")
        if failures:
            print(f"skipped {len(failures)} images, such as {failures[0]}", file=sys.stderr)

    return ImageStream(split.name, (*size, 3), labels, np.arange(len(labels)), read, split.classes)


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_parallel(function: Callable[[T], U], items: Iterable[T], workers: int) -> Iterator[U]:
    """Yield function(item) of every item, in order, computed by threads that are a few items ahead at most.

    Args:
        function: for several threads at once; numpy and the engines let others run meanwhile.
        items: taken from their iterator when there is room.
        workers: threads; with one, all is done in this one.
    """
    if workers == 1:
        yield from map(function, items)
        return
    waiting: deque[Future[U]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > _AHEAD * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _parts(positions: np.ndarray) -> Iterator[np.ndarray]:
    return (positions[start : start + MAX_BATCH] for start in range(0, len(positions), MAX_BATCH))


def _header(member: IO[bytes]) -> tuple[np.dtype, tuple[int, ...], bool]:
    """Return dtype and shape of the array that follows, and whether its rows lie one after the other."""
    version = npy.read_magic(member)
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, columns_first, dtype = read(member)
    return dtype, shape, not columns_first


def _rows(member: IO[bytes], positions: np.ndarray, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """Yield the images at ascending positions, in batches; the others are passed over up to the file's end."""
    size = int(np.prod(shape[1:]))
    waiting: list[np.ndarray] = []
    for start in range(0, shape[0], MAX_BATCH):
        count = min(MAX_BATCH, shape[0] - start)
        images = np.frombuffer(member.read(count * size), np.uint8).reshape(count, *shape[1:])
        first, end = np.searchsorted(positions, (start, start + count))
        waiting.append(images[positions[first:end] - start])
        if sum(map(len, waiting)) >= MAX_BATCH:
            joined = np.concatenate(waiting)
            yield joined[:MAX_BATCH]
            waiting = [joined[MAX_BATCH:]]
    if member.read(1):
        raise ValueError("more than its header says")
    if sum(map(len, waiting)):
        yield np.concatenate(waiting)


def _damaged(path: Path) -> FileError:
    return FileError(f"{path}: holds no images and labels, {_EXPECTED}; write it again")
