"""What is in a model file, and what the engines say that they made of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.inspect import Product, contents, main
from runtime.errors import FileError, ModelError
from tests.exports import exported
from train.checkpoint import Checkpoint


def by_layer(path: Path, engine: str, part: str) -> dict[str, Product]:
    return {p.layer: p for p in contents(path.read_bytes(), engine).products if p.part == part}


def test_every_layer_is_found_in_both_directions_with_its_codes(
    digits_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    path = tmp_path / "int8.onnx"
    path.write_bytes(exported(digits_checkpoint, saliency_precision="int8").model.SerializeToString())
    forward, gradient = (by_layer(path, "openvino", part) for part in ("forward", "gradient"))
    assert list(forward) == ["conv1", "conv2", "fc1", "fc2"]
    assert list(gradient) == ["fc1", "conv2", "conv1"]  # of the last matrix the gradient reads a row
    for layer, product in forward.items():
        assert product.stored == "int8"
        assert product.codes is not None
        assert -127 <= product.codes[0] < product.codes[1] <= 127
        assert layer == "fc2" or gradient[layer].codes == product.codes
    assert [p.executed == "not found" for p in forward.values()] == [False] * 4


def test_onnx_runtime_says_which_products_it_runs_in_float(digits_models: dict[str, Path]) -> None:
    forward = by_layer(digits_models["ort"], "ort", "forward")
    assert [p.executed for p in forward.values()] == [
        "INT8 QLinearConv",
        "INT8 QLinearConv",
        "INT8 QGemm",
        "INT8 QGemm",
    ]
    gradient = by_layer(digits_models["ort"], "ort", "gradient")
    assert {p.executed.split()[0] for p in gradient.values()} == {"F32"}
    assert {p.remark for p in gradient.values()} == {"its weight is stored in float"}


def test_bytes_and_operators_are_those_of_the_file(digits_models: dict[str, Path]) -> None:
    model = digits_models["float"].read_bytes()
    found = contents(model, "openvino")
    assert sum(found.bytes.values()) == len(model)
    zeros = 4 * 128  # the row of a target that is no class
    assert found.bytes["forward weights"] + zeros == found.bytes["gradient weights"]
    assert found.operators["forward"]["Conv"] == found.operators["gradient"]["Conv"] == 2


def test_a_person_and_a_script_read_it(digits_models: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    main([str(digits_models["ort"])])
    text = capsys.readouterr().out
    assert "forward: 4 of 4 products on integer codes (ort)" in text
    assert "gradient: 0 of 3 products on integer codes (ort)" in text
    assert max(map(len, text.splitlines()[1:])) <= 110
    main([str(digits_models["tensorrt"]), "--engine", "openvino", "--json"])
    row = json.loads(capsys.readouterr().out)
    assert row["manifest"]["target"] == "tensorrt"
    assert row["engine"] == "openvino"
    assert len(row["products"]) == 7


def test_bad_files_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"missing\.onnx"):
        main([str(tmp_path / "missing.onnx")])
    (tmp_path / "text.onnx").write_text("not a model")
    with pytest.raises(ModelError, match="expected an ONNX file"):
        main([str(tmp_path / "text.onnx")])
