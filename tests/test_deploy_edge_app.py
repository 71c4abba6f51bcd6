from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from deploy.edge_app import main
from runtime import Classifier
from runtime.errors import FileError, OptionError
from train.data import ImageData


@pytest.fixture
def frames(digits: ImageData, tmp_path: Path) -> Path:
    folder = tmp_path / "frames"
    folder.mkdir()
    for index in range(4):
        Image.fromarray(digits.test_images[index, 0].numpy()).save(folder / f"frame{index}.png")
    return folder


def test_a_real_process_prints_class_and_latency_of_every_frame(
    digits_models: dict[str, Path], digits: ImageData, frames: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "deploy.edge_app", str(digits_models["openvino"]), str(frames), "--threads", "1"],
        cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    *rows, last = done.stdout.splitlines()
    predictions = Classifier(digits_models["openvino"]).predict(list(digits.test_images[:4, 0].numpy()))
    for index, (row, prediction) in enumerate(zip(rows, predictions, strict=True)):
        found = re.fullmatch(r"(\S+) +(\S+) +([\d.]+%) +([\d.]+) ms", row)
        assert found
        assert found.groups()[:3] == (f"frame{index}.png", prediction.label, f"{prediction.probability:.1%}")
        assert float(found[4]) > 0
    assert re.fullmatch(r"4 frames, median [\d.]+ ms, first [\d.]+ ms", last)


def test_an_unreadable_frame_is_reported_and_passed_over(
    digits_models: dict[str, Path], frames: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (frames / "frame1.png").write_text("no pixels")
    main([str(digits_models["ort"]), str(frames)])
    captured = capsys.readouterr()
    assert [line.split()[0] for line in captured.out.splitlines()] == [
        "frame0.png",
        "frame2.png",
        "frame3.png",
        "3",
    ]
    assert captured.err.startswith(f"error: {frames}/frame1.png: cannot be read as an image (not an image file)")
    assert captured.err.count("\n") == 1


def test_frames_stops_after_so_many(
    digits_models: dict[str, Path], frames: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(digits_models["ort"]), str(frames), "--frames", "2"])
    assert capsys.readouterr().out.splitlines()[2].startswith("2 frames, median ")


@pytest.mark.parametrize("count", ["0", "-1"])
def test_less_than_one_frame_is_refused(digits_models: dict[str, Path], frames: Path, count: str) -> None:
    with pytest.raises(OptionError, match=f"^--frames {count}: expected a whole number from 1$"):
        main([str(digits_models["ort"]), str(frames), "--frames", count])


def test_a_folder_without_images_is_an_error(digits_models: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(FileError, match=f"^{tmp_path}: a folder without images, expected files such as"):
        main([str(digits_models["ort"]), str(tmp_path)])


@pytest.mark.parametrize("source", [[], ["frames", "--camera", "0"]], ids=["neither", "both"])
def test_exactly_one_source_is_expected(digits_models: dict[str, Path], source: list[str]) -> None:
    with pytest.raises(OptionError, match=r"^expected either a folder of images or --camera NUMBER; see --help$"):
        main([str(digits_models["ort"]), *source])


@pytest.mark.skipif(importlib.util.find_spec("cv2") is not None, reason="OpenCV is installed here")
def test_without_opencv_a_camera_is_one_line_that_names_the_extra(digits_models: dict[str, Path]) -> None:
    with pytest.raises(OptionError, match=r"^--camera needs OpenCV; pip install 'clearpact\[camera\]'$"):
        main([str(digits_models["ort"]), "--camera", "0"])


def test_a_missing_model_is_an_error(frames: Path) -> None:
    with pytest.raises(FileError, match=r"^absent.onnx: no such file; check the path$"):
        main(["absent.onnx", str(frames)])
