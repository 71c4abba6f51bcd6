from __future__ import annotations

import dataclasses
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics

from bench.accuracy import confusion_matrix, count, main, roc_auc, score
from bench.measure import data as bench_data
from bench.measure.environment import environment
from bench.measure.streams import in_memory
from export.onnx import main as export_main
from runtime import Classifier
from runtime.errors import FileError, OptionError
from tests.image_folders import write_digits
from train import checkpoint as checkpoints
from train.__main__ import main as train_main
from train.checkpoint import Checkpoint
from train.data.__main__ import main as write_data
from train.data.images import ImageData

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def npz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "digits_test.npz"
    write_data(["digits", "-o", str(path)])
    return path


def saved(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def test_a_confusion_matrix_has_true_classes_in_rows() -> None:
    found = confusion_matrix(np.array([0, 0, 1, 2, 2, 2]), np.array([0, 1, 1, 0, 2, 2]), 3)
    assert found.tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 2]]


def test_scores_of_three_classes_by_hand() -> None:
    found = score(np.array([[8, 2, 0], [1, 4, 0], [0, 1, 4]]))
    assert found.accuracy == pytest.approx(100 * 16 / 20)
    assert found.sensitivity == pytest.approx(100 * (8 / 10 + 4 / 5 + 4 / 5) / 3)
    # True negatives over negatives: class 0: 9 of 10, class 1: 12 of 15, class 2: 15 of 15.
    assert found.specificity == pytest.approx(100 * (9 / 10 + 12 / 15 + 15 / 15) / 3)


def test_always_one_class_scores_a_third_and_two_thirds_when_balanced() -> None:
    found = score(np.array([[5, 0, 0], [5, 0, 0], [5, 0, 0]]))
    assert (found.accuracy, found.sensitivity, found.specificity) == pytest.approx((100 / 3, 100 / 3, 200 / 3))


def test_a_class_without_images_is_left_out_of_the_means() -> None:
    found = score(np.array([[3, 1, 0], [0, 4, 0], [0, 0, 0]]))
    assert found.sensitivity == pytest.approx(100 * (3 / 4 + 4 / 4) / 2)
    assert found.specificity == pytest.approx(100 * (4 / 4 + 3 / 4) / 2)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=20, max_size=80))
def test_scores_are_scikit_learns(pairs: list[tuple[int, int]]) -> None:
    # Every class twice, so that no mean is over a class without images.
    labels, predicted = np.array(pairs + [(c, (c + i) % 5) for c in range(5) for i in (0, 1)]).T
    confusion = confusion_matrix(labels, predicted, 5)
    found = score(confusion)
    assert np.array_equal(confusion, metrics.confusion_matrix(labels, predicted))
    assert found.accuracy == pytest.approx(100 * metrics.accuracy_score(labels, predicted))
    assert found.sensitivity == pytest.approx(100 * metrics.recall_score(labels, predicted, average="macro"))
    rest = [metrics.recall_score(labels != c, predicted != c) for c in range(5)]
    assert found.specificity == pytest.approx(100 * np.mean(rest))


def test_a_split_travels_through_npz_to_the_bench(npz: Path, digits: ImageData) -> None:
    loaded = bench_data.load(str(npz))
    assert loaded.name == "digits_test.npz"
    assert loaded.images.dtype == np.uint8
    assert np.array_equal(loaded.images, digits.test_images.permute(0, 2, 3, 1).numpy())
    assert np.array_equal(loaded.labels, digits.test_labels.numpy())
    named = bench_data.load("digits")
    assert named.name == "digits"
    assert np.array_equal(named.images, loaded.images)
    assert named.images.flags.c_contiguous


@pytest.mark.parametrize("engine", ["openvino", "ort"])
def test_predicted_classes_are_the_classifiers(digits_models: dict[str, Path], npz: Path, engine: str) -> None:
    stream = bench_data.stream(str(npz))
    loaded = bench_data.collected(stream)
    classifier = Classifier(digits_models["ort"], engine=engine, parallel_runs=3)
    expected = [p.index for p in classifier.predict(list(loaded.images))]

    for workers in (1, 3):
        found = count(
            classifier.logits, stream, 10, against=lambda images: -classifier.logits(images), workers=workers
        )
        assert np.array_equal(found.confusion, confusion_matrix(loaded.labels, np.array(expected), 10))
        assert (found.differing, found.auc) == (360, None)


