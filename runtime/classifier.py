"""`Classifier`: from a frame to a class, with whatever engine the device has."""

from __future__ import annotations

import os
from dataclasses import dataclass
from types import TracebackType
from typing import overload

import numpy as np

from runtime.errors import ImageError, OptionError
from runtime.images import to_batch
from runtime.manifest import INPUT_NAME, Manifest
from runtime.session import Session, open_session

# Images in one run of the engine: large inputs are cut, so that memory stays bounded.
MAX_BATCH = 64


@dataclass(frozen=True)
class Prediction:
    """The class of one image.

    Args:
        label: name of the most probable class.
        index: its position in the manifest's classes.
        probability: its softmax probability, 0 to 1.
        top: the k most probable classes as (label, probability), best first.
        logits: float32 [K].
    """

    label: str
    index: int
    probability: float
    top: tuple[tuple[str, float], ...]
    logits: np.ndarray


class Classifier:
    """An exported model, ready to classify frames. Safe to call from several threads; a context manager.

    Args:
        model: path or contents of an ONNX file that `python -m export.onnx` wrote.
        engine: "openvino" or "ort"; None takes the one the file was exported for.
        device: "cpu", or another device of the engine.
        threads: CPU threads of one inference; None leaves the number to the engine.

    Raises:
        ClearpactError: see `runtime.session.open_session`.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | bytes,
        *,
        engine: str | None = None,
        device: str = "cpu",
        threads: int | None = None,
    ) -> None:
        self.session: Session = open_session(model, engine=engine, device=device, threads=threads)

    @property
    def manifest(self) -> Manifest:
        """What the model file says about itself."""
        return self.session.manifest

    @overload
    def predict(self, images: np.ndarray, *, top_k: int = 3) -> Prediction | list[Prediction]: ...
    @overload
    def predict(self, images: list[np.ndarray], *, top_k: int = 3) -> list[Prediction]: ...
    def predict(self, images: np.ndarray | list[np.ndarray], *, top_k: int = 3) -> Prediction | list[Prediction]:
        """Classify one image or several.

        Args:
            images: uint8, one image [H, W] or [H, W, C], a batch [N, H, W, C], or a list of images of any sizes;
                grey or RGB, converted and resized to what the model takes.
            top_k: how many classes `Prediction.top` lists.

        Returns:
            One prediction for one image, otherwise a list.

        Raises:
            ImageError: an image has a dtype, shape or size the model cannot take.
        """
        if top_k < 1:
            raise OptionError(f"top_k {top_k}: expected a whole number from 1")
        logits = self.logits(images)
        predictions = [_prediction(row, self.manifest.classes, top_k) for row in logits]
        single = not isinstance(images, list) and _is_single(np.asarray(images))
        return predictions[0] if single else predictions

    def logits(self, images: np.ndarray | list[np.ndarray]) -> np.ndarray:
        """Return the logits float32 [N, K] of the images that `predict` takes."""
        if isinstance(images, list):
            if not images:
                raise ImageError("an empty list of images, expected at least one")
            batch = np.concatenate([to_batch(image, self.manifest.input) for image in images])
        else:
            batch = to_batch(images, self.manifest.input)
        parts = [batch[start : start + MAX_BATCH] for start in range(0, len(batch), MAX_BATCH)]
        return np.concatenate([self.session.run({INPUT_NAME: part})["logits"] for part in parts])

    def close(self) -> None:
        """Free the model."""
        self.session.close()

    def __enter__(self) -> Classifier:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def softmax(logits: np.ndarray) -> np.ndarray:
    """Return the probabilities float64 [..., K] of logits [..., K]."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    probabilities: np.ndarray = shifted / shifted.sum(-1, keepdims=True)
    return probabilities


def _prediction(logits: np.ndarray, classes: tuple[str, ...], top_k: int) -> Prediction:
    probabilities = softmax(logits)
    best = np.argsort(-probabilities, kind="stable")[:top_k]
    top = tuple((classes[i], float(probabilities[i])) for i in best)
    return Prediction(top[0][0], int(best[0]), top[0][1], top, logits)


def _is_single(images: np.ndarray) -> bool:
    return images.ndim == 2 or (images.ndim == 3 and images.shape[2] in (1, 3))
