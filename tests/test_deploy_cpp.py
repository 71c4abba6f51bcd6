"""The C++ programs beside `Classifier`: the same file gives the same class, probability, logits and map.

It needs the programs in build/cpp: `make test-cpp`.
"""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

from bench.measure.programs import start
from bench.processes.native_start import main as native_start
from export.pipeline import export
from runtime import Classifier
from runtime.images import load_image, to_batch
from runtime.manifest import METADATA_KEY, ImageInput, read_manifest
from train.checkpoint import Checkpoint
from train.data.images import ImageData

pytestmark = pytest.mark.cpp
PROGRAMS = Path(__file__).parents[1] / "build" / "cpp"
ENGINES = ("openvino", "ort")


def run(engine: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    program = PROGRAMS / f"classify-{engine}"
    assert program.exists(), f"{program}: not built; run make cpp"
    return subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, check=False)


def answers(engine: str, *arguments: object) -> list[dict[str, object]]:
    done = run(engine, *arguments, "--json")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return [json.loads(line) for line in done.stdout.splitlines()]


def float_map(path: Path) -> np.ndarray:
    """Return a portable float map as float32 [H, W]."""
    kind, size, scale, values = path.read_bytes().split(b"\n", 3)
    assert (kind, scale) == (b"Pf", b"-1.0")
    width, height = map(int, size.split())
    return np.frombuffer(values, "<f4").reshape(height, width)[::-1]


@pytest.fixture(scope="module")
def photos(digits: ImageData, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("photos")
    paths = [folder / f"{index}.png" for index in range(100)]
    for path, image in zip(paths, digits.test_images, strict=False):
        Image.fromarray(image[0].numpy()).save(path)
    return paths


@pytest.mark.parametrize("engine", ENGINES)
def test_class_probability_logits_and_map_are_those_of_classifier(
    engine: str, digits_models: dict[str, Path], photos: list[Path], tmp_path: Path
) -> None:
    model = digits_models[engine]
    found = answers(engine, model, *photos, "--maps", tmp_path)
    images = np.stack([load_image(path) for path in photos])
    with Classifier(model, engine=engine, threads=1) as classifier:
        expected = [classifier.predict(image) for image in images]
        maps = np.stack([np.abs(classifier.explain(image).attribution).max(0) for image in images])
    assert [row["path"] for row in found] == list(map(str, photos))
    assert [row["class"] for row in found] == [each.label for each in expected]
    assert len({row["class"] for row in found}) == 10
    logits = np.array([row["logits"] for row in found], np.float32)
    assert np.array_equal(logits, np.stack([each.logits for each in expected]))
    probabilities = [row["probability"] for row in found]
    assert probabilities == pytest.approx([each.probability for each in expected], rel=1e-12)
    theirs = np.stack([float_map(Path(str(row["map"]))) for row in found])
    assert np.abs(theirs - maps).max() <= 1e-6 * maps.max()
    assert np.ptp(maps[0]) > 0


@pytest.mark.parametrize("engine", ENGINES)
def test_a_target_is_explained(
    engine: str, digits_models: dict[str, Path], photos: list[Path], tmp_path: Path
) -> None:
    model = digits_models[engine]
    answers(engine, model, photos[0], "--maps", tmp_path, "--target", 3, "--threads", 2)
    with Classifier(model, engine=engine, threads=1) as classifier:
        expected, other = (
            np.abs(classifier.explain(load_image(photos[0]), target=t).attribution).max(0) for t in (3, None)
        )
    found = float_map(tmp_path / "0.png.pfm")
    assert np.abs(found - expected).max() <= 1e-6 * expected.max()
    assert np.abs(found - other).max() > 1e-3 * expected.max()


@pytest.mark.parametrize("engine", ENGINES)
def test_probabilities_are_of_logits_by_the_temperature(
    engine: str, digits_models: dict[str, Path], photos: list[Path], tmp_path: Path
) -> None:
    model = onnx.load(digits_models[engine])
    (entry,) = (entry for entry in model.metadata_props if entry.key == METADATA_KEY)
    manifest = replace(read_manifest(digits_models[engine].read_bytes(), "digits"), temperature=4.0)
    entry.value = manifest.to_json()
    warm = tmp_path / "warm.onnx"
    onnx.save(model, warm)
    (found,) = answers(engine, warm, photos[0])
    (plain,) = answers(engine, digits_models[engine], photos[0])
    with Classifier(warm, engine=engine, threads=1) as classifier:
        assert found["probability"] == pytest.approx(classifier.predict(photos[0]).probability, rel=1e-12)
    assert found["probability"] < plain["probability"] - 0.01


@pytest.mark.parametrize("engine", ENGINES)
def test_a_file_with_a_map_of_a_layer_alone(
    engine: str, digits_checkpoint: Checkpoint, photos: list[Path], tmp_path: Path
) -> None:
    exported = export(digits_checkpoint, target=engine, saliency=False, cams=[("layercam", "")])
    model = tmp_path / "cam.onnx"
    model.write_bytes(exported.data)
    answers(engine, model, photos[0], "--maps", tmp_path)
    with Classifier(model, engine=engine, threads=1) as classifier:
        expected = classifier.explain(load_image(photos[0])).attribution[0]
    found = float_map(tmp_path / "0.png.pfm")
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1e-6 * expected.max()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("size", "resize"), [((28, 28), "bilinear"), ((40, 24), "crop"), ((64, 96), "bilinear")])
def test_odd_pictures_are_prepared_as_here_within_one_level(
    size: tuple[int, int], resize: str, channels: int, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (9, 8, 3), dtype=np.uint8)).resize((61, 47), 3)
    clear = smooth.convert("RGBA")
    clear.putalpha(Image.fromarray(rng.integers(0, 256, (47, 61), dtype=np.uint8)))
    pictures = {
        "rgb.png": smooth, "grey.png": smooth.convert("L"), "palette.png": smooth.convert("P"), "clear.png": clear,
        "grey-clear.png": clear.convert("LA"), "rgb.ppm": smooth, "grey.pgm": smooth.convert("L"),
        "rgb.bmp": smooth, "pixel.png": smooth.crop((5, 5, 6, 6)), "row.png": smooth.crop((0, 5, 61, 6)),
        "wide.png": smooth.resize((2500, 3)), "exact.png": smooth.resize(size[::-1]),
    }  # fmt: skip
    wanted = ImageInput(size, channels, (0.5,) * channels, (0.5,) * channels, resize)
    for name, picture in pictures.items():
        path = tmp_path / name
        picture.save(path)
        given = [PROGRAMS / "show-pixels", *map(str, (*size, channels, resize, path))]
        done = subprocess.run(given, capture_output=True, check=True)
        expected = to_batch(load_image(path), wanted)[0].astype(int)
        found = np.frombuffer(done.stdout, np.uint8).reshape(expected.shape)
        assert np.abs(found - expected).max() <= 1, name


