"""A user's own network: imported where the user names it, and never because a file does."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from bench import agreement as bench_agreement
from bench import compare as bench_compare
from bench import ptq as bench_ptq
from bench import saliency as bench_saliency
from bench import targets as bench_targets
from export import onnx as export_onnx
from export.engine import __main__ as export_engine
from runtime.errors import ModelError, OptionError
from runtime.manifest import read_manifest
from train import __main__ as train
from train import checkpoint as checkpoints
from train import loop
from train.checkpoint import Checkpoint
from train.data.images import ImageData
from train.models import factory
from train.models.build import build
from train.quantization.spec import QuantSpec
from train.recipe import default_recipe

NAME = "tests.toy_models:small_convnet"
ARGUMENTS = {"channels": 1, "size": (8, 8), "classes": 10}

OWN_CODE = """
from pathlib import Path
import torch

Path("was_imported").touch()

def net(channels, size, classes):
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(channels * size[0] * size[1], classes))
"""


@pytest.fixture(autouse=True)
def nothing_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factory, "_allowed", set())


@pytest.fixture
def own_checkpoint(digits: ImageData, tmp_path: Path) -> Path:
    """One epoch of a network of the user's own."""
    factory.allow(NAME)
    recipe = dataclasses.replace(default_recipe("digits", "plain"), epochs=1)
    path = tmp_path / "ckpt.pt"
    loop.fit(loop.start(NAME, digits, QuantSpec(8), recipe), digits, path)
    factory._allowed.clear()
    return path


def test_a_named_factory_makes_the_network() -> None:
    factory.allow(NAME)
    model = build(NAME, **ARGUMENTS)
    assert isinstance(model, torch.nn.Sequential)
    assert model.training
    assert model(torch.zeros(3, 1, 8, 8)).shape == (3, 10)


def test_a_checkpoint_opens_for_those_who_name_its_factory_and_for_no_one_else(own_checkpoint: Path) -> None:
    checkpoint = checkpoints.load(own_checkpoint)
    assert checkpoint.arch["name"] == NAME
    for named in ((), ("tests.toy_models:not_code",)):
        factory.allow(*named)
        with pytest.raises(
            OptionError,
            match=rf"architecture '{NAME}': is code of its own, which a file alone never runs; if you trust it, "
            rf"name it: --arch {NAME} \(in Python: train\.models\.factory\.allow\)$",
        ):
            checkpoint.network()
    factory.allow(NAME)
    assert checkpoint.network()(torch.zeros(1, 1, 8, 8)).shape == (1, 10)


COMMANDS = {
    export_onnx.main: ("ckpt.pt", "--int8"),
    export_engine.main: ("ckpt.pt", "--dry-run"),
    train.main: ("--resume", "."),
    bench_saliency.main: ("ckpt.pt", "--data", "digits"),
    bench_compare.main: ("ckpt.pt",),
    bench_agreement.main: ("ckpt.pt", "ckpt.pt", "--data", "digits"),
    bench_targets.main: ("ckpt.pt",),
    bench_ptq.main: ("ckpt.pt", "--data", "digits"),
}


@pytest.mark.parametrize("main", COMMANDS, ids=lambda main: main.__module__)
def test_a_file_that_names_code_never_imports_it(
    main: Callable[[Sequence[str]], None], own_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the code in the folder where the user stands, by every command that takes a checkpoint."""
    monkeypatch.chdir(own_checkpoint.parent)
    monkeypatch.syspath_prepend(str(own_checkpoint.parent))
    Path("own_code.py").write_text(OWN_CODE)
    checkpoint = checkpoints.load(own_checkpoint)
    checkpoint.arch["name"] = "own_code:net"
    checkpoints.save(checkpoint, own_checkpoint)
    with pytest.raises(OptionError, match=r"^architecture .own_code:net.: is code .*name it: --arch own_code:net"):
        main(COMMANDS[main])
    assert not Path("was_imported").exists()
    # The control: named, the same file does.
    with pytest.raises(ModelError, match=r"checkpoint of own_code:net: '1\.bias' has shape"):
        main([*COMMANDS[main], "--arch", "own_code:net"])
    assert Path("was_imported").exists()
    del sys.modules["own_code"]


def test_train_and_resume_and_export_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train.main(["--data", "digits", "--arch", NAME, "--method", "plain", "--epochs", "1", "--runs", str(tmp_path)])
    run = tmp_path / "digits-small_convnet-8bit-plain"
    assert "network  tests.toy_models:small_convnet, " in capsys.readouterr().out
    factory._allowed.clear()
    with pytest.raises(OptionError, match="if you trust it, name it"):
        train.main(["--resume", str(run)])
    train.main(["--resume", str(run), "--arch", NAME])
    export_onnx.main([str(run / "ckpt.pt"), "--int8", "--arch", NAME])
    assert read_manifest((run / "ckpt.onnx").read_bytes(), "ckpt.onnx").arch == NAME


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tests.toy_models:nothing", "tests.toy_models has no function 'nothing'; check the name"),
        ("tests.toy_models:not_code", "tests.toy_models has no function 'not_code'; check the name"),
        ("tests.no_such_module:net", "No module named 'tests.no_such_module'; run where .* can be imported"),
        ("tests.toy_models:takes_nothing", "expected one that takes channels, size, classes"),
        ("tests.toy_models:makes_a_string", r"returned str, expected a torch\.nn\.Module"),
        ("tests.toy_models:needs_larger_images",
         r"called with channels, size, classes, it raises ValueError \(toy_models\.py:\d+\): 8 x 8 is too small$"),
        ("tests.toy_models:takes_three_channels",
         r"of 2 images \[2, 1, 8, 8\] its network raises RuntimeError \(conv\.py:\d+\): Given groups=1, weight"),
        ("torchvision.models:vit_b_16", r"raises TypeError \(vision_transformer\.py:\d+\): .* 'channels'$"),
        ("tests.toy_models:makes_features", r"it returns \[2, 5\], expected logits \[2, 10\]"),
    ],
)  # fmt: skip
def test_what_is_no_factory_is_refused(name: str, message: str) -> None:
    factory.allow(name)
    with pytest.raises(OptionError, match=f"^--arch {name}: .*{message}"):
        build(name, **ARGUMENTS)


def test_what_a_factory_says_in_one_line_stays_as_it_is() -> None:
    factory.allow("tests.toy_models:says_it_itself")
    with pytest.raises(OptionError, match=r"^8 x 8: expected 16 x 16$"):
        build("tests.toy_models:says_it_itself", **ARGUMENTS)


@pytest.mark.parametrize(
    "name", ["os:system; rm", "a b:c", ":net", "nets:", "../nets:net", "nets:net:net", "nets.:f"]
)
def test_what_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(OptionError, match=r"expected package\.module:factory"):
        factory.allow(name)
    with pytest.raises(OptionError, match="is code of its own"):
        build(name, **ARGUMENTS)


def test_checkpoints_of_ours_need_no_name(digits_checkpoint: Checkpoint) -> None:
    assert digits_checkpoint.network()(torch.zeros(1, 1, 8, 8)).shape == (1, 10)
