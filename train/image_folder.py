"""Class folders as training data: in memory where they fit, else decoded batch by batch ahead of the steps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from runtime.errors import FileError
from train import splits
from train.data import ImageData
from train.decoding import Decoder, read_all, worker_count
from train.splits import PARTS, SPLIT_NAME, Split

if TYPE_CHECKING:
    from train.data import Images
    from train.recipe import Recipe

MEMORY_BYTES = 4 << 30
IMAGE_SIDE = 64


@dataclass(frozen=True)
class Reading:
    """How an image folder is read; only the first two change what is trained on.

    Args:
        side: height and width in pixels that every image is cropped and resized to.
        seed: of the split, where the folder has none of its own.
        strict: an image that cannot be read is an error; otherwise it is skipped.
        workers: processes that decode, None: as many as are worth it. A script that asks for any must do so below
            `if __name__ == "__main__"`, since the processes import it; without, this one decodes.
        memory_bytes: the largest data set, all pixels together, that is kept in memory.
        split: from an earlier run; None finds or makes it.
    """

    side: int = IMAGE_SIDE
    seed: int = 0
    strict: bool = False
    workers: int | None = 0
    memory_bytes: int = MEMORY_BYTES
    split: Split | None = None


def reading_of(recipe: Recipe, run: Path | None) -> Reading:
    """Return how a recipe reads its folder: with the split written into its run's folder, once there is one.

    Raises:
        FileError: the run's split is gone, or is not the one the checkpoint was trained on.
    """
    split = None
    if run is not None and recipe.split:
        split = splits.read(run / SPLIT_NAME)
        if split.digest != recipe.split:
            raise FileError(
                f"{run / SPLIT_NAME}: split {split.digest}, expected the checkpoint's {recipe.split}; restore it"
            )
    return Reading(recipe.image_size, recipe.split_seed, split=split)


class FileImages:
    """Image files that behave like a tensor uint8 [N, 3, H, W]: what is asked for is decoded then.

    Args:
        paths: N files, known to be readable.
        decoder: gives their pixels.
        device: where the pixels are put.
    """

    def __init__(self, paths: list[str], decoder: Decoder, device: str | torch.device = "cpu") -> None:
        self.paths, self.decoder, self.device = paths, decoder, torch.device(device)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[N, 3, H, W]."""
        return (len(self.paths), 3, *self.decoder.size)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: slice | Tensor) -> Tensor:
        if isinstance(index, slice):
            index = torch.arange(len(self))[index]
        return next(self.batches([index]))

    def to(self, device: str | torch.device) -> FileImages:
        """Return the same images, whose pixels come to another device."""
        return FileImages(self.paths, self.decoder, device)

    def batches(self, indices: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield the images uint8 [n, 3, H, W] of each index int64 [n], decoded some batches ahead.

        Raises:
            FileError: a file that could be read before cannot any more.
        """
        for pixels, failures in self.decoder.batches([self.paths[i] for i in index.tolist()] for index in indices):
            for reason in failures.values():
                raise FileError(f"{reason}; it could be read when the run began")
            yield _channels_first(pixels).to(self.device)


def load(data: str, root: str | Path, reading: Reading) -> ImageData:
    """Return an image folder; the files that cannot be read are named in its split's `skipped`.

    Args:
        data: "folder:PATH" or one of train.splits.NAMED.
        root: folder below which a named data set lies.
        reading: how it is read.

    Raises:
        FileError: the folder is missing or laid out otherwise, holds no readable image for a class, or, with
            `strict` or the split of an earlier run, one image that cannot be read.
    """
    split = reading.split or splits.find(data, root, seed=reading.seed)
    if not Path(split.root).is_dir():
        raise FileError(f"{split.root}: no such folder; where the images have moved, name it: --data folder:PATH")
    paths = {part: split.part(part)[0] for part in PARTS}
    count = sum(map(len, paths.values()))
    workers = worker_count(count) if reading.workers is None else reading.workers
    decoder = Decoder((reading.side, reading.side), workers)
    fits = 3 * reading.side**2 * count <= reading.memory_bytes
    pixels: dict[str, np.ndarray] = {}
    failed: dict[str, str] = {}
    if fits or split.skipped is None:
        for part in PARTS:
            if fits:
                pixels[part], failures = read_all(paths[part], decoder, f"reading {part}")
            else:
                failures = {
                    p: r for _, _, f in decoder.scan(paths[part], f"checking {part}") for p, r in f.items()
                }
            failed |= {paths[part][position]: reason for position, reason in failures.items()}
            readable = [position for position in range(len(paths[part])) if position not in failures]
            if fits and failures:
                pixels[part] = pixels[part][readable]
    if failed and (reading.strict or split.skipped is not None):
        remedy = "remove it, or leave out --strict to skip it" if reading.strict else "restore it"
        raise FileError(f"{next(iter(failed.values()))}; {len(failed)} such images; {remedy}")
    root_path = Path(split.root)
    skipped = {Path(path).relative_to(root_path).as_posix(): reason for path, reason in failed.items()}
    split = replace(split, skipped={**(split.skipped or {}), **skipped})
    return _image_data(split, pixels, decoder)


def _image_data(split: Split, pixels: dict[str, np.ndarray], decoder: Decoder) -> ImageData:
    images: dict[str, Images] = {}
    labels: dict[str, Tensor] = {}
    for part in PARTS:
        paths, classes = split.part(part)
        # Popped: one part at most is there twice, before and after its axes are turned.
        images[part] = _channels_first(pixels.pop(part)) if part in pixels else FileImages(paths, decoder)
        labels[part] = torch.tensor(classes, dtype=torch.int64)
    present = labels["train"].bincount(minlength=len(split.classes))
    if not present.all():
        empty = split.classes[int(present.argmin())]
        raise FileError(f"{split.root}: no readable training image of class {empty!r}, expected some; add images")
    if not len(labels["test"]):
        raise FileError(f"{split.root}: no readable test image, expected some; add images")
    if isinstance(images["train"], Tensor):
        decoder.close()
    has_val = len(labels["val"]) > 0
    return ImageData(
        split.name, split.classes, images["train"], labels["train"], images["test"], labels["test"],
        images["val"] if has_val else None, labels["val"] if has_val else None, split,
    )  # fmt: skip


def _channels_first(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
