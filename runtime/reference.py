"""What a model did on validation images, as its file tells it: what a device is compared with.

    images            how many there were
    class_shares      of each class among the predictions [K], adding up to 1
    confidences       shares of the predictions whose probability lies in each tenth of 0 to 1 [10]
    scores            mean and standard deviation of the out-of-distribution score
    threshold         95 % of the validation images score higher
    map_output        output whose maps were summed; empty where the file has none
    map_shares        mean share of a map's mass in each of 3 x 3 regions, row by row [9]; empty likewise

The score is the negative free energy of Liu et al. 2020 at temperature 1, log(sum(exp(logits))): large for images
such as those of the training.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

BINS = 10
REGIONS = 3


@dataclass(frozen=True)
class Reference:
    """What a model did on validation images; see the module's text for the fields."""

    images: int
    class_shares: tuple[float, ...]
    confidences: tuple[float, ...]
    scores: tuple[float, float]
    threshold: float
    map_output: str = ""
    map_shares: tuple[float, ...] = ()

    @classmethod
    def from_values(cls, values: Any, classes: int) -> Reference:
        """Read one from a JSON object; raises ValueError with the field and what it must be."""
        if not isinstance(values, dict) or values.keys() != cls.__dataclass_fields__.keys():
            raise ValueError(f"field reference: expected {', '.join(cls.__dataclass_fields__)}")
        lists = {}
        sizes = {"class_shares": (classes,), "confidences": (BINS,), "scores": (2,), "map_shares": (0, REGIONS**2)}
        for name, allowed in sizes.items():
            numbers = values[name]
            if not isinstance(numbers, list) or len(numbers) not in allowed or not all(map(_is_number, numbers)):
                raise ValueError(f"field reference.{name}: expected {allowed[-1]} numbers")
            lists[name] = tuple(map(float, numbers))
        images, threshold, output = (values[name] for name in ("images", "threshold", "map_output"))
        if not isinstance(images, int) or images < 1 or not _is_number(threshold) or not isinstance(output, str):
            raise ValueError("field reference: images from 1, a threshold and an output's name are expected")
        scores = lists["scores"]
        return cls(
            images, lists["class_shares"], lists["confidences"], (scores[0], scores[1]), float(threshold), output,
            lists["map_shares"],
        )  # fmt: skip


def in_distribution_scores(logits: np.ndarray) -> np.ndarray:
    """Return log(sum(exp(logits))), float64 [...], of logits [..., K] (Liu et al. 2020, equation 4)."""
    highest = logits.max(-1, keepdims=True).astype(np.float64)
    found: np.ndarray = highest[..., 0] + np.log(np.exp(logits - highest).sum(-1))
    return found


def confidence_bins(probabilities: np.ndarray) -> np.ndarray:
    """Return in which tenth of 0 to 1 probabilities lie, int64, 0 to 9."""
    return np.minimum((np.asarray(probabilities) * BINS).astype(np.int64), BINS - 1)


def region_shares(maps: np.ndarray) -> np.ndarray:
    """Return the share of each map's mass in 3 x 3 regions, float64 [N, 9], of maps [N, H, W] >= 0.

    A map of nothing but zeros has the same share everywhere.
    """
    n, *sizes = maps.shape
    rows, columns = (np.minimum(np.arange(size) * REGIONS // size, REGIONS - 1) for size in sizes)
    by_row = np.stack([maps[:, rows == r].sum(1, dtype=np.float64) for r in range(REGIONS)], axis=1)
    sums = np.stack([by_row[:, :, columns == c].sum(2) for c in range(REGIONS)], axis=2).reshape(n, -1)
    total = sums.sum(1, keepdims=True)
    return np.where(total > 0, sums / np.where(total > 0, total, 1), 1 / REGIONS**2)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
