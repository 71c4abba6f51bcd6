"""One run of training, from the options of `python -m train` to its folder."""

from __future__ import annotations

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
from train.choices import CHECKPOINT_NAME, FLOAT_BITS
from train.data import datasets, names, splits
from train.data.images import ImageData, hold_out
from train.data.splits import SPLIT_NAME
from train.device import computes_bfloat16_slowly
from train.figures import draw_alphas, draw_training_curves, has_alphas
from train.models import factory
from train.ownership import owned
from train.quantization.description import describe, warnings_of
from train.quantization.spec import QuantSpec
from train.recipe import Recipe, default_recipe
from train.resuming import reading_of

FILES = (CHECKPOINT_NAME, "metrics.csv", "curves.png", "alpha.png", SPLIT_NAME)
_SHOWN = 5  # unreadable images that are named on the terminal


def train(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Train or resume one run as the options of train.options say; the parser knows which of them are defaults."""
    if options.arch and factory.is_factory(options.arch):
        factory.allow(options.arch)
    device = processes.join(_device(options.device))
    if options.resume:
        folder = Path(options.resume)
        start = functools.partial(_resumed, options, _chosen(parser, options), folder)
        exists = (folder / CHECKPOINT_NAME).exists()  # else nothing is to be made there
    else:
        arch, quant, recipe = settings(options)
        data_name = names.short_name(recipe.data)
        name = f"{data_name}-{arch.rpartition(':')[2]}-{bits_name(quant)}-{recipe.method}"
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


def bits_name(quant: QuantSpec) -> str:
    """Return what a run's name says of its bits, such as "8bit"."""
    if quant.bits == FLOAT_BITS:
        return "float"
    return f"{quant.bits}bit-mixed" if quant.layer_bits else f"{quant.bits}bit"


def settings(options: argparse.Namespace) -> tuple[str, QuantSpec, Recipe]:
    """Return architecture, quantization and recipe: the published or default ones, then what is given."""
    if options.recipe:
        run = recipes.named(options.recipe)
        arch, quant, recipe = run.arch, run.quant, run.recipe
    elif options.data is None:
        raise OptionError(
            f"--data is missing: expected one of {names.EXPECTED}, or --recipe NAME, or --resume FOLDER"
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
        "bits": options.bits, "weight_quantizer": options.weight_quantizer,
        "full_range": options.full_range or None, "quantize_adds": options.quantize_adds or None,
        "bias_grid": options.bias_grid, "layer_bits": bits,
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
    print(f"network  {checkpoint.arch['name']}, {parameters:,} parameters, {bits_name(checkpoint.quant)}")
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
    done = len(checkpoint.history)
    if recipe.precision == "bfloat16" and not done and computes_bfloat16_slowly(device):
        notes = [
            *notes,
            "this processor has no bfloat16 instructions: --precision float32 takes about half the time",
        ]
    for note in notes:
        print(f"note     {note}")
    if done >= recipe.epochs:
        print(f"finished all {done} epochs are done; train on with --resume {folder} --epochs {2 * done}")
    elif done:
        print(f"resumed  after epoch {done}")


def _load(recipe: Recipe, options: argparse.Namespace, run: Path | None = None) -> ImageData:
    """Return the images of a recipe; of a run that is resumed, those it began with."""
    command.check_counts(options, workers=0)
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
