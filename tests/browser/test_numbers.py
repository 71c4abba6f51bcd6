"""The page in a real browser: the same pictures, classes and maps as here."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bench.measure.chromium import opened as opened_page
from bench.measure.chromium import run_all
from bench.networks.codes import differences, with_codes
from deploy.web.page import write_page
from export.pipeline import export
from runtime import Classifier
from runtime.explanations.agreement import spearman
from runtime.images import load_image, to_batch
from runtime.manifest import ImageInput
from runtime.session import open_session
from tests.browser.answers import encoded, shown
from train.checkpoint import Checkpoint
from train.data import datasets
from train.data.images import ImageData

pytestmark = pytest.mark.browser
ROOT = Path(__file__).parents[2]
# Some codes next to a tie round to the neighbour where floats are added in another order: see
# tests/test_runtime_explain.py. Such a code moves logits by 1e-3 and more.
TIED = 1e-4


_ALL = """async (files) => {
  const { readPicture } = await import("./picture.js");
  const { toModel } = await import("./resizing.js");
  const { openModel } = await import("./model.js");
  const described = await (await fetch("model.json")).json();
  const model = await openModel(described, "wasm");
  const found = [];
  for (const file of files) {
    const picture = await readPicture(new Blob([Uint8Array.from(atob(file), (letter) => letter.charCodeAt(0))]));
    const image = await toModel(picture, described.manifest.input);
    picture.close();
    const { logits, probabilities, map } = await model.explain(image, -1);
    found.push([[...image], [...logits], [...probabilities], [...map]]);
  }
  return found;
}"""


@pytest.mark.parametrize(("data", "n"), [("mnist", 1000), ("cifar10", 200)])
def test_classes_logits_and_maps_are_those_of_the_same_file_here(
    data: str, n: int, exported: dict[str, Path], pages: dict[str, str], opened: Callable[..., Any]
) -> None:
    loaded: ImageData = datasets.load(data, str(ROOT / "data"))
    pixels = loaded.test_images[:n].permute(0, 2, 3, 1).numpy()
    files = [base64.b64encode(encoded(Image.fromarray(image.squeeze()))).decode() for image in pixels]
    page = opened(pages[data], ready=False, bypass_csp=True)
    found = [result for start in range(0, n, 100) for result in page.evaluate(_ALL, files[start : start + 100])]
    images, logits, probabilities, maps = (np.array(part) for part in zip(*found, strict=True))
    assert np.array_equal(images.reshape(pixels.shape), pixels)
    classifier = Classifier(exported[data], engine="ort", threads=1)
    explained = classifier.explain(pixels)
    assert np.array_equal(logits.argmax(1), explained.logits.argmax(1))
    far = np.abs(logits - explained.logits).max(1) / np.abs(explained.logits).max(1)
    same = far < TIED
    assert same.mean() >= {"mnist": 1.0, "cifar10": 0.85}[data]
    expected = np.abs(explained.attribution).max(1).reshape(n, -1)
    differences = np.abs(maps - expected).max(1) / expected.max(1)
    assert differences[same].max() < 1e-3
    predictions = classifier.predict(pixels)
    certain = [p.probability for p in predictions]
    assert np.abs(probabilities.max(1) - certain)[same].max() < 1e-4


def test_logits_and_maps_are_off_only_where_a_code_moved(
    exported: dict[str, Path], browser: Any, tmp_path: Path
) -> None:
    data, names = with_codes(exported["cifar10"].read_bytes())
    model = tmp_path / "codes.onnx"
    model.write_bytes(data)
    images = (
        datasets.load("cifar10", str(ROOT / "data")).test_images[:100].permute(0, 2, 3, 1).contiguous().numpy()
    )
    outputs = ("logits", "saliency", *names)
    session = open_session(data, engine="ort", threads=1)
    expected = session.run({"image": images, "target": np.full(len(images), -1, np.int64)}, outputs)
    with opened_page(write_page(model, tmp_path / "page", webgpu=False).folder, browser) as page:
        parts = [run_all(page, images[start : start + 20], outputs) for start in range(0, len(images), 20)]
    found = {name: np.concatenate([part[name] for part in parts]) for name in outputs}
    row = differences(expected, found)
    assert row.codes > 100_000 * len(images)
    assert row.classes_differing == 0
    # ResNet-20's residual sums are in float: beside a rounding tie another order of a sum moves a code.
    assert row.images_with_moved_codes <= 0.15 * len(images)
    assert row.logits_of_equal_codes is not None
    assert row.map_of_equal_codes is not None
    assert row.logits_of_equal_codes < TIED
    assert row.map_of_equal_codes < 1e-3


_ON_WEBGPU = """async (images) => {
  const { openModel } = await import("./model.js");
  const model = await openModel(await (await fetch("model.json")).json(), "webgpu");
  const found = [];
  for (const image of images) {
    const { logits, map } = await model.explain(Uint8Array.from(image), -1);
    found.push([[...logits], [...map]]);
  }
  return [await model.check(), found];
}"""


def test_webgpu_computes_the_same_on_a_software_adapter(
    exported: dict[str, Path], pages: dict[str, str], browser: Any
) -> None:
    images = datasets.load("mnist", str(ROOT / "data")).test_images[:5, 0].numpy()
    flags = ["--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan",
             "--use-vulkan=swiftshader", "--ignore-gpu-blocklist"]  # fmt: skip
    started = browser.browser_type.launch(
        executable_path=shutil.which("chromium") or shutil.which("google-chrome"), args=["--no-sandbox", *flags]
    )
    page = started.new_context(bypass_csp=True).new_page()
    page.goto(f"{pages['mnist']}icon.svg")
    difference, found = page.evaluate(_ON_WEBGPU, [image.ravel().tolist() for image in images])
    started.close()
    assert difference < 1e-5
    explained = Classifier(exported["mnist"], engine="ort", threads=1).explain(images)
    logits, maps = (np.array(part) for part in zip(*found, strict=True))
    assert np.abs(logits - explained.logits).max() < 1e-5 * np.abs(explained.logits).max()
    expected = np.abs(explained.attribution).max(1).reshape(len(images), -1)
    assert (np.abs(maps - expected).max(1) < 1e-4 * expected.max(1)).all()


_CAM = """async ([image, output]) => {
  const { openModel } = await import("./model.js");
  const model = await openModel(await (await fetch("model.json")).json(), "wasm");
  const { map, height, width } = await model.explain(Uint8Array.from(image), -1, output);
  return [[...map], height, width];
}"""


def test_grad_cam_is_that_of_the_same_file_here(
    digits_checkpoint: Checkpoint, digits: ImageData, serve: Callable[[Path], str], opened: Callable[..., Any],
    tmp_path: Path,
) -> None:  # fmt: skip
    model = tmp_path / "cam.onnx"
    model.write_bytes(export(digits_checkpoint, target="ort", cams=[("gradcam", "")]).data)
    image = digits.test_images[0, 0].numpy()
    with Classifier(model, engine="ort", threads=1) as classifier:
        (cam,) = classifier.manifest.cams
        expected = classifier.explain(image, method="gradcam").attribution[0]
    address = serve(write_page(model, tmp_path / "page", webgpu=False).folder)
    page = opened(address, ready=False, bypass_csp=True)
    found, height, width = page.evaluate(_CAM, [image.ravel().tolist(), cam.output])
    assert (height, width) == expected.shape
    assert np.ptp(expected) > 0
    assert np.abs(np.reshape(found, expected.shape) - expected).max() < 1e-4 * expected.max()
    # A person chooses it by its name and layer.
    page = opened(address)
    page.set_input_files(
        "#file", {"name": "0.png", "mimeType": "image/png", "buffer": encoded(Image.fromarray(image))}
    )
    shown(page)
    page.select_option("#method", label=f"Grad-CAM, {cam.layer}")
    page.locator("#overlay").wait_for()
    assert "ms for class and map" in page.text_content("#times")


def odd_pictures() -> dict[str, bytes]:
    """Return files that a person may drop, by name."""
    rng = np.random.default_rng(0)
    # Smooth, as photographs are, and of odd sizes.
    image = Image.fromarray(rng.integers(0, 256, (9, 8, 3), dtype=np.uint8)).resize(
        (61, 47), Image.Resampling.BICUBIC
    )
    clear = image.convert("RGBA")
    clear.putalpha(Image.fromarray(rng.integers(0, 256, (47, 61), dtype=np.uint8)))
    files = {
        "grey": encoded(image.convert("L")),
        "palette": encoded(image.convert("P")),
        "one bit": encoded(image.convert("1")),
        "transparent": encoded(clear),
        "grey and transparent": encoded(clear.convert("LA")),
        "transparent WebP": encoded(clear, "WEBP", lossless=True, exact=True),
        "JPEG": encoded(image, "JPEG", quality=75, subsampling=2),
        "JPEG 4:4:4": encoded(image, "JPEG", quality=95, subsampling=0),
        "progressive JPEG": encoded(image, "JPEG", progressive=True),
        "grey JPEG": encoded(image.convert("L"), "JPEG"),
        "CMYK": encoded(image.convert("CMYK"), "JPEG"),
        "WebP": encoded(image, "WEBP", quality=80),
        "GIF": encoded(image, "GIF"),
        "BMP": encoded(image, "BMP"),
        "AVIF": encoded(image, "AVIF"),
        "one pixel": encoded(image.crop((5, 5, 6, 6))),
        "a column": encoded(image.crop((5, 0, 6, 47))),
        "a row": encoded(image.crop((0, 5, 61, 6))),
        "wide": encoded(image.resize((2500, 3))),
        "large": encoded(image.resize((2300, 2111), Image.Resampling.BICUBIC), "JPEG"),
    }
    exif = Image.Exif()
    for orientation in range(1, 9):
        exif[0x0112] = orientation
        for kind in ("JPEG", "PNG", "WEBP"):
            files[f"{kind} {orientation}"] = encoded(image, kind, exif=exif)
    return files


_PREPARED = """async ([files, input]) => {
  const { readPicture } = await import("./picture.js");
  const { toModel } = await import("./resizing.js");
  const found = [];
  for (const file of files) {
    const picture = await readPicture(new Blob([Uint8Array.from(atob(file), (letter) => letter.charCodeAt(0))]));
    found.push([...(await toModel(picture, input))]);
    picture.close();
  }
  return found;
}"""


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("size", "resize"), [((28, 28), "bilinear"), ((40, 24), "crop"), ((64, 96), "bilinear")])
def test_odd_pictures_are_prepared_as_here_within_one_level(
    size: tuple[int, int], resize: str, channels: int, pages: dict[str, str], opened: Callable[..., Any],
    tmp_path: Path,
) -> None:  # fmt: skip
    files = odd_pictures()
    page = opened(pages["mnist"], ready=False, bypass_csp=True)
    wanted = {"size": size, "channels": channels, "resize": resize}
    coded = [base64.b64encode(file).decode() for file in files.values()]
    expected_input = ImageInput(size, channels, (0.5,) * channels, (0.5,) * channels, resize)
    for (name, file), found in zip(files.items(), page.evaluate(_PREPARED, [coded, wanted]), strict=True):
        (tmp_path / "picture").write_bytes(file)
        expected = to_batch(load_image(tmp_path / "picture"), expected_input)[0]
        assert np.abs(np.reshape(found, expected.shape) - expected.astype(int)).max() <= 1, name


_SMOOTH = """async ([image, samples]) => {
  const { openModel } = await import("./model.js");
  const model = await openModel(await (await fetch("model.json")).json(), "wasm");
  let last;
  for await (last of model.smoothgrad(Uint8Array.from(image), -1, samples, 0.15));
  return [...last.map];
}"""


def test_smoothgrad_is_the_same_method_with_other_noise(
    pages: dict[str, str], opened: Callable[..., Any], exported: dict[str, Path]
) -> None:
    image = datasets.load("mnist", str(ROOT / "data")).test_images[0, 0].numpy()
    page = opened(pages["mnist"], ready=False, bypass_csp=True)
    found = np.reshape(page.evaluate(_SMOOTH, [image.ravel().tolist(), 128]), (1, 28, 28))
    classifier = Classifier(exported["mnist"], engine="ort", threads=1)
    other, plain = (
        classifier.explain(image[None], method="smoothgrad", samples=128, seed=seed).map for seed in (0, 1)
    )
    # As near to ours as ours with one noise to ours with another.
    assert spearman(found, other)[0] > spearman(plain, other)[0] - 0.02


def test_a_browser_that_computes_other_numbers_shows_none(
    exported: dict[str, Path], serve: Callable[[Path], str], opened: Callable[..., Any], tmp_path: Path
) -> None:
    folder = write_page(exported["mnist"], tmp_path / "page", webgpu=False).folder
    described = json.loads((folder / "model.json").read_text())
    described["check"][0]["logits"] = [value * 1.2 for value in described["check"][0]["logits"]]
    (folder / "model.json").write_text(json.dumps(described))
    page = opened(serve(folder), ready=False)
    page.locator(
        "#problem", has_text="This browser computes other numbers than where the page was made ("
    ).wait_for()
    assert page.text_content("#state") == "The network does not run in this browser."
