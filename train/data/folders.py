"""Class folders as training data: in memory where they fit, else decoded batch by batch ahead of the steps."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from runtime.errors import FileError
from train.choices import MEMORY_BYTES
from train.data import splits
from train.data.decoding import Decoder, read_all, worker_count
from train.data.images import FileImages, ImageData, Images, channels_first
from train.data.splits import PARTS, TEST_SHARE, Split

IMAGE_SIDE = 64


@dataclass(frozen=True)
class Reading:
    """How an image folder is read; only the first three change what is trained on.

    Args:
        side: height and width in pixels that every image is cropped and resized to.
        seed: of the split, where the folder has none of its own.
        test_share: of every class that such a split tests on.
        strict: an image that cannot be read is an error; otherwise it is skipped.
        workers: processes that decode, None: as many as are worth it. A script that asks for any must do so below
            `if __name__ == "__main__"`, since the processes import it; without, this one decodes.
        memory_bytes: the largest data set, all pixels together, that is kept in memory.
        split: from an earlier run; None finds or makes it.
    """

    side: int = IMAGE_SIDE
    seed: int = 0
    test_share: float = TEST_SHARE
    strict: bool = False
    workers: int | None = 0
    memory_bytes: int = MEMORY_BYTES
    split: Split | None = None


def load(data: str, root: str | Path, reading: Reading) -> ImageData:
    """Return an image folder; the files that cannot be read are named in its split's `skipped`.

    Args:
        data: "folder:PATH" or one of train.data.names.NAMED.
        root: folder below which a named data set lies.
        reading: how it is read.

    Raises:
        FileError: the folder is missing or laid out otherwise, holds no readable image for a class, or, with
            `strict` or the split of an earlier run, one image that cannot be read.
    """
    split = reading.split or splits.find(data, root, seed=reading.seed, test_share=reading.test_share)
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
        images[part] = channels_first(pixels.pop(part)) if part in pixels else FileImages(paths, decoder)
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
