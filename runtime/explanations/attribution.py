"""Attribution methods on top of a gradient that the engine computes.

Each takes `gradient_of(images, target)`, which runs the exported graph on uint8 images [n, H, W, C] and classes
int64 [n] and returns logits float32 [n, K] and d logit_target / d x, float32 [n, C, H, W], x being the normalized
image. Noise and paths are rounded to pixel levels, which is all that the graph takes. A network whose input grid
is the pixels' own (the default normalization) would round to these levels itself, so that nothing is lost. Others
lose little: Integrated Gradients of a float export (MNIST, cnn2, 100 test images, 64 steps) are 0.7 % in norm from
those along the unrounded path (median; 4.3 % at worst), and rank the pixels alike (Spearman 0.9999 or more).

Work is cut into runs of at most `max_batch` images, whatever the number of samples or steps.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from runtime.errors import OptionError
from runtime.manifest import ImageInput

GradientOf = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
Progress = Callable[..., Iterable[int]]

METHODS = ("gradient", "input_x_gradient", "smoothgrad", "integrated_gradients")


@dataclass(frozen=True)
class Attribution:
    """What a method found.

    Args:
        values: float32 [N, C, H, W], one signed number per input element.
        logits: of the unchanged images, float32 [N, K].
        target: the class that was explained, int64 [N].
        completeness_gap: for Integrated Gradients, the sum of the values minus the change of the target's logit
            from the baseline to the image, float64 [N]; 0 for an exact integral. None for the others.
    """

    values: np.ndarray
    logits: np.ndarray
    target: np.ndarray
    completeness_gap: np.ndarray | None = None


def attribute(
    gradient_of: GradientOf,
    images: np.ndarray,
    target: np.ndarray,
    expected: ImageInput,
    *,
    method: str,
    samples: int,
    noise: float,
    steps: int,
    baseline: int,
    seed: int,
    max_batch: int,
    progress: Progress | None,
) -> Attribution:
    """Run one of METHODS; the arguments are those of the functions below, of which each takes its own.

    Raises:
        OptionError: no such method, or a number out of range.
    """
    if method not in METHODS:
        raise OptionError(f"method {method!r}: expected one of {', '.join(METHODS)}")
    for name, value in (("samples", samples), ("steps", steps)):
        if not isinstance(value, (int, np.integer)) or value < 1:
            raise OptionError(f"{name} {value!r}: expected a whole number from 1")
    if not isinstance(seed, (int, np.integer)) or seed < 0:
        raise OptionError(f"seed {seed!r}: expected a whole number from 0")
    if not isinstance(noise, numbers.Real) or not 0 <= noise < np.inf:
        raise OptionError(f"noise {noise!r}: expected a share of the image's range, from 0")
    if not isinstance(baseline, numbers.Real) or not 0 <= baseline <= 255:
        raise OptionError(f"baseline {baseline!r}: expected a pixel level, 0 to 255")
    bar = progress or _no_progress
    if method == "smoothgrad":
        return smoothgrad(
            gradient_of, images, target, samples=samples, noise=noise, seed=seed, max_batch=max_batch, progress=bar
        )
    if method == "integrated_gradients":
        return integrated_gradients(
            gradient_of,
            images,
            target,
            expected,
            steps=steps,
            baseline=baseline,
            max_batch=max_batch,
            progress=bar,
        )
    if method == "input_x_gradient":
        return input_x_gradient(gradient_of, images, target, expected, max_batch=max_batch)
    return gradient(gradient_of, images, target, max_batch=max_batch)


def normalize(images: np.ndarray, expected: ImageInput) -> np.ndarray:
    """Return the normalized image float32 [N, C, H, W] of uint8 [N, H, W, C], as the graph computes it."""
    mean, std = np.array(expected.mean), np.array(expected.std)
    normalized: np.ndarray = ((images / 255 - mean) / std).astype(np.float32).transpose(0, 3, 1, 2)
    return normalized


def gradient(gradient_of: GradientOf, images: np.ndarray, target: np.ndarray, *, max_batch: int) -> Attribution:
    """Return d logit_target / d x (Simonyan et al. 2014).

    Args:
        gradient_of: see the module's text.
        images: uint8 [N, H, W, C].
        target: int64 [N]; -1 means the predicted class.
        max_batch: images in one run.
    """
    parts = [gradient_of(images[cut], target[cut]) for cut in _cuts(len(images), max_batch)]
    logits = np.concatenate([part[0] for part in parts])
    values = np.concatenate([part[1] for part in parts])
    return Attribution(values, logits, np.where(target < 0, logits.argmax(1), target))


def input_x_gradient(
    gradient_of: GradientOf, images: np.ndarray, target: np.ndarray, expected: ImageInput, *, max_batch: int
) -> Attribution:
    """Return x * d logit_target / d x, elementwise (Shrikumar et al. 2016); arguments as `gradient`."""
    plain = gradient(gradient_of, images, target, max_batch=max_batch)
    return Attribution(normalize(images, expected) * plain.values, plain.logits, plain.target)


def smoothgrad(
    gradient_of: GradientOf,
    images: np.ndarray,
    target: np.ndarray,
    *,
    samples: int = 32,
    noise: float = 0.15,
    seed: int = 0,
    max_batch: int,
    progress: Progress,
) -> Attribution:
    """Return the mean gradient over noisy copies of each image (Smilkov et al. 2017, section 3).

    Args:
        gradient_of: see the module's text.
        images: uint8 [N, H, W, C].
        target: int64 [N]; -1 means the class predicted without noise.
        samples: noisy copies of each image, >= 1.
        noise: standard deviation of the noise as a share of the image's range of levels.
        seed: of the noise.
        max_batch: images in one run.
        progress: wraps the iteration over images.
    """
    clean = gradient(gradient_of, images, target, max_batch=max_batch)
    values = np.empty_like(clean.values)
    for index in progress(range(len(images)), label="explaining"):
        total = np.zeros(values.shape[1:], np.float64)
        generator = np.random.default_rng([seed, index])
        for cut in _cuts(samples, max_batch):
            noisy = noisy_copies(images[index], cut.stop - cut.start, noise, generator)
            _, gradients = gradient_of(noisy, np.repeat(clean.target[index], len(noisy)))
            total += gradients.sum(0, dtype=np.float64)
        values[index] = total / samples
    return Attribution(values, clean.logits, clean.target)


def noisy_copies(image: np.ndarray, n: int, noise: float, generator: np.random.Generator) -> np.ndarray:
    """Return n copies uint8 [n, H, W, C] of an image uint8 [H, W, C] with normal noise, rounded and clipped."""
    deviation = noise * (float(image.max()) - float(image.min()))
    levels = image + deviation * generator.standard_normal((n, *image.shape), dtype=np.float32)
    return np.rint(levels).clip(0, 255).astype(np.uint8)


def integrated_gradients(
    gradient_of: GradientOf,
    images: np.ndarray,
    target: np.ndarray,
    expected: ImageInput,
    *,
    steps: int = 64,
    baseline: int = 0,
    max_batch: int,
    progress: Progress,
) -> Attribution:
    """Return (x - x') times the mean gradient on the line from x' to x (Sundararajan et al. 2017, equation 3).

    The integral is the midpoint sum over `steps` intervals.

    Args:
        gradient_of: see the module's text.
        images: uint8 [N, H, W, C].
        target: int64 [N]; -1 means the class predicted for the image itself.
        expected: normalization of the image.
        steps: number of intervals, >= 1.
        baseline: pixel level of the image x' that the path starts from; 0 is black.
        max_batch: images in one run.
        progress: wraps the iteration over images.
    """
    start = np.full_like(images, baseline)
    clean = gradient(gradient_of, images, target, max_batch=max_batch)
    _, *rest = images.shape
    dark_logits, _ = gradient_of(np.full((1, *rest), baseline, np.uint8), np.zeros(1, np.int64))
    mean_gradient = np.empty_like(clean.values)
    positions = (np.arange(steps, dtype=np.float32) + 0.5) / steps
    for index in progress(range(len(images)), label="explaining"):
        total = np.zeros(mean_gradient.shape[1:], np.float64)
        image = images[index].astype(np.float32)
        for cut in _cuts(steps, max_batch):
            along = positions[cut, None, None, None]
            path = np.rint(baseline + along * (image - baseline)).astype(np.uint8)
            _, gradients = gradient_of(path, np.repeat(clean.target[index], len(path)))
            total += gradients.sum(0, dtype=np.float64)
        mean_gradient[index] = total / steps
    values = (normalize(images, expected) - normalize(start, expected)) * mean_gradient
    rows = np.arange(len(images))
    change = clean.logits[rows, clean.target].astype(np.float64) - dark_logits[0, clean.target]
    gap = values.sum((1, 2, 3), dtype=np.float64) - change
    return Attribution(values, clean.logits, clean.target, gap)


def _cuts(n: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


def _no_progress(items: Iterable[int], *, label: str) -> Iterable[int]:
    return items
