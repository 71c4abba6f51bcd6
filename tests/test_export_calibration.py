from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import onnx
import pytest
import torch

from bench.accuracy import main as bench_accuracy
from bench.calibration import main as bench_calibration
from export.calibration import accuracy, calibrate, load_images, training_sample
from export.onnx import main
from export.pipeline import export
from runtime.errors import FileError, OptionError
from tests.image_folders import write_digits
from train import checkpoint as checkpoints
from train import loop
from train.__main__ import main as train_main
from train.checkpoint import Checkpoint
from train.data.images import ImageData
from train.quantization.spec import QuantSpec
from train.recipe import default_recipe


@pytest.fixture(scope="module")
def float_path(digits: ImageData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("float") / "ckpt.pt"
    recipe = dataclasses.replace(default_recipe("digits", "plain"), epochs=6)
    loop.fit(loop.start("cnn2", digits, QuantSpec(32), recipe), digits, path)
    return path


@pytest.fixture(scope="module")
def floating(float_path: Path) -> Checkpoint:
    return checkpoints.load(float_path)


def test_a_calibrated_checkpoint_exports_exactly(floating: Checkpoint, digits: ImageData) -> None:
    found = calibrate(floating, training_sample(digits, 256))
    assert (found.equalized, found.uncorrected, found.samples) == (3, [], 256)
    assert found.checkpoint.quant == QuantSpec(8)
    assert accuracy(found.checkpoint, digits) > floating.test_accuracy - 1.5
    exported = export(found.checkpoint, saliency=False)
    assert exported.verification.changed_classes == 0
    assert exported.verification.weight_codes > 30_000


def test_calibration_beats_a_blind_start_at_few_bits(floating: Checkpoint, digits: ImageData) -> None:
    sample, spec = training_sample(digits, 256), QuantSpec(2, "sawb")
    model = checkpoints.new_network(floating.arch, spec, floating.input, floating.float_state())
    blind = dataclasses.replace(floating, quant=spec, state_dict=model.state_dict())
    found = calibrate(floating, sample, spec).checkpoint
    assert accuracy(found, digits) > accuracy(blind, digits) + 3
    assert accuracy(found, digits) > floating.test_accuracy - 10


def test_each_part_can_be_switched_off(floating: Checkpoint, digits: ImageData) -> None:
    sample = training_sample(digits, 64)
    plain = calibrate(floating, sample, search="mse", equalizes=False, corrects_biases=False)
    assert (plain.equalized, plain.uncorrected, list(plain.errors)) == (0, None, ["mse"])
    assert all(torch.equal(plain.checkpoint.float_state()[k], v) for k, v in floating.float_state().items())
    corrected = calibrate(floating, sample, search="mse", equalizes=False).checkpoint.float_state()
    changed = {k for k, v in floating.float_state().items() if not torch.equal(corrected[k], v)}
    assert changed == {"conv1.bias", "conv2.bias", "fc1.bias", "fc2.bias"}
    # The float checkpoint itself is left as it was.
    assert calibrate(floating, sample, search="mse").errors == calibrate(floating, sample, search="mse").errors


def test_command_writes_model_and_checkpoint_and_reports_beside_training(
    float_path: Path, digits_checkpoint_path: Path, digits_checkpoint: Checkpoint,
    capsys: pytest.CaptureFixture[str], tmp_path: Path,
) -> None:  # fmt: skip
    output = tmp_path / "small.onnx"
    main([str(float_path), "--int8", "--calibrate", "--samples", "200", "--qat", str(digits_checkpoint_path),
          "--no-saliency", "-o", str(output)])  # fmt: skip
    out = capsys.readouterr().out
    assert "calibrated: 200 training images; 3 pairs of layers equalized; alpha by " in out
    calibrated = checkpoints.load(tmp_path / "small.pt")
    accuracies = [c.test_accuracy for c in (checkpoints.load(float_path), calibrated, digits_checkpoint)]
    assert (
        "accuracy on 360 test images: float {:.2f} %, calibrated, 8 bit {:.2f} %, trained, 8 bit {:.2f} %".format(
            *accuracies
        )
        in out
    )
    assert {v.data_type for v in onnx.load(output).graph.initializer} >= {onnx.TensorProto.INT8}
    bench_accuracy([str(output), "--data", "digits", "--against", str(tmp_path / "small.pt"), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["classified_differently"] == 0
    assert found["checkpoint_accuracy"] == calibrated.test_accuracy


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fp32", "--calibrate"], "--calibrate makes integer grids, which --fp32 leaves out; give --int8"),
        (["--int8"], "int8 export of a network trained in float; train it with --bits 8, --calibrate it, or"),
        (["--int8", "--calibrate", "--samples", "0"], "--samples 0: expected a whole number from 1"),
        (["--int8", "--calibrate", "--data", "mnist", "--data-root", "/tmp/none"], "holds no mnist|images "),
    ],
)
def test_what_cannot_be_calibrated_is_one_line(
    float_path: Path, tmp_path: Path, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision import datasets

    monkeypatch.setattr(datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    with pytest.raises((OptionError, FileError), match=message):
        main([str(float_path), *arguments, "-o", str(tmp_path / "x.onnx")])
    assert not list(tmp_path.iterdir())


def test_a_quantized_checkpoint_is_not_calibrated(digits_checkpoint_path: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="--calibrate of a network trained with 8 bits: expected a float one"):
        main([str(digits_checkpoint_path), "--int8", "--calibrate", "-o", str(tmp_path / "x.onnx")])


def test_a_folder_is_calibrated_on_its_own_training_images(tmp_path: Path) -> None:
    folder = write_digits(tmp_path / "mine", {"zero": 30, "one": 30})
    train_main(["--data", f"folder:{folder}", "--image-size", "12", "--bits", "32", "--epochs", "1",
                "--runs", str(tmp_path), "--name", "run", "--split-seed", "5"])  # fmt: skip
    path = tmp_path / "run" / "ckpt.pt"
    checkpoint = checkpoints.load(path)
    images = load_images(checkpoint, path, None, "data")
    assert images.name == checkpoint.recipe.data_name
    assert len(images.train_labels) == 48
    moved = folder.rename(tmp_path / "moved")
    assert load_images(checkpoint, path, f"folder:{moved}", "data").split.digest == checkpoint.recipe.split
    (moved / "one" / "000.png").unlink()
    with pytest.raises(OptionError, match=r"folder:moved@\w+, expected the images of training, folder:mine@"):
        load_images(checkpoint, path, f"folder:{moved}", "data")
    with pytest.raises(OptionError, match=r"digits, expected the images of training, folder:mine@"):
        load_images(checkpoint, path, "digits", "data")


def test_bench_measures_every_part_and_records_it(
    float_path: Path, digits_checkpoint_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = tmp_path / "r.jsonl"
    bench_calibration([str(float_path), "--bits", "4", "--samples", "32", "--qat", str(digits_checkpoint_path),
                       "--allow-dirty", "--record", str(record)])  # fmt: skip
    found = json.loads(record.read_text())
    assert len(found["calibrated"]) == 8
    assert found["trained"][0]["accuracy"] > 90
    assert found["float_accuracy"] > 90
    assert max(row["accuracy"] for row in found["calibrated"]) > 85
    assert "trained, sgt, 6 epochs" in capsys.readouterr().out
    with pytest.raises(OptionError, match="--bits 4,9: expected whole numbers from 2 to 8, with commas"):
        bench_calibration([str(float_path), "--bits", "4,9"])
