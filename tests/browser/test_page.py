"""The page in a real browser: what a person does with it, and every mistake told in words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from runtime import Classifier
from tests.browser.answers import encoded, shown
from train.data import datasets

pytestmark = pytest.mark.browser
ROOT = Path(__file__).parents[2]


def test_a_picture_is_chosen_classified_and_explained(
    pages: dict[str, str], opened: Callable[..., Any], exported: dict[str, Path]
) -> None:
    image = datasets.load("mnist", str(ROOT / "data")).test_images[0, 0].numpy()
    page = opened(pages["mnist"])
    page.set_input_files(
        "#file", {"name": "7.png", "mimeType": "image/png", "buffer": encoded(Image.fromarray(image))}
    )
    prediction = Classifier(exported["mnist"]).predict(image)
    assert shown(page) == f"{prediction.label}, {100 * prediction.probability:.1f} %"
    assert "ms for class and map" in page.text_content("#times")
    assert str(page.get_attribute("#overlay", "aria-label")).startswith("Pixels that 7 depends on: ")
    page.select_option("#target", "3")
    page.locator("#where", has_text="Pixels that 3 depends on").wait_for()
    page.select_option("#method", "smoothgrad")
    page.locator("#times", has_text="32 of 32 noisy copies").wait_for()
    page.select_option("#method", "none")
    page.locator("#times", has_text="ms for class,").wait_for()


_TOLD = """() => {
  const state = document.getElementById("state");
  window.told = [state.textContent];
  new MutationObserver(() => window.told.push(state.textContent)).observe(state, { childList: true });
}"""


def test_the_page_says_that_it_works_on_a_large_picture(pages: dict[str, str], opened: Callable[..., Any]) -> None:
    page = opened(pages["mnist"], bypass_csp=True)
    page.evaluate(_TOLD)
    for size in ((40, 30), (2500, 2000)):
        file = encoded(Image.fromarray(np.full((*size, 3), 90, np.uint8)))
        page.set_input_files("#file", {"name": "wall.png", "mimeType": "image/png", "buffer": file})
        if size == (40, 30):
            shown(page)
            assert len(page.evaluate("window.told")) == 1
    page.wait_for_function("window.told.length === 3", timeout=60_000)
    ready, working, again = page.evaluate("window.told")
    assert working == "Working on the picture ..."
    assert again == ready == page.text_content("#state")


BAD = {
    "empty.png": (b"", "empty.png is empty: copy it again."),
    "notes.png": (b"no picture", "notes.png is no picture that this browser can read: save it as PNG or JPEG."),
    "half.jpg": (b"\xff\xd8\xff\xe0\0\x10JFIF", "half.jpg is no picture that this browser can read"),
    "huge.png": (
        b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + (30000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0",
        "huge.png has 30000 x 30000 pixels, at most 89,478,485 are read: make it smaller.",
    ),
    "deep.png": (
        encoded(Image.fromarray(np.full((8, 8), 40000, np.uint16))),
        "deep.png has 16 bits a pixel, expected 8: save it with 8 bits.",
    ),
}


def test_bad_files_are_told_in_words_and_the_next_one_works(
    pages: dict[str, str], opened: Callable[..., Any]
) -> None:
    page = opened(pages["mnist"])
    for name, (content, message) in BAD.items():
        page.set_input_files("#file", {"name": name, "mimeType": "image/png", "buffer": content})
        page.locator("#problem", has_text=message).wait_for(timeout=5000)
    good = encoded(Image.fromarray(np.full((30, 20), 200, np.uint8)))
    page.set_input_files("#file", {"name": "good.png", "mimeType": "image/png", "buffer": good})
    shown(page)
    assert not page.is_visible("#problem")


def test_a_denied_camera_is_told_and_an_allowed_one_is_classified(
    pages: dict[str, str], opened: Callable[..., Any]
) -> None:
    page = opened(pages["cifar10"])
    page.click("#camera")
    page.locator("#problem", has_text="This page may not use the camera: allow it").wait_for(timeout=5000)
    assert page.get_attribute("#camera", "aria-pressed") == "false"
    allowed = opened(pages["cifar10"], permissions=["camera"])
    allowed.click("#camera")
    assert shown(allowed).split(",")[0] in datasets.load("cifar10", str(ROOT / "data")).classes
    assert allowed.is_visible("#video")
    first = allowed.text_content("#times")
    allowed.locator("#times").filter(has_not_text=str(first)).wait_for()  # the next frame
    allowed.click("#camera")
    allowed.locator("#video").wait_for(state="hidden")


def test_a_page_from_plain_http_says_why_it_has_no_camera(
    pages: dict[str, str], opened: Callable[..., Any]
) -> None:
    page = opened(pages["mnist"])
    page.evaluate("Object.defineProperty(navigator, 'mediaDevices', { value: undefined })")
    page.click("#camera")
    page.locator("#problem", has_text="to pages from https or localhost only").wait_for(timeout=5000)


def test_a_one_is_drawn_with_the_keyboard_alone(pages: dict[str, str], opened: Callable[..., Any]) -> None:
    page = opened(pages["mnist"])
    page.locator("#draw").focus()
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "ink"
    for key in ["ArrowUp"] * 8 + [" "] + ["ArrowDown"] * 16:
        page.keyboard.press(key)
    page.locator("#answer", has_text="1, ").wait_for(timeout=10_000)
    assert "Pen down" in page.text_content("#pen")
    for key in ("Tab", "Enter"):  # to Clear
        page.keyboard.press(key)
    assert page.text_content("#pen") == ""


def test_it_works_without_a_network_once_it_was_open(pages: dict[str, str], opened: Callable[..., Any]) -> None:
    page = opened(pages["mnist"])
    asked: list[str] = []
    page.context.on("request", lambda request: asked.append(request.url))
    page.evaluate("async () => { await navigator.serviceWorker.ready; }")
    page.context.set_offline(True)
    page.reload()
    page.locator("#state", has_text="Ready: ").wait_for(timeout=60_000)
    assert all(url.startswith((pages["mnist"], "blob:")) for url in asked)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1600])
def test_nothing_leaves_the_screen_and_text_stands_out(
    width: int, scheme: str, pages: dict[str, str], opened: Callable[..., Any]
) -> None:
    page = opened(pages["cifar10"], viewport={"width": width, "height": 800}, color_scheme=scheme)
    picture = encoded(Image.fromarray(np.full((400, 900, 3), 90, np.uint8)))
    page.set_input_files("#file", {"name": "wide.png", "mimeType": "image/png", "buffer": picture})
    shown(page)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    paper, ink, quiet = page.evaluate(
        """() => [getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color,
                  getComputedStyle(document.querySelector(".quiet")).color]"""
    )
    assert (luminance(paper) > 0.5) == (scheme == "light")
    for text in (ink, quiet):  # WCAG 2.2, 1.4.3
        low, high = sorted((luminance(text), luminance(paper)))
        assert (high + 0.05) / (low + 0.05) > 4.5
    for control in page.locator("button:visible, select:visible, input:visible").all():
        assert control.evaluate(
            "e => e.labels?.length > 0 || e.textContent.trim() !== '' || e.querySelector('img[alt]') !== null"
        )


def luminance(color: str) -> float:
    """Return the relative luminance (WCAG 2.2) of "rgb(r, g, b)"."""
    parts = np.array([int(part) for part in color[4:-1].split(",")]) / 255
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])
