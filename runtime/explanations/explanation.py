"""The explanation of a prediction: a map over the image, to read as numbers or to look at."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from runtime.errors import ImageError, OptionError
from runtime.explanations.attribution import Attribution
from runtime.explanations.picture import blend, joined, panels_of
from runtime.files import write_atomically
from runtime.images.resizing import middle, resize_maps


@dataclass(frozen=True)
class Explanation:
    """Why images were put into a class.

    For one image the leading axis N is absent throughout.

    Args:
        map: saliency in the image's own size, float32 [N, H, W], >= 0: the largest magnitude over channels.
        target: index of the explained class, int64 [N].
        label: its name; a list for several images.
        logits: float32 [N, K].
        attribution: what the map was made of, in the model's size, signed, float32 [N, C, h, w]; of a class
            activation map, that of the layer, [N, 1, h, w].
        method: name of the method.
        images: the explained images as they were given, uint8 [N, H, W] or [N, H, W, C].
        completeness_gap: of Integrated Gradients, float64 [N]; otherwise None.
        temperature: of the caption's probability.
    """

    map: np.ndarray
    target: np.ndarray
    label: str | list[str]
    logits: np.ndarray
    attribution: np.ndarray
    method: str
    images: np.ndarray
    completeness_gap: np.ndarray | None = None
    temperature: float = 1.0

    def overlay(
        self, images: np.ndarray | None = None, *, strength: float = 0.9, colormap: str = "inferno"
    ) -> np.ndarray:
        """Return the images with the map drawn over them, uint8 RGB [N, H, W, 3].

        Args:
            images: to draw on, uint8, of the map's size; None takes the explained ones.
            strength: opacity of the most salient pixels, 0 to 1.
            colormap: one of runtime.explanations.picture.COLORMAPS.

        Raises:
            ImageError: the images are not uint8 of the map's size.
            OptionError: no such scale of colours.
        """
        images = np.asarray(self.images if images is None else images)
        return blend(images, self.map, strength=strength, colormap=colormap)

    def picture(
        self,
        *,
        caption: bool = True,
        side_by_side: bool = False,
        runner_up: Explanation | None = None,
        colormap: str = "inferno",
    ) -> np.ndarray:
        """Return the explanation of one image as a picture for a person, uint8 RGB [H, W, 3].

        Its shorter side has 256 pixels at least; the pixels of tiny images stay squares.

        Args:
            caption: write class, probability and method under it, which needs Pillow.
            side_by_side: show the frame, the map and the overlay.
            runner_up: of the same image for another class, whose overlay is shown beside.
            colormap: one of runtime.explanations.picture.COLORMAPS.

        Raises:
            ImageError: the explanation is of several images.
            OptionError: no such scale of colours, or Pillow is not installed.
        """
        if self.map.ndim != 2:
            raise ImageError(f"a picture of {len(self.map)} explanations, expected one; draw one at a time")
        panels = panels_of(
            self.images, self.map, self._caption() if caption else "", side_by_side=side_by_side, colormap=colormap
        )
        if runner_up is not None:
            text = runner_up._caption() if caption else ""
            panels += panels_of(runner_up.images, runner_up.map, text, side_by_side=False, colormap=colormap)
        return joined(panels)

    def _caption(self) -> str:
        shifted = np.exp((self.logits.astype(np.float64) - self.logits.max()) / self.temperature)
        return f"{self.label} {shifted[self.target] / shifted.sum():.1%} · {self.method.replace('_', ' ')}"

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        caption: bool = True,
        side_by_side: bool = False,
        runner_up: Explanation | None = None,
        colormap: str = "inferno",
    ) -> None:
        """Write the explanation of one image: `.npz` holds map, attribution, logits and target; else `picture`.

        Raises:
            FileError: the file cannot be written.
            OptionError: Pillow, which pictures need, is not installed, or the suffix is not a picture's.
            ImageError: the explanation is of several images and the file a picture.
        """
        path = Path(path)
        buffer = io.BytesIO()
        if path.suffix.lower() == ".npz":
            np.savez_compressed(
                buffer, map=self.map, attribution=self.attribution, logits=self.logits, target=self.target
            )
            write_atomically(path, buffer.getvalue())
            return
        if self.map.ndim != 2:
            raise ImageError(f"{path}: explanation of {len(self.map)} images, expected one; save one at a time")
        try:
            from PIL import Image
        except ImportError:
            raise OptionError("writing pictures needs Pillow; pip install 'clearpact[tools]'") from None
        if path.suffix.lower() not in Image.registered_extensions():
            raise OptionError(f"{path}: unknown kind of picture, expected a name such as heat.png")
        drawn = self.picture(caption=caption, side_by_side=side_by_side, runner_up=runner_up, colormap=colormap)
        Image.fromarray(drawn).save(buffer, format=Image.registered_extensions()[path.suffix.lower()])
        write_atomically(path, buffer.getvalue())


def explanation(
    found: Attribution,
    images: np.ndarray,
    classes: tuple[str, ...],
    method: str,
    *,
    single: bool,
    cropped: bool = False,
    size: tuple[int, int] | None = None,
) -> Explanation:
    """Return the explanation of images from what a method found.

    Args:
        found: the attribution, in the model's size.
        images: as they were given.
        classes: names of the classes.
        method: name of the method.
        single: leave the axis N out.
        cropped: the model saw the middle of images of another shape only; outside of it, maps are 0.
        size: height and width of the model's image, where the attribution's are others.
    """
    maps = np.abs(found.values).max(1)
    height, width = images.shape[:2] if single else images.shape[1:3]
    if maps.shape[1:] != (height, width):
        top, left, *seen = middle((height, width), size or maps.shape[1:]) if cropped else (0, 0, height, width)
        inside = resize_maps(maps, (seen[0], seen[1]))
        if tuple(seen) == (height, width):
            maps = inside
        else:
            maps = np.zeros((len(maps), height, width), np.float32)
            maps[:, top : top + seen[0], left : left + seen[1]] = inside
    labels = [classes[index] for index in found.target]
    if not single:
        return Explanation(
            maps, found.target, labels, found.logits, found.values, method, images, found.completeness_gap
        )
    gap = None if found.completeness_gap is None else found.completeness_gap[0]
    return Explanation(maps[0], found.target[0], labels[0], found.logits[0], found.values[0], method, images, gap)
