"""`python -m train.data`: write a split as a plain file that `bench` reads on a device without torch."""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module: python -m train.data")

import io
import sys
from collections.abc import Sequence

import numpy as np

from runtime import command
from runtime.files import write_atomically
from runtime.outputs import check_outputs
from train.data import names
from train.data.splits import TEST_SHARE, sources_of


def main(argv: Sequence[str] | None = None) -> None:
    """Write one split of a data set as images uint8 [N, H, W, C] and labels int64 [N] in an .npz file."""
    parser = command.parser(
        "train.data",
        "Write one split of a data set as an .npz file for devices without torch.",
        "  python -m train.data digits -o digits_test.npz\n"
        "  python -m train.data mnist --split test --data-root data -o mnist_test.npz\n"
        "  python -m train.data folder:photos --image-size 96 -o photos_test.npz",
    )
    parser.add_argument("data", type=names.check_name, help=names.EXPECTED)
    parser.add_argument("-o", "--output", required=True, help="file to write, .npz")
    parser.add_argument("--split", choices=("train", "test"), default="test")
    parser.add_argument("--data-root", default="data", help="folder of the original files (default: data)")
    parser.add_argument("--image-size", type=int, default=64, help="of folders: side in pixels (default: 64)")
    parser.add_argument("--split-seed", type=int, default=0, help="of folders without own split (default: 0)")
    parser.add_argument("--test-share", type=float, default=TEST_SHARE, help="of such a split (default: 0.1)")
    options = parser.parse_args(argv)
    from train.data import datasets  # torch takes seconds to import: --help does without
    from train.data.folders import Reading

    check_outputs([options.output], inputs=sources_of(options.data, options.data_root))
    # Everything goes into one file: it has to fit into memory.
    reading = Reading(
        options.image_size, options.split_seed, options.test_share, memory_bytes=sys.maxsize, workers=None
    )
    data = datasets.load(options.data, options.data_root, reading)
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