@given(st.integers(2, 60), st.integers(1, 5), st.integers(0, 999))
def test_the_area_under_the_curve_is_scikit_learns(n: int, levels: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    margins, labels = rng.integers(0, levels, n).astype(np.float32), np.arange(n) % 2
    assert roc_auc(margins, labels == 1) == pytest.approx(metrics.roc_auc_score(labels, margins))
    logits = np.stack([-margins, margins], 1)
    images = np.arange(n, dtype=np.uint8).reshape(n, 1, 1, 1)
    stream = in_memory("two", images, labels.astype(np.int64))
    found = count(lambda part: logits[part[:, 0, 0, 0]], stream, 2, workers=2)
    assert found.auc == pytest.approx(metrics.roc_auc_score(labels, margins))


def test_json_has_the_scores_the_counts_and_the_environment(
    digits_models: dict[str, Path], digits_checkpoint: Checkpoint, npz: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(digits_models["openvino"]), "--data", str(npz), "--json"])
    result = json.loads(capsys.readouterr().out)
    confusion = np.array(result["confusion"])
    assert (result["n"], confusion.sum(), confusion.shape) == (360, 360, (10, 10))
    assert result["accuracy"] == pytest.approx(digits_checkpoint.test_accuracy)
    assert result["accuracy"] == pytest.approx(result["checkpoint_accuracy"])
    assert result["accuracy"] == pytest.approx(100 * np.trace(confusion) / 360)
    assert (result["precision"], result["target"], result["data"]) == ("int8", "openvino", "digits_test.npz")
    assert result["engine"].startswith("openvino 20")
    assert result["classes"] == [str(digit) for digit in range(10)]
    changing = {"load_1min": pytest.approx(result["environment"]["load_1min"], abs=2)}  # the system counts on
    assert result["environment"] == environment() | changing


def test_a_person_reads_the_scores_and_a_confusion_matrix(
    digits_models: dict[str, Path], digits_checkpoint: Checkpoint, npz: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(digits_models["ort"]), "--data", str(npz)])
    out = capsys.readouterr().out
    accuracy = f"{digits_checkpoint.test_accuracy:6.2f} %"
    assert f"accuracy     {accuracy}   (checkpoint {accuracy.strip()})" in out
    assert "int8 on ort " in out
    assert "360 images of digits_test.npz" in out
    rows = [line.split() for line in out.splitlines() if line.startswith("  ")][-10:]
    assert [row[0] for row in rows] == list("0123456789")
    assert sum(int(cell) for row in rows for cell in row[1:] if cell != ".") == 360


def test_pickled_objects_in_npz_are_refused_and_never_executed(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "executed"),)

    path = saved(tmp_path / "trap.npz", images=np.array([Trap()], dtype=object), labels=np.zeros(1, int))
    plain = tmp_path / "pickle.npz"
    plain.write_bytes(pickle.dumps(Trap()))
    for trap in (path, plain):
        with pytest.raises(
            FileError, match=f"^{trap}: holds no images and labels, expected an .npz file written by"
        ):
            bench_data.load(str(trap))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("images", "labels", "found"),
    [
        (np.zeros((2, 8, 8), np.uint8), np.zeros(2, int), r"images uint8 \[2, 8, 8\] and labels \[2\]"),
        (np.zeros((2, 8, 8, 1)), np.zeros(2, int), r"images float64 \[2, 8, 8, 1\] and labels \[2\]"),
        (np.zeros((2, 8, 8, 1), np.uint8), np.zeros(3, int), r"images uint8 \[2, 8, 8, 1\] and labels \[3\]"),
        (np.zeros((2, 8, 8, 1), np.uint8), np.zeros((), int), r"images uint8 \[2, 8, 8, 1\] and labels \[\]"),
        (np.zeros((0, 8, 8, 1), np.uint8), np.zeros(0, int), r"images uint8 \[0, 8, 8, 1\] and labels \[0\]"),
        (np.zeros((2, 8, 8, 1), np.uint8), np.zeros(2), "labels float64"),
        (np.zeros((2, 8, 8, 1), np.uint8), np.array(["a", "b"]), "labels <U1"),
        (np.zeros((2, 8, 8, 1), np.uint8), np.array([0, -1]), "labels int64"),
    ],
)
def test_wrong_arrays_are_named_with_what_is_expected(
    tmp_path: Path, images: np.ndarray, labels: np.ndarray, found: str
) -> None:
    path = saved(tmp_path / "odd.npz", images=images, labels=labels)
    with pytest.raises(
        FileError, match=f"^{path}: {found}, expected an .npz file written by `python -m train.data`"
    ):
        bench_data.load(str(path))


