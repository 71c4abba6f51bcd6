from __future__ import annotations

import importlib.util
import itertools
import re
import subprocess
import sys
import threading
import types
from collections.abc import Callable, Generator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deploy.edge_app.__main__ import main
from deploy.edge_app.frames import Frame, Video
from deploy.edge_app.times import FrameTimes
from runtime import Classifier
from runtime.errors import EngineError, FileError, ImageError, OptionError
from train.data.images import ImageData


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


@pytest.mark.parametrize(
    "source",
    [[], ["frames", "--camera", "0"], ["--video", "a.mp4", "--camera", "0"]],
    ids=["none", "two", "others"],
)
def test_exactly_one_source_is_expected(digits_models: dict[str, Path], source: list[str]) -> None:
    with pytest.raises(OptionError, match=r"^expected either a folder of images, --camera NUMBER or --video"):
        main([str(digits_models["ort"]), *source])


@pytest.mark.skipif(importlib.util.find_spec("cv2") is not None, reason="OpenCV is installed here")
def test_without_opencv_a_camera_is_one_line_that_names_the_extra(digits_models: dict[str, Path]) -> None:
    with pytest.raises(OptionError, match=r"^--camera needs OpenCV; pip install 'clearpact\[camera\]'$"):
        main([str(digits_models["ort"]), "--camera", "0"])


def test_a_video_file_is_read_to_its_end(
    digits_models: dict[str, Path], digits: ImageData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cv2 = pytest.importorskip("cv2", reason="no OpenCV here: pip install 'clearpact[camera]'")
    film = tmp_path / "film.avi"
    writer = cv2.VideoWriter(str(film), cv2.VideoWriter_fourcc(*"MJPG"), 10, (64, 64))
    for index in range(5):
        image = np.kron(digits.test_images[index, 0].numpy(), np.ones((8, 8), np.uint8))
        writer.write(np.dstack([image] * 3))
    writer.release()
    assert main([str(digits_models["ort"]), "--video", str(film), "--engine", "ort", "--device", "cpu"]) == 0
    *rows, last = capsys.readouterr().out.splitlines()
    assert last.startswith("5 frames, median ")
    expected = Classifier(digits_models["ort"]).predict(list(digits.test_images[:5, 0].numpy()))
    same = [row.split()[2] == prediction.label for row, prediction in zip(rows, expected, strict=True)]
    assert sum(same) >= 4  # JPEG and resizing may cost one
    film.write_bytes(b"no video")
    with pytest.raises(EngineError, match=rf"^{film}: (not found|ended after 0 frames); "):
        main([str(digits_models["ort"]), "--video", str(film)])
    with pytest.raises(FileError, match=r"absent.mp4: no such file; check the path$"):
        main([str(digits_models["ort"]), "--video", str(tmp_path / "absent.mp4")])


def test_a_process_that_is_told_to_end_prints_its_times(digits_models: dict[str, Path], tmp_path: Path) -> None:
    frames = tmp_path / "frames"
    frames.mkdir()
    for index in range(3000):
        (frames / f"{index}.png").symlink_to(tmp_path / "frame.png")
    Image.fromarray(np.zeros((200, 200), np.uint8)).save(tmp_path / "frame.png")
    errors = tmp_path / "errors.txt"
    with errors.open("w") as file:  # a pipe that nobody reads would stop the app once it is full
        app = subprocess.Popen(
            [sys.executable, "-m", "deploy.edge_app", str(digits_models["ort"]), str(frames), "--threads", "1"],
            cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, stderr=file, text=True,
        )  # fmt: skip
        assert app.stdout is not None
        app.stdout.readline()
        app.terminate()
        out, _ = app.communicate(timeout=60)
    assert (app.returncode, errors.read_text()) == (143, "")
    assert re.match(r"\d+ frames, median ", out.splitlines()[-1])


class Camera:
    """What OpenCV's VideoCapture does for the numbers of the frames below; no test machine has a camera."""

    def __init__(self, frames: list[tuple[bool, object]], opens: bool = True) -> None:
        self.frames, self.opens, self.released = iter(frames), opens, False

    def isOpened(self) -> bool:  # noqa: N802
        return self.opens

    def read(self) -> tuple[bool, object]:
        there, frame = next(self.frames, (False, None))
        if isinstance(frame, Exception):
            raise frame
        return there, frame

    def release(self) -> None:
        self.released = True


@pytest.fixture
def plug_in(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Camera]:
    def plug_in(*frames: object, opens: bool = True) -> Camera:
        camera = Camera([frame if isinstance(frame, tuple) else (True, frame) for frame in frames], opens)
        cv2 = types.ModuleType("cv2")
        cv2.error, cv2.VideoCapture = OSError, lambda number: camera  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "cv2", cv2)
        return camera

    return plug_in


