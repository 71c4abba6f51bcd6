"""`python -m train`: train one network into a run folder."""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module: python -m train")

import argparse
import contextlib
import csv
import functools
import io
import json
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from runtime import command
from runtime.errors import EngineError, FileError, OptionError
from runtime.files import read_bytes, remove_leftovers, write_atomically
from runtime.outputs import check_outputs
from train import checkpoint as checkpoints
from train import loop, processes, recipes, resuming
from train.checkpoint import Checkpoint
from train.choices import FLOAT_BITS
from train.data import datasets, splits
from train.data.folders import MEMORY_BYTES
from train.data.images import ImageData, hold_out
from train.data.splits import SPLIT_NAME
from train.device import PRECISIONS
from train.figures import draw_alphas, draw_training_curves, has_alphas
from train.losses.guidance import FILLS
from train.models import factory
from train.models.build import ARCHITECTURES
from train.ownership import owned
from train.quantization.quantize import WEIGHT_METHODS, QuantSpec, describe, warnings_of
from train.recipe import METHODS, OPTIMIZERS, SCHEDULES, Recipe, default_recipe
from train.resuming import reading_of

CHECKPOINT_NAME = "ckpt.pt"
FILES = (CHECKPOINT_NAME, "metrics.csv", "curves.png", "alpha.png", SPLIT_NAME)
_SHOWN = 5  # unreadable images that are named on the terminal

