"""A page of `deploy.web` in Chromium: what its engine computes, and how long that takes."""

from __future__ import annotations

import base64
import contextlib
import functools
import http.server
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from runtime.errors import EngineError, OptionError

RUNS = 8  # of one sample: a browser tells the time to a tenth of a millisecond only
_OPEN = """async () => {
  const { openModel } = await import("./model.js");
  const described = await (await fetch("model.json")).json();
  globalThis.opened = await openModel(described, "wasm");
  await globalThis.opened.warmUp();
}"""
_SAMPLE = """async ([image, explain, runs]) => {
  const pixels = Uint8Array.from(image);
  const run = () => (explain ? globalThis.opened.explain(pixels, -1) : globalThis.opened.classify(pixels));
  await run();
  const began = performance.now();
  for (let index = 0; index < runs; index += 1) await run();
  return (performance.now() - began) / runs;
}"""
# Every output of the page's file, of one image after the other, as bytes.
_OUTPUTS = """async ([images, shape, outputs]) => {
  const described = await (await fetch("model.json")).json();
  if (!globalThis.session) {
    globalThis.ort = await import(described.runtime.wasm.module);
    const { InferenceSession } = globalThis.ort;
    globalThis.session = await InferenceSession.create(described.file, { executionProviders: ["wasm"] });
  }
  const coded = (array) => {
    const bytes = new Uint8Array(array.buffer, array.byteOffset, array.byteLength);
    let text = "";
    for (let at = 0; at < bytes.length; at += 8192) text += String.fromCharCode(...bytes.subarray(at, at + 8192));
    return btoa(text);
  };
  const found = [];
  for (const image of images) {
    const pixels = Uint8Array.from(atob(image), (letter) => letter.charCodeAt(0));
    const feeds = {
      image: new globalThis.ort.Tensor("uint8", pixels, shape),
      target: new globalThis.ort.Tensor("int64", BigInt64Array.of(-1n), [1]),
    };
    const result = await globalThis.session.run(feeds, outputs);
    found.push(outputs.map((name) => [result[name].type, result[name].dims, coded(result[name].data)]));
  }
  return found;
}"""


class _Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def opened(folder: Path, browser: Any = None) -> Iterator[Any]:
    """Give the page in a Chromium, its model open on one thread of WebAssembly.

    Args:
        folder: of the page.
        browser: of Playwright's synchronous interface, which a thread has one of at a time; None: started here.

    Raises:
        OptionError: Playwright is not installed.
        EngineError: there is no Chromium.
    """
    with contextlib.ExitStack() as ends:
        if browser is None:
            browser = ends.enter_context(_started())
        server = http.server.ThreadingHTTPServer(
            ("127.0.0.1", 0), functools.partial(_Handler, directory=str(folder))
        )
        ends.callback(server.server_close)
        ends.callback(server.shutdown)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        context = browser.new_context(bypass_csp=True)
        ends.callback(context.close)
        page = context.new_page()
        page.goto(f"http://127.0.0.1:{server.server_port}/icon.svg")
        page.evaluate(_OPEN)
        yield page


@contextlib.contextmanager
def _started() -> Iterator[Any]:
    """Give a Chromium."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        raise OptionError("driving a browser needs Playwright; pip install 'clearpact[browser]'") from None
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        raise EngineError("no Chromium in PATH; apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


def milliseconds(page: Any, image: np.ndarray, *, explain: bool) -> float:
    """Return the mean time of RUNS classifications, or maps, of an image uint8 [H, W, C]."""
    return float(page.evaluate(_SAMPLE, [image.ravel().tolist(), explain, RUNS]))


def run_all(page: Any, images: np.ndarray, outputs: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Return outputs of the page's file by name, for images uint8 [N, H, W, C] and their predicted classes."""
    coded = [base64.b64encode(image.tobytes()).decode() for image in images]
    found = page.evaluate(_OUTPUTS, [coded, [1, *images.shape[1:]], list(outputs)])
    return {name: np.concatenate([_array(*row[at]) for row in found]) for at, name in enumerate(outputs)}


def _array(kind: str, dims: list[int], data: str) -> np.ndarray:
    """Return a tensor of ONNX Runtime Web."""
    return np.frombuffer(base64.b64decode(data), kind).reshape(dims)
