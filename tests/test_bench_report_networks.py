"""The report on networks: what it measures itself, and the page in a real browser."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import html
import io
import json
import math
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from bench.accuracy import checkpoint_logits
from bench.inspect import contents
from bench.layers.statistics import activation_use, layer_statistics, weight_use
from bench.layers.times import kernels
from bench.report.__main__ import main
from bench.report.maps import picture
from export.pipeline import export
from runtime.errors import OptionError
from runtime.files import write_atomically
from tests.html_page import Element, assert_sound, read_page
from train import checkpoint as checkpoints
from train.checkpoint import Checkpoint
from train.data.images import ImageData
from train.quantization.quantize import float_weight, quantize, quantizers
from train.quantization.spec import QuantSpec

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = "<script>document.title='taken'</script>\"'&"


@pytest.fixture(scope="module")
def run(digits_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a hostile class name, its exported file, and a record."""
    folder = tmp_path_factory.mktemp("runs") / "digits-run"
    classes = (HOSTILE, *digits_checkpoint.classes[1:])
    checkpoints.save(dataclasses.replace(digits_checkpoint, classes=classes), folder / "ckpt.pt")
    checkpoint = checkpoints.load(folder / "ckpt.pt")
    sha256 = hashlib.sha256((folder / "ckpt.pt").read_bytes()).hexdigest()
    exported = export(checkpoint, checkpoint_sha256=sha256)
    write_atomically(folder / "ckpt.onnx", exported.model.SerializeToString())
    return folder


@pytest.fixture(scope="module")
def text(run: Path, digits: ImageData, digits_checkpoint: Checkpoint) -> str:
    results = Path(__file__).parents[1] / "bench" / "results"
    output, test = run / "report.html", run.parent / "digits_test.npz"
    np.savez(
        test, images=digits.test_images[:].permute(0, 2, 3, 1).numpy(), labels=digits.test_labels.numpy(),
        classes=np.array([HOSTILE, *digits_checkpoint.classes[1:]]),
    )  # fmt: skip
    main([str(run), str(results), "--data", str(test), "--samples", "64", "--images", "4", "-o", str(output)])
    return output.read_text()


@pytest.fixture(scope="module")
def page(text: str) -> Element:
    root = read_page(text)
    assert_sound(root)
    return root


def section(root: Element, title: str) -> Element:
    (found,) = [s for s in root.find("section") if s.find("h2")[0].text == title]
    return found


def cells(table: Element) -> list[list[str]]:
    return [[cell.text for cell in row.children if isinstance(cell, Element)] for row in table.find("tr")]


def test_every_part_is_there_and_linked(page: Element, text: str) -> None:
    titles = [s.find("h2")[0].text for s in page.find("section")]
    assert titles == [
        "At a glance", "Accuracy against latency", "Latency", "Training", "Masked accuracy", "Maps",
        "Confusion matrix", "Layers", "Environment", "Commands",
    ]  # fmt: skip
    assert [a.text for a in page.find("nav")[0].find("a")] == titles
    assert len(text) < 3_000_000
    assert "<script" not in text


def test_the_pipeline_and_the_figures_that_count(page: Element, run: Path, digits_checkpoint: Checkpoint) -> None:
    glance = section(page, "At a glance")
    stages = {li.find("b")[0].text: [span.text for span in li.find("span")] for li in glance.find("li")}
    assert list(stages) == ["Train", "Checkpoint", "Export", "Model file", "Runtime", "Answer"]
    assert stages["Train"][:2] == ["cnn2 on digits", "method sgt"]
    accuracy = f"{digits_checkpoint.test_accuracy:.2f} %"
    assert stages["Checkpoint"][0] == f"test accuracy {accuracy}"
    assert stages["Model file"][0] == f"{(run / 'ckpt.onnx').stat().st_size / 1e6:.2f} MB"
    assert f"accuracy {accuracy}" in stages["Answer"]
    tiles = {tile.find("span")[0].text: tile.find("b")[0].text for tile in glance.find("div", class_="tile")}
    assert tiles["Test accuracy"] == accuracy
    assert 0.9 < float(tiles["Agreement of maps"]) <= 1