EXAMPLES = """
  python -m train --data digits                                # seconds, no download
  python -m train --data mnist --arch cnn2 --bits 8 --method sgt
  python -m train --data cifar10 --arch resnet20 --bits 4 --epochs 200 --device cuda
  python -m train --recipe maleki2024-cifar10 --device cuda    # as published; see --list-recipes
  python -m train --data folder:photos --image-size 96 --flip  # photos/cat/1.jpg, photos/dog/2.png, ...
  python -m train --data cifar10 --arch my_project.nets:small_net    # your own network; say --arch again to resume
  python -m train --resume runs/mnist-cnn2-8bit-sgt            # from its last epoch
  torchrun --nproc-per-node 2 -m train --data cifar10 --arch resnet20    # two GPUs, or two processes on the CPU
  tensorboard --logdir runs                                    # curves and alphas of all runs
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Train or resume one run: checkpoint, metrics.csv, TensorBoard events and plots in its folder."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.list_recipes:
        print(recipes.table())
        return
    if options.arch and factory.is_factory(options.arch):
        factory.allow(options.arch)
    device = processes.join(_device(options.device))
    if options.resume:
        folder = Path(options.resume)
        start = functools.partial(_resumed, options, _chosen(parser, options), folder)
        exists = (folder / CHECKPOINT_NAME).exists()  # else nothing is to be made there
    else:
        arch, quant, recipe = _settings(options)
        data_name = splits.short_name(recipe.data)
        name = f"{data_name}-{arch.rpartition(':')[2]}-{_bits_name(quant)}-{recipe.method}"
        folder = Path(options.runs) / (options.name or options.recipe or name)
        start = functools.partial(_started, options, folder, arch, quant, recipe)
        exists = True
    with owned(folder) if exists and processes.rank() == 0 else contextlib.nullcontext():
        checkpoint, images, notes = start()
        if processes.rank() == 0:
            remove_leftovers(folder)
            if images.split is not None:
                splits.write(images.split, folder / SPLIT_NAME)
            _print_run(checkpoint, images, folder, device, notes)
        _train(checkpoint, images, folder, device)
        if processes.rank() == 0:
            for warning in warnings_of(checkpoint.network()):
                print(f"warning: {warning}")
            print(f"{folder / CHECKPOINT_NAME}: test accuracy {checkpoint.test_accuracy:.2f} %")
        processes.leave()


def _started(
    options: argparse.Namespace, folder: Path, arch: str, quant: QuantSpec, recipe: Recipe
) -> tuple[Checkpoint, ImageData, list[str]]:
    """Return a run before its first epoch, its images, and no remarks."""
    if (folder / CHECKPOINT_NAME).exists() and not options.overwrite:
        raise OptionError(
            f"{folder}: holds a run already; continue it with --resume {folder}, "
            "replace it with --overwrite, or choose another --name"
        )
    inputs = [recipe.init, recipe.teacher, options.bits_file, *splits.sources_of(recipe.data, options.data_root)]
    check_outputs([folder / name for name in FILES], inputs=inputs)
    images = _load(recipe, options)
    if images.split is not None:
        recipe = replace(recipe, split=images.split.digest)
    return loop.start(arch, images, quant, recipe), images, []


def _resumed(
    options: argparse.Namespace, chosen: dict[str, Any], folder: Path
) -> tuple[Checkpoint, ImageData, list[str]]:
    """Return a run where it stopped, its images, and what is to be said about the options given with --resume."""
    checkpoint = checkpoints.load(folder / CHECKPOINT_NAME)
    checkpoint, notes = resuming.with_options(checkpoint, chosen, folder)
    images = _load(checkpoint.recipe, options, folder)
    if images.classes != checkpoint.classes:
        raise OptionError(
            f"{images.name}: classes {', '.join(images.classes[:3])} ..., expected the run's, "
            f"{', '.join(checkpoint.classes[:3])} ...; name the data it began with"
        )
    return checkpoint, images, notes


def _parser() -> argparse.ArgumentParser:
    parser = command.parser("train", "Train a quantized, saliency-guided image classifier.", EXAMPLES)
    parser.add_argument("--data", type=datasets.check_name, metavar="NAME", help=datasets.EXPECTED)
    parser.add_argument(
        "--recipe", metavar="NAME", help="a published experiment, or one of ours; other options override it"
    )
    parser.add_argument("--list-recipes", action="store_true", help="show all recipes and stop")
    parser.add_argument("--arch", metavar="NAME",
                        help=f"{', '.join(ARCHITECTURES)} or your own module:factory (default: cnn2)")  # fmt: skip
    parser.add_argument("--bits", type=_bits, help="2 to 8, or 32 for float (default: 8)")
    parser.add_argument("--bits-file", metavar="JSON", help='bits of single layers: {"conv2": 4, "fc1": 2}')
    parser.add_argument("--method", choices=METHODS, help="default: sgt")
    parser.add_argument("--weights", choices=WEIGHT_METHODS, help="weight quantizer (default: absmax)")
    parser.add_argument("--full-grid", action="store_true",
                        help="8-bit codes 0..255, not 0..127: faster on CPUs, not for TensorRT")  # fmt: skip
    parser.add_argument("--addends", action="store_true",
                        help="grids on what sums add: faster on ONNX Runtime, refused by TensorRT")  # fmt: skip
    parser.add_argument("--bias-grid", action=argparse.BooleanOptionalAction,
                        help="biases in whole steps of their sums: exact on ONNX Runtime (default)")  # fmt: skip
    parser.add_argument("--data-root", default="data", help="folder of the data sets' files (default: data)")
    parser.add_argument("--runs", default="runs", help="folder of all runs (default: runs)")
    parser.add_argument("--name", help="name of the run's folder (default: from data, arch, bits, method)")
    parser.add_argument("--overwrite", action="store_true", help="replace a run of the same name")
    parser.add_argument("--resume", metavar="FOLDER", help="continue an interrupted run; its settings are kept")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto (default: auto)")
    folders = parser.add_argument_group("image folders (folder:PATH, kvasir, caltech101)")
    folders.add_argument("--image-size", type=int, metavar="PIXELS",
                         help="side they get, cropped and resized (default: 64; the named ones 224)")  # fmt: skip
    folders.add_argument("--split-seed", type=int, help="of the split 80/10/10, where there is none (default: 0)")
    folders.add_argument("--strict", action="store_true", help="stop at an image that cannot be read")
    folders.add_argument("--workers", type=int, help="processes that decode (default: one a core, if worth it)")
    folders.add_argument("--memory-gib", type=float, default=MEMORY_BYTES / 2**30, metavar="GIB",
                         help="larger data sets are decoded batch by batch (default: %(default)g)")  # fmt: skip
    hyper = parser.add_argument_group("hyperparameters (defaults depend on the data set and the method)")
    hyper.add_argument("--epochs", type=int)
    hyper.add_argument("--batch-size", type=int, help="images a step")
    hyper.add_argument("--optimizer", choices=OPTIMIZERS)
    hyper.add_argument("--lr", type=float, help="(peak) learning rate")
    hyper.add_argument("--schedule", choices=SCHEDULES, help="cosine after one epoch of warm-up, or constant")
    hyper.add_argument("--momentum", type=float, help="of sgd")
    hyper.add_argument("--weight-decay", type=float, help="L2 on weights")
    hyper.add_argument("--alpha-decay", type=float, help="L2 on PACT's alpha")
    hyper.add_argument("--alpha-lr", type=float, help="learning rate of alpha, as a multiple of --lr")
    hyper.add_argument("--label-smoothing", type=float)
    hyper.add_argument("--flip", action=argparse.BooleanOptionalAction, help="mirror half the training images")
    hyper.add_argument("--crop-padding", type=int, help="border in pixels for random crops")
    hyper.add_argument("--rotate-degrees", type=float, help="largest random rotation")
    hyper.add_argument("--zoom", type=float, help="largest random growth or shrinkage, as a share")
    hyper.add_argument("--elastic-pixels", type=float, help="size of random elastic displacements")
    hyper.add_argument("--erase-pixels", type=int, help="side of a random grey square")
    hyper.add_argument("--color-jitter", type=float, metavar="SHARE", help="of brightness, contrast, saturation")
    hyper.add_argument("--class-weights", action=argparse.BooleanOptionalAction, help="weight rare classes more")
    hyper.add_argument("--balanced-sampling", action=argparse.BooleanOptionalAction, help="draw classes equally")
    hyper.add_argument(
        "--mask-share", type=float, help="share of the pixels that sgt masks, 0 to 1; where smoot and asg start"
    )
    hyper.add_argument("--kl-weight", type=float, help="lambda of sgt and smoot, lambda_1 of asg")
    hyper.add_argument("--fill", choices=FILLS, help="what masked pixels hold")
    hyper.add_argument("--top1-weight", type=float, help="alpha of smoot, 0 to 1")
    hyper.add_argument("--mask-speed", type=float, help="mu of smoot")
    hyper.add_argument("--saliency-weight", type=float, help="lambda_2 of asg")
    hyper.add_argument("--alpha-weight", type=float, help="eta of asg")
    hyper.add_argument("--threshold-rate", type=float, help="gamma of asg")
    hyper.add_argument("--precision", choices=PRECISIONS, help="of a step's convolutions; weights stay float32")
    hyper.add_argument("--init", metavar="CKPT", help="start from its parameters: same architecture, any bits")
    hyper.add_argument("--pretrained", action="store_true", default=None,
                       help="start from the parameters that torchvision trained on ImageNet")  # fmt: skip
    hyper.add_argument("--teacher", metavar="CKPT", help="learn its probabilities too (distillation)")
    hyper.add_argument("--teacher-weight", type=float, help="share of the teacher in the loss, 0 to 1")
    hyper.add_argument("--temperature", type=float, help="of the teacher's probabilities")
    hyper.add_argument("--validation", type=int, metavar="N",
                       help="training images held out, to choose among runs (folders have their own)")  # fmt: skip
    hyper.add_argument("--seed", type=int, help="of everything random (default: 0)")
    return parser


def _bits(text: str) -> int:
    if text not in {str(b) for b in range(2, 9)} | {str(FLOAT_BITS)}:
        raise OptionError(f"--bits {text}: expected a whole number from 2 to 8, or 32 for float")
    return int(text)


def _bits_name(quant: QuantSpec) -> str:
    if quant.bits == FLOAT_BITS:
        return "float"
    return f"{quant.bits}bit-mixed" if quant.layer_bits else f"{quant.bits}bit"


def _settings(options: argparse.Namespace) -> tuple[str, QuantSpec, Recipe]:
    """Return architecture, quantization and recipe: the published or default ones, then what is given."""
    if options.recipe:
        run = recipes.named(options.recipe)
        arch, quant, recipe = run.arch, run.quant, run.recipe
    elif options.data is None:
        raise OptionError(
            f"--data is missing: expected one of {datasets.EXPECTED}, or --recipe NAME, or --resume FOLDER"
        )
    else:
        arch, quant = "cnn2", QuantSpec()
        recipe = default_recipe(options.data, options.method or "sgt")
    quant = replace(quant, **_quantization(options))
    recipe = replace(recipe, **_given({f.name: getattr(options, f.name, None) for f in fields(Recipe)}))
    return options.arch or arch, quant, recipe


def _quantization(options: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of QuantSpec that the options give."""
    bits = _layer_bits(options.bits_file) if options.bits_file else None
    return _given({
        "bits": options.bits, "weights": options.weights, "full_grid": options.full_grid or None,
        "addends": options.addends or None, "bias_grid": options.bias_grid, "layer_bits": bits,
    })  # fmt: skip


