"""Pictures of explanations that a person can read: large enough, captioned, in colours that all can tell apart.

The frame is shown in grey and dimmed, and the map over it in a scale whose lightness rises steadily, so that the
most salient pixels are the lightest of the picture for every kind of colour vision, on dark and on light frames.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from runtime.errors import ImageError, OptionError
from runtime.images.resizing import resize_maps

# Colours at equal distances from 0 to 1, sRGB, of matplotlib's scales of these names (CC0); their lightness rises
# steadily. cividis differs least between kinds of colour vision (Nunez et al. 2018).
COLORMAPS = {
    "inferno": (
        (0, 0, 4), (33, 12, 74), (87, 16, 110), (138, 34, 106), (188, 55, 84), (228, 90, 49), (249, 142, 9),
        (249, 203, 53), (252, 255, 164),
    ),
    "viridis": (
        (68, 1, 84), (71, 45, 123), (59, 82, 139), (44, 114, 142), (33, 145, 140), (40, 174, 128), (94, 201, 98),
        (173, 220, 48), (253, 231, 37),
    ),
    "cividis": (
        (0, 34, 78), (26, 56, 111), (67, 78, 108), (97, 101, 111), (125, 124, 120), (155, 148, 118),
        (188, 174, 108), (222, 201, 88), (254, 232, 56),
    ),
}  # fmt: skip
# Of a picture's shorter side; below the second number pixels stay squares, above it they are interpolated.
LEAST_SIDE, _TINY = 256, 128
# A call is close where the second class has more than this share of the best one's probability.
CLOSE = 0.5
# The map's value that is drawn as fully salient: single pixels above it would otherwise darken all others.
_BRIGHT_PERCENTILE = 99.0
# Grey levels of a black and of a white pixel under the map: a white frame must leave room for lighter colours.
_DARKEST, _LIGHTEST = 20, 125
# Below 1, so that middling values show; far below, low ones would veil the frame.
_OPACITY = 0.75
_GAP, _PAPER, _INK = 6, 255, 0


@dataclass(frozen=True)
class Panel:
    """A part of a picture.

    Args:
        pixels: uint8 [H, W, 3].
        caption: text under it; empty for none.
    """

    pixels: np.ndarray
    caption: str = ""


def colored(level: np.ndarray, colormap: str = "inferno") -> np.ndarray:
    """Return the colours float64 [..., 3], 0 to 255, of levels [...] from 0 to 1.

    Raises:
        OptionError: no such scale of colours.
    """
    if colormap not in COLORMAPS:
        raise OptionError(f"colormap {colormap!r}: expected one of {', '.join(COLORMAPS)}")
    colors = np.array(COLORMAPS[colormap], np.float64)
    places = np.linspace(0, 1, len(colors))
    return np.stack([np.interp(level, places, colors[:, channel]) for channel in range(3)], axis=-1)


def levels(maps: np.ndarray) -> np.ndarray:
    """Return maps [..., H, W] >= 0 as shares, 0 to 1, of their value at the 99th percentile of the pixels."""
    bright = np.percentile(maps, _BRIGHT_PERCENTILE, axis=(-2, -1), keepdims=True)
    # Where fewer pixels than one in a hundred have a value, the largest counts.
    bright = np.where(bright > 0, bright, maps.max((-2, -1), keepdims=True))
    found: np.ndarray = np.clip(maps / np.maximum(bright, np.finfo(np.float32).tiny), 0, 1)
    return found


def blend(images: np.ndarray, maps: np.ndarray, *, strength: float = 0.9, colormap: str = "inferno") -> np.ndarray:
    """Return images with maps drawn over them, uint8 RGB [..., H, W, 3].

    Args:
        images: uint8 [..., H, W] or [..., H, W, C], grey or RGB, of the maps' size.
        maps: float32 [..., H, W], >= 0.
        strength: opacity of the most salient pixels, 0 to 1.
        colormap: one of COLORMAPS.

    Raises:
        ImageError: the images are not uint8 of the maps' size.
        OptionError: no such scale of colours.
    """
    images = images[..., None] if images.ndim == maps.ndim else images
    if images.dtype != np.uint8 or images.shape[:-1] != maps.shape or images.shape[-1] not in (1, 3):
        raise ImageError(
            f"overlay on {images.dtype} {list(images.shape)}, expected uint8 {[*maps.shape, 3]}; "
            "pass the frame that was explained"
        )
    level = levels(maps)
    grey = _DARKEST + images.mean(-1, keepdims=True) * ((_LIGHTEST - _DARKEST) / 255)
    opacity = strength * level[..., None] ** _OPACITY
    return np.rint((1 - opacity) * grey + opacity * colored(level, colormap)).astype(np.uint8)


def enlarged(pixels: np.ndarray) -> np.ndarray:
    """Return pixels uint8 [H, W, C] whose shorter side is LEAST_SIDE at least; tiny ones become squares."""
    shorter = min(pixels.shape[:2])
    if shorter >= LEAST_SIDE:
        return pixels
    if shorter < _TINY:
        factor = -(-LEAST_SIDE // shorter)
        return pixels.repeat(factor, 0).repeat(factor, 1)
    height, width = (-(-size * LEAST_SIDE // shorter) for size in pixels.shape[:2])
    channels = pixels.transpose(2, 0, 1).astype(np.float32)
    return np.rint(resize_maps(channels, (height, width))).clip(0, 255).astype(np.uint8).transpose(1, 2, 0)


def panels_of(
    image: np.ndarray, map: np.ndarray, caption: str, *, side_by_side: bool, colormap: str
) -> list[Panel]:
    """Return the overlay; or frame, map and overlay.

    Args:
        image: uint8 [H, W] or [H, W, C].
        map: float32 [H, W].
        caption: of the overlay.
        side_by_side: whether frame and map are shown, too.
        colormap: one of COLORMAPS.
    """
    overlay = Panel(enlarged(blend(image, map, colormap=colormap)), caption)
    if not side_by_side:
        return [overlay]
    frame = np.broadcast_to(image[..., None] if image.ndim == 2 else image, (*map.shape, 3))
    drawn = np.rint(colored(levels(map), colormap)).astype(np.uint8)
    return [
        Panel(enlarged(frame), "frame" if caption else ""),
        Panel(enlarged(drawn), "map" if caption else ""),
        overlay,
    ]


def joined(panels: list[Panel]) -> np.ndarray:
    """Return panels of one height in a row, each with its caption under it, uint8 [H, W, 3].

    Raises:
        OptionError: Pillow, which writes captions, is not installed.
    """
    strip = max(_caption_of(panel).shape[0] if panel.caption else 0 for panel in panels)
    columns = []
    for panel in panels:
        height, width, _ = panel.pixels.shape
        column = np.full((height + strip, width, 3), _PAPER, np.uint8)
        column[:height] = panel.pixels
        if panel.caption:
            caption = _caption_of(panel)
            column[height : height + len(caption)] = caption
        columns += [column, np.full((height + strip, _GAP, 3), _PAPER, np.uint8)]
    return np.concatenate(columns[:-1], axis=1)


def _caption_of(panel: Panel) -> np.ndarray:
    """Return a caption as wide as its panel, uint8 [h, W, 3], broken into lines."""
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError:
        raise OptionError("captions need Pillow; pip install 'clearpact[tools]'") from None
    width = panel.pixels.shape[1]
    size = max(13, width // 22)
    font: Any = ImageFont.load_default(size)
    lines = [""]
    for word in panel.caption.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width - size:
            lines.append(word)
        else:
            lines[-1] = longer
    step = round(1.35 * size)
    strip = Image.new("RGB", (width, step * len(lines) + size // 2), (_PAPER,) * 3)
    draw = ImageDraw.Draw(strip)
    for row, line in enumerate(lines):
        draw.text((size // 2, size // 4 + row * step), line, fill=(_INK,) * 3, font=font)
    return np.asarray(strip)
