"""The page's folder, as the command writes it; tests/browser opens it in a browser."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deploy.web.__main__ import main
from deploy.web.page import PROVIDERS, STATIC, pinned_version
from runtime import Classifier
from runtime.errors import FileError, OptionError
from runtime.onnx_bytes import output_names
from train.data.images import ImageData


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A node_modules folder as npm makes it; what the runtime's files hold is not looked at here."""
    folder = tmp_path / "node_modules" / "onnxruntime-web"
    (folder / "dist").mkdir(parents=True)
    (folder / "package.json").write_text(json.dumps({"version": pinned_version()}))
    for names in PROVIDERS.values():
        for name in names:
            (folder / "dist" / name).write_text(name)
    return folder.parent


def test_the_folder_holds_the_same_file_and_all_that_the_page_needs(
    digits_models: dict[str, Path], digits: ImageData, package: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    pictures = [digits.test_images[index, 0].numpy() for index in range(3)]
    for index, picture in enumerate(pictures):
        Image.fromarray(picture).save(tmp_path / f"{index}.png")
    page = tmp_path / "page"
    examples = [str(tmp_path / f"{index}.png") for index in range(3)]
    model = digits_models["ort"]
    main([str(model), "-o", str(page), "--runtime", str(package), "--examples", *examples])
    assert capsys.readouterr().out.startswith(f"{page}: ")
    assert (page / "model.onnx").read_bytes() == model.read_bytes()
    assert output_names((page / "class.onnx").read_bytes()) == ("logits",)
    described = json.loads((page / "model.json").read_text())
    classifier = Classifier(model, engine="ort")
    assert described["sha256"] == hashlib.sha256(model.read_bytes()).hexdigest()
    assert described["manifest"] == json.loads(classifier.manifest.to_json())
    expected = classifier.logits(pictures[:2])
    for checked, picture, logits in zip(described["check"], pictures, expected, strict=False):
        assert base64.b64decode(checked["image"]) == picture.tobytes()
        assert np.array_equal(np.float32(checked["logits"]), logits)
    labels = [prediction.label for prediction in classifier.predict(pictures)]
    assert [e["label"] for e in described["examples"]] == [f"{i + 1}, {label}" for i, label in enumerate(labels)]
    with Image.open(page / described["examples"][2]["file"]) as image:
        assert np.array_equal(np.asarray(image), pictures[2])
    for provider in PROVIDERS:
        for name in ("module", "loader", "wasm"):
            assert (page / described["runtime"][provider][name]).is_file()


def test_the_service_worker_keeps_every_file_and_changes_with_each(
    digits_models: dict[str, Path], package: Path, tmp_path: Path
) -> None:
    pages = [tmp_path / "ort", tmp_path / "float"]
    for page in pages:
        main([str(digits_models[page.name]), "-o", str(page), "--runtime", str(package)])
    scripts = [(page / "sw.js").read_text() for page in pages]
    kept = json.loads(re.search(r"^const FILES = (.*);$", scripts[0], re.MULTILINE)[1])  # type: ignore[index]
    present = {str(path.relative_to(pages[0])) for path in pages[0].rglob("*") if path.is_file()}
    assert set(kept) == present - {"sw.js"} | {"./"}
    versions = [re.search(r"^const VERSION = (.*);$", script, re.MULTILINE)[1] for script in scripts]  # type: ignore[index]
    assert versions[0] != versions[1]


def test_nothing_on_the_page_comes_from_elsewhere() -> None:
    for path in STATIC.iterdir():
        # Names of XML's vocabularies are no addresses that anyone opens.
        text = path.read_text().replace("http://www.w3.org/2000/svg", "")
        assert "//" not in re.sub(r"(?m)^\s*//.*$|\s// .*$|https or", "", text), path.name
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', (STATIC / "index.html").read_text())
    assert policy
    assert policy[1].startswith("default-src 'none'; ")
    assert "http" not in policy[1]


def test_webgpu_can_be_left_out(digits_models: dict[str, Path], package: Path, tmp_path: Path) -> None:
    page = tmp_path / "page"
    main([str(digits_models["ort"]), "-o", str(page), "--runtime", str(package), "--no-webgpu"])
    assert sorted(path.name for path in (page / "runtime").iterdir()) == sorted(PROVIDERS["wasm"])
    assert "webgpu" not in json.loads((page / "model.json").read_text())["runtime"]


def test_a_former_page_is_replaced_and_nothing_else(
    digits_models: dict[str, Path], package: Path, tmp_path: Path
) -> None:
    page = tmp_path / "page"
    arguments = [str(digits_models["ort"]), "-o", str(page), "--runtime", str(package)]
    main(arguments)
    (page / "old.txt").write_text("old")
    main(arguments)
    assert not (page / "old.txt").exists()
    other = tmp_path / "photos"
    other.mkdir()
    (other / "dear.jpg").write_text("dear")
    with pytest.raises(FileError, match=f"^{other}: is there already and no page of this command; name another"):
        main([arguments[0], "-o", str(other), "--runtime", str(package)])
    assert (other / "dear.jpg").read_text() == "dear"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".clearpact")]


def test_an_input_inside_the_output_is_refused(
    digits_models: dict[str, Path], package: Path, tmp_path: Path
) -> None:
    page = tmp_path / "page"
    main([str(digits_models["ort"]), "-o", str(page), "--runtime", str(package)])
    with pytest.raises(
        OptionError, match=f"^--output {page}: holds {page}/model.onnx, which is read; name another"
    ):
        main([str(page / "model.onnx"), "-o", str(page), "--runtime", str(package)])


def test_a_missing_or_another_runtime_is_one_line_that_tells_how_to_get_it(
    digits_models: dict[str, Path], package: Path, tmp_path: Path
) -> None:
    page, model = tmp_path / "page", str(digits_models["ort"])
    with pytest.raises(
        FileError, match=r"onnxruntime-web is not there; run `make web-runtime`, or `npm install onn"
    ):
        main([model, "-o", str(page), "--runtime", str(tmp_path)])
    (package / "onnxruntime-web" / "package.json").write_text('{"version": "1.2.3"}')
    with pytest.raises(FileError, match=f"version 1.2.3, expected {pinned_version()}; run `make web-runtime`"):
        main([model, "-o", str(page), "--runtime", str(package)])
    assert not page.exists()


def test_a_plan_is_refused(package: Path, tmp_path: Path) -> None:
    with pytest.raises(
        OptionError, match=r"^engine.plan: a browser runs ONNX files; name the file that the plan was"
    ):
        main(["engine.plan", "-o", str(tmp_path / "page"), "--runtime", str(package)])