def _chosen(parser: argparse.ArgumentParser, options: argparse.Namespace) -> dict[str, Any]:
    """Return the options that are given and are not the default, with those of the quantization as its fields."""
    changed = {name: v for name, v in vars(options).items() if v != parser.get_default(name)}
    changed.pop("bits_file", None)
    return changed | _quantization(options)


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _layer_bits(path: str) -> dict[str, int]:
    expected = 'expected layer names and whole numbers from 2 to 8, as in {"conv2": 4, "fc1": 2}'
    try:
        bits = json.loads(read_bytes(path))
    except ValueError:
        raise FileError(f"{path}: no JSON, {expected}") from None
    if not isinstance(bits, dict) or not all(type(value) is int for value in bits.values()):
        raise FileError(f"{path}: other JSON, {expected}")
    return bits


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name != "cpu" and not (name.startswith("cuda") and torch.cuda.is_available()):
        raise EngineError(f"--device {name}: not found on this machine; use --device cpu")
    return name


def _print_run(checkpoint: Checkpoint, images: ImageData, folder: Path, device: str, notes: Sequence[str]) -> None:
    recipe, network = checkpoint.recipe, checkpoint.network()
    parameters = sum(p.numel() for p in network.parameters())
    print(f"run      {folder}  ({device}, {torch.get_num_threads()} threads)")
    print(f"network  {checkpoint.arch['name']}, {parameters:,} parameters, {_bits_name(checkpoint.quant)}")
    print(f"recipe   {recipe.method} on {recipe.data}, {recipe.epochs} epochs of batches of {recipe.batch_size}")
    if images.split is not None:
        counts = [len(labels) for labels in (images.train_labels, images.val_labels, images.test_labels)
                  if labels is not None]  # fmt: skip
        parts = "train, val, test" if len(counts) == 3 else "train, test"
        where = "the folder's own split" if images.split.seed is None else f"split with seed {images.split.seed}"
        print(
            f"images   {', '.join(f'{n:,}' for n in counts)} ({parts}; {where}), {recipe.image_size} pixels square"
        )
        for name, reason in list((images.split.skipped or {}).items())[:_SHOWN]:
            print(f"skipped  {name}: {reason.split(': ', 1)[-1]}")
        if images.split.skipped:
            print(f"skipped  {len(images.split.skipped)} images that cannot be read, listed in {SPLIT_NAME}")
    for layer in describe(network):
        if layer.bits is None and "folded" not in layer.reason and checkpoint.quant.bits != FLOAT_BITS:
            print(f"float    {layer.name} ({layer.kind}): {layer.reason}")
    for note in notes:
        print(f"note     {note}")
    done = len(checkpoint.history)
    if done >= recipe.epochs:
        print(f"finished all {done} epochs are done; train on with --resume {folder} --epochs {2 * done}")
    elif done:
        print(f"resumed  after epoch {done}")


