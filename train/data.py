"""Image data sets as uint8 tensors, on whichever device trains, or as files that are decoded in time.

`python -m train.data mnist -o mnist_test.npz` writes a split as a plain file that `bench` reads on a device
without torch.
"""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module: python -m train.data")

import io
import sys
import urllib.error
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from runtime import command
from runtime.errors import FileError, OptionError
from runtime.files import write_atomically
from runtime.outputs import check_outputs
from train.splits import NAMED, PREFIX, Split, is_folder, sources_of

if TYPE_CHECKING:
    from train.image_folder import FileImages, Reading

    Images: TypeAlias = Tensor | FileImages

DATA_SETS = ("digits", "mnist", "fashion-mnist", "cifar10", "cifar100", *NAMED)
EXPECTED = f"{', '.join(DATA_SETS)} or {PREFIX}PATH"
# Pixels that the normalization is measured on.
_SAMPLED_VALUES = 1 << 25
_DIGITS_TEST_SHARE = 5  # every fifth image; the set has no split of its own


@dataclass(frozen=True)
class InputSpec:
    """What a network expects: size, channels and normalization of its image.

    The normalized image is (p / 255 - mean) / std, p the uint8 pixel.

    Args:
        size: height and width in pixels.
        channels: 1 or 3.
        mean: per channel, on the scale where 255 is 1.
        std: per channel, likewise.
    """

    size: tuple[int, int]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def exact(self) -> bool:
        """Whether the int8 codes p - 128 are the normalized image, without any rounding."""
        return len(set(self.std)) == 1 and set(self.mean) == {128 / 255}

    @property
    def grid_scale(self) -> float:
        """Step of the int8 grid of the normalized image: its pixels' own where the grid is exact."""
        if self.exact:
            return 1 / (255 * self.std[0])
        ends = [abs(end - m) / s for m, s in zip(self.mean, self.std, strict=True) for end in (0, 1)]
        return max(ends) / 127

    def normalize(self, images: Tensor) -> Tensor:
        """Return float32 [N, C, H, W] of uint8 [N, C, H, W], by the arithmetic that the exported graph uses."""
        if self.exact:
            return (images.float() - 128) * torch.tensor(self.grid_scale, dtype=torch.float32)
        mean = torch.tensor(self.mean, device=images.device).reshape(-1, 1, 1)
        std = torch.tensor(self.std, device=images.device).reshape(-1, 1, 1)
        return (images.float() - 255 * mean) / (255 * std)


