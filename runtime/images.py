"""Images on their way in: files to arrays, any frame to the size and channels of the model."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from runtime.errors import FileError, ImageError, OptionError
from runtime.manifest import ImageInput
from runtime.resizing import crop_to_shape, resize

SUFFIXES = (
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".j2k", ".bmp", ".dib", ".webp", ".gif", ".tif",
    ".tiff", ".tga", ".ppm", ".pgm", ".pbm", ".pnm",
)  # fmt: skip
# Images whose reading depends on how Pillow was built, or needs a plugin: never passed over without a word.
RARE_SUFFIXES = (".avif", ".avifs", ".heic", ".heif", ".hif", ".jxl", ".jpf", ".jpx", ".j2c", ".jpc", ".mpo")
# How files of these kinds begin, whatever they are called.
_BEGINNINGS = (
    b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*", b"\0\0\0\x0cjP  ",
    b"\xff\x4f\xff\x51", b"\xff\x0a", b"\0\0\0\x0cJXL ",
)  # fmt: skip
_HEIF_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"hevc", b"mif1", b"msf1")
# Folders that systems make beside images, for their own copies of them.
_SYSTEM_FOLDERS = ("__MACOSX", "__pycache__", "@eaDir")
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

# ITU-R BT.601 luma in 16-bit fixed point, as in Pillow's convert("L").
_LUMA = np.array([19595, 38470, 7471], dtype=np.int64)


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
    try:
        from PIL import Image
    except ImportError:
        raise OptionError("reading image files needs Pillow; pip install 'clearpact[tools]'") from None
    path = Path(path)
    try:
        with _opened(path) as image:
            return _pixels(image, max_pixels)
    except ImageError as error:
        raise FileError(f"{path}: {error}") from None
    except FileNotFoundError:
        raise FileError(f"{path}: no such file; check the path") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise FileError(
            f"{path}: has more pixels than Pillow takes ({Image.MAX_IMAGE_PIXELS:,}); make it smaller"
        ) from None
    except Exception as error:  # Pillow's plugins let anything through that a damaged file makes them do
        unidentified = isinstance(error, Image.UnidentifiedImageError)
        reason = "not an image file" if unidentified else getattr(error, "strerror", None) or _said(error)
        raise FileError(f"{path}: cannot be read as an image ({reason}); expected PNG, JPEG or the like") from None


def is_image_file(path: Path) -> bool:
    """Return whether a file is meant as an image: by its suffix or, failing that, by how it begins.

    A link to nothing is meant as one too, if its name does not say otherwise: what it stood for must be missed.
    """
    if path.exists() and not path.is_file():  # a pipe would wait for its writer
        return False
    suffix = path.suffix.lower()
    if suffix in SUFFIXES or suffix in RARE_SUFFIXES:
        return True
    try:
        with path.open("rb") as file:
            start = file.read(16)
    except FileNotFoundError:
        return not suffix
    except OSError:
        return False
    riff = start.startswith(b"RIFF") and start[8:12] == b"WEBP"
    bitmap = start.startswith(b"BM") and start[6:10] == b"\0\0\0\0"
    return (
        start.startswith(_BEGINNINGS) or riff or bitmap or (start[4:8] == b"ftyp" and start[8:12] in _HEIF_BRANDS)
    )


def is_hidden(name: str) -> bool:
    """Return whether a file or folder of this name is a system's or an editor's, not a person's."""
    return name.startswith(".") or name in _SYSTEM_FOLDERS


def list_images(paths: list[str]) -> list[Path]:
    """Return the files among `paths`, with every folder replaced by the images in it, sorted by name.

    Folders in folders are not looked into; `folders_in` names them.

    Raises:
        FileError: a folder holds no image or cannot be read.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if not path.is_dir():
            found.append(path)
            continue
        inside = [p for p in _entries(path) if not p.is_dir() and is_image_file(p)]
        if not inside:
            raise FileError(f"{path}: a folder without images, expected files such as *.png or *.jpg")
        found += inside
    return found


def folders_in(paths: list[str]) -> list[Path]:
    """Return the folders, not hidden, in the folders among `paths`, which `list_images` does not look into."""
    return [inside for path in map(Path, paths) if path.is_dir() for inside in _entries(path) if inside.is_dir()]


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


def to_batch(images: np.ndarray, expected: ImageInput) -> np.ndarray:
    """Return uint8 [N, H, W, C] as a model wants it.

    Args:
        images: uint8, one image [H, W] or [H, W, 1 or 3], or a batch [N, H, W, 1 or 3] or [N, H, W], W > 4 and
            N not 3, which could be the channels of one; or a PIL image. Three channels are RGB.
        expected: from the manifest; other sizes are resized to it or refused, as it says.

    Raises:
        ImageError: wrong dtype, shape, or a size that the manifest does not allow to be resized.
    """
    images = to_array(images)
    wanted = f"uint8 [H, W], [H, W, 3] or a batch [N, H, W, {expected.channels}]"
    if images.dtype != np.uint8:
        raise ImageError(f"image of dtype {images.dtype}, expected {wanted}; pass pixels 0..255 as np.uint8")
    if 0 in images.shape:
        raise ImageError(f"image of shape {list(images.shape)}, expected {wanted}; it holds no pixel")
    if images.ndim in (3, 4) and images.shape[-1] in (2, 4):
        raise ImageError(f"image of shape {list(images.shape)}, expected {wanted}; drop its alpha channel")
    if images.ndim == 3 and images.shape[0] == 3 and images.shape[2] not in (1, 3):
        raise ImageError(
            f"image of shape {list(images.shape)}, expected {wanted}; put the channels last, or give three grey "
            f"images as {[*images.shape, 1]}"
        )
    if images.ndim == 2:
        batch = images[None, :, :, None]
    elif images.ndim == 3:
        batch = images[None] if images.shape[2] in (1, 3) else images[..., None]
    else:
        batch = images
    if batch.ndim != 4 or batch.shape[3] not in (1, 3):
        raise ImageError(f"image of shape {list(images.shape)}, expected {wanted}; put the channels last")
    if batch.shape[1:3] != expected.size:
        if expected.resize == "none":
            height, width = expected.size
            raise ImageError(
                f"image of {batch.shape[1]}x{batch.shape[2]} pixels, expected {height}x{width}; "
                "resize it, or export with --resize bilinear"
            )
        if expected.resize == "crop":
            batch = crop_to_shape(batch, expected.size)
        batch = resize(batch, expected.size)
    if batch.shape[3] == 3 and expected.channels == 1:
        batch = ((batch @ _LUMA + 0x8000) >> 16).astype(np.uint8)[..., None]
    elif batch.shape[3] == 1 and expected.channels == 3:
        batch = np.repeat(batch, 3, axis=3)
    return np.ascontiguousarray(batch)


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(entry for entry in folder.iterdir() if not is_hidden(entry.name))
    except OSError as error:
        raise FileError(f"{folder}: cannot be listed ({error.strerror}); check its permissions") from None


def _opened(path: Path) -> Any:
    """Return a file as a PIL image that is not decoded yet."""
    from PIL import Image

    try:
        return Image.open(path, formats=_FIRST_KINDS)
    except Image.UnidentifiedImageError:
        Image.init()
        return Image.open(path, formats=[kind for kind in _MORE_KINDS if kind in Image.OPEN])


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
        strip = image.crop((0, top, width, min(top + lines, height)))
        target[top : top + lines] = np.asarray(strip if image.mode == "L" else strip.convert("RGB"))
    return pixels


def _said(error: Exception) -> str:
    """Return an error's text as one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
