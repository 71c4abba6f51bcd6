"""The size of the image where an ONNX file leaves it open."""

from __future__ import annotations

import onnx

from runtime.errors import OptionError


def size_of(text: str) -> tuple[int, int]:
    """Return the height and width that `--size` names: 224, or 96x128.

    Raises:
        OptionError: it is neither.
    """
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise OptionError(f"--size {text}: expected pixels, as in 224, or height x width, as in 96x128")
    return int(sides[0]), int(sides[-1])


def fix_size(model: onnx.ModelProto, size: tuple[int, int]) -> None:
    """Write height and width, in place, where the only image leaves two axes beside the batch open."""
    constants = {tensor.name for tensor in model.graph.initializer}
    images = [value for value in model.graph.input if value.name not in constants]
    sides = [d for d in images[0].type.tensor_type.shape.dim[1:] if not d.dim_value] if len(images) == 1 else []
    if len(sides) != len(size):
        return
    for side, pixels in zip(sides, size, strict=True):
        side.Clear()
        side.dim_value = pixels
