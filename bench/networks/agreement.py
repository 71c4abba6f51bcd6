"""How much two networks agree on the same images: in the class, in the logits, and in the map of one class."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bench.measure.streams import Batch, ImageStream, in_parallel
from bench.networks.network import Network
from runtime import command
from runtime.explanations.agreement import MEASURES, spearman, top_overlap

TARGETS = ("predicted", "true")


@dataclass(frozen=True)
class Spread:
    """The agreements of single images: mean, median, lowest decile, and the least with its image."""

    mean: float
    median: float
    lowest_decile: float
    least: float
    least_image: int

    @classmethod
    def of(cls, values: np.ndarray) -> Spread:
        """Return it for the agreements float64 [N] of N images."""
        worst = int(values.argmin())
        return cls(
            mean=float(values.mean()),
            median=float(np.median(values)),
            lowest_decile=float(np.quantile(values, 0.1)),
            least=float(values[worst]),
            least_image=worst,
        )


@dataclass(frozen=True)
class Agreement:
    """How well one network does what another does.

    Args:
        images: number of images.
        differing: images that the two put into different classes.
        largest_difference: of two logits, as a share of the other's largest magnitude.
        spearman: rank correlation of the two maps of each image, -1 to 1; None where one of the two has no maps.
        top_overlap: share of the 10 % most salient pixels that the two have in common, 0 to 1; or None.
        pearson: linear correlation of the two maps, -1 to 1; or None.
        ssim: structural similarity of the two, -1 to 1; or None.
        top_20_overlap: as top_overlap, of the 20 % most salient pixels.
        same_class: means of these over the images that both put into one class, by name; None likewise, or where
            there is no such image.
    """

    images: int
    differing: int
    largest_difference: float
    spearman: Spread | None
    top_overlap: Spread | None
    pearson: Spread | None = None
    ssim: Spread | None = None
    top_20_overlap: Spread | None = None
    same_class: dict[str, float] | None = None


def of_maps(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return rank correlation and top-10 % overlap, float64 [N, 2], of maps float32 [N, H, W] of N images."""
    return np.stack([spearman(a, b), top_overlap(a, b)], axis=1)


def compare(
    network: Network, reference: Network, test: ImageStream, *, target: str = "predicted", workers: int = 1
) -> Agreement:
    """Run both on the images.

    Args:
        network: to compare.
        reference: to compare with.
        test: labelled images, of the networks' size.
        target: the class whose maps are compared: the one that `reference` predicts, or the "true" one.
        workers: batches that run at the same time.

    Raises:
        ClearpactError: the images cannot be read.
    """
    explained = network.explains and reference.explains

    def of_batch(batch: Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        images, labels = batch
        logits = network.logits(images), reference.logits(images)
        peaks = np.array([np.abs(logits[0] - logits[1]).max(), np.abs(logits[1]).max()])
        differing = logits[0].argmax(1) != logits[1].argmax(1)
        if not explained:
            return differing, peaks, np.empty((len(images), 0))
        classes = (labels if target == "true" else logits[1].argmax(1)).astype(np.int64)
        maps = (side.explain(images, classes)[1] for side in (network, reference))
        pair = tuple(maps)
        return differing, peaks, np.stack([measure(*pair) for measure in MEASURES.values()], axis=1)

    steps = in_parallel(of_batch, test.batches(), workers)
    found = list(command.progress(steps, label="images / 64", total=test.batch_count))
    differing, peaks, maps = (np.concatenate(parts) for parts in zip(*found, strict=True))
    difference, magnitude = peaks.reshape(-1, 2).max(0)
    spreads = {name: Spread.of(maps[:, i]) for i, name in enumerate(MEASURES)} if explained else {}
    agreeing = explained and not differing.all()
    return Agreement(
        images=len(differing),
        differing=int(differing.sum()),
        largest_difference=float(difference / magnitude) if magnitude else float(difference > 0),
        spearman=spreads.get("Spearman"),
        top_overlap=spreads.get("top-10 % overlap"),
        pearson=spreads.get("Pearson"),
        ssim=spreads.get("SSIM"),
        top_20_overlap=spreads.get("top-20 % overlap"),
        same_class=dict(zip(MEASURES, map(float, maps[~differing].mean(0)), strict=True)) if agreeing else None,
    )
