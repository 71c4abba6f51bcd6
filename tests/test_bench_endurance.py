from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bench.measure.data import LabelledImages
from bench.measure.streams import in_memory, in_npz, watched
from bench.processes.endurance import main, write_repeated
from runtime.errors import OptionError


def test_repeated_images_are_the_given_ones_but_for_noise(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (7, 4, 4, 3), np.uint8)
    write_repeated(tmp_path / "r.npz", LabelledImages("seven", images, np.arange(7)), 150)
    found = list(in_npz(tmp_path / "r.npz").batches())
    pixels, labels = (np.concatenate(parts) for parts in zip(*found, strict=True))
    assert pixels.shape == (150, 4, 4, 3)
    assert labels.tolist() == [n % 7 for n in range(150)]
    difference = np.abs(pixels.astype(int) - images[labels])
    assert difference.max() <= 7
    assert difference.mean() == pytest.approx(63 / 24, abs=0.1)  # of two numbers below 8
    assert not np.array_equal(pixels[:7], pixels[7:14])


def test_peaks_are_noted_at_round_numbers_and_at_the_end() -> None:
    images, peaks = np.zeros((2345, 1, 1, 1), np.uint8), dict[int, int]()
    test = watched(in_memory("zeros", images, np.zeros(2345, np.int64)), peaks)
    assert sum(len(labels) for _, labels in test.batches()) == 2345
    assert list(peaks) == [1000, 2000, 2345]
    assert 1 << 20 < peaks[1000] <= peaks[2000] <= peaks[2345]


def test_command_prints_and_records(
    digits_models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "r.jsonl"
    main(
        [str(digits_models["ort"]), "--data", "digits", "--images", "1500", "--record", str(path), "--allow-dirty"]
    )
    (row,) = [json.loads(line) for line in path.read_text().splitlines()]
    assert row["n"] == 1500
    assert list(row["peak_memory_bytes_after_images"]) == ["1000", "1500"]
    assert row["network"]["accuracy"] > 85
    assert f"grown since 150 images: {row['grown_bytes'] / 2**20:.1f} MiB" in capsys.readouterr().out


@pytest.mark.parametrize("option", [["--images", "999"], ["--threads", "0"]])
def test_numbers_out_of_range_are_refused(option: list[str]) -> None:
    with pytest.raises(OptionError, match=f"{option[0]} {option[1]}: expected a whole number from"):
        main(["no.onnx", "--data", "digits", *option])
