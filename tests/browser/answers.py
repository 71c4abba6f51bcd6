"""What the tests give to the page, and what it answers."""

from __future__ import annotations

import io
from typing import Any

from PIL import Image


def encoded(image: Image.Image, kind: str = "PNG", **settings: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def shown(page: Any) -> str:
    """Return what the page answers, once it does."""
    page.locator("#classes li").first.wait_for()
    return str(page.text_content("#answer"))
