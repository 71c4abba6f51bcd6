from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path

import pytest
import torch

from runtime.errors import FileError, OptionError
from train import checkpoint as checkpoints
from train import loop
from train.checkpoint import Checkpoint
from train.data.images import ImageData
from train.quantization.spec import QuantSpec
from train.recipe import default_recipe


def test_round_trip_keeps_everything(digits_checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "copy.pt"
    checkpoints.save(digits_checkpoint, path)
    again = checkpoints.load(path)
    for name in ("arch", "quant", "input", "classes", "recipe", "history"):
        assert getattr(again, name) == getattr(digits_checkpoint, name)
    assert again.state_dict.keys() == digits_checkpoint.state_dict.keys()
    assert all(torch.equal(again.state_dict[k], v) for k, v in digits_checkpoint.state_dict.items())
    images = again.samples["images"]
    expected = digits_checkpoint.network()(digits_checkpoint.input.normalize(images))
    assert torch.equal(again.network()(again.input.normalize(images)), expected)


def test_accuracy_of_the_samples_is_that_of_real_digits(digits_checkpoint: Checkpoint) -> None:
    images, labels = digits_checkpoint.samples["images"], digits_checkpoint.samples["labels"]
    assert images.shape == (256, 1, 8, 8)
    assert loop.evaluate(digits_checkpoint, digits_checkpoint.network(), images, labels) > 90


def test_samples_of_large_images_stay_small() -> None:
    images = torch.zeros(300, 3, 200, 200, dtype=torch.uint8)
    labels = torch.zeros(300, dtype=torch.int64)
    large = ImageData("digits", ("a", "b"), images, labels, images, labels)
    checkpoint = loop.start("resnet20", large, QuantSpec(32), default_recipe("digits"))
    assert checkpoint.samples["images"].numel() <= 4 << 20


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"nowhere\.pt: no such file; check the path"):
        checkpoints.load(tmp_path / "nowhere.pt")


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.999])
def test_truncated_file(digits_checkpoint_path: Path, tmp_path: Path, share: float) -> None:
    whole = digits_checkpoint_path.read_bytes()
    path = tmp_path / "cut.pt"
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(
        FileError, match=r"cut\.pt: .* bytes that are no complete torch file, expected a checkpoint"
    ):
        checkpoints.load(path)


def test_file_of_another_program(tmp_path: Path) -> None:
    torch.save({"model": torch.zeros(3)}, tmp_path / "other.pt")
    with pytest.raises(FileError, match=r"other\.pt: a torch file of another program, expected a checkpoint"):
        checkpoints.load(tmp_path / "other.pt")


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path(self.target),)  # type: ignore[return-value]

    def __init__(self, target: str) -> None:
        self.target = target


def test_pickled_code_is_refused_and_not_executed(tmp_path: Path) -> None:
    proof = tmp_path / "executed"
    torch.save({"format": "clearpact.checkpoint", "bomb": Bomb(str(proof))}, tmp_path / "bomb.pt")
    with pytest.raises(FileError, match=r"bomb\.pt: holds pickled code, which is never executed"):
        checkpoints.load(tmp_path / "bomb.pt")
    assert not proof.exists()
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Bomb(str(proof))))
    with pytest.raises(FileError, match="no complete torch file"):
        checkpoints.load(tmp_path / "plain.pt")
    assert not proof.exists()


def test_newer_version_is_refused(digits_checkpoint_path: Path, tmp_path: Path) -> None:
    contents = torch.load(digits_checkpoint_path, weights_only=True)
    torch.save(contents | {"version": 99}, tmp_path / "newer.pt")
    with pytest.raises(FileError, match=r"checkpoint version 99, expected 1; use the release that wrote it"):
        checkpoints.load(tmp_path / "newer.pt")
    torch.save(contents | {"quant": {"bits": 8, "shape": "log"}}, tmp_path / "spec.pt")
    with pytest.raises(OptionError, match=r"unknown fields \['shape'\]"):
        checkpoints.load(tmp_path / "spec.pt")


def test_a_channel_that_was_dead_in_version_0_1_stays_dead(digits: ImageData, tmp_path: Path) -> None:
    checkpoint = loop.start("cnn2", digits, QuantSpec(3, "lsq"), default_recipe("digits"))
    name = "conv1.parametrizations.weight"
    checkpoint.state_dict[f"{name}.0.learned_scale"][[1, 3]] = torch.tensor([-0.05, 0.0])
    checkpoints.save(checkpoint, tmp_path / "now.pt")
    contents = torch.load(tmp_path / "now.pt", weights_only=True)
    contents["quant"]["weights"] = contents["quant"].pop("weight_quantizer")
    torch.save(contents, tmp_path / "then.pt")
    now, then = (checkpoints.load(tmp_path / f"{when}.pt") for when in ("now", "then"))
    of_now, of_then = (c.network().conv1.weight.detach().flatten(1).abs().amax(1) for c in (now, then))
    assert (of_then == 0).nonzero().flatten().tolist() == [1, 3]
    assert (of_now > 0).all()
    kept = [0, 2, *range(4, len(of_now))]
    assert torch.equal(of_then[kept], of_now[kept])


def test_a_view_is_saved_without_the_memory_it_lies_in(digits_checkpoint: Checkpoint, tmp_path: Path) -> None:
    checkpoints.save(digits_checkpoint, tmp_path / "own.pt")
    images = torch.zeros(1000, *digits_checkpoint.samples["images"].shape[1:], dtype=torch.uint8)
    count = len(digits_checkpoint.samples["images"])
    images[:count] = digits_checkpoint.samples["images"]
    view = dataclasses.replace(digits_checkpoint, samples=digits_checkpoint.samples | {"images": images[:count]})
    checkpoints.save(view, tmp_path / "view.pt")
    assert (tmp_path / "view.pt").stat().st_size == (tmp_path / "own.pt").stat().st_size
    assert torch.equal(checkpoints.load(tmp_path / "view.pt").samples["images"], images[:count])
