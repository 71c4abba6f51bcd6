from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from bench.evidence.cards import card
from bench.measure.environment import environment
from bench.rows import TABLES, Row, main, needed
from runtime.errors import OptionError
from train import checkpoint as checkpoints
from train import loop, run
from train.choices import FLOAT_BITS
from train.data.images import ImageData
from train.data.names import short_name
from train.options import training_parser
from train.quantization.description import describe

ROOT = Path(__file__).parents[1]
ROWS = [row for table in TABLES.values() for row in table]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_row_is_a_command_that_train_takes(row: Row, tmp_path: Path) -> None:
    arch, quant, recipe = run.settings(training_parser().parse_args(row.arguments(tmp_path)))
    network = arch.partition(":")[0].rpartition(".")[2]  # of a user's factory, its module's own name
    assert row.name.startswith(f"{short_name(recipe.data)}-{network}-{run.bits_name(quant)}-{recipe.method}")
    for given, name in ((recipe.init, row.init), (recipe.teacher, row.teacher)):
        if name.endswith(".pt"):
            assert (ROOT / given).is_file()
        else:
            assert given == (str(tmp_path / name / "ckpt.pt") if name else "")


@pytest.mark.parametrize("table", TABLES.values(), ids=list(TABLES))
def test_rows_start_from_rows_above_them(table: tuple[Row, ...]) -> None:
    names = [row.name for row in table]
    assert len(set(names)) == len(names)
    for position, row in enumerate(table):
        above = {"", *names[:position]}
        assert {name for name in (row.init, row.teacher) if not name.endswith(".pt")} <= above


def test_one_row_brings_those_it_needs() -> None:
    rows = needed(TABLES["cifar10"], "cifar10-resnet20-2bit-sgt")
    assert [row.name.removeprefix("cifar10-resnet20-") for row in rows] == [
        "float-plain-start", "float-plain-other", "float-plain", "4bit-plain", "3bit-plain", "2bit-plain",
        "2bit-sgt",
    ]  # fmt: skip
    with pytest.raises(OptionError, match="--only nothing: expected one of cifar10-resnet20-float-plain-start, "):
        needed(TABLES["cifar10"], "nothing")


@pytest.mark.parametrize("table", ["cifar10", pytest.param("deit", marks=pytest.mark.slow)])
def test_the_cifar10_rows_run_on_a_few_images(table: str, tmp_path: Path) -> None:
    """What a GPU trains for an hour must not fail in its second half: here one step of every row."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (16, 3, 32, 32), generator=generator).to(torch.uint8)
    labels = torch.arange(16) % 10
    few = ImageData("cifar10", tuple("abcdefghij"), images, labels, images, labels)
    for row in TABLES[table]:
        arch, quant, recipe = run.settings(training_parser().parse_args(row.arguments(tmp_path)))
        (tmp_path / row.name).mkdir()
        started = loop.start(arch, few, quant, dataclasses.replace(recipe, epochs=1, batch_size=16))
        finished = loop.fit(started, few, tmp_path / row.name / "ckpt.pt")
        assert math.isfinite(finished.history[0]["train_loss"])
        layers = [layer.bits for layer in describe(finished.network()) if layer.kind in ("Conv2d", "Linear")]
        if quant.bits != FLOAT_BITS:
            assert layers == [8, *[quant.bits] * (len(layers) - 2), 8]


def test_rows_are_trained_recorded_and_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "training.jsonl"
    arguments = ["digits", "--runs", str(tmp_path), "--device", "cpu", "--allow-dirty", "--record", str(path)]
    arguments += ["--precision", "bfloat16"]
    main([*arguments, "--epochs", "1"])
    capsys.readouterr()
    four_bits = tmp_path / "digits-cnn2-4bit-sgt" / "ckpt.pt"
    before = four_bits.read_bytes()
    main([*arguments, "--ship", str(tmp_path)])  # all are finished: nothing is trained
    assert four_bits.read_bytes() == before
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["bits"] for line in lines] == [32, 4, 32, 4]
    checkpoint = checkpoints.load(four_bits)
    light = checkpoints.load(tmp_path / "digits-cnn2-4bit-sgt.pt")
    assert (tmp_path / "digits-cnn2-4bit-sgt.pt").stat().st_size < 0.7 * four_bits.stat().st_size
    assert all(torch.equal(light.state_dict[name], value) for name, value in checkpoint.state_dict.items())
    assert light.recipe.init == "runs/digits-cnn2-float-plain/ckpt.pt"
    text = (tmp_path / "digits-cnn2-4bit-sgt.md").read_text()
    assert f"| test accuracy | {checkpoint.test_accuracy:.2f} % |" in text
    assert "| method | sgt, 1 epochs, seed 0 |" in text
    assert "export.onnx deploy/models/digits-cnn2-4bit-sgt.pt --int8" in text
    assert str(tmp_path) not in text
    assert not (tmp_path / "digits-cnn2-float-plain.pt").exists()  # a step only
    assert str(tmp_path) not in json.dumps(lines)
    assert checkpoint.quant.weight_quantizer == "lsq"
    assert checkpoint.recipe.init == checkpoint.recipe.teacher
    assert Path(checkpoint.recipe.init).parent.name == "digits-cnn2-float-plain"
    for line in lines:
        assert line["epochs"] == 1
        assert line["recipe"]["precision"] == "bfloat16"
        assert (
            line["command"].endswith(" --precision bfloat16") or " --precision bfloat16 --init " in line["command"]
        )
        assert line["command"].startswith("python -m train --runs runs --name digits-cnn2-")
    assert lines[1]["test_accuracy"] == checkpoint.test_accuracy
    assert f"{checkpoint.test_accuracy:9.2f}" in capsys.readouterr().out


def test_a_card_shows_the_newest_area_of_its_row() -> None:
    recipe = {"data": "mnist", "method": "sgt", "seed": 2, "init": ""}
    result = {"row": "x", "arch": "cnn2", "bits": 8, "epochs": 3, "test_accuracy": 99.5, "command": "python",
              "recipe": recipe, "environment": environment()}  # fmt: skip

    def record(model: str, precision: str, auc: float, fill: str = "black") -> dict[str, object]:
        network = {"model": model, "precision": precision, "masked_auc": auc, "masked_auc_error": 0.25}
        return {"bench": "saliency", "fill": fill, "n": 5000, "networks": [network]}

    records = [record("x", "8 bit", 30.0), record("x", "8 bit", 26.5), record("x", "float", 1.0),
               record("y", "8 bit", 2.0), record("x", "8 bit", 3.0, "random"), {"bench": "latency"}]  # fmt: skip
    assert "| masked-accuracy AUC | 26.50 ± 0.25 (5,000 images, black fill," in card(result, records, 10)
    believed = {"ece_percent": 3.0, "nll": 0.25, "brier": 0.125}
    accuracy = {
        "bench": "accuracy", "model": "x.onnx", "raw": believed, "calibrated": believed, "temperature": 1.5,
        "precision": "int8", "engine": "ort 1", "n": 10,
    }  # fmt: skip
    line = "| confidence | ECE 3.00 %, NLL 0.2500, Brier 0.1250; at temperature 1.500 ECE 3.00 %"
    assert line in card(result, [accuracy, {**accuracy, "model": "y.onnx"}], 10)
    newer = [{**accuracy, "part": "odd"}, {**accuracy, "temperature": 9.0}]
    assert f"{line}, NLL 0.2500, Brier 0.1250 (int8 on ort 1, 10 images not of the fit) |" in card(
        result, newer, 10
    )
    assert "AUC" not in card(result, [], 10)
    assert "starts from" not in card(result, [], 10)
