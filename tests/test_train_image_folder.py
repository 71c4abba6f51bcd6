from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch

from runtime.errors import FileError, OptionError
from tests.image_folders import write_digits
from train import checkpoint as checkpoints
from train import loop
from train.__main__ import main
from train.data import datasets, names, splits
from train.data.folders import Reading
from train.data.images import FileImages, stream
from train.recipe import Recipe, default_recipe

COUNTS = {"zero": 60, "one": 40, "two": 20}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three digits, of them two images that cannot be read."""
    folder = write_digits(tmp_path_factory.mktemp("data") / "mine", COUNTS)
    (folder / "one" / "broken.png").write_bytes(b"no image")
    whole = (folder / "zero" / "000.png").read_bytes()
    (folder / "zero" / "cut.png").write_bytes(whole[: len(whole) // 2])
    return folder


def arguments(folder: Path, runs: Path, *more: str) -> list[str]:
    given = ["--data", f"folder:{folder}", "--image-size", "16", "--runs", str(runs), "--name", "a",
             "--epochs", "3", "--bits", "4", "--batch-size", "16"]  # fmt: skip
    return [*given, *more]


def test_images_in_memory_and_in_files_are_the_same(folder: Path) -> None:
    kept = datasets.load(f"folder:{folder}", reading=Reading(16))
    streamed = datasets.load(f"folder:{folder}", reading=Reading(16, memory_bytes=0, workers=2))
    assert isinstance(kept.train_images, torch.Tensor)
    assert isinstance(streamed.train_images, FileImages)
    assert kept.train_images.shape == streamed.train_images.shape == (len(kept.train_labels), 3, 16, 16)
    for part in ("train", "val", "test"):
        assert torch.equal(getattr(kept, f"{part}_images"), getattr(streamed, f"{part}_images")[:])
        assert torch.equal(getattr(kept, f"{part}_labels"), getattr(streamed, f"{part}_labels"))
    assert kept.input_spec() == streamed.input_spec()
    indices = [torch.tensor([3, 1, 1]), torch.tensor([50]), torch.arange(20)]
    for (index, pixels), expected in zip(stream(streamed.train_images, indices), indices, strict=True):
        assert torch.equal(index, expected)
        assert torch.equal(pixels, kept.train_images[expected])
    streamed.train_images.decoder.close()


def test_unreadable_images_are_skipped_by_name_or_stop_the_run(folder: Path) -> None:
    loaded = datasets.load(f"folder:{folder}", reading=Reading(16))
    assert loaded.split is not None
    assert loaded.split.skipped is not None
    assert set(loaded.split.skipped) == {"one/broken.png", "zero/cut.png"}
    labels = (loaded.train_labels, loaded.val_labels, loaded.test_labels)
    assert sum(len(part) for part in labels if part is not None) == sum(COUNTS.values())
    with pytest.raises(FileError, match=r"(broken|cut)\.png: .*; 2 such images; remove it, or leave out --strict"):
        datasets.load(f"folder:{folder}", reading=Reading(16, strict=True))
    # Those known from before are not tried again; a new one is no longer the same data.
    assert (
        datasets.load(f"folder:{folder}", reading=Reading(16, split=loaded.split, strict=True)).name == loaded.name
    )
    split = dataclasses.replace(loaded.split, skipped={"one/broken.png": ""})
    with pytest.raises(FileError, match=r"cut\.png: .*; 1 such images; restore it"):
        datasets.load(f"folder:{folder}", reading=Reading(16, split=split))


def test_a_class_without_readable_images_is_refused(tmp_path: Path) -> None:
    folder = write_digits(tmp_path / "mine", {"cat": 3, "dog": 3})
    for path in (folder / "dog").iterdir():
        path.write_bytes(b"")
    with pytest.raises(FileError, match="mine: no readable training image of class 'dog', expected some"):
        datasets.load(f"folder:{folder}", reading=Reading(16))


EVERYTHING = [
    "--flip", "--rotate-degrees", "10", "--color-jitter", "0.3", "--method", "smoot", "--class-weights"
]  # fmt: skip


@pytest.fixture(scope="module")
def straight(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> checkpoints.Checkpoint:
    """A run that was never interrupted, with its images in memory."""
    runs = tmp_path_factory.mktemp("straight")
    main(arguments(folder, runs, *EVERYTHING))
    return checkpoints.load(runs / "a" / "ckpt.pt")


@pytest.mark.parametrize("options", [["--workers", "0"], ["--memory-gib", "0", "--workers", "2"]], ids=str)
def test_an_interrupted_run_on_a_folder_resumes_bit_for_bit(
    folder: Path, straight: checkpoints.Checkpoint, tmp_path: Path, options: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    assert straight.history[-1]["val_accuracy"] > 30

    real = checkpoints.save

    def saved_then_interrupted(checkpoint: checkpoints.Checkpoint, path: Path) -> None:
        real(checkpoint, path)
        if len(checkpoint.history) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop.checkpoints, "save", saved_then_interrupted)
    with pytest.raises(KeyboardInterrupt):
        main(arguments(folder, tmp_path, *EVERYTHING, *options))
    monkeypatch.setattr(loop.checkpoints, "save", real)
    assert splits.read(tmp_path / "a" / "split.json").digest == straight.recipe.split
    main(["--resume", str(tmp_path / "a"), *options])
    resumed = checkpoints.load(tmp_path / "a" / "ckpt.pt")
    assert all(torch.equal(value, resumed.state_dict[key]) for key, value in straight.state_dict.items())
    assert torch.equal(straight.guidance["percent"], resumed.guidance["percent"])


def test_a_run_keeps_its_split_when_the_folder_grows(folder: Path, tmp_path: Path) -> None:
    grown = shutil.copytree(folder, tmp_path / "mine")
    main(arguments(grown, tmp_path, "--epochs", "1"))
    for number in range(20):
        shutil.copy(grown / "one" / "000.png", grown / "one" / f"new{number}.png")
    main(["--resume", str(tmp_path / "a")])
    (grown / "one" / "001.png").unlink()
    with pytest.raises(FileError, match=r"001\.png: no such file; check the path; 1 such images; restore it"):
        main(["--resume", str(tmp_path / "a")])
    splits.write(splits.find(f"folder:{grown}"), tmp_path / "a" / "split.json")
    with pytest.raises(FileError, match=r"split\.json: split \w+, expected the checkpoint's \w+; restore it"):
        main(["--resume", str(tmp_path / "a")])


def test_the_run_says_what_it_reads_and_skips(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(arguments(folder, tmp_path, "--epochs", "1", "--split-seed", "4"))
    out = capsys.readouterr().out
    assert "(train, val, test; split with seed 4), 16 pixels square" in out
    assert "skipped  one/broken.png: cannot be read as an image (not an image file)" in out
    assert "skipped  2 images that cannot be read, listed in split.json" in out
    assert "val " in out
    with pytest.raises(FileError, match="leave out --strict"):
        main(arguments(folder, tmp_path, "--strict", "--overwrite"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data": "digits", "image_size": 32}, "image_size 32 of digits: expected none, its images have one size"),
        ({"data": "folder:x"}, "image_size 0 of folder:x: expected a side in pixels, as in 64"),
        ({"class_weights": True, "balanced_sampling": True}, "balanced_sampling together with class_weights"),
        ({"method": "smoot", "balanced_sampling": True}, "balanced_sampling together with method smoot, which"),
        ({"color_jitter": 1.5}, "color_jitter 1.5: expected a share from 0 to 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Recipe(**{"data": "digits", **values})  # type: ignore[arg-type]


def test_published_folders_have_defaults_of_their_own() -> None:
    kvasir = default_recipe("kvasir", "asg")
    assert (kvasir.image_size, kvasir.flip, kvasir.optimizer) == (224, True, "adam")
    assert kvasir.augmentation.color_jitter == 0.2
    assert default_recipe("folder:/home/me/mine").image_size == 64
    assert dataclasses.replace(default_recipe("folder:/home/me/mine"), split="ab").data_name == "folder:mine@ab"


def test_kvasirs_row_runs_from_its_folders_with_one_command(tmp_path: Path) -> None:
    write_digits(tmp_path / "kvasir-dataset-v2", dict.fromkeys(names.NAMED["kvasir"].names, 10), color=True)
    main(["--recipe", "lavaei2025-kvasir", "--data-root", str(tmp_path), "--runs", str(tmp_path / "runs"),
          "--epochs", "1", "--image-size", "24", "--batch-size", "32"])  # fmt: skip
    checkpoint = checkpoints.load(tmp_path / "runs" / "lavaei2025-kvasir" / "ckpt.pt")
    assert checkpoint.classes == names.NAMED["kvasir"].names
    assert (checkpoint.recipe.method, checkpoint.quant.bits, len(checkpoint.samples["labels"])) == ("asg", 8, 8)
