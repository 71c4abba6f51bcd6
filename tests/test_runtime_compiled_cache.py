from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime import Classifier
from runtime.engines.compiled_cache import SUFFIX, CompiledCache, cache_key, processor_features
from runtime.errors import FileError, OptionError
from runtime.session import Session, open_session
from train.data.images import ImageData

ROOT = Path(__file__).parents[1]
BOTH = ("logits", "saliency")


@pytest.fixture
def inputs(digits: ImageData) -> dict[str, np.ndarray]:
    images = digits.test_images[:5].permute(0, 2, 3, 1).contiguous().numpy()
    return {"image": images, "target": np.full(5, -1, np.int64)}


def opened(model: Path, cache: Path | None, threads: int = 1) -> Session:
    return open_session(model, engine="openvino", threads=threads, cache=cache)


def test_a_second_session_gives_the_same_bits_without_reading_the_graph(
    digits_models: dict[str, Path], inputs: dict[str, np.ndarray], tmp_path: Path
) -> None:
    cache, model = tmp_path / "cache", digits_models["openvino"]
    plain = opened(model, None).run(inputs, BOTH)
    first, second = opened(model, cache), opened(model, cache)
    assert first.outputs == second.outputs == opened(model, None).outputs
    for session in (first, second):
        found = session.run(inputs, BOTH)
        assert all(np.array_equal(found[name], plain[name]) for name in BOTH)
    assert first._model is not None  # type: ignore[attr-defined]
    assert second._model is None  # type: ignore[attr-defined]
    assert len(list(cache.iterdir())) == 1


def test_what_decides_the_compiled_model_has_a_file_of_its_own(
    digits_models: dict[str, Path], inputs: dict[str, np.ndarray], tmp_path: Path
) -> None:
    one = {"image": inputs["image"][:1]}
    opened(digits_models["openvino"], tmp_path).run(one)
    for count, (name, threads, asked, outputs) in enumerate((
        ("openvino", 1, inputs, BOTH), ("openvino", 1, {"image": inputs["image"]}, ("logits",)),
        ("openvino", 2, one, ("logits",)), ("float", 1, one, ("logits",)),
    ), 2):  # fmt: skip
        opened(digits_models[name], tmp_path, threads).run(asked, outputs)
        assert len(list(tmp_path.iterdir())) == count
    opened(digits_models["openvino"], tmp_path).run(one)
    assert len(list(tmp_path.iterdir())) == 5


