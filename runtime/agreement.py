"""How much two saliency maps of the same image agree."""

from __future__ import annotations

import numpy as np


def spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the rank correlation of maps [N, H, W] image by image, float64 [N], -1 to 1.

    Equal values share their mean rank. A constant map agrees with nothing: 0.
    """
    ranks_a, ranks_b = (np.stack([_ranks(m.ravel()) for m in maps]) for maps in (a, b))
    ranks_a -= ranks_a.mean(1, keepdims=True)
    ranks_b -= ranks_b.mean(1, keepdims=True)
    norms = np.linalg.norm(ranks_a, axis=1) * np.linalg.norm(ranks_b, axis=1)
    correlation: np.ndarray = (ranks_a * ranks_b).sum(1) / np.where(norms > 0, norms, 1)
    return correlation


def top_overlap(a: np.ndarray, b: np.ndarray, share: float = 0.1) -> np.ndarray:
    """Return which share of the most salient pixels two maps [N, H, W] have in common, float64 [N], 0 to 1.

    Args:
        a: maps of one network.
        b: maps of the other, of the same images.
        share: how many pixels count as most salient; one at least.
    """
    n, *size = a.shape
    count = max(1, int(share * np.prod(size)))
    tops = []
    for maps in (a, b):
        chosen = np.zeros((n, int(np.prod(size))), bool)
        order = np.argsort(-maps.reshape(n, -1), axis=1, kind="stable")[:, :count]
        np.put_along_axis(chosen, order, True, axis=1)
        tops.append(chosen)
    overlap: np.ndarray = (tops[0] & tops[1]).sum(1) / count
    return overlap


def _ranks(values: np.ndarray) -> np.ndarray:
    _, where, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    mean_rank: np.ndarray = (last - (counts - 1) / 2)[where]
    return mean_rank
