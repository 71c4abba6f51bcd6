"""What a viewer sees: the frame, the map over it and one line of text, drawn only where somebody looks."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

from deploy.edge_app.opencv import opencv
from runtime.errors import OptionError
from runtime.explanations.picture import blend, levels

_LONGEST_SIDE, _LEAST_SIDE = 640, 240
_STRIP, _TEXT = 28, 18  # height of the strip under the frame and of its text, in pixels
_JPEG_QUALITY = 85


@dataclass(frozen=True)
class Picture:
    """A frame with its answer.

    Args:
        frame: uint8 [H, W], [H, W, 1] or RGB [H, W, 3].
        caption: one line.
        map: float32 [h, w], >= 0, of any size; None draws the frame alone.
        area: top, left, height and width of the part of the frame that the map covers; None is all of it.
    """

    frame: np.ndarray
    caption: str
    map: np.ndarray | None = None
    area: tuple[int, int, int, int] | None = None

    @functools.cached_property
    def pixels(self) -> np.ndarray:
        """The picture, uint8 BGR [H', W', 3] with even sides, the longer one of 640 pixels at most."""
        cv2 = opencv("a picture of a frame")
        height, width = self.frame.shape[:2]
        scale = min(_LONGEST_SIDE / max(height, width), max(1.0, _LEAST_SIDE / min(height, width)))
        size = tuple(max(2, round(side * scale / 2) * 2) for side in (height, width))
        shrinks = scale < 1
        squares = min(height, width) < _LEAST_SIDE // 2  # tiny frames keep their pixels visible
        way = cv2.INTER_AREA if shrinks else cv2.INTER_NEAREST if squares else cv2.INTER_LINEAR
        frame = cv2.resize(self.frame, (size[1], size[0]), interpolation=way)
        if self.map is not None:
            drawn = self._drawn(cv2, frame, (size[0] / height, size[1] / width))
        elif frame.ndim == 2:
            drawn = cv2.cvtColor(frame, cv2.COLOR_GRAY2BGR)
        else:
            drawn = np.ascontiguousarray(frame[..., ::-1])
        return np.concatenate([drawn, _strip(self.caption, size[1])])

    @functools.cached_property
    def jpeg(self) -> bytes:
        """The picture as a JPEG file."""
        cv2 = opencv("a picture of a frame")
        _, encoded = cv2.imencode(".jpg", self.pixels, [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
        return bytes(encoded)

    def _drawn(self, cv2: Any, frame: np.ndarray, scale: tuple[float, float]) -> np.ndarray:
        """Return the map over a frame, uint8 BGR, as `Explanation.overlay` draws it."""
        assert self.map is not None
        grey = frame if frame.ndim == 2 else cv2.transform(frame, np.full((1, 3), 1 / 3, np.float32))
        shown = np.zeros(grey.shape, np.uint8)
        top, left, height, width = self.area or (0, 0, *self.frame.shape[:2])
        rows = [round(edge * scale[0]) for edge in (top, top + height)]
        columns = [round(edge * scale[1]) for edge in (left, left + width)]
        level = np.rint(255 * levels(self.map)).astype(np.uint8)
        inside = (columns[1] - columns[0], rows[1] - rows[0])
        shown[rows[0] : rows[1], columns[0] : columns[1]] = cv2.resize(level, inside)
        drawn: np.ndarray = _colors()[grey, shown]
        return drawn


@functools.cache
def _colors() -> np.ndarray:
    """Return the colour, uint8 BGR [256, 256, 3], of every grey level under every level of the map.

    `blend` decides them all, once: for each pixel of each frame it takes ten times as long.
    """
    grey = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 512, axis=1)
    # The levels are shares of the 99th percentile: half of the pixels are fully salient, so that it is 1.
    level = np.concatenate([np.arange(256) / 255, np.ones(256)]).astype(np.float32)
    drawn = blend(grey, np.broadcast_to(level, grey.shape))
    return np.ascontiguousarray(drawn[:, :256, ::-1])


def _strip(text: str, width: int) -> np.ndarray:
    """Return one line of text, cut to a width, black on white, uint8 [28, width, 3]."""
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError:
        raise OptionError("pictures of frames need Pillow; pip install 'clearpact[camera]'") from None
    strip = Image.new("RGB", (width, _STRIP), (255, 255, 255))
    ImageDraw.Draw(strip).text((8, 3), text, fill=(0, 0, 0), font=ImageFont.load_default(_TEXT))
    return np.asarray(strip)