def test_damaged_and_foreign_npz_files_are_one_error(npz: Path, tmp_path: Path) -> None:
    data = npz.read_bytes()
    flipped = bytearray(data)
    flipped[500] ^= 0xFF
    array = io.BytesIO()
    np.save(array, np.zeros(3))
    other = io.BytesIO()
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("notes.txt", "hello")
    path = tmp_path / "bad.npz"
    for contents in (b"", b"text", data[:1000], data[:-30], bytes(flipped), array.getvalue(), other.getvalue()):
        path.write_bytes(contents)
        with pytest.raises(FileError, match=f"^{path}: holds no images and labels, expected .*; write it again$"):
            bench_data.load(str(path))
    with pytest.raises(FileError, match=r"absent.npz: no such file; check the path$"):
        bench_data.load(str(tmp_path / "absent.npz"))


def test_an_unknown_data_set_is_refused(digits_models: dict[str, Path]) -> None:
    with pytest.raises(OptionError, match=r"^data set 'imagenet': expected one of digits, mnist"):
        main([str(digits_models["ort"]), "--data", "imagenet"])


def test_labels_beyond_the_models_classes_are_refused(digits_models: dict[str, Path], tmp_path: Path) -> None:
    path = saved(tmp_path / "other.npz", images=np.zeros((2, 8, 8, 1), np.uint8), labels=np.array([3, 10]))
    message = f"^--data {path}: labels up to 10, expected below 10, the classes of .*; name the data"
    with pytest.raises(OptionError, match=message):
        main([str(digits_models["ort"]), "--data", str(path)])


