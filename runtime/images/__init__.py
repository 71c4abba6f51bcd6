"""Images on their way in: files to arrays, any frame to the size and channels of the model."""

from runtime.images.batch import to_batch
from runtime.images.folders import RARE_SUFFIXES, SUFFIXES, folders_in, is_hidden, is_image_file, list_images
from runtime.images.reading import MAX_PIXELS, decode_image, gpu_interface, load_image, load_readers, to_array

__all__ = [
    "MAX_PIXELS", "RARE_SUFFIXES", "SUFFIXES", "decode_image", "folders_in", "gpu_interface", "is_hidden",
    "is_image_file", "list_images", "load_image", "load_readers", "to_array", "to_batch",
]  # fmt: skip