def test_the_confusion_matrix_is_the_engines(page: Element, run: Path, digits: ImageData) -> None:
    first = section(page, "Confusion matrix").find("table")[0]
    found = np.array([[0 if n == "·" else int(n) for n in row[1:]] for row in cells(first)[1:]])
    images = digits.test_images[:].permute(0, 2, 3, 1).contiguous().numpy()
    predicted = checkpoint_logits(str(run / "ckpt.pt"))(images).argmax(1)
    expected = np.zeros((10, 10), int)
    np.add.at(expected, (digits.test_labels.numpy(), predicted), 1)
    assert found.sum() == 360
    assert np.abs(found - expected).sum() <= 4  # a rounding of float sums may change a class or two
    assert [row[0] for row in cells(first)[1:]] == [HOSTILE, *map(str, range(1, 10))]


def test_maps_of_all_three_networks_stand_side_by_side(page: Element) -> None:
    maps = section(page, "Maps")
    cards = maps.find("div", class_="card")
    assert 4 <= len(cards) <= 7  # four classes, and the three that agree least, which may be among them
    for card in cards:
        image, *saliency = card.find("img")
        assert image.attributes["alt"].startswith("Image ")  # type: ignore[union-attr]
        heads = ["the network float", "the network fake-quantized, 8 bit", "the network INT8 on OpenVINO"]
        assert len(saliency) == 3
        for one, head in zip(saliency, heads, strict=True):
            assert head in (one.attributes["alt"] or "")
        drawn = Image.open(io.BytesIO(base64.b64decode((saliency[0].attributes["src"] or "").partition(",")[2])))
        assert drawn.size == (8, 8)
        assert np.asarray(drawn.convert("L")).std() > 5
    assert all("maps agree least" in card.text for card in cards[-3:])
    rows = cells(maps.find("table")[0])
    assert [row[0] for row in rows[1:]] == [
        "float and fake-quantized, 8 bit", "float and INT8 on OpenVINO",
        "fake-quantized, 8 bit and INT8 on OpenVINO",
    ]  # fmt: skip
    assert all(0.9 < float(row[1]) <= 1 for row in rows[1:])
    assert "64 images of digits" in maps.find("caption")[0].text


def test_curves_are_measured_on_the_samples(page: Element) -> None:
    curves = section(page, "Masked accuracy")
    described = curves.find("desc")[0].text
    assert "1: digits-run, float: " in described
    assert "3: digits-run/ckpt.onnx, INT8 on OpenVINO: " in described
    assert "64 images of digits_test.npz, removed pixels black" in curves.find("figcaption")[0].text


def test_layers_have_their_grids_and_times(page: Element, digits_checkpoint: Checkpoint) -> None:
    header, *rows = cells(section(page, "Layers").find("table")[0])
    assert [row[0] for row in rows] == ["conv1", "conv2", "fc1", "fc2"]
    columns = {name: [row[at] for row in rows] for at, name in enumerate(header)}
    assert columns["bits"] == columns["input bits"] == ["8"] * 4
    assert columns["input from"] == ["x_grid", "relu1", "relu2", "relu3"]
    alphas = [digits_checkpoint.history[-1][f"alpha/relu{n}"] for n in (1, 2, 3)]
    assert columns["alpha"] == ["-", *(f"{alpha:.4g}" for alpha in alphas)]
    assert columns["input scale"][1:] == [f"{alpha / 127:.3g}" for alpha in alphas]
    assert columns["input SQNR dB"][0] == "exact"
    assert all(ms.startswith("with ") or float(ms) >= 0 for ms in columns["time ms"])
    assert all(kernel.startswith("INT8 ") for kernel in columns["kernel"])


def test_without_data_the_checkpoints_own_images_serve(run: Path, tmp_path: Path) -> None:
    main([str(run), "-o", str(tmp_path / "report.html"), "--images", "2"])
    root = read_page((tmp_path / "report.html").read_text())
    assert_sound(root)
    assert "images of digits (in the checkpoint)" in section(root, "Maps").find("caption")[0].text
    for title, remedy in (("Masked accuracy", "python -m bench.saliency"), ("Confusion matrix", "--data DATA")):
        assert remedy in section(root, title).find("code")[0].text


