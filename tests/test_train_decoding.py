from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.image_folders import write_digits
from train.data.decoding import Decoder, decode, read_all

ROOT = Path(__file__).parents[1]


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    folder = write_digits(tmp_path / "digits", {"zero": 40, "one": 30})
    return [str(path) for path in sorted(folder.rglob("*.png"))]


def test_the_shorter_side_is_resized_and_the_longer_one_cropped(tmp_path: Path) -> None:
    # Three squares side by side: only the middle one is kept, whatever its size becomes.
    wide = np.zeros((40, 120, 3), np.uint8)
    wide[:, 40:80] = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    for name, pixels in (("wide", wide), ("high", wide.transpose(1, 0, 2))):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
        middle = pixels[:, 40:80] if name == "wide" else pixels[40:80]
        assert np.array_equal(decode(str(tmp_path / f"{name}.png"), (40, 40)), middle)
        smaller = Image.fromarray(np.ascontiguousarray(middle)).resize((16, 16), Image.Resampling.BILINEAR)
        assert np.array_equal(decode(str(tmp_path / f"{name}.png"), (16, 16)), np.asarray(smaller))
    assert decode(str(tmp_path / "wide.png"), (10, 30)).shape == (10, 30, 3)


def test_grey_images_become_rgb(paths: list[str]) -> None:
    pixels = decode(paths[0], (16, 16))
    assert (pixels.shape, pixels.dtype) == ((16, 16, 3), np.uint8)
    assert np.array_equal(pixels[..., 0], pixels[..., 2])


def test_worker_processes_give_the_same_pixels_in_the_same_order(paths: list[str]) -> None:
    Path(paths[5]).write_bytes(b"no image")
    Path(paths[68]).write_bytes(Path(paths[68]).read_bytes()[:60])
    alone, failures = read_all(paths, Decoder((12, 12), 0), "reading")
    assert set(failures) == {5, 68}
    assert (
        failures[5]
        == f"{paths[5]}: cannot be read as an image (not an image file); expected PNG, JPEG or the like"
    )
    assert not alone[5].any()
    assert alone[6].any()
    decoder = Decoder((12, 12), 2)
    shared, their_failures = read_all(paths, decoder, "reading")
    assert np.array_equal(shared, alone)
    assert their_failures == failures
    batches = [paths[:3], paths[10:20], paths[1:2], paths[30:37], paths[2:4]]
    parts = list(decoder.batches(iter(batches)))
    decoder.close()
    assert [len(pixels) for pixels, _ in parts] == [3, 10, 1, 7, 2]
    assert np.array_equal(parts[3][0], alone[30:37])


def test_workers_end_with_a_killed_process(paths: list[str]) -> None:
    code = f"""
import time
from train.data.decoding import Decoder
if __name__ == "__main__":
    decoder = Decoder((8, 8), 2)
    list(decoder.batches([{paths[:4]!r}]))
    print(*decoder._pool._processes, flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    workers = [int(pid) for pid in process.stdout.readline().split()]
    assert len(workers) == 2
    process.send_signal(signal.SIGKILL)
    process.communicate()
    deadline = time.monotonic() + 30
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, workers))


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