def read(source: int, count: int) -> list[Frame]:
    """Return the first frames of a camera, without the thread that would drop some."""
    frames = Video(source).frames(threading.Event())
    taken = [frame for frame in itertools.islice(frames, count) if isinstance(frame, Frame)]
    assert isinstance(frames, Generator)
    frames.close()
    return taken


def test_frames_of_every_form_are_rgb_or_grey(plug_in: Callable[..., Camera], digits: ImageData) -> None:
    bgr = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    grey = digits.test_images[1, 0].numpy()
    camera = plug_in(bgr, np.dstack([bgr, bgr[..., 0]]), grey, grey[..., None])
    taken = read(0, 4)
    assert [frame.name for frame in taken] == [f"frame {n}" for n in range(4)]
    for frame, expected in zip(taken, (bgr[..., ::-1], bgr[..., ::-1], grey, grey[..., None]), strict=True):
        assert isinstance(frame.pixels, np.ndarray)
        assert frame.pixels.flags.c_contiguous
        np.testing.assert_array_equal(frame.pixels, expected)
    assert camera.released


def test_a_lost_frame_is_an_error_in_its_place(plug_in: Callable[..., Camera]) -> None:
    grey = np.zeros((8, 8), np.uint8)
    plug_in(grey, None, grey)
    lost = [isinstance(frame.pixels, ImageError) for frame in read(0, 3)]
    assert lost == [False, True, False]


@pytest.mark.parametrize("frame", [np.zeros((8, 8)), np.zeros((0, 8), np.uint8), np.zeros((8, 8, 2), np.uint8)])
def test_a_camera_of_frames_that_no_model_takes_ends_with_status_2(
    digits_models: dict[str, Path], plug_in: Callable[..., Camera], frame: np.ndarray,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    plug_in(frame)
    assert main([str(digits_models["ort"]), "--camera", "0", "--frames", "1"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"error: frame 0: .*(image of|shape) .*, expected .*\n", err)


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        ([], "^camera 3: ended after 0 frames; check its cable$"),
        ([(False, None)], "^camera 3: ended after 0 frames"),
        ([np.zeros((8, 8), np.uint8), (False, None)], "^camera 3: ended after 1 frames"),
        ([None] * 200, "^camera 3: ended after 100 frames"),
        ([OSError("no\nsignal")], "^camera 3: no signal; check its driver$"),
    ],
)
def test_a_camera_that_ends_is_an_error_after_the_times(
    digits_models: dict[str, Path], plug_in: Callable[..., Camera], frames: list[object], message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    camera = plug_in(*frames)
    with pytest.raises(EngineError, match=message):
        main([str(digits_models["ort"]), "--camera", "3", "--retry", "0"])
    assert camera.released
    assert ("1 frames, median" in capsys.readouterr().out) == ("after 1 frames" in message)


def test_a_camera_that_does_not_open_is_an_error(
    digits_models: dict[str, Path], plug_in: Callable[..., Camera]
) -> None:
    plug_in(opens=False)
    with pytest.raises(EngineError, match=r"^camera 0: not found"):
        main([str(digits_models["ort"]), "--camera", "0"])


def test_a_folder_with_nothing_readable_ends_with_status_2(
    digits_models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "b.jpg").symlink_to(tmp_path / "gone")
    (tmp_path / "more").mkdir()
    assert main([str(digits_models["ort"]), str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.split(":")[0] for line in err.splitlines()] == ["note", "error", "error"]


def test_the_times_of_years_need_no_more_memory_than_those_of_a_minute() -> None:
    times = FrameTimes()
    times.add(5.0)
    for n in range(5000):
        times.add(float(n))
    assert len(times.latest_ms) == 1000
    assert str(times) == "5001 frames, median of the last 1000 4499.50 ms, first 5.00 ms"


def test_a_missing_model_is_an_error(frames: Path) -> None:
    with pytest.raises(FileError, match=r"^absent.onnx: no such file; check the path$"):
        main(["absent.onnx", str(frames)])
