"""Removal by imputation (ROAD): removed pixels take the values that their neighbours suggest.

A black or blurred hole tells a network where pixels were removed. Rong et al. 2022 ("A consistent and efficient
evaluation strategy for attribution methods", section 5) fill holes so that each removed pixel is the weighted mean
of its neighbours, direct ones with weight 1/6 and diagonal ones with 1/12, plus a little noise: one linear system.
"""

from __future__ import annotations

import numpy as np

from bench.networks.network import Network
from bench.networks.removal import salience_ranks
from runtime.errors import OptionError

# Shares of the most salient pixels that are removed, in percent.
ROAD_PERCENTS = (20, 40, 60, 80)
_NEIGHBOURS = (
    ((0, 1), 1 / 6), ((0, -1), 1 / 6), ((1, 0), 1 / 6), ((-1, 0), 1 / 6),
    ((1, 1), 1 / 12), ((1, -1), 1 / 12), ((-1, 1), 1 / 12), ((-1, -1), 1 / 12),
)  # fmt: skip
_NOISE_LEVELS = 255 * 0.01


def impute(image: np.ndarray, removed: np.ndarray, *, seed: int = 0, noise: float = _NOISE_LEVELS) -> np.ndarray:
    """Return an image whose removed pixels are the weighted means of their neighbours, uint8 [H, W, C].

    Args:
        image: uint8 [H, W, C].
        removed: bool [H, W].
        seed: of the noise.
        noise: its standard deviation in grey levels.

    Raises:
        OptionError: SciPy is not installed.
    """
    try:
        from scipy.sparse import coo_array
        from scipy.sparse.linalg import spsolve
    except ImportError:
        raise OptionError("removal by imputation needs SciPy; pip install 'clearpact[train]'") from None
    if not removed.any():
        return image
    height, width = removed.shape
    number = np.full(removed.shape, -1)
    rows, columns = np.nonzero(removed)
    number[rows, columns] = np.arange(len(rows))
    places, others, weights = [np.arange(len(rows))], [np.arange(len(rows))], [np.zeros(len(rows))]
    known = np.zeros((len(rows), image.shape[2]))
    total = np.zeros(len(rows))
    for (down, right), weight in _NEIGHBOURS:
        r, c = rows + down, columns + right
        inside = np.flatnonzero((r >= 0) & (r < height) & (c >= 0) & (c < width))
        total[inside] += weight
        neighbour = number[r[inside], c[inside]]
        given = neighbour < 0
        known[inside[given]] += weight * image[r[inside[given]], c[inside[given]]]
        places.append(inside[~given])
        others.append(neighbour[~given])
        weights.append(np.full(int((~given).sum()), -weight))
    weights[0] = total  # at a border fewer neighbours share all the weight
    entries = np.concatenate(weights), (np.concatenate(places), np.concatenate(others))
    system = coo_array(entries, shape=(len(rows), len(rows))).tocsc()
    if removed.all():
        values = np.full((len(rows), image.shape[2]), image.mean())
    else:
        values = spsolve(system, known).reshape(len(rows), -1)
    values = values + np.random.default_rng(seed).normal(0, noise, values.shape)
    filled = image.copy()
    filled[rows, columns] = np.rint(values).clip(0, 255)
    return filled


def road_curve(
    network: Network, images: np.ndarray, labels: np.ndarray, maps: np.ndarray, *, first: int = 0
) -> np.ndarray:
    """Return whether images are still put into their true classes without their most salient pixels, bool [N, 4].

    Args:
        network: that classifies.
        images: uint8 [N, H, W, C].
        labels: int64 [N].
        maps: float32 [N, H, W].
        first: number of the first image, which seeds the noise.
    """
    ranks = salience_ranks(maps)
    size = ranks[0].size
    right = []
    for percent in ROAD_PERCENTS:
        removed = ranks < percent * size // 100
        filled = [impute(images[n], removed[n], seed=first + n) for n in range(len(images))]
        right.append(network.logits(np.stack(filled)).argmax(1) == labels)
    return np.stack(right, axis=1)
