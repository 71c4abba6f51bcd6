"""What test_train_processes runs alone and under `torchrun --nproc-per-node 2`: two_processes.py FOLDER.

Trains every method for two epochs and writes FOLDER/METHOD.pt, and FOLDER/resumed.pt, interrupted after one epoch.
In double precision: in single precision a code or a mask can turn on the last bit of a sum, and both runs, equally
right, soon differ by more than 1e-4.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import torch

from train import checkpoint as checkpoints
from train import loop, processes
from train.data import datasets
from train.input_spec import InputSpec
from train.quantization.spec import QuantSpec
from train.recipe import METHODS, default_recipe


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    in_single_precision = InputSpec.normalize
    InputSpec.normalize = lambda spec, images: in_single_precision(spec, images).double()
    processes.join("cpu")
    digits = datasets.load("digits")
    digits = dataclasses.replace(
        digits, train_images=digits.train_images[:64], train_labels=digits.train_labels[:64]
    )

    def run(method: str, epochs: int, path: Path) -> None:
        recipe = dataclasses.replace(
            default_recipe("digits", method),
            epochs=epochs, batch_size=32, schedule="constant", crop_padding=1, mask_speed=200, threshold_rate=1.0,
        )  # fmt: skip
        # Gradients of quantized weights are sums of few values: pixels tie, and the last bit chooses the mask.
        bits = 32 if method in ("sgt", "smoot") else 4
        loop.fit(loop.start("resnet20", digits, QuantSpec(bits), recipe), digits, path)

    for method in METHODS:
        run(method, 2, folder / f"{method}.pt")
    run("smoot", 1, folder / "resumed.pt")
    with processes.first_alone():
        resumed = checkpoints.load(folder / "resumed.pt")
    resumed.recipe = dataclasses.replace(resumed.recipe, epochs=2)
    loop.fit(resumed, digits, folder / "resumed.pt")
    processes.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