@pytest.mark.parametrize("engine", ENGINES)
def test_mistakes_are_one_line_with_status_2(
    engine: str, digits_models: dict[str, Path], photos: list[Path], tmp_path: Path
) -> None:
    model, photo = digits_models[engine], photos[0]
    (tmp_path / "half.png").write_bytes(photo.read_bytes()[:60])
    (tmp_path / "notes.png").write_text("no picture")
    (tmp_path / "notes.onnx").write_text("no model")
    classes_only = tmp_path / "classes.onnx"
    classes_only.write_bytes(without_manifest(model.read_bytes()))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / photo.name).write_bytes(photo.read_bytes())
    for arguments, said in (
        ((model,), "expected a model and a picture at least"),
        ((model, tmp_path / "none.png"), "none.png: cannot be read as a picture (Unable to open file)"),
        ((model, tmp_path / "notes.png"), "notes.png: cannot be read as a picture"),
        ((model, tmp_path / "half.png"), "half.png: is damaged"),
        ((tmp_path / "none.onnx", photo), "none.onnx: no such file; check the path"),
        ((tmp_path / "notes.onnx", photo), "notes.onnx: "),
        ((classes_only, photo), "a file without a clearpact manifest; export it"),
        ((model, photo, "--target", 10), "has 10 classes, --target is 10"),
        ((model, photo, "--target", "cat"), "--target cat: expected a whole number from 0"),
        ((model, photo, "--threads"), "--threads : expected a whole number from 1"),
        ((model, photo, "--map", "x"), "--map: no such option"),
        ((model, photo, tmp_path / "other" / photo.name, "--maps", tmp_path), "rename it"),
    ):
        done = run(engine, *arguments)
        assert (done.returncode, done.stdout) == (2, ""), arguments
        assert done.stderr.splitlines()[-1].startswith("classify: ")
        assert said in done.stderr, done.stderr
    assert "usage: " in run(engine, "--help").stdout


def test_start_measures_one_process_to_its_end(digits_models: dict[str, Path], photos: list[Path]) -> None:
    program = PROGRAMS / "classify-openvino"
    found = start([program, digits_models["openvino"], photos[0]])
    assert found.wall_ms > 1
    assert 10e6 < found.peak_memory_bytes < 1e9


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("explain", [(), ("--explain",)])
def test_the_benchmark_starts_both_programs(
    explain: tuple[str, ...], engine: str, digits_models: dict[str, Path], photos: list[Path],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    native_start([str(digits_models[engine]), str(photos[0]), *explain, "--starts", "2", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (found["engine"], found["explain"]) == (engine, bool(explain))
    # Python imports numpy first; a C++ program that did nothing would not hold an engine's library.
    assert found["wall"]["Python"]["p50_ms"] > found["wall"]["C++"]["p50_ms"] > 1
    assert found["peak_memory_bytes"]["Python"] > found["peak_memory_bytes"]["C++"] > 10e6


def without_manifest(model: bytes) -> bytes:
    assert b"clearpact" in model
    return model.replace(b"clearpact", b"clearbact")