def test_a_file_alone_and_one_of_another_run(run: Path, digits_models: dict[str, Path], tmp_path: Path) -> None:
    output = tmp_path / "report.html"
    main([str(digits_models["ort"]), "--data", "digits", "--samples", "8", "--images", "1", "-o", str(output)])
    root = read_page(output.read_text())
    assert_sound(root)
    assert [row[0] for row in cells(section(root, "Layers").find("table")[0])[1:]] == [
        "conv1",
        "conv2",
        "fc1",
        "fc2",
    ]
    assert len(section(root, "Maps").find("img")) == 2
    main([str(run / "ckpt.pt"), str(digits_models["openvino"]), "--images", "1", "-o", str(output)])
    root = read_page(output.read_text())
    assert "Its checkpoint is none of the runs here." in section(root, "At a glance").text
    assert "Exported for this report, for OpenVINO." in section(root, "At a glance").text


def test_wrong_data_and_numbers_are_refused(run: Path, tmp_path: Path) -> None:
    end = ["-o", str(tmp_path / "report.html")]
    with pytest.raises(OptionError, match=r"^--samples 0: expected a whole number from 1$"):
        main([str(run), "--samples", "0", *end])
    with pytest.raises(OptionError, match=r"^--data cifar11: |data set 'cifar11'"):
        main([str(run), "--data", "cifar11", *end])
    assert not (tmp_path / "report.html").exists()


def test_weights_on_a_known_grid() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(2, 3))
    model = quantize(network, QuantSpec(3, first_last_bits=3))
    with torch.no_grad():
        float_weight(model.get_submodule("0")).copy_(torch.tensor([3.0, 1.2]).reshape(2, 1, 1, 1))
        float_weight(model.get_submodule("3")).copy_(torch.tensor([[3.0, 1.25], [1.5, 1.5], [0.0, 3.0]]))
    first = weight_use(model.get_submodule("0"))
    assert first is not None
    assert (first.bits, first.codes_used, first.codes, first.sqnr_db) == (3, 1, 7, math.inf)
    assert first.scale == pytest.approx((0.4, 1.0))
    last = weight_use(model.get_submodule("3"))
    assert last is not None
    # Codes 3 and 1 (of 1.25), 3 and 3, 0 and 3: the only noise is 0.25.
    assert (last.codes_used, last.scale) == (3, pytest.approx((0.5, 1.0)))
    assert last.sqnr_db == pytest.approx(10 * math.log10((9 + 1.5625 + 4.5 + 9) / 0.0625), abs=1e-4)
    assert weight_use(nn.Linear(2, 2)) is None


def test_activations_on_a_known_grid() -> None:
    model = quantize(nn.Sequential(nn.ReLU(), nn.Conv2d(1, 1, 1), nn.Flatten()), QuantSpec(2, first_last_bits=2))
    (pact,) = quantizers(model).values()
    with torch.no_grad():
        pact.alpha.fill_(3.0)
    images = torch.tensor([-2, 0, 1, 5], dtype=torch.float32).reshape(1, 1, 2, 2).repeat(100, 1, 1, 1)
    (found,) = activation_use(model, lambda x: x, images).values()
    assert (found.bits, found.codes_used, found.codes, found.alpha) == (2, 3, 4, 3.0)
    assert found.scale == pytest.approx((1.0, 1.0))
    assert found.clipped_share == 0.25
    assert found.sqnr_db == pytest.approx(10 * math.log10(26 / 4))


def test_statistics_name_every_layer_of_a_residual_network(
    resnet_checkpoint: Checkpoint, digits: ImageData
) -> None:
    rows = layer_statistics(resnet_checkpoint, digits.test_images[:4])
    assert [row.weight.bits for row in rows if row.weight] == [8, *[4] * (len(rows) - 2), 8]
    assert all(row.input is not None and row.quantizer for row in rows)
    assert rows[0].shape[:2] == (16, 1)


@pytest.mark.parametrize("engine", ["openvino", "ort"])
def test_engines_tell_the_time_of_every_product(digits_models: dict[str, Path], engine: str) -> None:
    model = digits_models[engine].read_bytes()
    found = kernels(model, engine, np.zeros((1, 8, 8, 1), np.uint8))
    products = [p.node for p in contents(model, engine).products if p.part == "forward"]
    assert len(products) == 4
    computed = [node for kernel in found for node in kernel.nodes if node]
    assert set(products) <= set(computed)
    assert all(0 <= kernel.ms < 100 for kernel in found)
    assert sum(kernel.ms for kernel in found) > 0
    assert any(kernel.name.startswith("INT8 ") for kernel in found)


