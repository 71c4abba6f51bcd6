"""A browser, a web server, and pages of the shipped networks, for the tests in this folder.

They need Chromium, and ONNX Runtime Web beneath deploy/web: `make test-browser`.
"""

from __future__ import annotations

import functools
import http.server
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from deploy.web.page import write_page
from export.pipeline import export
from train import checkpoint as checkpoints

ROOT = Path(__file__).parents[2]


class _Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    assert chromium, "these tests need Chromium in PATH: apt-get install chromium"
    with sync_playwright() as playwright:
        # A camera that shows a test pattern; a page must ask for it all the same.
        flags = ["--no-sandbox", "--use-fake-device-for-media-stream"]
        started = playwright.chromium.launch(executable_path=chromium, args=flags)
        yield started
        started.close()


@pytest.fixture(scope="session")
def serve() -> Iterator[Callable[[Path], str]]:
    """Serves folders as any web server does."""
    servers = []

    def start(folder: Path) -> str:
        handler = functools.partial(_Handler, directory=str(folder))
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The shipped networks as files for ONNX Runtime."""
    folder = tmp_path_factory.mktemp("exported")
    made = {}
    for data, name in (("mnist", "mnist-cnn2-8bit-sgt"), ("cifar10", "cifar10-resnet20-8bit-sgt")):
        made[data] = folder / f"{name}.onnx"
        shipped = checkpoints.load(ROOT / "deploy" / "models" / f"{name}.pt")
        made[data].write_bytes(export(shipped, target="ort").data)
    return made


@pytest.fixture(scope="session")
def pages(
    exported: dict[str, Path], serve: Callable[[Path], str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """The address of a page of each."""
    folder = tmp_path_factory.mktemp("pages")
    return {data: serve(write_page(model, folder / data).folder) for data, model in exported.items()}


@pytest.fixture
def opened(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens an address in a browser of its own and waits until the network is ready; no error may be logged."""
    contexts, errors = [], []

    def open_(address: str, *, ready: bool = True, **settings: Any) -> Any:
        context = browser.new_context(**settings)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.goto(address)
        if ready:
            page.locator("#state", has_text="Ready: ").wait_for(timeout=60_000)
        return page

    yield open_
    for context in contexts:
        context.close()
    assert errors == []
