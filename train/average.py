"""`python -m train.average`: one network whose weights are the mean of several runs' (Izmailov et al. 2018).

Runs that began with one network and went on with other seeds, methods or shares end in one basin of the loss,
where the mean of their weights is about as accurate as they are, often more (Wortsman et al. 2022, "model soups").
"""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module: python -m train.average")

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from runtime import command
from runtime.errors import OptionError
from runtime.outputs import check_outputs
from train.choices import CHECKPOINT_NAME

if TYPE_CHECKING:
    from train.checkpoint import Checkpoint
    from train.data.images import ImageData

EXAMPLES = """
  python -m train.average runs/seed0 runs/seed1 runs/seed2 -o averaged.pt
  python -m train.average sgt.pt smoot.pt -o averaged.pt --data-root data
"""
_BATCH = 128


def main(argv: Sequence[str] | None = None) -> None:
    """Write the mean of several checkpoints, measured on the test split, as a checkpoint."""
    parser = command.parser("train.average", "Average the weights of runs that began with one network.", EXAMPLES)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders or checkpoints, two at least")
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="checkpoint to write")
    parser.add_argument("--data-root", default="data", help="folder of the data set's files (default: data)")
    options = parser.parse_args(argv)
    files = [path / CHECKPOINT_NAME if path.is_dir() else path for path in map(Path, options.runs)]
    check_outputs([options.output], inputs=files)
    # torch takes seconds to import: --help does without
    from train import checkpoint as checkpoints
    from train.data import datasets
    from train.data.images import hold_out
    from train.resuming import reading_of

    found = [checkpoints.load(file) for file in files]
    check_alike(found, [str(file) for file in files])
    recipe = found[0].recipe
    command.status("reading images ...")
    folder = files[0].parent if recipe.split else None
    images = hold_out(datasets.load(recipe.data, options.data_root, reading_of(recipe, folder)), recipe.validation)
    averaged = average(found, images)
    checkpoints.save(averaged, options.output)
    command.status("")
    for run, file in zip(found, files, strict=True):
        print(f"{run.test_accuracy:6.2f} %  {file}")
    print(f"{averaged.test_accuracy:6.2f} %  {options.output}, their mean, on the test split")


def check_alike(found: Sequence[Checkpoint], names: Sequence[str]) -> None:
    """Raise OptionError unless there are two checkpoints, all of one network, on one grid and of one data set."""
    if len(found) < 2:
        raise OptionError(f"{', '.join(names)}: expected two runs at least, whose weights have a mean")
    first = found[0]
    for other, name in zip(found[1:], names[1:], strict=True):
        for what, ours, theirs in (
            ("network", first.arch, other.arch), ("quantization", first.quant, other.quant),
            ("image", first.input, other.input), ("classes", first.classes, other.classes),
            ("data", first.recipe.data, other.recipe.data), ("split", first.recipe.split, other.recipe.split),
        ):  # fmt: skip
            if ours != theirs:
                raise OptionError(
                    f"{name}: has another {what} than {names[0]} ({theirs}, not {ours}); "
                    "average runs that began with one network"
                )


def average(found: Sequence[Checkpoint], images: ImageData) -> Checkpoint:
    """Return the checkpoint of the mean weights, scales and alphas, with the accuracy of that network.

    BatchNorm's statistics are those of the mean network: it sees the training images once, as they are.

    Args:
        found: alike, see `check_alike`; they stay as they are.
        images: that they were trained on.
    """
    import torch
    from torch.optim.swa_utils import update_bn

    from train import loop
    from train.data.images import stream

    first = found[0]
    state = {
        name: torch.stack([run.state_dict[name].double() for run in found]).mean(0).to(value.dtype)
        if value.is_floating_point()
        else value.clone()
        for name, value in first.state_dict.items()
    }
    recipe = replace(first.recipe, epochs=1)
    averaged = replace(first, recipe=recipe, state_dict=state, optimizer={}, guidance={}, history=[])
    network = averaged.training_network()
    parts = torch.arange(len(images.train_images)).split(_BATCH)
    batches = command.progress(stream(images.train_images, list(parts)), label="statistics", total=len(parts))
    with torch.no_grad():
        update_bn((first.input.normalize(pixels) for _, pixels in batches), network)
    averaged.state_dict = network.state_dict()
    network, row = averaged.network(), {"epoch": 1.0}
    if images.val_images is not None and images.val_labels is not None:
        row["val_accuracy"] = loop.evaluate(averaged, network, images.val_images, images.val_labels)
    row["test_accuracy"] = loop.evaluate(averaged, network, images.test_images, images.test_labels)
    averaged.history = [row]
    return averaged


if __name__ == "__main__":
    command.run(main)