def _load(recipe: Recipe, options: argparse.Namespace, run: Path | None = None) -> ImageData:
    """Return the images of a recipe; of a run that is resumed, those it began with."""
    if options.workers is not None and options.workers < 0:
        raise OptionError(f"--workers {options.workers}: expected a whole number from 0")
    reading = replace(
        reading_of(recipe, run),
        strict=options.strict,
        workers=options.workers,
        memory_bytes=int(options.memory_gib * 2**30),
    )
    if reading.split is not None:
        reading = replace(
            reading, split=resuming.located(reading.split, recipe.data, options.data, options.data_root)
        )
    with processes.first_alone():
        images = datasets.load(recipe.data, options.data_root, reading)
    return hold_out(images, recipe.validation)


def _train(checkpoint: Checkpoint, images: ImageData, folder: Path, device: str) -> None:
    if processes.rank() > 0:
        loop.fit(checkpoint, images, folder / CHECKPOINT_NAME, device=device)
        return
    from torch.utils.tensorboard import SummaryWriter

    # A crash may have left more epochs in the event file than in the checkpoint, or have come between the two: all
    # from the checkpoint's last epoch on are hidden, and that one is written again.
    events = SummaryWriter(str(folder), purge_step=max(1, len(checkpoint.history)))

    def record(current: Checkpoint) -> None:
        row = current.history[-1]
        for key, value in row.items():
            if key != "epoch":
                events.add_scalar(key, value, int(row["epoch"]))
        events.flush()
        write_atomically(folder / "metrics.csv", _csv(current.history))
        draw_training_curves(current.history, folder / "curves.png")
        if has_alphas(current.history):
            draw_alphas({folder.name: current.history}, folder / "alpha.png")

    def record_and_print(current: Checkpoint) -> None:
        record(current)
        row = current.history[-1]
        validated = f"val {row['val_accuracy']:6.2f} %  " if "val_accuracy" in row else ""
        print(
            f"epoch {int(row['epoch']):3d}/{current.recipe.epochs}  loss {row['train_loss']:.4f}  "
            f"train {row['train_accuracy']:6.2f} %  {validated}test {row['test_accuracy']:6.2f} %  "
            f"{row['seconds']:.1f} s",
            flush=True,
        )

    try:
        if checkpoint.history:
            record(checkpoint)
        loop.fit(checkpoint, images, folder / CHECKPOINT_NAME, device=device, on_epoch=record_and_print)
    except KeyboardInterrupt:
        if checkpoint.history:
            print(f"\n{len(checkpoint.history)} epochs are saved; continue: python -m train --resume {folder}")
        raise
    finally:
        events.close()


def _csv(history: list[dict[str, float]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(history[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    return text.getvalue()


if __name__ == "__main__":
    command.run(main)