def test_large_pictures_are_made_small() -> None:
    grey = np.random.default_rng(0).integers(0, 256, (300, 200, 3), dtype=np.uint8)
    (image,) = read_page(picture(grey, "noise")).find("img")
    assert (image.attributes["width"], image.attributes["height"]) == ("75", "112")


PROBE = """
function luminance(color) {
  const [r, g, b] = color.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
function behind(element) {
  for (let e = element; e; e = e.parentElement) {
    const color = e.ownerDocument.defaultView.getComputedStyle(e).backgroundColor;
    if (/^rgb\\(/.test(color)) return color;
    if (/color|rgba\\(.*0\\.[1-9]/.test(color)) return null;  // tinted cells
  }
}
window.onload = () => {
  const found = [...document.querySelectorAll('iframe')].map(frame => {
    const page = frame.contentDocument, view = frame.contentWindow, contrasts = [];
    for (const element of page.body.querySelectorAll('*')) {
      const own = [...element.childNodes].some(n => n.nodeType === 3 && n.data.trim());
      if (!own || element.closest('title, desc')) continue;
      const style = view.getComputedStyle(element), back = behind(element);
      const front = element.closest('svg') ? style.fill : style.color;
      if (!back) continue;
      const [a, b] = [luminance(front), luminance(back)].sort((x, y) => y - x);
      contrasts.push([(a + 0.05) / (b + 0.05), element.tagName, element.textContent.slice(0, 40)]);
    }
    return {
      width: frame.clientWidth, scrolls: page.documentElement.scrollWidth, title: page.title,
      background: view.getComputedStyle(page.body).backgroundColor, contrasts: contrasts.length,
      least: contrasts.sort((x, y) => x[0] - y[0])[0],
      pictures: page.querySelectorAll('svg').length,
      empty: [...page.querySelectorAll('svg, img')].filter(e => !e.closest('details') &&
        (e.getBoundingClientRect().width < 20 || e.naturalWidth === 0)).length,
      smallest: Math.min(...[...page.querySelectorAll('svg text')].filter(e => !e.closest('details'))
        .map(e => [parseFloat(view.getComputedStyle(e).fontSize), e.getScreenCTM()])
        .map(([size, shown]) => size * Math.hypot(shown.a, shown.b))),
      elements: page.querySelectorAll('*').length,
    };
  });
  document.getElementById('found').textContent = JSON.stringify(found);
};
"""


@pytest.fixture(scope="module", params=["light", "dark"])
def seen(request: pytest.FixtureRequest, text: str, run: Path) -> tuple[str, list[dict[str, Any]], str]:
    """What a browser finds on the page at three widths, and what it says on its console."""
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine; apt-get install chromium")
    frames = "".join(
        f'<iframe style="width: {width}px; height: 800px; border: 0" srcdoc="{html.escape(text)}"></iframe>'
        for width in (360, 768, 1200)
    )
    wrapper = run / f"{request.param}.html"
    wrapper.write_text(f"<!DOCTYPE html><pre id=found></pre>{frames}<script>{PROBE}</script>")
    scheme = ("dark", "light").index(request.param)
    done = subprocess.run(
        [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={run / request.param}",
         f"--blink-settings=preferredColorScheme={scheme}", "--enable-logging=stderr",
         "--window-size=1300,2500", "--virtual-time-budget=5000", "--dump-dom", f"file://{wrapper}"],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    _, _, rest = done.stdout.partition('<pre id="found">')
    return request.param, json.loads(html.unescape(rest.partition("</pre>")[0])), done.stderr


def test_a_browser_shows_the_page_whole(seen: tuple[str, list[dict[str, Any]], str], page: Element) -> None:
    scheme, frames, console = seen
    assert "CONSOLE" not in console, console
    assert [frame["width"] for frame in frames] == [360, 768, 1200]
    for frame in frames:
        assert frame["scrolls"] <= frame["width"]  # tables scroll in boxes of their own
        assert frame["title"] == "digits-run"
        assert (frame["pictures"], frame["empty"]) == (len(page.find("svg")), 0)
        assert frame["elements"] == len(page.walk())  # the browser mends nothing
        assert frame["background"] == {"light": "rgb(255, 255, 255)", "dark": "rgb(18, 22, 27)"}[scheme]
        assert frame["contrasts"] > 500
        assert frame["least"][0] >= 4.5, frame["least"]  # WCAG 2.2, AA
        assert frame["smallest"] >= 8.5  # CSS pixels of the letters in pictures
