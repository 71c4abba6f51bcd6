from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from deploy.batch.__main__ import main
from deploy.batch.arrow import image_rows
from deploy.batch.parts import Part, Settings, plan
from deploy.batch.reading import images_of
from deploy.batch.work import Job, Worker, answers, levels
from runtime import Classifier
from runtime.errors import ClearpactError, FileError, ModelError, OptionError
from runtime.images.resizing import resize_maps
from train.data.images import ImageData

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def pictures(digits: ImageData) -> np.ndarray:
    return digits.test_images[:60, 0].numpy()


def encoded(picture: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def sources(pictures: np.ndarray, tmp_path: Path) -> list[str]:
    """Sixty images in folders, in a tar, a compressed tar and a Parquet file; four cannot be read."""
    coded = [encoded(picture) for picture in pictures]
    photos = tmp_path / "photos"
    for index in range(20):
        path = photos / ("even" if index % 2 == 0 else "odd") / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(coded[index] if index != 7 else b"no picture")
    (photos / "notes.txt").write_text("no image is meant")
    for suffix, mode, start in ((".tar", "w", 20), (".tar.gz", "w:gz", 30)):
        with tarfile.open(tmp_path / f"shard{suffix}", mode) as tar:  # type: ignore[call-overload]
            for index in range(start, start + 10):
                content = coded[index] if index not in (25, 35) else coded[index][:40]
                for name, data in ((f"{index}.png", content), (f"{index}.json", b"{}")):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    values = [{"bytes": None if index == 45 else coded[index], "path": f"{index}.png"} for index in range(40, 60)]
    table = pa.table({"label": list(range(20)), "image": values})
    pq.write_table(table, tmp_path / "more.parquet", row_group_size=7)
    return [str(tmp_path / name) for name in ("photos", "shard.tar", "shard.tar.gz", "more.parquet")]


ORDER = [*range(0, 20, 2), *range(1, 20, 2), *range(20, 60)]  # even before odd
UNREADABLE = {7, 25, 35, 45}


def rows(folder: Path) -> list[dict]:
    return [row for path in sorted(folder.glob("part-*.parquet")) for row in pq.read_table(path).to_pylist()]


@pytest.mark.parametrize("part", [9, 40])  # of 40 images, the last 8 run together with repeated ones
def test_every_image_of_every_source_is_a_row_with_what_the_classifier_says(
    part: int, digits_models: dict[str, Path], sources: list[str], pictures: np.ndarray, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    results = tmp_path / "results"
    arguments = [str(digits_models["openvino"]), *sources, "-o", str(results), "--processes", "1"]
    main([*arguments, "--part", str(part), "--explain", "--map-size", "4"])
    said = capsys.readouterr().out
    assert ": 60 images, 60 now in " in said
    assert said.endswith(", 4 of them unreadable\n")
    main([*arguments, "--part", str(part), "--explain", "--map-size", "4"])
    assert capsys.readouterr().out == f"{results}: 60 images, 0 now, 60 were done before\n"
    found = rows(results)
    assert len(found) == 60
    assert len({row["path"] for row in found}) == 60
    with Classifier(digits_models["openvino"], threads=1) as classifier:
        maps = classifier.explain(pictures).map
        predictions = classifier.predict(pictures, top_k=2)
        reference = classifier.manifest.reference
        threshold = None if reference is None else reference.threshold
    for index, row in zip(ORDER, found, strict=True):
        if index in UNREADABLE:
            assert row["class"] is row["probability"] is row["map"] is None
            assert row["reason"].startswith(row["path"].split(" ")[0])
            continue
        prediction = predictions[index]
        assert row["reason"] is None
        assert (row["class"], row["index"]) == (prediction.label, prediction.index)
        assert row["probability"] == pytest.approx(prediction.probability, rel=1e-5)
        assert row["margin"] == pytest.approx(prediction.margin, rel=1e-5)
        score = np.log(np.exp(prediction.logits.astype(np.float64)).sum())
        assert row["score"] == pytest.approx(score, rel=1e-5)
        assert row["in_distribution"] == (None if threshold is None else score >= threshold)
        small = resize_maps(maps[index : index + 1], (4, 4))[0].ravel()
        assert row["map_max"] == pytest.approx(small.max(), rel=1e-5)
        assert np.abs(np.array(row["map"]) / 255 * row["map_max"] - small).max() <= row["map_max"] / 500
    assert [row["path"] for row in found[-20:]][:2] == [f"{sources[3]}#0 40.png", f"{sources[3]}#1 41.png"]


@pytest.mark.parametrize("kill_at", [0, 1, 4])
def test_an_interrupted_run_continues_and_loses_and_repeats_nothing(
    kill_at: int, digits_models: dict[str, Path], sources: list[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    results = tmp_path / "results"
    arguments = [str(digits_models["ort"]), *sources, "-o", str(results), "--processes", "1", "--part", "9"]
    do, calls = Worker.do, []

    def interrupted(self: Worker, part: object) -> object:
        if len(calls) == kill_at:
            raise KeyboardInterrupt
        calls.append(part)
        return do(self, part)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Worker, "do", interrupted)
        with pytest.raises(KeyboardInterrupt):
            main(arguments)
    assert len(list(results.glob("part-*.parquet"))) == kill_at
    # What came and went meanwhile changes nothing of what is left to do.
    (tmp_path / "photos" / "even" / "000.png").write_bytes(b"new")
    shutil.rmtree(tmp_path / "photos" / "odd")
    main(arguments)
    found = rows(results)
    assert len(found) == len({row["path"] for row in found}) == 60
    before = {path: path.stat().st_mtime_ns for path in results.iterdir()}
    main(arguments)
    assert {path: path.stat().st_mtime_ns for path in results.iterdir()} == before


def test_results_of_other_settings_are_not_continued(
    digits_models: dict[str, Path], sources: list[str], tmp_path: Path
) -> None:
    results = tmp_path / "results"
    common = ["-o", str(results), "--processes", "1"]
    main([str(digits_models["ort"]), sources[1], *common])
    for arguments, name in (
        ([str(digits_models["openvino"]), sources[1]], "model"),
        ([str(digits_models["ort"]), sources[0]], "inputs"),
        ([str(digits_models["ort"]), sources[1], "--explain"], "explain"),
        ([str(digits_models["ort"]), sources[1], "--part", "3"], "images_in_part"),
    ):
        with pytest.raises(FileError, match=f"^{results}: holds results with {name} "):
            main([*arguments, *common])


def shorter(text: bytes) -> bytes:
    return text[: len(text) // 2]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent", None, "absent: no such file; check the path$"),
        ("bad.tar", b"no tar", "bad.tar: cannot be read as a tar file "),
        ("bad.parquet", b"no Parquet", "bad.parquet: cannot be read as Parquet "),
        ("empty", "folder", "empty: no image in it; expected images, "),
    ],
)
def test_an_input_that_is_none_is_one_line(
    name: str, content: object, message: str, digits_models: dict[str, Path], tmp_path: Path
) -> None:
    if content == "folder":
        (tmp_path / name).mkdir()
    elif content is not None:
        (tmp_path / name).write_bytes(content)  # type: ignore[arg-type]
    with pytest.raises(FileError, match=message):
        main([str(digits_models["ort"]), str(tmp_path / name), "-o", str(tmp_path / "results")])
    assert not list((tmp_path / "results").glob("*.parquet"))


def test_a_source_that_vanishes_is_a_reason_in_every_row(
    digits_models: dict[str, Path], sources: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [str(digits_models["ort"]), *sources[1:], "-o", str(tmp_path / "results"), "--processes", "1"]
    with monkeypatch.context() as patch:
        patch.setattr("deploy.batch.processes.run", lambda *_: iter(()))
        main(arguments)
    for source in sources[1:]:
        Path(source).unlink()
    main(arguments)
    found = rows(tmp_path / "results")
    assert len(found) == len({row["path"] for row in found}) == 40
    assert all(row["reason"] for row in found)


@pytest.mark.parametrize("row_group", [7, 20, 100])
def test_rows_of_parquet_are_found_whatever_the_row_groups_are(
    row_group: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "more.parquet"
    pq.write_table(pa.table({"image": [b"%d" % row for row in range(60)]}), path, row_group_size=row_group)
    monkeypatch.setattr("deploy.batch.arrow._MOST_ROWS", 4)
    for first, count in ((0, 60), (0, 9), (7, 14), (13, 1), (40, 20), (59, 1)):
        found = list(image_rows(path, first, count, ""))
        assert found == [(f"{path}#{row}", b"%d" % row) for row in range(first, first + count)]
    os.utime(path, ns=(1, 1))  # as another file of this name would be
    monkeypatch.setattr("deploy.batch.arrow._BYTES_AT_ONCE", 1)
    assert [value for _, value in image_rows(path, 20, 3, "image")] == [b"20", b"21", b"22"]
    # A file that has lost rows since it was listed gives a reason for each of them.
    lost = list(images_of(Part(0, "parquet", str(path), 4, first=58), ""))
    assert [name for name, _ in lost] == [f"{path}#{row}" for row in range(58, 62)]
    assert "holds 60 rows, expected 62" in str(lost[2][1])


def test_mistakes_are_told_before_any_work(
    digits_models: dict[str, Path], sources: list[str], tmp_path: Path
) -> None:
    model, results = str(digits_models["ort"]), str(tmp_path / "results")
    for arguments, error, message in (
        ([sources[0], sources[0]], OptionError, "^an input is named twice"),
        ([sources[0], "--part", "0"], OptionError, "^--part 0: expected a whole number from 1"),
        ([sources[0], "--map-size", "0"], OptionError, "^--map-size 0: expected"),
    ):
        with pytest.raises(error, match=message):
            main([model, *arguments, "-o", results])
    with pytest.raises(FileError, match=r"lies in .*photos, whose files are read; name a file outside of it"):
        main([model, sources[0], "-o", f"{sources[0]}/results"])
    from runtime.onnx_bytes import without_gradient

    (tmp_path / "class.onnx").write_bytes(without_gradient(Path(model).read_bytes()))
    with pytest.raises(ModelError, match=r"gives classes only; leave --explain out"):
        main([str(tmp_path / "class.onnx"), sources[0], "-o", results, "--explain"])
    for column, message in (("label", "column 'label' holds no images"), ("picture", "no column picture")):
        with pytest.raises(FileError, match=f"{message}, expected bytes; such columns are: image$"):
            main([model, sources[3], "-o", results, "--column", column, "--processes", "1"])


def test_what_starts_a_worker_is_told_apart_from_its_work(
    digits_models: dict[str, Path], pictures: np.ndarray, tmp_path: Path
) -> None:
    photos, results = tmp_path / "photos", tmp_path / "results"
    photos.mkdir()
    for index in range(80):
        (photos / f"{index}.png").write_bytes(encoded(pictures[index % len(pictures)]))
    settings = Settings("0" * 64, (str(photos),), "gradient", 4, "", 40)
    worker = Worker(Job(str(digits_models["openvino"]), None, str(results), settings))
    first, second = (worker.do(part) for part in plan(settings, results))
    assert first.images == second.images == 40
    assert first.start_cpu_seconds > 0
    assert second.start_cpu_seconds == 0
    # Compiling takes longer than forty images of 8 x 8 pixels; it is no part of the work.
    assert 0 < first.cpu_seconds < first.start_cpu_seconds


def test_equal_logits_and_dark_maps_have_numbers_too(digits_models: dict[str, Path]) -> None:
    manifest = Classifier(digits_models["ort"]).manifest
    answer = answers(np.zeros((2, 10), np.float32), manifest)
    assert answer["probability"] == pytest.approx([0.1, 0.1])
    assert answer["margin"].tolist() == [0, 0]
    assert answer["score"] == pytest.approx([np.log(10)] * 2)
    maps = np.stack([np.zeros((4, 4)), np.eye(4)]).astype(np.float32)
    found = levels(maps)
    assert found["map_max"].tolist() == [0, 1]
    assert found["map"].tolist() == [[0] * 16, (np.eye(4) * 255).astype(int).ravel().tolist()]


def start(arguments: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "deploy.batch", *arguments],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def killed_half_way(arguments: list[str], results: Path, parts: int, is_worker: Callable) -> None:
    """Start the command, kill one worker when half of the parts are done, and wait for its end."""
    running = start(arguments)
    while len(list(results.glob("part-*.parquet"))) < parts // 2:
        assert running.poll() is None, running.communicate()
        time.sleep(0.05)
    worker = next(
        process for process in psutil.Process(running.pid).children(recursive=True) if is_worker(process)
    )
    worker.send_signal(signal.SIGKILL)
    out, err = running.communicate(timeout=300)
    assert running.returncode == 0, err
    assert json.loads(out.splitlines()[-1])["images"] == 100 * parts


@pytest.fixture(scope="module")
def many(digits: ImageData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20,000 image files."""
    folder = tmp_path_factory.mktemp("many")
    coded = [encoded(picture) for picture in digits.test_images[:, 0].numpy()]
    for index in range(20_000):
        (folder / f"{index:05d}.png").write_bytes(coded[index % len(coded)])
    return folder


def arguments_of(model: Path, folder: Path, results: Path) -> list[str]:
    options = ["--part", "100", "--processes", "2", "--json"]
    return [str(model), str(folder), "-o", str(results), *options]


def complete(results: Path, model: Path, folder: Path) -> None:
    found = rows(results)
    paths = sorted(str(path) for path in folder.iterdir())
    assert [row["path"] for row in found] == paths
    with Classifier(model, threads=1) as classifier:
        some = range(0, len(paths), 97)
        for index in some:
            with Image.open(paths[index]) as image:
                assert found[index]["index"] == classifier.predict([np.asarray(image)])[0].index


@pytest.mark.slow
def test_a_killed_process_loses_and_repeats_nothing_of_20000_images(
    digits_models: dict[str, Path], many: Path, tmp_path: Path
) -> None:
    results = tmp_path / "results"
    arguments = arguments_of(digits_models["ort"], many, results)
    killed_half_way(arguments, results, 200, lambda process: "spawn_main" in " ".join(process.cmdline()))
    complete(results, digits_models["ort"], many)


@pytest.mark.ray
def test_a_killed_worker_of_ray_loses_and_repeats_nothing_of_20000_images(
    digits_models: dict[str, Path], many: Path, tmp_path: Path
) -> None:
    results = tmp_path / "results"
    arguments = [*arguments_of(digits_models["ort"], many, results), "--ray", "local"]
    killed_half_way(
        arguments, results, 200, lambda process: "MapWorker" in process.name() + "".join(process.cmdline())
    )
    complete(results, digits_models["ort"], many)


@pytest.mark.ray
def test_a_cluster_that_is_not_there_is_one_line(
    digits_models: dict[str, Path], sources: list[str], tmp_path: Path
) -> None:
    with pytest.raises(ClearpactError, match=r"^--ray 127.0.0.1:1: no cluster there"):
        main([str(digits_models["ort"]), sources[1], "-o", str(tmp_path / "results"), "--ray", "127.0.0.1:1"])
