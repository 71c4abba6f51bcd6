"""How much two saliency maps of the same image agree."""

from __future__ import annotations

import numpy as np

_SSIM_WINDOW = 7


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


def pearson(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the linear correlation of maps [N, H, W] image by image, float64 [N]; of a constant map 0."""
    flat_a, flat_b = (maps.reshape(len(maps), -1).astype(np.float64) for maps in (a, b))
    flat_a -= flat_a.mean(1, keepdims=True)
    flat_b -= flat_b.mean(1, keepdims=True)
    norms = np.linalg.norm(flat_a, axis=1) * np.linalg.norm(flat_b, axis=1)
    correlation: np.ndarray = (flat_a * flat_b).sum(1) / np.where(norms > 0, norms, 1)
    return correlation


def ssim(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the mean structural similarity of maps [N, H, W], each divided by its maximum, float64 [N], -1 to 1.

    Wang et al. 2004, equation 13, in windows of 7 x 7 pixels, or of the map where that is smaller.
    """
    scaled = []
    for maps in (a, b):
        peaks = maps.max((1, 2), keepdims=True).astype(np.float64)
        scaled.append(maps / np.where(peaks > 0, peaks, 1))
    window = tuple(min(_SSIM_WINDOW, size) for size in a.shape[1:])
    x, y = scaled
    mean_x, mean_y = _window_means(x, window), _window_means(y, window)
    n = window[0] * window[1]
    unbiased = n / max(n - 1, 1)
    var_x, var_y = (
        unbiased * (_window_means(v * v, window) - mean**2).clip(0) for v, mean in ((x, mean_x), (y, mean_y))
    )
    cov = unbiased * (_window_means(x * y, window) - mean_x * mean_y)
    c1, c2 = 0.01**2, 0.03**2
    similarity = ((2 * mean_x * mean_y + c1) * (2 * cov + c2)) / (
        (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    )
    found: np.ndarray = similarity.mean((1, 2))
    return found


def _window_means(maps: np.ndarray, window: tuple[int, ...]) -> np.ndarray:
    """Return the mean of maps [N, H, W] in every window, [N, H - h + 1, W - w + 1]; rows first, then columns."""
    height, width = window
    down, across = (size - length + 1 for size, length in zip(maps.shape[1:], window, strict=True))
    rows = np.add.reduce([maps[:, i : i + down] for i in range(height)])
    sums: np.ndarray = np.add.reduce([rows[:, :, i : i + across] for i in range(width)])
    return sums / (height * width)


def top_20_overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return `top_overlap` of the 20 % most salient pixels."""
    return top_overlap(a, b, share=0.2)


# What two maps of an image are compared by.
MEASURES = {
    "Spearman": spearman, "Pearson": pearson, "SSIM": ssim, "top-10 % overlap": top_overlap,
    "top-20 % overlap": top_20_overlap,
}  # fmt: skip


def _ranks(values: np.ndarray) -> np.ndarray:
    _, where, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    mean_rank: np.ndarray = (last - (counts - 1) / 2)[where]
    return mean_rank