def test_classes_are_compared_by_name(
    digits_models: dict[str, Path], digits: ImageData, digits_checkpoint: Checkpoint, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    images, labels = digits.test_images[:].permute(0, 2, 3, 1).numpy(), digits.test_labels.numpy()

    def measured(keep: np.ndarray, numbers: list[int]) -> dict[str, Any]:
        """Return the scores on some images, of a file that numbers the digits in an order of its own."""
        path = saved(
            tmp_path / "own.npz", images=images[keep],
            labels=np.array([numbers.index(label) for label in labels[keep]]),
            classes=np.array([str(number) for number in numbers]),
        )  # fmt: skip
        main([str(digits_models["openvino"]), "--data", str(path), "--json"])
        return json.loads(capsys.readouterr().out)

    everything = np.ones(len(labels), bool)
    permuted = measured(everything, [3, 1, 4, 5, 9, 2, 6, 8, 7, 0])
    assert permuted["accuracy"] == pytest.approx(digits_checkpoint.test_accuracy)
    assert permuted["classes"] == list("0123456789")
    assert np.array_equal(np.sum(permuted["confusion"], 1), np.bincount(labels))
    some = np.isin(labels, (7, 2))
    assert measured(some, [7, 2])["accuracy"] > 80
    path = saved(
        tmp_path / "cats.npz", images=images, labels=labels, classes=np.array([f"cat {n}" for n in range(10)])
    )
    with pytest.raises(
        OptionError, match=r"classes cat 0, cat 1, .*, expected 0, 1, .* it has no 'cat 0'; name the"
    ):
        main([str(digits_models["openvino"]), "--data", str(path)])
    for names in (["0"] * 10, list("012")):
        path = saved(tmp_path / "few.npz", images=images, labels=labels, classes=np.array(names))
        with pytest.raises(FileError, match=r"expected .*: a name of its own for every label; write it again"):
            main([str(digits_models["openvino"]), "--data", str(path)])


def test_a_device_without_torch_measures_npz_and_is_told_so_for_names(
    digits_models: dict[str, Path], npz: Path
) -> None:
    code = """
import sys
sys.modules["torch"] = None
from bench.accuracy import main
from runtime import command
command.run(main)
"""
    base = [sys.executable, "-c", code, str(digits_models["ort"]), "--data"]
    done = subprocess.run([*base, str(npz)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "accuracy" in done.stdout
    done = subprocess.run([*base, "digits"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: --data digits: named data sets need torch; pip install 'clearpact[train]', or name an .npz file "
        "that `python -m train.data` wrote elsewhere\n"
    )


def test_images_classified_differently_from_the_checkpoint_are_counted(
    digits_models: dict[str, Path], digits_checkpoint: Checkpoint, digits_checkpoint_path: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    model = str(digits_models["openvino"])
    main([model, "--data", "digits", "--against", str(digits_checkpoint_path), "--json"])
    assert json.loads(capsys.readouterr().out)["classified_differently"] == 0
    # A checkpoint whose last layer is turned around agrees on hardly any image.
    weight = "fc2.parametrizations.weight.original"
    other = dataclasses.replace(digits_checkpoint, state_dict=dict(digits_checkpoint.state_dict))
    other.state_dict[weight] = -other.state_dict[weight]
    checkpoints.save(other, tmp_path / "other.pt")
    main([model, "--data", "digits", "--against", str(tmp_path / "other.pt")])
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("differently"))
    assert 300 < int(line.split()[1]) <= 360
    assert line.endswith(f"images of 360, from {tmp_path / 'other.pt'}")


@pytest.fixture(scope="module")
def folder_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder of three digits, and a run on it with its exported file."""
    root = tmp_path_factory.mktemp("folder")
    folder = write_digits(root / "mine", {"zero": 60, "one": 60, "two": 60})
    train_main(["--data", f"folder:{folder}", "--image-size", "12", "--runs", str(root), "--name", "run",
                "--epochs", "2"])  # fmt: skip
    export_main([str(root / "run" / "ckpt.pt"), "--int8", "--no-saliency"])
    return folder, root / "run"


def test_a_folder_is_measured_on_the_test_images_of_training_without_torch(
    folder_run: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, run = folder_run
    code = """
import sys
sys.modules["torch"] = None
from bench.accuracy import main
from runtime import command
if __name__ == "__main__":
    command.run(main)
"""
    for name in (f"folder:{folder}", str(run / "split.json")):
        done = subprocess.run(
            [sys.executable, "-c", code, str(run / "ckpt.onnx"), "--data", name, "--json"],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")
        found = json.loads(done.stdout)
        assert found["data"].startswith("folder:mine@")
        assert found["n"] == 18
        assert Classifier(run / "ckpt.onnx").manifest.input.resize == "crop"
        assert found["accuracy"] == pytest.approx(found["checkpoint_accuracy"], abs=100 / 18 + 1e-6)
    main([str(run / "ckpt.onnx"), "--data", str(run / "split.json"), "--against", str(run / "ckpt.pt"), "--json"])
    assert json.loads(capsys.readouterr().out)["classified_differently"] == 0


def test_another_split_of_the_folder_is_refused(folder_run: tuple[Path, Path], tmp_path: Path) -> None:
    folder, run = folder_run
    grown = shutil.copytree(folder, tmp_path / "mine")
    shutil.copy(grown / "one" / "000.png", grown / "one" / "new.png")
    with pytest.raises(OptionError, match=r"the split folder:mine@\w+, expected folder:mine@\w+ as in training; .*"
                       r"name the split\.json in the run's folder"):  # fmt: skip
        main([str(run / "ckpt.onnx"), "--data", f"folder:{grown}"])
    other = write_digits(tmp_path / "other", {"cat": 3, "dog": 3})
    with pytest.raises(OptionError, match="classes cat, dog, expected one, two, zero as the model has"):
        main([str(run / "ckpt.onnx"), "--data", f"folder:{other}"])


def test_a_folder_of_test_images_from_elsewhere_is_measured(
    folder_run: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for part in ("train", "test"):
        write_digits(tmp_path / "clinic" / part, {"zero": 6, "one": 5, "two": 4})
    (tmp_path / "clinic" / "test" / "one" / "bad.png").write_bytes(b"no image")
    main([str(folder_run[1] / "ckpt.onnx"), "--data", f"folder:{tmp_path / 'clinic'}", "--json"])
    out, err = capsys.readouterr()
    assert json.loads(out)["n"] == 15
    assert err.startswith("skipped 1 images, such as ")
    assert "bad.png: cannot be read as an image" in err
