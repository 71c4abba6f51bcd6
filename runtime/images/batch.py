"""Any image or batch to the size and channels of the model."""

from __future__ import annotations

import numpy as np

from runtime.errors import ImageError
from runtime.images.reading import to_array
from runtime.images.resizing import crop_to_shape, resize
from runtime.manifest import ImageInput

# ITU-R BT.601 luma in 16-bit fixed point, as in Pillow's convert("L").
_LUMA = np.array([19595, 38470, 7471], dtype=np.int64)


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
