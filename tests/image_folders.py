"""Small folders of real images: scikit-learn's digits as PNG files, of sizes and colours of their own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits


def write_digits(folder: Path, counts: Mapping[str, int], *, color: bool = False) -> Path:
    """Write counts[name] images of the digit n, n being the position of the name, to folder/name/."""
    digits = load_digits()
    for position, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True)
        for number, pixels in enumerate(digits.images[digits.target == position % 10][:count]):
            image = Image.fromarray((pixels * (255 / 16)).round().astype(np.uint8))
            image = image.resize((16 + number % 3, 16))
            image.convert("RGB" if color else "L").save(folder / name / f"{number:03}.png")
    return folder
