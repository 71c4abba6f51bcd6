"""Curves of what a network makes of images whose most salient pixels are removed, or are all that is there.

All channels of a pixel go together. Pixels that are equally salient go in raster order, and of H * W pixels,
percent * H * W // 100 are gone. Images stay uint8, so that the exported graph sees the very same ones as torch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bench.networks.network import Network
from runtime.prediction import softmax

FILLS = ("black", "grey", "mean", "random", "blur")
TARGETS = ("predicted", "true")

PERCENTS = tuple(range(0, 101, 10))
# The masked-accuracy curve ends before the image does (Karkehabadi et al. 2024).
MASKED_PERCENTS = tuple(range(0, 91, 10))

_BLUR_PIXELS = 5.0  # standard deviation, as in the code of Petsiuk et al.


@dataclass(frozen=True)
class Curves:
    """What became of every image; row n belongs to image n.

    Args:
        correct: whether it is put into its true class, bool [N, 10], with MASKED_PERCENTS of its most salient
            pixels removed.
        deletion: probability of the explained class, float64 [N, 11], with PERCENTS removed.
        insertion: the same with only PERCENTS of the most salient pixels put onto a canvas without content.
    """

    correct: np.ndarray
    deletion: np.ndarray
    insertion: np.ndarray


def removal_curves(
    network: Network,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    fill: str = "black",
    canvas: str = "blur",
    target: str = "predicted",
    first: int = 0,
) -> tuple[Curves, np.ndarray]:
    """Return the curves of one batch and its saliency maps float32 [N, H, W].

    One gradient decides the order of the pixels; it is not computed again as they go.

    Masked accuracy: Karkehabadi et al. 2024 (SMOOT), Fig. 3 and Tables II and III. The paper says neither what
    removed pixels hold nor which class is explained. The code of Ismail et al. 2021, which it builds on, ranks the
    magnitudes of the true class's gradient and fills with the image's corner pixel, which is black on MNIST. Here:
    black, and the predicted class, which needs no label and is what a device explains.

    Deletion and insertion: Petsiuk et al. 2018 (RISE), section 4.2, in steps of 10 % of the pixels.

    Args:
        network: to measure.
        images: uint8 [N, H, W, C], at most runtime.classifier.MAX_BATCH.
        labels: true classes int64 [N].
        fill: what removed pixels hold, one of FILLS.
        canvas: what pixels are inserted into, one of FILLS.
        target: class that is explained and whose probability is followed, one of TARGETS.
        first: number of the first image in its data set, which seeds its random filling.
    """
    asked = labels if target == "true" else np.full(len(images), -1, np.int64)
    logits, maps = network.explain(images, asked)
    explained = labels if target == "true" else logits.argmax(1)
    ranks = salience_ranks(maps)
    removed, empty = filling(images, fill, first=first), filling(images, canvas, first=first)
    without = [logits, *(network.logits(overwrite(images, removed, ranks, p)) for p in PERCENTS[1:])]
    only = [*(network.logits(overwrite(empty, images, ranks, p)) for p in PERCENTS[:-1]), logits]
    rows = np.arange(len(images))
    curves = Curves(
        correct=np.stack([found.argmax(1) == labels for found in without[: len(MASKED_PERCENTS)]], 1),
        deletion=np.stack([softmax(found)[rows, explained] for found in without], 1),
        insertion=np.stack([softmax(found)[rows, explained] for found in only], 1),
    )
    return curves, maps


def salience_ranks(maps: np.ndarray) -> np.ndarray:
    """Return the rank of every pixel of maps [N, H, W], int64, 0 for the most salient one of its image."""
    order = np.argsort(-maps.reshape(len(maps), -1), axis=1, kind="stable")
    ranks = np.empty_like(order)
    np.put_along_axis(ranks, order, np.arange(order.shape[1])[None], axis=1)
    return ranks.reshape(maps.shape)


def overwrite(images: np.ndarray, others: np.ndarray, ranks: np.ndarray, percent: int) -> np.ndarray:
    """Return the images with their `percent` % most salient pixels taken from the others.

    Args:
        images: uint8 [N, H, W, C].
        others: uint8, the same shape.
        ranks: from `salience_ranks`, [N, H, W].
        percent: 0 to 100.
    """
    count = percent * ranks[0].size // 100
    return np.where((ranks < count)[..., None], others, images)


def filling(images: np.ndarray, fill: str, *, first: int = 0) -> np.ndarray:
    """Return images without content, uint8 [N, H, W, C], to take the pixels from that replace removed ones.

    Args:
        images: uint8 [N, H, W, C].
        fill: "black" (level 0), "grey" (128, the zero of our default normalization), "mean" (of the image and
            channel), "random" (uniform in the image's range) or "blur" (a Gaussian of 5 pixels).
        first: number of the first image; image n draws from a generator seeded by it, in whichever batch it comes.
    """
    if fill == "black":
        return np.zeros_like(images)
    if fill == "grey":
        return np.full_like(images, 128)
    if fill == "mean":
        means = np.rint(images.mean((1, 2), keepdims=True)).astype(np.uint8)
        return np.broadcast_to(means, images.shape)
    if fill == "blur":
        return _blurred(images)
    drawn = [
        np.random.default_rng(first + n).integers(int(image.min()), int(image.max()) + 1, image.shape)
        for n, image in enumerate(images)
    ]
    return np.stack(drawn).astype(np.uint8)


def area(curve: np.ndarray) -> np.ndarray:
    """Return the area under curves [..., P] in steps of 10 % of the pixels, by the trapezoid rule in float64."""
    values = curve.astype(np.float64)
    found: np.ndarray = (values[..., 1:] + values[..., :-1]).sum(-1) * 0.05
    return found


def _blurred(images: np.ndarray) -> np.ndarray:
    """Return the images under a Gaussian, borders repeated.

    Sums of shifted images and no matrix product: numpy's threads and torch's, each waiting for work by spinning,
    would take the cores from one another.
    """
    reach = round(3 * _BLUR_PIXELS)
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / _BLUR_PIXELS) ** 2)
    weights /= weights.sum()
    blurred = images.astype(np.float32)
    for axis in (1, 2):
        padded = np.pad(blurred, [(reach, reach) if a == axis else (0, 0) for a in range(4)], mode="edge")
        size = images.shape[axis]
        blurred = sum(
            np.float32(weight) * padded.take(range(start, start + size), axis)
            for start, weight in enumerate(weights)
        )
    return np.rint(blurred).astype(np.uint8)
