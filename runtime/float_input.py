"""A model that takes normalized floats, run on pixels: the normalization is computed before the engine.

Such a file keeps the input of the network that it came from (`python -m export.onnx ... --keep-input`), for
programs that normalize themselves. Everything here still takes pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from runtime.manifest import INPUT_NAME, Manifest


def normalized(pixels: np.ndarray, manifest: Manifest) -> np.ndarray:
    """Return images uint8 [N, H, W, C] as the model takes them, float32 in the manifest's `float_layout`."""
    mean, std = (np.asarray(values, np.float32) for values in (manifest.input.mean, manifest.input.std))
    floats = (pixels.astype(np.float32) - 255 * mean) / (255 * std)
    return np.ascontiguousarray(floats if manifest.float_layout == "NHWC" else floats.transpose(0, 3, 1, 2))


class PixelSession:
    """A session that takes pixels on one that takes normalized floats; see runtime.session.Session."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self.engine: str = session.engine
        self.version: str = session.version
        self.device: str = session.device
        self.manifest: Manifest = session.manifest
        self.outputs: tuple[str, ...] = session.outputs

    @property
    def max_batch(self) -> int | None:
        """The most images in one run; None where the engine takes any number."""
        largest: int | None = self._session.max_batch
        return largest

    def run(
        self, inputs: Mapping[str, np.ndarray], outputs: tuple[str, ...] = ("logits",)
    ) -> dict[str, np.ndarray]:
        """Normalize the pixels and run the model once."""
        given = {**inputs, INPUT_NAME: normalized(inputs[INPUT_NAME], self.manifest)}
        found: dict[str, np.ndarray] = self._session.run(given, outputs)
        return found

    def close(self) -> None:
        """Free the model."""
        self._session.close()
