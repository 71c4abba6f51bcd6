"""Images on their way in: files to arrays, any frame to the size and channels of the model."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import numpy as np

from runtime.errors import FileError, ImageError, OptionError
from runtime.manifest import ImageInput

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")

# ITU-R BT.601 luma in 16-bit fixed point, as in Pillow's convert("L").
_LUMA = np.array([19595, 38470, 7471], dtype=np.int64)


def load_image(path: str | os.PathLike[str]) -> np.ndarray:
    """Read an image file as uint8, [H, W] if grey, otherwise [H, W, 3] RGB.

    Raises:
        FileError: missing, or not an image that Pillow can read.
        OptionError: Pillow is not installed.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise OptionError("reading image files needs Pillow; pip install 'clearpact[tools]'") from None
    path = Path(path)
    try:
        with Image.open(path) as image:
            if image.mode[0] in "IF":  # converting these to 8 bits would clip them, not scale them
                raise FileError(
                    f"{path}: has {image.mode} pixels, expected 8 bits a channel; convert it to 8 bits"
                )
            upright = ImageOps.exif_transpose(image)
            return np.asarray(upright if upright.mode == "L" else upright.convert("RGB"))
    except FileError:
        raise
    except FileNotFoundError:
        raise FileError(f"{path}: no such file; check the path") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        unidentified = isinstance(error, Image.UnidentifiedImageError)
        reason = "not an image file" if unidentified else getattr(error, "strerror", None) or str(error)
        raise FileError(f"{path}: cannot be read as an image ({reason}); expected PNG, JPEG or the like") from None


def list_images(paths: list[str]) -> list[Path]:
    """Return the files among `paths`, with every folder replaced by the images in it, sorted by name.

    Raises:
        FileError: a folder holds no image or cannot be read.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if not path.is_dir():
            found.append(path)
            continue
        try:
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())
        except OSError as error:
            raise FileError(f"{path}: cannot be listed ({error.strerror}); check its permissions") from None
        if not inside:
            raise FileError(f"{path}: a folder without images, expected files such as *.png or *.jpg")
        found += inside
    return found


def to_batch(images: np.ndarray, expected: ImageInput) -> np.ndarray:
    """Return uint8 [N, H, W, C] as a model wants it.

    Args:
        images: uint8, one image [H, W] or [H, W, 1 or 3], or a batch [N, H, W, 1 or 3] or [N, H, W], W > 4.
        expected: from the manifest; other sizes are resized to it or refused, as it says.

    Raises:
        ImageError: wrong dtype, shape, or a size that the manifest does not allow to be resized.
    """
    images = np.asarray(images)
    wanted = f"uint8 [H, W], [H, W, 3] or a batch [N, H, W, {expected.channels}]"
    if images.dtype != np.uint8:
        raise ImageError(f"image of dtype {images.dtype}, expected {wanted}; pass pixels 0..255 as np.uint8")
    if 0 in images.shape:
        raise ImageError(f"image of shape {list(images.shape)}, expected {wanted}; it holds no pixel")
    if images.ndim in (3, 4) and images.shape[-1] in (2, 4):
        raise ImageError(f"image of shape {list(images.shape)}, expected {wanted}; drop its alpha channel")
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


def crop_to_shape(images: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return the largest middle part of images [N, H, W, C] that has the shape of `size`, height and width."""
    top, left, height, width = middle(images.shape[1:3], size)
    return images[:, top : top + height, left : left + width]


def middle(frame: tuple[int, ...], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return top, left, height and width of the largest middle part of a frame that has the shape of `size`."""
    height, width = frame
    if width * size[0] > height * size[1]:
        kept = height, max(1, round(height * size[1] / size[0]))
    else:
        kept = max(1, round(width * size[0] / size[1])), width
    return (height - kept[0]) // 2, (width - kept[1]) // 2, *kept


def resize(images: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return uint8 [N, H', W', C] of uint8 [N, H, W, C], Pillow's BILINEAR within one level.

    That is bilinear with antialiasing: what networks are trained on, when Pillow or torchvision resized.
    """
    rows = _bilinear_weights(images.shape[1], size[0])
    columns = _bilinear_weights(images.shape[2], size[1])
    resized = np.empty((len(images), *size, images.shape[3]), dtype=np.uint8)
    for image, out in zip(images, resized, strict=True):
        # Width first and rounded in between, halves up, as Pillow does. float32 halves the time of this pass, the
        # longer one, and moves a pixel by one level at a near tie; float64 in the other adds no second level.
        narrowed = np.tensordot(columns.astype(np.float32), image.astype(np.float32), (1, 1))  # [W', H, C]
        narrowed = np.floor(narrowed + np.float32(0.5)).astype(np.float64)
        out[...] = np.floor(np.tensordot(rows, narrowed, (1, 1)) + 0.5).clip(0, 255)  # [H', W', C]
    return resized


def resize_maps(maps: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return float32 [N, H', W'] of float32 maps [N, H, W], bilinear with antialiasing."""
    rows, columns = (_bilinear_weights(maps.shape[axis + 1], size[axis]) for axis in (0, 1))
    resized: np.ndarray = (rows @ maps.astype(np.float64) @ columns.T).astype(np.float32)
    return resized


@functools.lru_cache(maxsize=16)
def _bilinear_weights(source: int, target: int) -> np.ndarray:
    """Return the weights float64 [target, source] of a triangle filter as wide as one target pixel.

    They are multiples of 2**-22, as in Pillow, so that sums of pixels are exact in float64.
    """
    ratio = source / target
    support = max(ratio, 1.0)
    centers = (np.arange(target) + 0.5) * ratio
    distance = np.abs(np.arange(source)[None, :] + 0.5 - centers[:, None]) / support
    weights = np.clip(1 - distance, 0, None)
    weights *= 1 / weights.sum(1, keepdims=True)
    rounded: np.ndarray = np.floor(weights * 2**22 + 0.5) / 2**22
    return rounded
