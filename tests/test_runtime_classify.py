from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

from runtime import Classifier
from runtime.classify import main
from runtime.command import USER_ERROR
from runtime.errors import ClearpactError, ModelError
from train.data.images import ImageData

ROOT = Path(__file__).parents[1]


@pytest.fixture
def photos(digits: ImageData, tmp_path: Path) -> Path:
    """Five test images as PNG files in a folder; the last one three times as large and in colour."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(5):
        image = Image.fromarray(digits.test_images[index, 0].numpy())
        (image.convert("RGB").resize((24, 24)) if index == 4 else image).save(folder / f"{index}.png")
    return folder


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "runtime.classify", *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_a_folder_gives_one_line_per_image_in_order(
    digits_models: dict[str, Path], digits: ImageData, photos: Path
) -> None:
    done = run(digits_models["openvino"], photos)
    assert (done.returncode, done.stderr) == (0, "")
    rows = [line.split() for line in done.stdout.splitlines()]
    assert [row[0] for row in rows] == [str(photos / f"{n}.png") for n in range(5)]
    predictions = Classifier(digits_models["openvino"]).predict(list(digits.test_images[:4, 0].numpy()))
    for row, prediction in zip(rows, predictions, strict=False):
        assert row[1:] == [part for label, p in prediction.top for part in (label, f"{p:.1%}")]


def test_json_lines_hold_what_the_classifier_says(
    digits_models: dict[str, Path], digits: ImageData, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = photos / "3.png"
    assert main([str(digits_models["ort"]), str(path), "--json", "--top", "2", "--engine", "openvino"]) == 0
    (prediction,) = Classifier(digits_models["ort"], engine="openvino").predict(
        digits.test_images[3:4, 0].numpy(), top_k=2
    )
    assert json.loads(capsys.readouterr().out) == {
        "image": str(path), "label": prediction.label, "index": prediction.index,
        "probability": prediction.probability, "top": [list(pair) for pair in prediction.top],
    }  # fmt: skip


def test_an_unreadable_image_among_good_ones_is_one_error_line_and_status_2(
    digits_models: dict[str, Path], photos: Path
) -> None:
    (photos / "2.png").write_bytes((photos / "2.png").read_bytes()[:60])
    (photos / "3.png").write_text("no pixels")
    done = run(digits_models["openvino"], photos, photos / "absent.png")
    assert done.returncode == USER_ERROR
    assert [line.split()[0] for line in done.stdout.splitlines()] == [str(photos / f"{n}.png") for n in (0, 1, 4)]
    errors = done.stderr.splitlines()
    assert len(errors) == 3
    assert errors[0].startswith(f"error: {photos}/2.png: cannot be read as an image (")
    assert errors[1] == (
        f"error: {photos}/3.png: cannot be read as an image (not an image file); expected PNG, JPEG or the like"
    )
    assert errors[2] == f"error: {photos}/absent.png: no such file; check the path"


def test_an_empty_folder_is_an_error(digits_models: dict[str, Path], tmp_path: Path) -> None:
    done = run(digits_models["openvino"], tmp_path)
    assert (done.returncode, done.stdout) == (USER_ERROR, "")
    assert done.stderr == f"error: {tmp_path}: a folder without images, expected files such as *.png or *.jpg\n"


def test_a_missing_model_is_an_error(photos: Path) -> None:
    done = run("absent.onnx", photos)
    assert (done.returncode, done.stdout) == (USER_ERROR, "")
    assert done.stderr == "error: absent.onnx: no such file; check the path\n"


def test_a_truncated_model_is_an_error(digits_models: dict[str, Path], photos: Path, tmp_path: Path) -> None:
    path = tmp_path / "half.onnx"
    path.write_bytes(digits_models["openvino"].read_bytes()[:40_000])
    with pytest.raises(ModelError, match=r"half.onnx: truncated at 40000 bytes, expected an ONNX file; copy or"):
        main([str(path), str(photos)])


def test_a_text_file_as_model_is_an_error(photos: Path, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("Dear diary,\ntoday I trained a network.\n")
    with pytest.raises(ModelError, match=r"notes.txt: .*, expected an ONNX file; copy or export it again$"):
        main([str(path), str(photos)])


def test_an_image_as_model_is_an_error(photos: Path) -> None:
    with pytest.raises(ModelError, match=r"0.png: .*(expected an ONNX file|without a clearpact manifest)"):
        main([str(photos / "0.png"), str(photos)])


def test_an_onnx_file_of_another_program_is_an_error(photos: Path, tmp_path: Path) -> None:
    graph = onnx.parser.parse_graph("g (float[N] x) => (float[N] y) { y = Relu(x) }")
    onnx.save(onnx.helper.make_model(graph), tmp_path / "other.onnx")
    message = r"other.onnx: an ONNX file without a clearpact manifest; export it with `python -m export.onnx`$"
    with pytest.raises(ModelError, match=message):
        main([str(tmp_path / "other.onnx"), str(photos)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--top", "0"], "^--top 0: expected a whole number from 1$"),
        (["--threads", "0"], "^threads 0: expected a whole number from 1$"),
        (["--engine", "tflite"], "^argument --engine: invalid choice: 'tflite'"),
        (["--device", "abacus"], "^device 'abacus': OpenVINO does not find it; expected one of: cpu"),
    ],
)
def test_a_wrong_option_is_one_error_and_classifies_nothing(
    digits_models: dict[str, Path],
    photos: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    with pytest.raises(ClearpactError, match=message):
        main([str(digits_models["openvino"]), str(photos), *arguments])
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_without_pillow_one_line_names_the_extra(
    digits_models: dict[str, Path], photos: Path, tmp_path: Path
) -> None:
    site = Path(np.__file__).parents[1]
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("numpy", "numpy.libs", "openvino"):
        if (site / name).exists():
            (bare / name).symlink_to(site / name)
    (bare / "runtime").symlink_to(ROOT / "runtime")
    done = subprocess.run(
        [sys.executable, "-S", "-m", "runtime.classify", digits_models["openvino"], photos],
        cwd=bare, env={"PYTHONPATH": str(bare), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (USER_ERROR, "")
    assert done.stderr == "error: reading image files needs Pillow; pip install 'clearpact[tools]'\n"


def test_a_reader_that_goes_away_is_no_error(digits_models: dict[str, Path], photos: Path) -> None:
    command = [sys.executable, "-m", "runtime.classify", str(digits_models["openvino"]), *[str(photos)] * 400]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(10)
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(60) == 0


@pytest.mark.parametrize("encoding", ["ascii", "ascii:strict", "latin-1", "utf-8"])
def test_names_that_the_terminal_cannot_encode_are_written_as_escapes(
    digits_models: dict[str, Path], photos: Path, tmp_path: Path, encoding: str
) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    names = ["日本.png", "é.png", os.fsdecode(b"caf\xe9.png"), "broken é日.png"]
    for name in names[:3]:
        (folder / name).write_bytes((photos / "0.png").read_bytes())
    (folder / names[3]).write_bytes(b"no pixels")
    for arguments in ([], ["--json"], ["--explain", tmp_path / "heats"]):
        done = subprocess.run(
            [sys.executable, "-m", "runtime.classify", str(digits_models["ort"]), folder, *arguments],
            cwd=ROOT, env={**os.environ, "PYTHONIOENCODING": encoding}, capture_output=True, check=False,
        )  # fmt: skip
        assert done.returncode == USER_ERROR
        assert b"Traceback" not in done.stderr
        assert done.stderr.count(b"\n") == 1
        assert len(done.stdout.splitlines()) == 3


def test_folders_in_a_folder_are_named_since_they_are_not_looked_into(
    digits_models: dict[str, Path], photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "more").mkdir()
    assert main([str(digits_models["ort"]), str(photos)]) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 5
    assert err == f"note: {photos}/more: a folder in a folder is not looked into; name it to have it classified\n"


def test_a_class_or_file_whose_name_steers_the_terminal_is_written_as_escapes(
    digits_models: dict[str, Path], photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = onnx.load(digits_models["ort"])
    (entry,) = (entry for entry in model.metadata_props if entry.key == "clearpact")
    values = json.loads(entry.value)
    names = ["\x1b]0;taken\x07", "\x9b2J", "no\rgood\n", "\u202egnp", "日本", "नमस्ते"]
    values["classes"] = [*names, *map(str, range(len(values["classes"]) - len(names)))]
    entry.value = json.dumps(values)
    onnx.save(model, tmp_path / "steering.onnx")
    (photos / "0.png").rename(photos / "\x1b[2J.png")
    (photos / "\x1b[0m.png").write_bytes(b"no pixels")
    assert main([str(tmp_path / "steering.onnx"), str(photos), "--top", "10"]) == USER_ERROR
    out, err = capsys.readouterr()
    for text in ("\\x1b]0;taken\\x07", "\\x9b2J", "no\\rgood\\n", "\\u202egnp", "日本", "नमस्ते", "\\x1b[2J.png"):
        assert text in out
    assert not any(char in out + err for char in "\x1b\x07\x9b\r\u202e")
    assert len(out.splitlines()) == 5
    assert err.startswith(f"error: {photos}/\\x1b[0m.png: cannot be read as an image")


def test_an_image_of_more_pixels_than_asked_for_is_passed_over(
    digits_models: dict[str, Path], photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(digits_models["ort"]), str(photos), "--max-pixels", "500"]) == USER_ERROR
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 4
    assert err.startswith(f"error: {photos}/4.png: has 24x24 pixels, expected at most 500 together")
