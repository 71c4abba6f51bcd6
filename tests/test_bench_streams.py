from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.lib import format as npy

from bench.measure.streams import in_memory, in_npz, in_parallel
from runtime.errors import FileError, OptionError

ROOT = Path(__file__).parents[1]


def random_npz(path: Path, n: int, shape: tuple[int, int, int]) -> Path:
    """Write n images of random pixels, some thousands at a time."""
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(path, "w") as archive:
        with archive.open("labels.npy", "w") as member:
            npy.write_array(member, rng.integers(0, 10, n))
        with archive.open("images.npy", "w", force_zip64=True) as member:
            npy.write_array_header_1_0(member, {"descr": "|u1", "fortran_order": False, "shape": (n, *shape)})
            for start in range(0, n, 4096):
                member.write(rng.bytes(min(4096, n - start) * int(np.prod(shape))))
    return path


def run(module: str, *arguments: object) -> dict[str, float]:
    """Return the JSON of a real process."""
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments), "--json"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    found: dict[str, float] = json.loads(done.stdout)
    return found


@given(n=st.integers(1, 300), data=st.data())
def test_a_file_gives_the_images_that_memory_gives(
    tmp_path_factory: pytest.TempPathFactory, n: int, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("npz") / "some.npz"
    images = np.random.default_rng(n).integers(0, 256, (n, 2, 3, 1), dtype=np.uint8)
    labels = np.arange(n)
    (np.savez_compressed if n % 2 else np.savez)(path, images=images, labels=labels)
    count = data.draw(st.integers(1, n))
    from_file, from_memory = (
        list(stream.evenly_spaced(count).batches()) for stream in (in_npz(path), in_memory("m", images, labels))
    )
    assert [len(labels) for _, labels in from_file] == [64] * (count // 64) + [count % 64] * (count % 64 > 0)
    for (a, a_labels), (b, b_labels) in zip(from_file, from_memory, strict=True):
        assert np.array_equal(a, b)
        assert np.array_equal(a_labels, b_labels)
    assert np.array_equal(np.concatenate([labels for _, labels in from_file]), np.arange(count) * n // count)


def test_evenly_spaced_images_are_spread_over_the_split() -> None:
    test = in_memory("x", np.arange(10, dtype=np.uint8).reshape(10, 1, 1, 1), np.arange(10))
    assert [labels.tolist() for _, labels in test.evenly_spaced(4).batches()] == [[0, 2, 5, 7]]
    assert [images.ravel().tolist() for images, _ in test.evenly_spaced(10).batches()] == [list(range(10))]
    for count in (0, 11):
        with pytest.raises(OptionError, match=f"^--images {count}: expected a whole number from 1 to 10$"):
            test.evenly_spaced(count)


def test_damage_is_found_at_the_end_of_a_pass_over_any_of_the_images(tmp_path: Path) -> None:
    path = random_npz(tmp_path / "some.npz", 500, (4, 4, 1))
    stream = in_npz(path)
    data = bytearray(path.read_bytes())
    data[len(data) - 2000] ^= 1  # a pixel of an image near the end
    path.write_bytes(data)
    for some in (stream, stream.evenly_spaced(1)):
        with pytest.raises(FileError, match=f"^{path}: holds no images and labels, expected .*; write it again$"):
            list(some.batches())


def test_columns_before_rows_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "columns.npz"
    np.savez(path, images=np.asfortranarray(np.zeros((3, 4, 4, 1), np.uint8)), labels=np.zeros(3, int))
    with pytest.raises(FileError, match=f"^{path}: images in column-major order, expected an .npz file"):
        in_npz(path)


@pytest.mark.parametrize("workers", [1, 3])
def test_results_come_in_order_and_few_items_are_taken_ahead(workers: int) -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for n in range(40):
            taken.append(n)
            yield n

    def slow(n: int) -> int:
        time.sleep(0.002 * (n % 3))
        return n * n

    for n, found in enumerate(in_parallel(slow, items(), workers)):
        assert found == n * n
        assert len(taken) <= n + 2 + 2 * workers
    assert len(taken) == 40


def test_workers_run_at_the_same_time_and_their_errors_arrive() -> None:
    together = threading.Barrier(3, timeout=30)
    assert list(in_parallel(lambda n: together.wait() >= 0 and n, range(3), 3)) == [0, 1, 2]
    with pytest.raises(ZeroDivisionError):
        list(in_parallel(lambda n: 1 // (3 - n), range(100), 2))


def test_a_file_of_any_size_is_measured_in_the_same_memory(digits_models: dict[str, Path], tmp_path: Path) -> None:
    peaks = []
    for n in (500, 8000):
        path = random_npz(tmp_path / f"{n}.npz", n, (64, 64, 3))
        result = run("bench.accuracy", digits_models["ort"], "--data", path, "--threads", 2)
        assert result["n"] == n
        peaks.append(result["peak_memory_bytes"])
    assert path.stat().st_size > 98e6
    assert peaks[1] - peaks[0] < 20e6


@pytest.mark.slow
def test_a_million_images_are_measured_in_less_than_a_gigabyte(
    digits_models: dict[str, Path], tmp_path: Path
) -> None:
    large = random_npz(tmp_path / "large.npz", 1_000_000, (28, 28, 1))
    assert large.stat().st_size > 784e6
    result = run("bench.accuracy", digits_models["ort"], "--data", large)
    large.unlink()
    assert (result["n"], result["peak_memory_bytes"] < 1e9) == (1_000_000, True)
    small = random_npz(tmp_path / "small.npz", 1_000_000, (8, 8, 1))
    result = run("bench.saliency", digits_models["ort"], "--data", small)
    assert (result["n"], result["peak_memory_bytes"] < 1e9) == (1_000_000, True)
    peaks = result["peak_memory_bytes_after_images"]
    assert peaks["1000000"] - peaks["10000"] < 16e6
