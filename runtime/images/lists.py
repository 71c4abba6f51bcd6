"""What an app hands over at a time: one image, a batch of one size, or a list of images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from runtime.errors import ImageError
from runtime.images.reading import to_array


def singles(images: Sequence[Any]) -> list[np.ndarray]:
    """Return the images of a list as arrays, having checked that each is one image."""
    if not images:
        raise ImageError("an empty list of images, expected at least one")
    arrays = [to_array(image) for image in images]
    for position, array in enumerate(arrays):
        if array.ndim == 4 and len(array) != 1:
            raise ImageError(
                f"element {position} of the list: a batch of shape {list(array.shape)}, expected one image; "
                "give the batch alone, or join batches with np.concatenate"
            )
        if array.ndim == 3 and not is_single(array) and len(array) != 1:
            raise ImageError(
                f"element {position} of the list: shape {list(array.shape)}, expected one image [H, W], [H, W, 1] "
                "or [H, W, 3]; put the channels last"
            )
    return arrays


def stacked(images: Sequence[Any]) -> np.ndarray:
    """Return a list of images of one size as a batch [N, H, W, C]."""
    arrays = [array if is_single(array) else array[0] for array in singles(images)]  # of batches of one
    arrays = [array[..., None] if array.ndim == 2 else array for array in arrays]
    shapes = {array.shape for array in arrays}
    if len(shapes) > 1:
        raise ImageError(
            f"images of shapes {sorted(map(list, shapes))}, expected one shape; explain them one by one"
        )
    return np.stack(arrays)


def is_single(images: np.ndarray | Sequence[Any]) -> bool:
    """Return whether this is one image [H, W] or [H, W, 1 or 3], not a batch or a list."""
    return not isinstance(images, (list, tuple)) and is_single_shape(np.asarray(images).shape)


def is_single_shape(shape: tuple[int, ...]) -> bool:
    """Return whether an array of this shape is one image."""
    return len(shape) == 2 or (len(shape) == 3 and shape[2] in (1, 3))