@dataclass(frozen=True)
class ImageData:
    """One data set: images uint8 [N, C, H, W], in memory or in files, and labels int64 [N].

    Data sets of files have a `split`, and may have images for validation.
    """

    name: str
    classes: tuple[str, ...]
    train_images: Images
    train_labels: Tensor
    test_images: Images
    test_labels: Tensor
    val_images: Images | None = None
    val_labels: Tensor | None = None
    split: Split | None = None

    def input_spec(self) -> InputSpec:
        """Return the normalization whose int8 grid is exact: mean 128 / 255 and one standard deviation."""
        n, channels, *size = self.train_images.shape
        count = min(10_000, max(1, _SAMPLED_VALUES // (channels * size[0] * size[1])))
        sample = self.train_images[:: max(1, n // count)].float() / 255
        # Two digits: the value travels through JSON and a command line without loss.
        std = max(round(sample.std().item(), 2), 0.01)
        return InputSpec((size[0], size[1]), channels, (128 / 255,) * channels, (std,) * channels)


def load(name: str, root: str | Path = "data", reading: Reading | None = None) -> ImageData:
    """Return a data set, downloading it into `root` where it is absent and torchvision can.

    Args:
        name: one of DATA_SETS, or "folder:PATH".
        root: folder that torchvision's data sets read, or that `kvasir` and `caltech101` lie in.
        reading: how image folders are read.

    Raises:
        OptionError: no data set of that name.
        FileError: it is not in `root` and cannot be downloaded, or is laid out otherwise.
    """
    check_name(name)
    if name == "digits":
        return _digits()
    if is_folder(name):
        from train import image_folder

        return image_folder.load(name, root, reading or image_folder.Reading())
    from torchvision import datasets

    # The CIFAR files are pickles: torchvision opens those alone whose MD5 it knows.
    kind = {
        "mnist": datasets.MNIST, "fashion-mnist": datasets.FashionMNIST,
        "cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100,
    }[name]  # fmt: skip
    parts: list[Tensor] = []
    for train in (True, False):
        part = _open(kind, name, Path(root), train)
        images = torch.as_tensor(part.data)
        images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2)
        parts += [images.contiguous(), torch.as_tensor(part.targets, dtype=torch.int64)]
    # torchvision names MNIST's classes "0 - zero".
    classes = tuple(str(c).split(" - ")[0] for c in part.classes)
    return ImageData(name, classes, parts[0], parts[1], parts[2], parts[3])


def hold_out(data: ImageData, count: int) -> ImageData:
    """Return the data set with `count` of its training images as its validation split; 0: as it is.

    The choice is random, the same at every call, and does not depend on the seed of a run.

    Raises:
        OptionError: there are no more training images than that.
    """
    if not count:
        return data
    images, labels = data.train_images, data.train_labels
    if count >= len(labels):
        raise OptionError(
            f"validation {count}: expected fewer than the {len(labels)} training images of {data.name}"
        )
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    held, kept = order[:count].sort().values, order[count:].sort().values
    return replace(
        data,
        train_images=images[kept], train_labels=labels[kept], val_images=images[held], val_labels=labels[held],
    )  # fmt: skip


def check_name(name: str) -> str:
    """Return the name of a data set; raise OptionError if there is none of that name."""
    if name not in DATA_SETS and not is_folder(name):
        raise OptionError(f"data set {name!r}: expected one of {EXPECTED}")
    return name


def stream(images: Images, indices: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each index int64 [n] with its images uint8 [n, C, H, W], both on the images' device.

    Images in files are decoded ahead, by worker processes.
    """
    if isinstance(images, Tensor):
        for index in indices:
            index = index.to(images.device)
            yield index, images[index]
        return
    given: deque[Tensor] = deque()  # handed to the decoder, which runs ahead

    def noted() -> Iterator[Tensor]:
        for index in indices:
            given.append(index)
            yield index

    for pixels in images.batches(noted()):
        yield given.popleft().to(pixels.device), pixels


def batches(n: int, size: int, *, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield a random permutation of 0..n-1 in batches of `size`; the last, incomplete one is dropped."""
    order = torch.randperm(n, generator=generator)
    for start in range(0, n - n % min(size, n), size):
        yield order[start : start + size]


def _digits() -> ImageData:
    from sklearn.datasets import load_digits

    digits = load_digits()
    # 17 grey levels, 0..16, onto 0..255.
    images = torch.from_numpy((digits.images * (255 / 16)).round().astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(digits.target.astype(np.int64))
    test = torch.arange(len(images)) % _DIGITS_TEST_SHARE == 0
    classes = tuple(str(c) for c in digits.target_names)
    return ImageData("digits", classes, images[~test], labels[~test], images[test], labels[test])


def _open(kind: Any, name: str, root: Path, train: bool) -> Any:
    try:
        return kind(root, train=train, download=False)
    except RuntimeError:
        pass
    try:
        return kind(root, train=train, download=True)
    except (urllib.error.URLError, RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise FileError(
            f"{root}: holds no {name} and it could not be downloaded ({reason}); "
            "put the original files there or name their folder with --data-root"
        ) from None


def main(argv: Sequence[str] | None = None) -> None:
    """Write one split of a data set as images uint8 [N, H, W, C] and labels int64 [N] in an .npz file."""
    parser = command.parser(
        "train.data",
        "Write one split of a data set as an .npz file for devices without torch.",
        "  python -m train.data digits -o digits_test.npz\n"
        "  python -m train.data mnist --split test --data-root data -o mnist_test.npz\n"
        "  python -m train.data folder:photos --image-size 96 -o photos_test.npz",
    )
    parser.add_argument("data", type=check_name, help=EXPECTED)
    parser.add_argument("-o", "--output", required=True, help="file to write, .npz")
    parser.add_argument("--split", choices=("train", "test"), default="test")
    parser.add_argument("--data-root", default="data", help="folder of the original files (default: data)")
    parser.add_argument("--image-size", type=int, default=64, help="of folders: side in pixels (default: 64)")
    parser.add_argument("--split-seed", type=int, default=0, help="of folders without own split (default: 0)")
    options = parser.parse_args(argv)
    check_outputs([options.output], inputs=sources_of(options.data, options.data_root))
    from train.image_folder import Reading

    # Everything goes into one file: it has to fit into memory.
    reading = Reading(options.image_size, options.split_seed, memory_bytes=sys.maxsize, workers=None)
    data = load(options.data, options.data_root, reading)
    images, labels = (
        (data.test_images, data.test_labels) if options.split == "test" else (data.train_images, data.train_labels)
    )
    archive = io.BytesIO()
    np.savez_compressed(
        archive,
        images=images[:].permute(0, 2, 3, 1).numpy(),
        labels=labels.numpy(),
        classes=np.array(data.classes),
    )
    write_atomically(options.output, archive.getvalue())
    print(f"{options.output}: {len(labels)} images of {data.name}, {options.split} split")


if __name__ == "__main__":
    command.run(main)
