"""What an app holds as its image, to an array: a file, a PIL image, or anything that numpy takes."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from runtime.errors import FileError, ImageError, OptionError

# What is read: no other kind that Pillow knows, some of which start programs. It knows the first ones without
# loading its plugins; of the others those that are there count.
_FIRST_KINDS = ("PNG", "JPEG", "GIF", "BMP", "DIB", "PPM")
_MORE_KINDS = ("WEBP", "TIFF", "JPEG2000", "AVIF", "HEIF", "JXL", "TGA", "ICO", "PCX")
MAX_PIXELS = 50_000_000
_STRIP_PIXELS = 2**20  # converted at a time, so that no second copy of a large image is made
# EXIF orientation -> where the pixels as they are stored lie in the image that stands upright.
_STORED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.swapaxes(0, 1),
    6: lambda upright: np.rot90(upright),
    7: lambda upright: upright[::-1, ::-1].swapaxes(0, 1),
    8: lambda upright: np.rot90(upright, -1),
}
_ORIENTATION = 0x0112


def load_image(path: str | os.PathLike[str], *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Read an image file as uint8, [H, W] if grey, otherwise [H, W, 3] RGB.

    Args:
        path: of a PNG, JPEG, GIF, BMP, PNM, WebP, TIFF, JPEG 2000, AVIF, HEIF, JPEG XL, TGA, ICO or PCX file, as
            far as Pillow and its plugins read them.
        max_pixels: an image of more is refused before it is decoded: a small file can hold gigabytes.

    Raises:
        FileError: missing, too large, or not an image that Pillow can read; nothing else, whatever the file holds.
        OptionError: Pillow is not installed.
    """
    name = os.fspath(path)  # not a Path, which would take a seventh of the time that a small image takes
    return _decoded(name, name, max_pixels)


def decode_image(encoded: bytes, name: str, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Return the pixels of what an image file holds, as `load_image` does of the file.

    Args:
        encoded: contents of the file.
        name: which errors call it by.
        max_pixels: an image of more is refused before it is decoded.

    Raises:
        FileError: too large, or not an image that Pillow can read; nothing else, whatever the bytes are.
        OptionError: Pillow is not installed.
    """
    return _decoded(io.BytesIO(encoded), name, max_pixels)


def load_readers() -> None:
    """Load Pillow with its readers of the usual kinds of files, which the first image would else wait for.

    Raises:
        OptionError: Pillow is not installed.
    """
    _pillow().preinit()


def to_array(image: Any, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Return as an array what an app holds as its image or images.

    Args:
        image: an array or what numpy makes one of, the path of a file, which is read with `load_image`, or a PIL
            image, which comes upright, as grey or RGB.
        max_pixels: a file or PIL image of more is refused.

    Raises:
        FileError: there is no such file, or it is no image.
        ImageError: nothing, bytes, a PIL image that is too large, or what numpy cannot make an array of.
    """
    if hasattr(image, "getbands"):  # a PIL image, known without Pillow
        try:
            return _pixels(image, max_pixels)
        except ImageError as error:
            raise ImageError(f"PIL image: {error}") from None
        except Exception as error:
            raise ImageError(f"PIL image: cannot be read ({_said(error)}); convert it to RGB") from None
    if image is None:
        raise ImageError("None instead of an image: there is no frame; check the camera or what read the file")
    if isinstance(image, (str, os.PathLike)):
        return load_image(image, max_pixels=max_pixels)
    if isinstance(image, bytes):
        raise ImageError(
            f"{len(image)} bytes instead of pixels; give the path of a file, or PIL.Image.open of them"
        )
    try:
        return np.asarray(image)
    except Exception as error:
        given = gpu_interface(image)
        if given is not None:
            raise ImageError(
                f"{type(image).__name__} in GPU memory of shape {list(given['shape'])} and type "
                f"{given['typestr']}: only a plan takes such, uint8 of its own size and channels; resize it "
                "there, or copy it to the host"
            ) from None
        raise ImageError(
            f"{type(image).__name__} that is no array ({_said(error)}), expected np.uint8; "
            "give images of several sizes as a list of arrays"
        ) from None


def gpu_interface(image: Any) -> Mapping[str, Any] | None:
    """Return what an array in GPU memory says of itself (`__cuda_array_interface__`); None where it is none."""
    try:
        found: Mapping[str, Any] | None = getattr(image, "__cuda_array_interface__", None)
    except Exception:  # PyTorch, of a tensor that requires its gradient
        return None
    return found


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise OptionError("reading image files needs Pillow; pip install 'clearpact[tools]'") from None
    return Image


def _decoded(source: str | io.BytesIO, name: str, max_pixels: int) -> np.ndarray:
    pillow = _pillow()
    try:
        with _opened(source) as image:
            return _pixels(image, max_pixels)
    except ImageError as error:
        raise FileError(f"{name}: {error}") from None
    except FileNotFoundError:
        raise FileError(f"{name}: no such file; check the path") from None
    except (pillow.DecompressionBombError, pillow.DecompressionBombWarning):
        raise FileError(
            f"{name}: has more pixels than Pillow takes ({pillow.MAX_IMAGE_PIXELS:,}); make it smaller"
        ) from None
    except Exception as error:  # Pillow's plugins let anything through that a damaged file makes them do
        unidentified = isinstance(error, pillow.UnidentifiedImageError)
        reason = "not an image file" if unidentified else getattr(error, "strerror", None) or _said(error)
        raise FileError(f"{name}: cannot be read as an image ({reason}); expected PNG, JPEG or the like") from None


def _opened(source: str | io.BytesIO) -> Any:
    """Return a file as a PIL image that is not decoded yet."""
    pillow = _pillow()
    try:
        return pillow.open(source, formats=_FIRST_KINDS)
    except pillow.UnidentifiedImageError:
        pillow.init()
        return pillow.open(source, formats=[kind for kind in _MORE_KINDS if kind in pillow.OPEN])


def _pixels(image: Any, max_pixels: int) -> np.ndarray:
    """Return a PIL image, upright, as uint8 [H, W] if grey, otherwise as RGB [H, W, 3]."""
    if image.width * image.height > max_pixels:
        raise ImageError(
            f"has {image.height}x{image.width} pixels, expected at most {max_pixels:,} together; make it smaller, "
            "or allow more with max_pixels"
        )
    if image.mode[0] in "IF":  # converting these to 8 bits would clip them, not scale them
        raise ImageError(f"has {image.mode} pixels, expected 8 bits a channel; convert it to 8 bits")
    image.load()
    width, height = image.size
    if not width * height:
        raise ImageError(f"is of {height}x{width} pixels, expected some; save it again")
    try:
        orientation = image.getexif().get(_ORIENTATION)
        stored = _STORED.get(orientation)
    except Exception:  # the pixels are whole though what is said about them is not
        stored = None
    size = (width, height) if stored is not None and orientation >= 5 else (height, width)
    pixels = np.empty(size if image.mode == "L" else (*size, 3), np.uint8)
    target = pixels if stored is None else stored(pixels)
    lines = max(1, _STRIP_PIXELS // width)
    for top in range(0, height, lines):
        strip = image if lines >= height else image.crop((0, top, width, min(top + lines, height)))
        target[top : top + lines] = np.asarray(strip if image.mode == "L" else strip.convert("RGB"))
    return pixels


def _said(error: Exception) -> str:
    """Return an error's text as one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
