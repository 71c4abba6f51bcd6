"""Quantization after training, measured: beside others, what moves a class, how far maps can agree."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor

from bench import ptq
from bench.causes import map_limits, moved_classes
from bench.evidence import quantization_tables as tables
from bench.measure import record
from bench.networks import floating
from bench.peers.after_training import statements
from export.own_network import quantized_model
from export.sources.images import RealImages
from export.sources.torch_forms import FORMS
from runtime.errors import ModelError, OptionError
from tests import own_nets
from train import checkpoint as checkpoints
from train import loop
from train.data.images import ImageData
from train.input_spec import InputSpec
from train.model import QuantizedModel
from train.quantization.spec import QuantSpec
from train.recipe import default_recipe

GREY = ["tests.own_nets:grey", "--data", "digits"]


def test_what_a_user_writes_is_counted() -> None:
    def quantize(model: object) -> list[object]:
        """Text is no statement."""
        import math

        with torch.no_grad():  # nor is what silences a library
            for part in (1, 2):
                print(math.pi, part)
            return [model]

    assert statements(quantize) == 4


def test_accuracy_seconds_and_latency_are_told_and_recorded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = tmp_path / "ptq.jsonl"
    main = ptq.main
    main([*GREY, "--engines", "ort", "--bits", "8", "--samples", "40", "--images", "70", "--seconds", "0.05",
          "--record", str(kept), "--allow-dirty"])  # fmt: skip
    printed = capsys.readouterr().out
    (found,) = record.read(tmp_path)
    assert (found["n"], found["samples"], found["truth"], found["size"]) == (70, 40, "labels", [8, 8])
    ours, other = found["rows"]["clearpact, 8 bit, ort"], found["rows"]["ONNX Runtime, 8 bit, ort"]
    assert set(found["rows"]) == {"float", "clearpact, 8 bit, ort", "ONNX Runtime, 8 bit, ort"}
    assert ours["lines"] == 1 < other["lines"]
    assert ours["quantizing_s"] > 0 < ours["file_s"]
    beside = ours["beside"]
    assert beside["accuracy"] == pytest.approx(ours["accuracy"] - other["accuracy"])
    assert 0 <= beside["standard_error"] < 10
    assert f"{beside['times']:.3f} of its time" in printed
    table = tables.after_training([found]).splitlines()
    assert table[2].startswith("| own_nets:grey, 70 test images of digits | float | 32 | OpenVINO |  |  |")
    assert table[3].startswith("|  | **clearpact** | 8 | ONNX Runtime |")
    assert f"| {beside['accuracy']:+.2f} ± {beside['standard_error']:.2f} |" in table[3]


@pytest.mark.parametrize("arguments", [["--bits", "8,8"], ["--bits", "9"], ["--engines", "tensorrt"]])
def test_what_cannot_be_compared_is_refused(arguments: list[str]) -> None:
    with pytest.raises(OptionError, match=f"{arguments[0]} {arguments[1]}: expected some of"):
        ptq.main([*GREY, *arguments])


@pytest.fixture(scope="module")
def calibrated(digits: ImageData) -> tuple[QuantizedModel, Tensor]:
    pixels = digits.test_images[:40]
    images = RealImages("digits", digits.train_images[:40], pixels)
    spec = InputSpec((8, 8), 1, (0.0,), (1.0,))
    model, _ = quantized_model(own_nets.grey().eval(), spec, images, list("0123456789"))
    return model, pixels


def test_codes_of_an_engine_are_held_against_the_calibrated_network(
    calibrated: tuple[QuantizedModel, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moved_classes, "_moved", lambda on_engine, expected: np.arange(4))
    run = moved_classes._run
    _, found = moved_classes.moved_classes(*calibrated, "openvino")
    assert [one.image for one in found] == [0, 1, 2, 3]
    assert all(one.reproduced for one in found)
    assert all(one.codes == 0 or (one.largest == 1 and one.farthest_steps < 1e-3) for one in found)

    def damaged(model: bytes, target: str, frames: np.ndarray, outputs: tuple[str, ...]) -> dict[str, np.ndarray]:
        values = run(model, target, frames, outputs)
        if len(outputs) > 1:
            values[outputs[2]][1].flat[:7] ^= 2
        return values

    monkeypatch.setattr(moved_classes, "_run", damaged)
    _, found = moved_classes.moved_classes(*calibrated, "openvino")
    assert found[1].codes >= 7
    assert found[1].largest == 2
    assert found[1].farthest_steps > 0.01  # which no tie explains
    assert found[0].codes < 7


def test_where_classes_moved_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    moved_classes.main([*GREY, "--samples", "40", "--images", "30", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (found["n"], found["bits"], found["target"]) == (30, 8, "openvino")
    assert len(found["moved"]) <= found["on_engine"] <= 30
    assert found["moved_in_float32"] <= found["in_float32"] <= 30
    one = {"image": 3, "codes": 2, "first": "q", "largest": 1, "farthest_steps": 2.4e-6, "gap": 0.1}
    table = tables.moved_classes(
        [found, {**found, "moved": [one], "on_engine": 9, "moved_in_float32": 2, "in_float32": 8}]
    )
    assert table.splitlines()[2:] == [
        "| own_nets:grey, digits, 8 bit | OpenVINO | 1 of 30 | 9 | 1 | 2e-06 | 2, 8 |"
    ]


def test_a_float_checkpoint_is_measured_on_its_own_images(digits: ImageData, tmp_path: Path) -> None:
    path = tmp_path / "ckpt.pt"
    checkpoints.save(loop.start("cnn2", digits, QuantSpec(32), default_recipe("digits", "plain")), path)
    parser = argparse.ArgumentParser()
    floating.add_options(parser, samples=40, images=30)
    arguments = [str(path), "--data", "digits"]
    found = floating.load(parser.parse_args(arguments))
    assert found.images.labels is not None
    assert torch.equal(found.images.test, digits.test_images[:30])
    assert torch.equal(found.images.labels, digits.test_labels[:30])
    assert len(found.images.calibration) == 40
    assert found.network(found.input_spec.normalize(found.images.test)).shape == (30, 10)
    with pytest.raises(OptionError, match="--std: is not for a checkpoint"):
        floating.load(parser.parse_args([*arguments, "--std", "0.5"]))
    checkpoints.save(loop.start("cnn2", digits, QuantSpec(8), default_recipe("digits", "plain")), path)
    with pytest.raises(OptionError, match="was trained with 8 bits, expected a float network"):
        floating.load(parser.parse_args(arguments))


def test_what_is_read_of_an_onnx_file_is_compared_with_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "net.onnx"
    graph = "g (float[N,1,8,8] x) => (float[N,10] y) { a = Relu(x) b = Flatten(a) y = MatMul(b, w) }"
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 21]> {graph}')
    weight = np.random.default_rng(0).normal(size=(64, 10)).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    onnx.save(model, path)
    parser = argparse.ArgumentParser()
    floating.add_options(parser, samples=10, images=30)
    options = parser.parse_args([str(path), "--data", "digits", "--mean", "0.5"])
    found = floating.load(options)
    normalized = found.input_spec.normalize(found.images.test)
    expected = normalized.relu().flatten(1) @ torch.from_numpy(weight)
    torch.testing.assert_close(found.network(normalized), expected)
    monkeypatch.setitem(FORMS, "Relu", FORMS["Identity"])
    with pytest.raises(ModelError, match=r"net\.onnx: as a PyTorch network its logits differ by 1\.3 of their"):
        floating.load(options)


def test_maps_agree_more_with_more_bits(capsys: pytest.CaptureFixture[str]) -> None:
    map_limits.main([*GREY, "--samples", "40", "--images", "6", "--json"])
    found = json.loads(capsys.readouterr().out)
    rows = found["spearman"]
    assert found["images"] == 6
    half, whole = (rows[f"float, every pixel moved by up to {levels} level"] for levels in ("0.5", "1"))
    assert 0.5 < min(half, whole) <= max(half, whole) < 1
    assert rows["8-bit weights, float activations"] >= rows["8-bit weights, 14-bit activations"] - 0.01
    assert rows["8-bit weights, 14-bit activations"] >= rows["8 bit"] - 0.01
    assert 0.8 < rows["float, clipped at the alphas"] < 1
    table = tables.map_limits([found]).splitlines()
    assert table[0] == "| Spearman with the float network's maps | own_nets:grey, digits |"
    assert f"| 8 bit | {rows['8 bit']:.3f} |" in table
