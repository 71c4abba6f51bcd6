"""A network that nobody trained here, by one command: quantized on photos, exact on its engine, with its map."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from export import image_options
from export.calibration import calibrate_network, input_grid
from export.onnx import main
from export.own_network import quantized_model
from export.pipeline import export
from export.sources.images import RealImages
from export.sources.torch_network import load_network
from runtime.classifier import Classifier
from runtime.errors import ClearpactError, FileError, ModelError, OptionError
from tests import own_nets
from tests.image_folders import write_digits
from train.data.images import ImageData
from train.input_spec import InputSpec
from train.models import factory
from train.quantization.quantize import quantizers
from train.quantization.quantizers import InputQuantizer

PREFIX = "tests.own_nets:"


@pytest.fixture
def photos(tmp_path: Path, digits: ImageData) -> Path:
    """Forty images without classes, of two sizes."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, pixels in enumerate(digits.test_images[:40, 0].numpy()):
        image = Image.fromarray(pixels).convert("RGB").resize((20, 16) if i % 2 else (12, 24))
        image.save(folder / f"{i:02d}.png")
    return folder


def test_photos_without_labels_quantize_a_factorys_network(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state, output = tmp_path / "weights.pt", tmp_path / "own.onnx"
    network = own_nets.colored().eval()
    wrapped = {f"module.{name}": value for name, value in network.state_dict().items() if "tracked" not in name}
    torch.save({"state_dict": wrapped, "epoch": 3}, state)
    main([f"{PREFIX}colored", "--state", str(state), "--int8", "--data", f"folder:{photos}", "--size", "16",
          "-o", str(output)])  # fmt: skip
    printed = capsys.readouterr().out
    assert "32 training images" in printed
    assert "accuracy on" not in printed
    for name in ("stem", "branch", "head"):
        assert any(line.split()[0] == name and "8-bit codes" in line for line in printed.splitlines() if line)
    classifier = Classifier(output)
    frame = np.asarray(Image.open(photos / "00.png"))
    spec = InputSpec((16, 16), 3, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    pixels = torch.tensor(np.asarray(Image.open(photos / "00.png").crop((0, 6, 12, 18)).resize((16, 16), 2)))
    with torch.no_grad():
        expected = network(spec.normalize(pixels.permute(2, 0, 1)[None]))[0]
    found = classifier.predict(frame)
    assert found.label == str(int(expected.argmax()))
    assert found.probability == pytest.approx(float(expected.max()), abs=0.02)
    heat = classifier.explain(frame).map
    assert heat.shape == frame.shape[:2]
    assert heat.max() > 0


def test_folders_that_name_the_classes_measure_accuracy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [f"c{i}" for i in range(10)]
    folder = write_digits(tmp_path / "digits", dict.fromkeys(names, 20))
    (tmp_path / "names.txt").write_text("\n".join(reversed(names)))
    output = tmp_path / "own.onnx"
    main([f"{PREFIX}grey", "--data", f"folder:{folder}", "--size", "8x8", "--classes", str(tmp_path / "names.txt"),
          "--no-saliency", "--target", "ort", "-o", str(output)])  # fmt: skip
    printed = capsys.readouterr().out
    assert "accuracy on 20 other images of digits: float " in printed
    assert "image: 8x8, 1 channels; pixels from 0 to 1, mean 0, std 1" in printed
    manifest = Classifier(output, engine="ort").session.manifest
    assert manifest.classes == tuple(reversed(names))
    assert manifest.input.mean == (0.0,)


def test_float_is_exported_as_it_came(photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "float.onnx"
    main([f"{PREFIX}colored", "--fp32", "--data", f"folder:{photos}", "--size", "16", "-o", str(output)])
    assert Classifier(output).session.manifest.precision == "fp32"


def test_in_python_it_is_one_call_before_export(digits: ImageData) -> None:
    network = own_nets.grey().eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    spec = digits.input_spec()
    images = RealImages("digits", digits.train_images[:128], digits.test_images[:64], digits.test_labels[:64])
    model, found = quantized_model(network, spec, images, [str(i) for i in range(10)], bits=4)
    assert found is not None
    assert found.samples == 128
    exported = export(model)
    assert exported.verification.changed_classes == 0
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    # What the maps are compared with is the network that came in, not the calibrated one without rounding.
    with torch.no_grad():
        right = (network(spec.normalize(images.test)).argmax(1) == images.labels).double().mean()
    assert exported.agreement is not None
    assert exported.agreement.float_accuracy == pytest.approx(100 * float(right))


@pytest.mark.parametrize(
    ("target", "mean", "std", "codes"),
    [
        ("openvino", 0.498, 0.502, (-128, 127)),
        ("tensorrt", 0.0, 1.0, (-128, 127)),
        ("ort", 0.5, 0.5, (-128, 127)),
        ("ort", 0.0, 1.0, (0, 255)),
    ],
)
def test_other_targets_and_means_keep_int8_codes(
    target: str, mean: float, std: float, codes: tuple[int, int]
) -> None:
    scale, found = input_grid(InputSpec((8, 8), 1, (mean,), (std,)), target)
    assert found == codes
    assert scale == (1 / 255 if target == "ort" and not mean else pytest.approx(max(mean, 1 - mean) / std / 127))


@pytest.mark.parametrize(
    ("target", "mean", "std", "codes"),
    [
        ("ort", 0.498, 0.502, (-127, 128)),  # TensorFlow's (p - 127) / 128, as people write it
        ("openvino", 0.0, 1.0, (0, 255)),
    ],
)
def test_pixels_are_the_images_codes_where_the_engine_takes_them(
    target: str, mean: float, std: float, codes: tuple[int, int], digits: ImageData
) -> None:
    images = RealImages("digits", digits.train_images[:64], digits.test_images[:32], digits.test_labels[:32])
    spec = InputSpec((8, 8), 1, (mean,), (std,))
    model, _ = quantized_model(own_nets.grey().eval(), spec, images, list("0123456789"), target=target)
    (grid,) = [q for q in quantizers(model.network).values() if isinstance(q, InputQuantizer)]
    assert (grid.qmin, grid.qmax) == codes
    exported = export(model, target=target)
    assert exported.verification.changed_classes == 0
    assert float(grid.scale) == pytest.approx(1 / (255 * std))
    # ONNX Runtime's file has no normalization then: the bytes are the codes.
    assert ("Div" in [n.op_type for n in exported.model.graph.node[:4]]) == (target == "openvino")


def test_calibration_keeps_mean_outputs_in_one_walk(digits: ImageData) -> None:
    network, spec = own_nets.grey().eval(), digits.input_spec()
    found = calibrate_network(network, spec, digits.train_images[:256])
    outputs: dict[str, list[torch.Tensor]] = {}
    for model in (found.floating, found.network):
        for name in ("stem", "branch", "head"):
            model.get_submodule(name).register_forward_hook(
                lambda m, i, y, name=name: outputs.setdefault(name, []).append(
                    y.transpose(0, 1).flatten(1).mean(1)
                )
            )
        with torch.no_grad():
            model(spec.normalize(digits.train_images[:256]))
    for name, (floating, quantized) in outputs.items():
        torch.testing.assert_close(quantized, floating, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (["colored"], OptionError, "needs real images"),
        (["no_network", "--data", "digits"], OptionError, "returned a str, expected an nn.Module"),
        (["missing", "--data", "digits"], OptionError, "has no function 'missing'"),
        (["grey", "--data", "digits", "--state", "TEXT"], FileError, "cannot be read as parameters alone"),
        (["grey", "--data", "digits", "--state", "OTHER"], ModelError, "'stem.weight' has shape"),
        (["grey", "--data", "digits", "--classes", "TEXT"], FileError, "1 names, expected 10"),
        (["grey", "--data", "digits", "--mean", "1", "2"], OptionError, "--mean: 2 numbers, expected one"),
        (
            ["colored", "--data", "cifar10", "--mean", "1,2"],
            OptionError,
            "2 numbers, expected 1 or 3, one a channel",
        ),
        (
            ["grey", "--data", "digits", "--std", "1,a"],
            OptionError,
            "--std 1,a: expected numbers, one or one a channel",
        ),
        (["grey", "--data", "digits", "--std", "0"], OptionError, "expected numbers above 0"),
        (["grey", "--data", "digits", "--size", "big"], OptionError, "expected pixels, as in 224"),
        (["grey", "--data", "digits", "--qat", "TEXT"], OptionError, "--qat: is not for a network of your own"),
        (["square", "--data", "digits", "--size", "7"], OptionError, "does not run on an image of 7x7"),
        (["grey", "--data", "digits", "--samples", "1"], OptionError, "expected a whole number from 2"),
        # Before an image is read, and before minutes of calibration.
        (
            ["colored", "--data", "folder:none", "--explain", "layercam:brunch"],
            ModelError,
            "'brunch': no convolution of this name; expected one of stem, branch",
        ),
    ],
)
def test_what_does_not_fit_is_told_in_one_line_and_nothing_is_written(
    arguments: list[str], error: type[ClearpactError], text: str, tmp_path: Path
) -> None:
    (tmp_path / "TEXT").write_text("no parameters")
    torch.save(own_nets.colored().state_dict(), tmp_path / "OTHER")
    files = {name: str(tmp_path / name) for name in ("TEXT", "OTHER")}
    output = tmp_path / "own.onnx"
    given = [files.get(argument, argument) for argument in arguments[1:]]
    with pytest.raises(error, match=text) as caught:
        main([f"{PREFIX}{arguments[0]}", *given, "-o", str(output)])
    assert "\n" not in str(caught.value)
    assert not output.exists()


def test_a_states_file_is_never_run(tmp_path: Path) -> None:
    trap = tmp_path / "ran"
    file = tmp_path / "weights.pt"
    torch.save({"state_dict": _Trap(str(trap))}, file)
    factory.allow(f"{PREFIX}grey")
    with pytest.raises(FileError, match="cannot be read as parameters alone"):
        load_network(f"{PREFIX}grey", file)
    assert not trap.exists()


class _Trap:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (self.path, "w")


@pytest.mark.parametrize("words", [["0.1,0.2,0.3"], ["0.1", "0.2", "0.3"], ["0.1,", "0.2,", "0.3"]])
def test_numbers_of_channels_are_taken_with_spaces_or_commas(words: list[str]) -> None:
    parser = argparse.ArgumentParser()
    image_options.add_options(parser)
    options = parser.parse_args(["--mean", *words])
    assert (options.mean, options.std, options.size, options.pixels) == ([0.1, 0.2, 0.3], None, None, 1)
