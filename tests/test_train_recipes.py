from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from runtime.errors import FileError, OptionError
from train import checkpoint as checkpoints
from train import recipes, run
from train.__main__ import main
from train.choices import METHODS
from train.models.build import ARCHITECTURES
from train.options import training_parser
from train.quantization.description import describe
from train.quantization.spec import QuantSpec


def settings(*arguments: str) -> tuple[str, QuantSpec, dict[str, object]]:
    arch, quant, recipe = run.settings(training_parser().parse_args(arguments))
    return arch, quant, dataclasses.asdict(recipe)


@pytest.mark.parametrize(
    ("name", "arch", "bits", "expected"),
    [
        ("maleki2024-mnist", "resnet20", 8,
         {"data": "mnist", "method": "sgt", "epochs": 50, "batch_size": 128, "lr": 0.1, "kl_weight": 0.1,
          "mask_share": 0.5, "optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "schedule": "constant"}),
        ("maleki2024-cifar10", "resnet20", 4,
         {"data": "cifar10", "method": "sgt", "epochs": 50, "batch_size": 64, "lr": 0.01, "kl_weight": 0.05,
          "mask_share": 0.5, "optimizer": "sgd", "crop_padding": 0}),
        ("karkehabadi2024-mnist", "cnn2", 32,
         {"data": "mnist", "method": "smoot", "epochs": 100, "batch_size": 256, "lr": 1.0, "kl_weight": 1.0,
          "mask_share": 0.5, "top1_weight": 0.95, "optimizer": "adadelta", "schedule": "constant"}),
        ("lavaei2025-kvasir", "resnet20", 8,
         {"data": "kvasir", "method": "asg", "epochs": 50, "batch_size": 128, "optimizer": "adam",
          "mask_share": 0.5, "flip": True, "rotate_degrees": 20.0, "color_jitter": 0.2, "image_size": 224}),
        ("karkehabadi2024-fashion", "cnn2", 32,
         {"data": "fashion-mnist", "method": "smoot", "epochs": 100, "batch_size": 256, "lr": 1.0,
          "top1_weight": 0.95, "optimizer": "adadelta"}),
    ],
)  # fmt: skip
def test_rows_hold_what_the_papers_print(name: str, arch: str, bits: int, expected: dict[str, object]) -> None:
    found_arch, quant, recipe = settings("--recipe", name)
    assert found_arch == arch
    assert quant == QuantSpec(bits)
    assert {key: recipe[key] for key in expected} == expected


def test_every_row_can_be_trained_and_has_a_name_of_its_own() -> None:
    runs = (*recipes.PUBLISHED_RUNS, *recipes.OWN_RUNS)
    assert len({run.name for run in runs}) == len(runs) == 8 + 15
    assert all(run.arch in ARCHITECTURES and run.recipe.method in METHODS for run in runs)
    assert {run.name for run in runs if run.name.startswith("clearpact-")} == {r.name for r in recipes.OWN_RUNS}
    assert all((run.source and run.figure) for run in recipes.PUBLISHED_RUNS)


@pytest.mark.parametrize(
    ("data", "network", "batch_size"),
    [("caltech101", "resnet18", 128), ("cifar10", "deit_tiny", 256), ("cifar100", "deit_tiny", 256)],
)
def test_rows_of_deep_networks(data: str, network: str, batch_size: int) -> None:
    arch, quant, recipe = settings("--recipe", f"karkehabadi2024-{data}")
    assert (arch, quant.bits, recipe["data"], recipe["batch_size"]) == (network, 32, data, batch_size)
    assert (recipe["lr"], recipe["top1_weight"], recipe["optimizer"]) == (1e-3, 0.8, "adadelta")
    assert recipe["pretrained"] == (data == "caltech101")


def test_given_options_override_the_row() -> None:
    arch, quant, recipe = settings(
        "--recipe", "maleki2024-cifar10", "--arch", "cnn2", "--bits", "2", "--weight-quantizer", "lsq",
        "--method", "plain",
        "--epochs", "3", "--optimizer", "adam", "--momentum", "0",
    )  # fmt: skip
    assert (arch, quant) == ("cnn2", QuantSpec(2, "lsq"))
    assert (recipe["method"], recipe["epochs"], recipe["optimizer"]) == ("plain", 3, "adam")
    assert (recipe["data"], recipe["batch_size"], recipe["lr"]) == ("cifar10", 64, 0.01)


def test_without_a_row_the_defaults_are_the_known_ones() -> None:
    arch, quant, recipe = settings("--data", "digits")
    assert (arch, quant, recipe["method"], recipe["optimizer"]) == ("cnn2", QuantSpec(8), "sgt", "sgd")
    assert settings("--data", "digits", "--method", "asg")[2]["optimizer"] == "adam"
    assert settings("--data", "mnist", "--method", "smoot")[2]["top1_weight"] == 0.95


def test_list_shows_source_and_figure_of_every_row_in_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--list-recipes"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) < 80
    names = [run.name for run in (*recipes.PUBLISHED_RUNS, *recipes.OWN_RUNS)]
    assert [line.split()[0] for line in lines[1:] if line[0] != " "] == names
    row = next(n for n, line in enumerate(lines) if line.startswith("maleki2024-mnist "))
    assert lines[row].split()[1:] == ["mnist", "sgt", "resnet20", "8"]
    assert lines[row + 1].strip() == "99.35 % (99.23 % with --method plain): Maleki et al. 2024, Tables I and II"


def test_a_row_that_is_not_there() -> None:
    with pytest.raises(
        OptionError, match=r"--recipe resnet: expected one of maleki2024-mnist, .*; see --list-rec"
    ):
        main(["--recipe", "resnet"])


def test_bits_of_single_layers_come_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "bits.json").write_text('{"conv2": 3, "fc1": 2, "fc2": 6}')
    arguments = ["--data", "digits", "--bits", "4", "--epochs", "1", "--bits-file", str(tmp_path / "bits.json")]
    main([*arguments, "--runs", str(tmp_path)])
    checkpoint = checkpoints.load(tmp_path / "digits-cnn2-4bit-mixed-sgt" / "ckpt.pt")
    bits = {row.name: row.bits for row in describe(checkpoint.network())}
    assert bits == {"conv1": 8, "conv2": 3, "fc1": 2, "fc2": 6}


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ('{"conv9": 4}', OptionError, "no layer named 'conv9'; expected one of conv1, conv2, fc1, fc2"),
        ('{"conv2": 9}', OptionError, "bits 9 of conv2: expected a whole number from 2 to 8"),
        (
            '{"conv2": 4.0}',
            FileError,
            r"bits\.json: other JSON, expected layer names and whole numbers from 2 to 8",
        ),
        ("[4, 4]", FileError, r"bits\.json: other JSON, expected layer names"),
        ('{"conv2": ', FileError, r"bits\.json: no JSON, expected layer names"),
        (None, FileError, r"bits\.json: no such file"),
    ],
)
def test_bits_files_that_cannot_be_used(
    tmp_path: Path, text: str | None, kind: type[Exception], message: str
) -> None:
    path = tmp_path / "bits.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(kind, match=message):
        main(["--data", "digits", "--bits-file", str(path), "--runs", str(tmp_path)])


def test_bits_of_single_layers_of_a_float_network_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "bits.json"
    path.write_text('{"conv2": 4}')
    with pytest.raises(OptionError, match="bits 32 leave every layer in float"):
        main(["--data", "digits", "--bits", "32", "--bits-file", str(path)])


def test_options_of_version_0_1_keep_working() -> None:
    old = settings("--data", "digits", "--weights", "lsq", "--full-grid", "--addends")
    assert old == settings("--data", "digits", "--weight-quantizer", "lsq", "--full-range", "--quantize-adds")
    assert old[1] == QuantSpec(8, "lsq", full_range=True, quantize_adds=True)
