"""From a frame to its class and, where it is asked for, the map that explains it, in one run of the engine."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from deploy.edge_app.picture import Picture
from runtime.classifier import Classifier
from runtime.images import to_batch
from runtime.images.resizing import middle
from runtime.prediction import softmax


@dataclass(frozen=True)
class Answer:
    """What the model says about one frame.

    Args:
        label: name of the most probable class.
        probability: of it, 0 to 1.
        map: why, float32 [h, w], in the size of the model's image; None where it was not asked for.
        area: top, left, height and width of the part of the frame that the model saw; None is all of it.
        method: that made the map.
    """

    label: str
    probability: float
    map: np.ndarray | None = None
    area: tuple[int, int, int, int] | None = None
    method: str = ""

    def picture(self, frame: np.ndarray) -> Picture:
        """Return the frame with this answer."""
        method = f"  ·  {self.method.replace('_', ' ')}" if self.method else ""
        return Picture(frame, f"{self.label}  {self.probability:.1%}{method}", self.map, self.area)


class Answerer:
    """Asks a classifier.

    Args:
        classifier: that is asked.
        explain: for a map as well.
        method: of `Classifier.explain`.
    """

    def __init__(self, classifier: Classifier, *, explain: bool, method: str | None = None) -> None:
        self._classifier, self._explain, self._method = classifier, explain, method

    def warm_up(self) -> None:
        """Compile what the first answer needs.

        Raises:
            ModelError: the file has no such map.
        """
        expected = self._classifier.manifest.input
        self.answer(np.zeros((*expected.size, expected.channels), np.uint8))

    def answer(self, frame: np.ndarray) -> Answer:
        """Return the answer to a frame, uint8 [H, W], [H, W, 1] or RGB [H, W, 3].

        Raises:
            ImageError: it is no such frame, or the model takes no frame of its size.
            ModelError: the file has no such map.
        """
        if not self._explain:
            (prediction,) = self._classifier.predict([frame], top_k=1)
            return Answer(prediction.label, prediction.probability)
        expected = self._classifier.manifest.input
        # The map stays in the model's size: in that of a large frame it would take longer than all else.
        (small,) = to_batch(frame, expected)
        found = self._classifier.explain(small, method=self._method)
        probability = softmax(found.logits / found.temperature)[found.target]
        area = middle(frame.shape[:2], expected.size) if expected.resize == "crop" else None
        return Answer(str(found.label), float(probability), found.map, area, found.method)
