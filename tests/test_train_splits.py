from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.errors import FileError, OptionError
from tests.image_folders import write_digits
from train.data import names, splits

ROOT = Path(__file__).parents[1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_digits(tmp_path / "mine", {"zero": 30, "one": 20, "two": 3})


@given(st.integers(3, 2000), st.integers(0, 5))
def test_a_class_is_split_80_10_10_without_overlap(count: int, seed: int) -> None:
    names = tuple(f"cat/{i}.png" for i in range(count))
    train, val, test = splits._shares(names, seed)
    assert sorted((*train, *val, *test)) == sorted(names)
    assert len(val) == len(test) == max(1, round(count / 10))
    assert len(train) >= 1


@given(st.integers(3, 200), st.floats(0, 0.5))
def test_the_share_that_tests_can_be_chosen(count: int, share: float) -> None:
    names = tuple(f"cat/{i}.png" for i in range(count))
    parts = splits._shares(names, 0, share)
    assert sorted(name for part in parts for name in part) == sorted(names)
    assert len(parts[1]) == max(1, round(count / 10))
    assert len(parts[2]) == min(max(1, round(count * share)), count - len(parts[1]) - 1)
    # More test images leave those of a smaller share where they are.
    assert set(splits._shares(names, 0, share / 2)[2]) <= set(parts[2])


def test_a_split_depends_on_seed_and_names_alone(folder: Path, tmp_path: Path) -> None:
    split = splits.find(f"folder:{folder}")
    assert split.classes == ("one", "two", "zero")
    assert [len(split.part(part)[0]) for part in splits.PARTS] == [16 + 1 + 24, 2 + 1 + 3, 2 + 1 + 3]
    assert split.part("test")[1] == [0, 0, 1, 2, 2, 2]
    moved = shutil.copytree(folder, tmp_path / "elsewhere" / "mine")
    assert splits.find(f"folder:{moved}").name == split.name == f"folder:mine@{split.digest}"
    assert splits.find(f"folder:{folder}", seed=1).digest != split.digest
    # A new image moves hardly any other from one part to another.
    shutil.copy(folder / "zero" / "000.png", folder / "zero" / "new.png")
    test, again = (set(s.part("test")[0]) for s in (split, splits.find(f"folder:{folder}")))
    assert len(test & again) >= len(test) - 1


def test_a_folders_own_split_is_kept(tmp_path: Path) -> None:
    for part, count in (("Train", 9), ("valid", 4), ("test", 5)):
        write_digits(tmp_path / "own" / part, {"cat": count, "dog": count})
    (tmp_path / "own" / ".cache").mkdir()
    split = splits.find(f"folder:{tmp_path / 'own'}")
    assert split.seed is None
    assert [len(split.part(part)[0]) for part in splits.PARTS] == [18, 8, 10]
    assert split.part("val")[0][0] == str(tmp_path / "own" / "valid" / "cat" / "000.png")


def listed(split: splits.Split) -> set[str]:
    return {name for part in split.files.values() for names in part.values() for name in names}


def test_no_image_vanishes_and_none_sneaks_in(folder: Path, tmp_path: Path) -> None:
    two = folder / "two"
    image = next((folder / "zero").iterdir())
    used = ["photo.jfif", "photo.JPE", "photo.tga", "photo.jp2", "photo.avif", "photo.heic", "without_suffix"]
    hidden = [".thumbs/1.png", ".ipynb_checkpoints/000.png", "__MACOSX/1.png", "@eaDir/1.png", ".DS_Store.png"]
    for name in (*used, *hidden, "below/deeper/1.png", "notes.txt.orig"):
        (two / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(image, two / name)
    (two / "notes.txt").write_text("which digits these are")
    (two / "broken.png").symlink_to(tmp_path / "nowhere.png")
    elsewhere = write_digits(tmp_path / "elsewhere", {"more": 2}) / "more"
    (two / "linked").symlink_to(elsewhere, target_is_directory=True)
    (elsewhere / "again").symlink_to(two, target_is_directory=True)  # a circle
    write_digits(folder, {"_background": 4})
    split = splits.find(f"folder:{folder}")
    assert split.classes == ("_background", "one", "two", "zero")
    found = {name.removeprefix("two/") for name in listed(split) if name.startswith("two/")}
    assert found == {
        *used, "000.png", "001.png", "002.png", "below/deeper/1.png", "notes.txt.orig", "broken.png",
        "linked/000.png", "linked/001.png",
    }  # fmt: skip


def test_a_class_without_images_and_a_part_of_two_names_are_errors(folder: Path, tmp_path: Path) -> None:
    (folder / "three").mkdir()
    (folder / "three" / "notes.txt").write_text("to come")
    with pytest.raises(FileError, match="three: 0 images, expected 3 at least"):
        splits.find(f"folder:{folder}")
    for part in ("train", "val", "valid", "test"):
        write_digits(tmp_path / "own" / part, {"cat": 3, "dog": 3})
    with pytest.raises(
        FileError, match=r"own: val/ and valid/ are one part; merge them, or move one of them away"
    ):
        splits.find(f"folder:{tmp_path / 'own'}")
    assert splits.find(f"folder:{write_digits(tmp_path / 'v', {'val': 3, 'valid': 3})}").classes == (
        "val",
        "valid",
    )


def test_train_may_be_a_class(tmp_path: Path) -> None:
    split = splits.find(f"folder:{write_digits(tmp_path / 'v', {'car': 3, 'train': 3})}")
    assert (split.classes, split.seed) == (("car", "train"), 0)


def test_a_split_travels_through_its_file(folder: Path, tmp_path: Path) -> None:
    split = splits.find(f"folder:{folder}", seed=3)
    splits.write(split, tmp_path / "split.json")
    assert splits.read(tmp_path / "split.json") == split


@pytest.mark.parametrize(
    "change", [{"format": "other"}, {"version": 2}, {"files": {"train": {}}}, {"classes": None}]
)
def test_other_files_are_no_split(folder: Path, tmp_path: Path, change: dict[str, object]) -> None:
    path = tmp_path / "split.json"
    splits.write(splits.find(f"folder:{folder}"), path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(FileError, match=r"split\.json: no list of training and test images, expected"):
        splits.read(path)


def test_a_split_cannot_name_files_outside_its_folder(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "split.json"
    splits.write(splits.find(f"folder:{folder}"), path)
    path.write_text(path.read_text().replace("one/000.png", "../../secret.png"))
    with pytest.raises(FileError, match="no list of training and test images"):
        splits.read(path)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ({}, "mine: no such folder, expected a folder for each class"),
        ({"cat": 4}, "mine: holds the single folder cat/, expected a folder for each class"),
        ({"cat": 4, "dog": 2}, "dog: 2 images, expected 3 at least to split them into train, val and test"),
        ({"train/cat": 4, "train/dog": 4}, r"mine: has train/ but no test/; add test/ \(or rename val/\)"),
        ({"train/cat": 4, "train/dog": 4, "test/cow": 1}, r"test: class folder 'cow' is not in train/; rename it"),
        ({"train/cat": 4, "test/cat": 1}, "train: 1 class folders, expected a folder for each class"),
        ({"train/cat": 4, "train/dog": 4, "test/cat": 1, "raw/x": 1}, "raw/ stands beside train/ and test/"),
    ],
)
def test_wrong_layouts_are_explained_in_one_line(tmp_path: Path, made: dict[str, int], message: str) -> None:
    if made:
        write_digits(tmp_path / "mine", made)
    with pytest.raises(FileError, match=message) as caught:
        splits.find(f"folder:{tmp_path / 'mine'}")
    assert "\n" not in str(caught.value)


def test_images_without_class_folders_are_explained(folder: Path) -> None:
    with pytest.raises(
        FileError, match="zero: holds images but no class folders, expected a folder for each class"
    ):
        splits.find(f"folder:{folder / 'zero'}")


def test_kvasir_is_its_eight_classes(tmp_path: Path) -> None:
    classes = names.NAMED["kvasir"].names
    folder = write_digits(tmp_path / "kvasir-dataset-v2", dict.fromkeys(classes, 10))
    split = splits.find("kvasir", tmp_path)
    assert split.classes == classes
    assert split.name == f"kvasir@{split.digest}"
    assert [len(split.part(part)[0]) for part in splits.PARTS] == [64, 8, 8]
    shutil.move(folder / "polyps", folder / "polyp")
    with pytest.raises(
        FileError, match=r"8 class folders \(unexpected: polyp\), expected the 8 of kvasir; unpack kv"
    ):
        splits.find("kvasir", tmp_path)
    shutil.rmtree(folder / "polyp")
    with pytest.raises(FileError, match=r"7 class folders \(missing: polyps\), expected the 8 of kvasir"):
        splits.find("kvasir", tmp_path)
    shutil.rmtree(folder)
    with pytest.raises(
        FileError, match=r"holds no kvasir, expected the folder kvasir-dataset-v2; unpack kvasir-data"
    ):
        splits.find("kvasir", tmp_path)


def test_caltech101_is_without_its_clutter(tmp_path: Path) -> None:
    folder = tmp_path / "caltech101" / "101_ObjectCategories"
    write_digits(folder, {f"object{i:03}": 3 for i in range(101)} | {"BACKGROUND_Google": 3})
    split = splits.find("caltech101", tmp_path)
    assert len(split.classes) == 101
    assert "BACKGROUND_Google" not in split.classes
    shutil.rmtree(folder / "object050")
    with pytest.raises(FileError, match="100 class folders, expected the 101 of caltech101; unpack 101_Object"):
        splits.find("caltech101", tmp_path)


def test_no_other_names_are_folders() -> None:
    with pytest.raises(
        OptionError, match="data set 'imagenet': expected folder:PATH or one of kvasir, caltech101"
    ):
        splits.find("imagenet")


def test_splits_and_decoding_need_no_torch() -> None:
    code = """
import sys
sys.modules["torch"] = None
import train.data.decoding, train.data.splits
print("imported")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("imported\n", "")
