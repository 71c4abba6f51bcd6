"""What a viewer of the app sees: pictures, video files, windows and the page."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deploy.edge_app.__main__ import main
from deploy.edge_app.answers import Answerer
from deploy.edge_app.outputs import VideoFile, Window
from deploy.edge_app.page import _MOST_VIEWERS, Page
from deploy.edge_app.picture import Picture
from runtime import Classifier
from runtime.errors import FileError, ModelError, OptionError
from tests.live_pictures import LivePictures
from train.data.images import ImageData

cv2 = pytest.importorskip("cv2", reason="no OpenCV here: pip install 'clearpact[camera]'")
ROOT = Path(__file__).parents[1]


@pytest.fixture
def frame() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (120, 160, 3), dtype=np.uint8)


def picture(level: int, size: tuple[int, int] = (240, 320)) -> Picture:
    return Picture(np.full(size, level, np.uint8), f"level {level}")


def test_an_answer_with_its_map_is_that_of_predict_and_explain(
    digits_models: dict[str, Path], digits: ImageData
) -> None:
    with Classifier(digits_models["ort"]) as classifier:
        image = np.kron(digits.test_images[0, 0].numpy(), np.ones((20, 20), np.uint8))
        prediction = classifier.predict(image)
        answer = Answerer(classifier, explain=True).answer(image)
        assert (answer.label, answer.method) == (prediction.label, "gradient")
        assert answer.probability == pytest.approx(prediction.probability, abs=1e-6)
        assert answer.map is not None
        assert answer.map.shape == classifier.manifest.input.size
        plain = Answerer(classifier, explain=False).answer(image)
        assert (plain.label, plain.probability, plain.map) == (prediction.label, prediction.probability, None)
        with pytest.raises(ModelError, match="layercam"):
            Answerer(classifier, explain=True, method="layercam").answer(image)


@pytest.mark.parametrize("channels", [(), (1,), (3,)], ids=["grey", "one channel", "RGB"])
def test_the_drawn_map_is_the_overlay_of_an_explanation(channels: tuple[int, ...]) -> None:
    from runtime.explanations.picture import blend

    rng = np.random.default_rng(1)
    frame = rng.integers(0, 256, (240, 320, *channels), dtype=np.uint8)
    map = rng.random((240, 320), np.float32) ** 4
    drawn = Picture(frame, "seven 98.0%", map).pixels
    assert drawn.shape == (240 + 28, 320, 3)
    expected = blend(frame, map)[..., ::-1]
    off = np.abs(drawn[:240].astype(int) - expected)
    assert off.max() <= 3  # a level of the frame and one of the map, of 256 each
    assert off.mean() < 0.5
    assert drawn[240:].min() < 100  # the caption


def test_a_map_of_the_middle_leaves_the_sides_dark(frame: np.ndarray) -> None:
    drawn = Picture(frame, "", np.ones((8, 8), np.float32), (0, 20, 120, 120)).pixels
    assert drawn.shape == (240 + 28, 320, 3)
    salient = drawn[:240].max(axis=(0, 2)) > 150
    assert salient.tolist() == [40 <= column < 280 for column in range(320)]


@pytest.mark.parametrize(
    ("size", "expected"),
    [((1080, 1920), (360, 640)), ((8, 8), (240, 240)), ((101, 333), (194, 640)), ((2000, 10), (640, 4))],
)
def test_pictures_have_even_sides_that_fit_a_page(size: tuple[int, int], expected: tuple[int, int]) -> None:
    for map in (None, np.ones((4, 4), np.float32)):
        drawn = Picture(np.zeros(size, np.uint8), "black", map).pixels
        assert drawn.shape == (expected[0] + 28, expected[1], 3)


def test_colours_are_not_swapped() -> None:
    red = Picture(np.full((240, 240, 3), (250, 0, 0), np.uint8), "red")
    assert red.pixels[0, 0].tolist() == [0, 0, 250]
    decoded = cv2.imdecode(np.frombuffer(red.jpeg, np.uint8), cv2.IMREAD_COLOR)
    assert np.abs(decoded[100, 100].astype(int) - [0, 0, 250]).max() < 8


@pytest.mark.parametrize("suffix", [".mp4", ".avi"])
def test_a_film_is_saved_frame_by_frame_with_its_rate(
    digits_models: dict[str, Path], frame: np.ndarray, tmp_path: Path, suffix: str
) -> None:
    film = tmp_path / "film.avi"
    writer = cv2.VideoWriter(str(film), cv2.VideoWriter_fourcc(*"MJPG"), 12, (160, 120))
    for _ in range(7):
        writer.write(frame)
    writer.release()
    saved = tmp_path / "out" / f"explained{suffix}"
    arguments = [str(digits_models["ort"]), "--video", str(film), "--explain", "--save", str(saved)]
    assert main(arguments) == 0
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]
    video = cv2.VideoCapture(str(saved))
    assert video.get(cv2.CAP_PROP_FPS) == pytest.approx(12)
    frames = []
    while (read := video.read())[0]:
        frames.append(read[1])
    assert len(frames) == 7
    with Classifier(digits_models["ort"]) as classifier:
        expected = Answerer(classifier, explain=True).answer(frame[..., ::-1]).picture(frame[..., ::-1]).pixels
    assert frames[0].shape == expected.shape
    assert np.abs(frames[0].astype(int) - expected).mean() < 20  # of a lossy film


def test_a_live_video_keeps_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("deploy.edge_app.outputs.time.monotonic", lambda: now)
    film = VideoFile(tmp_path / "live.avi", frames_per_s=20, live=True)
    film.show(picture(0))
    now += 0.5
    film.show(picture(100, (200, 300)))  # of another size
    now += 1.6
    film.show(picture(200))
    film.close()
    video = cv2.VideoCapture(str(tmp_path / "live.avi"))
    levels = []
    while (read := video.read())[0]:
        levels.append(round(float(read[1][:200].mean()), -2))
    assert levels == sorted(levels)
    # A pause of more than a second is cut.
    assert [levels.count(level) for level in (0.0, 100.0, 200.0)] == [5, 11, 1]


def test_a_live_video_of_a_fast_source_keeps_the_time_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("deploy.edge_app.outputs.time.monotonic", lambda: now)
    film = VideoFile(tmp_path / "live.avi", frames_per_s=60, live=True)
    for _ in range(120):
        film.show(picture(0))
        now += 1 / 60
    film.close()
    video = cv2.VideoCapture(str(tmp_path / "live.avi"))
    assert video.get(cv2.CAP_PROP_FPS) == pytest.approx(10)
    assert abs(video.get(cv2.CAP_PROP_FRAME_COUNT) - 20) <= 1  # two seconds


def test_a_video_without_pictures_leaves_nothing(tmp_path: Path) -> None:
    VideoFile(tmp_path / "none.mp4", frames_per_s=None, live=False).close()
    assert list(tmp_path.iterdir()) == []


def test_a_saved_video_replaces_the_old_one_only_at_its_end(tmp_path: Path) -> None:
    path = tmp_path / "a.avi"
    path.write_bytes(b"old")
    film = VideoFile(path, frames_per_s=10, live=False)
    film.show(picture(0))
    assert path.read_bytes() == b"old"
    film.close()
    assert path.read_bytes()[:4] == b"RIFF"
    assert [p.name for p in tmp_path.iterdir()] == ["a.avi"]


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 2**20})
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage)
    film = VideoFile(tmp_path / "a.avi", frames_per_s=10, live=False)
    with pytest.raises(FileError, match=r"a.avi: its disk is full; free space, or choose another folder$"):
        film.show(picture(0))


def test_an_unknown_kind_of_video_is_refused(digits_models: dict[str, Path], tmp_path: Path) -> None:
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(OptionError, match=r"^--save out.gif: expected a name that ends with .mp4, .mkv, .avi$"):
        main([str(digits_models["ort"]), str(tmp_path), "--save", "out.gif"])


@pytest.mark.skipif("DISPLAY" in os.environ, reason="there is a desktop here")
def test_without_a_desktop_a_window_is_an_error_and_the_process_lives() -> None:
    with pytest.raises(OptionError, match=r"^--show: no window opens here; use --serve 8080, or a desktop and"):
        Window()


def get(port: int, path: str, **headers: str) -> tuple[int, str | None, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.getheader("Content-Type"), answer.read()
    finally:
        connection.close()


@pytest.fixture
def page() -> Page:
    return Page("127.0.0.1", 0, lambda: {"state": "running"})


def test_the_page_answers_what_a_browser_asks(page: Page) -> None:
    page.show(picture(50))
    status, kind, html = get(page.port, "/")
    assert (status, kind) == (200, "text/html; charset=utf-8")
    assert b'src="/stream.mjpg"' in html
    assert get(page.port, "/frame.jpg") == (200, "image/jpeg", picture(50).jpeg)
    assert get(page.port, "/health") == (200, "application/json", b'{"state": "running"}')
    assert get(page.port, "/../etc/passwd")[0] == 404
    page.close()


def test_another_sites_name_for_this_machine_is_refused(page: Page) -> None:
    page.show(picture(0))
    for host in (f"localhost:{page.port}", f"127.0.0.1:{page.port}", "127.0.0.1", "[::1]:80", "[::1]"):
        assert get(page.port, "/frame.jpg", Host=host)[0] == 200, host
    for host in ("evil.example", f"evil.example:{page.port}", "127.0.0.1.evil.example", "", "[", "10.0.0.7"):
        assert get(page.port, "/frame.jpg", Host=host)[0] == 403, host
    page.close()


def test_a_page_without_a_frame_says_so(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy.edge_app.page._SLOWEST_S", 0.1)
    assert get(page.port, "/frame.jpg")[0] == 503
    page.close()


def test_a_slow_viewer_misses_pictures_and_holds_nobody_up(page: Page) -> None:
    """Noise makes large pictures, so that what the sockets keep is a few of them."""
    connection = http.client.HTTPConnection("127.0.0.1", page.port, timeout=20)
    connection.connect()
    connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 1024)
    noise = np.random.default_rng(0)
    pictures = [
        Picture(noise.integers(0, 256, (480, 640, 3), dtype=np.uint8), str(number)) for number in range(40)
    ]
    expected = [len(one.jpeg) for one in pictures]
    page.show(pictures[0])
    connection.request("GET", "/stream.mjpg")
    stream = connection.getresponse()
    began = time.monotonic()
    for one in pictures[1:]:
        page.show(one)
        time.sleep(0.002)
    assert time.monotonic() - began < 5  # the app does not wait for the viewer
    seen = []
    while not seen or seen[-1] != expected[-1]:
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += stream.read(1)
        size = int(re.search(rb"Content-Length: (\d+)", head)[1])  # type: ignore[index]
        stream.read(size)
        seen.append(size)
    numbers = [expected.index(size) for size in seen]
    assert numbers == sorted(numbers)
    assert len(numbers) < 20
    page.close()
    connection.close()


def test_viewers_that_leave_make_room_for_others(page: Page) -> None:
    page.show(picture(0))
    viewers = []
    for _ in range(_MOST_VIEWERS):
        viewer = http.client.HTTPConnection("127.0.0.1", page.port, timeout=20)
        viewer.request("GET", "/stream.mjpg")
        assert viewer.getresponse().status == 200
        viewers.append(viewer)
    assert get(page.port, "/stream.mjpg")[0] == 503
    for viewer in viewers:
        viewer.close()
    until = time.monotonic() + 20
    free = 0
    while free < _MOST_VIEWERS and time.monotonic() < until:
        page.show(picture(1))  # whoever has gone is noticed at the next pictures
        time.sleep(0.05)
        free = page.viewers._value
    assert free == _MOST_VIEWERS
    page.close()


def test_a_port_that_is_taken_is_one_line(page: Page) -> None:
    with pytest.raises(
        OptionError, match=rf"^--serve {page.port}: cannot listen on 127.0.0.1 \(Address already in use\); choose"
    ):
        Page("127.0.0.1", page.port, dict)
    page.close()


def test_an_app_watches_what_another_one_serves(
    digits_models: dict[str, Path], digits: ImageData, tmp_path: Path
) -> None:
    """The whole chain: a live source, an app that serves its pictures, and a second one that reads them."""
    large = [np.dstack([np.kron(digits.test_images[n, 0].numpy(), np.ones((8, 8), np.uint8))] * 3) for n in (0, 1)]
    health = tmp_path / "health.json"
    with LivePictures(large) as source:
        app = subprocess.Popen(
            [sys.executable, "-m", "deploy.edge_app", str(digits_models["ort"]), "--video", source.address,
             "--explain", "--serve", "0", "--report", "0.2", "--json", "--health", str(health)],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert app.stdout is not None
        assert app.stderr is not None
        said = app.stderr.readline()
        found = re.fullmatch(r"watch at (http://127\.0\.0\.1:(\d+)/)\n", said)
        assert found, said
        try:
            frames: list[str] = []
            watcher = threading.Thread(
                target=lambda: frames.append(
                    subprocess.run(
                        [sys.executable, "-m", "deploy.edge_app", str(digits_models["ort"]),
                         "--video", f"{found[1]}stream.mjpg", "--frames", "3", "--json"],
                        cwd=ROOT, capture_output=True, text=True, check=True, timeout=60,
                    ).stdout
                )
            )  # fmt: skip
            watcher.start()
            watcher.join(60)
            rows = [json.loads(line) for line in frames[0].splitlines()]
            assert [sorted(row) for row in rows[:3]] == [["frame", "label", "ms", "probability"]] * 3
            assert rows[3]["frames"] == 3
            status, _, told = get(int(found[2]), "/health")
            report = json.loads(told)
            assert (status, report["state"], report["source"]) == (200, "running", source.address)
            assert json.loads(health.read_text()).keys() == report.keys()
        finally:
            app.send_signal(signal.SIGTERM)
            out, err = app.communicate(timeout=30)
    assert (app.returncode, err) == (143, "")
    *reports, last = [json.loads(line) for line in out.splitlines()]
    assert len(reports) >= 2
    assert reports[-1]["frames"] > reports[0]["frames"]
    assert last["frames"] >= reports[-1]["frames"]
    assert json.loads(health.read_text())["state"] == "ended"