def test_a_damaged_file_is_compiled_and_written_again(
    digits_models: dict[str, Path], inputs: dict[str, np.ndarray], tmp_path: Path
) -> None:
    model, image = digits_models["openvino"], {"image": inputs["image"]}
    expected = opened(model, tmp_path).run(image)["logits"]
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for damaged in (b"", whole[:-1], whole[: len(whole) // 2], bytes(flipped), b"another program's"):
        path.write_bytes(damaged)
        session = opened(model, tmp_path)
        assert np.array_equal(session.run(image)["logits"], expected)
        assert session._model is not None  # type: ignore[attr-defined]
        again = opened(model, tmp_path)
        assert np.array_equal(again.run(image)["logits"], expected)
        assert again._model is None  # type: ignore[attr-defined]


def test_a_whole_file_that_the_engine_does_not_take_is_compiled_again(
    digits_models: dict[str, Path], inputs: dict[str, np.ndarray], tmp_path: Path
) -> None:
    model, image = digits_models["openvino"], {"image": inputs["image"]}
    expected = opened(model, tmp_path).run(image)["logits"]
    (path,) = tmp_path.iterdir()
    CompiledCache(tmp_path).store(path.name.removesuffix(SUFFIX), b"of an engine that was replaced")
    assert np.array_equal(opened(model, tmp_path).run(image)["logits"], expected)


@given(contents=st.binary(max_size=200), data=st.data())
def test_nothing_comes_back_but_what_was_stored(
    tmp_path_factory: pytest.TempPathFactory, contents: bytes, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("cache")
    cache, key = CompiledCache(folder), cache_key([contents, 1])
    assert cache.load(key) is None
    cache.store(key, contents)
    assert cache.load(key) == contents
    path = folder / f"{key}{SUFFIX}"
    stored = bytearray(path.read_bytes())
    position = data.draw(st.integers(0, len(stored) - 1))
    stored[position] ^= data.draw(st.integers(1, 255))
    path.write_bytes(stored)
    assert cache.load(key) is None


def test_keys_differ_where_parts_do() -> None:
    parts = [("a", "b"), ("ab",), ("a", "b", ""), ("a", 1), ("a", "1"), (("a",), "b")]
    assert len({cache_key(part) for part in parts}) == len(parts)
    if sys.platform == "linux":
        assert len(processor_features().split()) > 3


def test_a_cache_that_cannot_be_written_warns_and_the_model_runs(
    digits_models: dict[str, Path], inputs: dict[str, np.ndarray], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    session = opened(digits_models["openvino"], tmp_path / "file" / "cache")
    with pytest.warns(RuntimeWarning, match=r"^compiled model not kept: .*cannot be written"):
        found = session.run({"image": inputs["image"]})["logits"]
    assert np.array_equal(found, opened(digits_models["openvino"], None).run(inputs, ("logits",))["logits"])


def test_a_file_and_a_folder_of_everybody_are_refused(digits_models: dict[str, Path], tmp_path: Path) -> None:
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.write_text("")
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(FileError, match=f"^cache {file}: is a file, expected a folder; name another$"):
        Classifier(digits_models["openvino"], cache=file)
    with pytest.raises(OptionError, match=f"^cache {folder}: every user may write to it, expected a folder of"):
        Classifier(digits_models["openvino"], cache=folder)


@pytest.mark.parametrize(
    ("mode", "who"), [(0o777, "every user"), (0o757, "every user"), (0o775, "a group"), (0o1777, "every user")]
)
@pytest.mark.parametrize("above", [False, True], ids=["itself", "above"])
def test_a_folder_that_others_can_fill_is_refused(tmp_path: Path, mode: int, who: str, above: bool) -> None:
    place = tmp_path / "place"
    place.mkdir()
    os.chown(place, -1, 12345) if os.geteuid() == 0 else None
    place.chmod(mode)
    folder = place / "cache" if above else place
    if above and mode & 0o1000:  # as /tmp: what lies in it is its owner's
        CompiledCache(folder).store("key", b"contents")
        assert folder.stat().st_mode & 0o777 == 0o700
        return
    if who == "a group" and os.geteuid() != 0:
        pytest.skip("only root can give a folder to a group that it is not in")
    with pytest.raises(OptionError, match=f"^cache {folder}: {who} may write to {place if above else 'it'}, exp"):
        CompiledCache(folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to another user")
def test_a_folder_of_another_user_is_refused_also_where_it_appears_later(tmp_path: Path) -> None:
    cache = CompiledCache(tmp_path / "cache")
    (tmp_path / "cache").mkdir(mode=0o700)
    os.chown(tmp_path / "cache", 12345, -1)
    for use in (lambda: cache.load("key"), lambda: cache.store("key", b"contents")):
        with pytest.raises(OptionError, match=f"^cache {tmp_path}/cache: it belongs to another user, expected"):
            use()
    assert not list((tmp_path / "cache").iterdir())


def test_a_link_is_followed_to_the_folder_that_counts(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "link").symlink_to(tmp_path / "open")
    with pytest.raises(OptionError, match=f"^cache {tmp_path}/link: every user may write to it"):
        CompiledCache(tmp_path / "link")


def test_what_was_used_longest_ago_makes_room(tmp_path: Path) -> None:
    cache = CompiledCache(tmp_path, max_bytes=3500)
    for age, name in enumerate(("a", "b", "c")):
        cache.store(name, bytes(1000))
        os.utime(tmp_path / f"{name}{SUFFIX}", (age, age))
    assert cache.load("a")  # now the one that was used last
    cache.store("d", bytes(1000))
    assert [bool(cache.load(name)) for name in "abcd"] == [True, False, True, True]
    cache.store("large", bytes(5000))
    assert [path.name for path in tmp_path.iterdir()] == [f"large{SUFFIX}"]


def test_onnx_runtime_does_without(digits_models: dict[str, Path], tmp_path: Path) -> None:
    with Classifier(digits_models["ort"], cache=tmp_path / "cache") as classifier:
        classifier.predict(np.zeros((8, 8), np.uint8))
    assert not (tmp_path / "cache").exists()


def test_openvino_is_imported_without_its_converter_which_is_still_there_when_asked_for(
    digits_models: dict[str, Path],
) -> None:
    code = f"""
import sys
from runtime import Classifier
Classifier({str(digits_models["openvino"])!r})
print("openvino.tools.ovc" in sys.modules)
import openvino
try:
    openvino.nothing
except AttributeError as error:
    print(error)
print(callable(openvino.convert_model), "openvino.tools.ovc" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.stdout.splitlines() == ["False", "module 'openvino' has no attribute 'nothing'", "True True"]
