"""Live sources: the newest frame, and sources that stop and come back."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from deploy.edge_app.__main__ import main
from deploy.edge_app.frames import Frame, Video, Waiting
from deploy.edge_app.newest import Newest
from runtime.errors import EngineError, OptionError
from tests.live_pictures import LivePictures
from train.data.images import ImageData

cv2 = pytest.importorskip("cv2", reason="no OpenCV here: pip install 'clearpact[camera]'")
ROOT = Path(__file__).parents[1]


def large(digits: ImageData, count: int) -> list[np.ndarray]:
    return [np.kron(digits.test_images[n, 0].numpy(), np.ones((8, 8), np.uint8)) for n in range(count)]


@pytest.fixture
def pictures(digits: ImageData) -> list[np.ndarray]:
    return [np.dstack([image] * 3) for image in large(digits, 3)]


@pytest.fixture
def film(digits: ImageData, tmp_path: Path) -> Path:
    path = tmp_path / "film.mp4"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 12, (64, 64))
    for image in large(digits, 6):
        writer.write(np.dstack([image] * 3))
    writer.release()
    return path


def test_a_slow_reader_gets_the_newest_item_and_nothing_queues() -> None:
    taken_first, all_read = threading.Event(), threading.Event()

    def numbers() -> Iterator[int]:
        yield 0
        taken_first.wait(10)
        yield from range(1, 1000)
        all_read.set()

    newest = Newest(numbers(), threading.Event())
    items = iter(newest)
    assert next(items) == 0
    taken_first.set()
    assert all_read.wait(10)
    assert list(items) == [999]
    assert newest.dropped[int] == 998


def test_an_item_displaces_only_its_own_type_and_errors_come_after_what_was_read() -> None:
    def items() -> Iterator[int | str]:
        yield from (1, "lost", 2, "lost again")
        raise EngineError("gone")

    newest = Newest(items(), threading.Event())
    newest._thread.join(10)
    taken: list[int | str] = []
    with pytest.raises(EngineError, match=r"^gone$"):
        taken.extend(newest)  # which keeps the items before the error
    assert taken == [2, "lost again"]
    assert (newest.dropped[int], newest.dropped[str]) == (1, 1)


def test_closing_ends_the_generator_in_its_own_thread() -> None:
    stop, ended_in = threading.Event(), []

    def numbers() -> Iterator[int]:
        try:
            while not stop.is_set():
                yield 0
                stop.wait(0.01)
        finally:
            ended_in.append(threading.current_thread().name)

    newest = Newest(numbers(), stop)
    assert next(iter(newest)) == 0
    newest.close()
    assert ended_in == ["newest frame"]


def test_a_film_is_read_frame_by_frame_also_from_a_server(film: Path) -> None:
    address = film.as_uri()
    for source in (str(film), address):
        video = Video(source)
        assert (video.live, video.frames_per_s) == (False, 12)
        frames = list(video.frames(threading.Event()))
        assert [frame.name for frame in frames if isinstance(frame, Frame)] == [f"frame {n}" for n in range(6)]


def test_a_live_source_that_stops_and_comes_back_goes_on(pictures: list[np.ndarray]) -> None:
    first = LivePictures(pictures)
    video = Video(first.address)
    assert video.live
    seen: list[str] = []
    stop = threading.Event()
    server = first
    for item in video.frames(stop, retry_s=60):
        if isinstance(item, Waiting):
            seen.append("waiting")
            if seen.count("waiting") == 2:  # after an attempt that found nobody
                server = LivePictures(pictures, port=first.port)
            assert re.fullmatch(
                rf"{re.escape(first.address)}: ended after \d+ frames; trying again in [\d.]+ s", item.reason
            )
            continue
        seen.append(item.name)
        if len(seen) == 2:
            first.stop()
        if "waiting" in seen and seen[-1] != "waiting" and len(seen) > seen.index("waiting") + 4:
            stop.set()
    server.stop()
    names = [name for name in seen if name != "waiting"]
    assert names == [f"frame {n}" for n in range(len(names))]  # the numbers go on
    assert 2 <= seen.count("waiting") <= 4


def test_a_live_source_that_stays_away_is_an_error_after_the_time_that_was_given(
    digits_models: dict[str, Path], pictures: list[np.ndarray], capsys: pytest.CaptureFixture[str]
) -> None:
    server = LivePictures(pictures, length=10)
    began = time.monotonic()
    with pytest.raises(EngineError, match=rf"^{server.address}: ended after \d+ frames; check the network$"):
        main([str(digits_models["ort"]), "--video", server.address, "--retry", "1"])
    assert time.monotonic() - began > 1
    out, err = capsys.readouterr()
    assert re.fullmatch(r"\d+ frames, median [\d.]+ ms, first [\d.]+ ms, \d+ dropped", out.splitlines()[-1])
    notes = err.splitlines()
    pauses = [float(re.search(r"again in ([\d.]+) s$", note)[1]) for note in notes]  # type: ignore[index]
    assert pauses
    assert all(0 < pause_s <= 0.5 for pause_s in pauses)  # the last one ends with the time that was given


def test_a_source_that_gives_nothing_is_an_error_at_once(digits_models: dict[str, Path]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}/stream"
    with pytest.raises(EngineError, match=rf"^{address}: not found; check the address, or that it is a video$"):
        main([str(digits_models["ort"]), "--video", address])


def test_a_stream_that_says_nothing_ends_after_the_timeout(digits_models: dict[str, Path]) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/stream"
        began = time.monotonic()
        with pytest.raises(EngineError, match=f"^{address}: not found"):
            main([str(digits_models["ort"]), "--video", address, "--timeout", "1"])
        assert 0.9 < time.monotonic() - began < 8


def test_a_real_process_says_one_line_where_a_source_gives_nothing(digits_models: dict[str, Path]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "deploy.edge_app", str(digits_models["ort"]), "--video", "rtsp://127.0.0.1:1/none"],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: rtsp://127.0.0.1:1/none: not found; check the address, or that it is a video\n"


def test_a_process_that_is_told_to_end_while_its_source_is_gone_ends_at_once(
    digits_models: dict[str, Path], pictures: list[np.ndarray]
) -> None:
    server = LivePictures(pictures)
    app = subprocess.Popen(
        [sys.executable, "-m", "deploy.edge_app", str(digits_models["ort"]), "--video", server.address],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert app.stdout is not None
    assert app.stderr is not None
    assert app.stdout.readline().startswith("frame ")
    server.stop()
    assert app.stderr.readline().startswith(f"note: {server.address}: ended after ")
    began = time.monotonic()
    app.send_signal(signal.SIGTERM)
    out, err = app.communicate(timeout=30)
    assert app.returncode == 143
    assert time.monotonic() - began < 5
    assert " frames, median " in out.splitlines()[-1]
    assert all(line.startswith("note: ") for line in err.splitlines())


def test_an_opencv_that_does_not_fit_numpy_is_named(
    digits_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cv2.py").write_text('raise ImportError("numpy.core.multiarray failed to import")')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "cv2")
    with pytest.raises(
        OptionError, match=r"^--camera: OpenCV is installed and cannot be imported \(numpy\.core.*<2'$"
    ):
        main([str(digits_models["ort"]), "--camera", "0"])


def test_a_pipeline_needs_an_opencv_with_gstreamer(digits_models: dict[str, Path]) -> None:
    pipeline = "videotestsrc num-buffers=3 ! videoconvert ! appsink"
    if cv2.videoio_registry.hasBackend(cv2.CAP_GSTREAMER):
        assert main([str(digits_models["ort"]), "--video", pipeline, "--frames", "1"]) == 0
        return
    with pytest.raises(OptionError, match=r"^videotestsrc .*: a pipeline needs an OpenCV with GStreamer, which"):
        main([str(digits_models["ort"]), "--video", pipeline])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--retry", "-1"], "^--retry -1: expected a number of seconds from 0$"),
        (["--retry", "nan"], "^--retry nan: expected"),
        (["--timeout", "0"], "^--timeout 0: expected a number of seconds above 0$"),
        (["--report", "inf"], "^--report inf: expected a number of seconds above 0$"),
        (["--serve", "70000"], "^--serve 70000: expected a port, 1 to 65535, or 0 for a free one$"),
        (["--host", "0.0.0.0"], "^--host is for --serve PORT; add it$"),
        (["--explain"], "^--explain draws maps that nobody would see; add --show, --save FILE or --serve PORT$"),
        (["--explain-method", "gradient"], "^--explain draws maps"),
    ],
)
def test_wrong_options_are_refused_before_the_model_is_opened(arguments: list[str], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        main(["absent.onnx", "--camera", "0", *arguments])
