"""`python -m bench.gradient_price`: how much a choice in the exported gradient changes the maps.

One checkpoint is exported twice, with two settings of the same option, and both files explain the same test images
on the same engine, each image for its true class. The maps are compared image by image.
"""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module: python -m bench.gradient_price")

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from bench.measure import data
from bench.measure.environment import describe, environment
from bench.measure.record import append
from export.pipeline import export
from runtime import command
from runtime.agreement import spearman, top_overlap
from runtime.classifier import MAX_BATCH, Classifier
from runtime.errors import OptionError
from runtime.manifest import INPUT_NAME, TARGET_NAME
from runtime.outputs import check_outputs
from train import checkpoint as checkpoints
from train.checkpoint import Checkpoint
from train.data.splits import sources_of
from train.models import factory

EXAMPLES = """
  python -m bench.gradient_price ckpt.pt --data mnist --data-root data
  python -m bench.gradient_price ckpt.pt --data mnist --choice saliency_precision
  python -m bench.gradient_price ckpt.pt --data cifar10 --images 10000 --record bench/results/cpu.jsonl
"""

# Option of export.onnx.export -> the two values compared.
CHOICES = {"gate": ("code", "ste"), "saliency_precision": ("float32", "int8")}
# What the others are while one is compared; the default, auto, would choose by the maps themselves.
FIXED = {"saliency_precision": "float32"}


def saliency(
    checkpoint: Checkpoint, choice: str, value: str, images: np.ndarray, labels: np.ndarray, *, threads: int
) -> np.ndarray:
    """Return the maps float32 [N, H, W] of an INT8 export on OpenVINO.

    Args:
        checkpoint: to export.
        choice: one of CHOICES.
        value: of this option.
        images: uint8 [N, H, W, C], of the network's size.
        labels: the classes to explain, int64 [N].
        threads: CPU threads of one inference.
    """
    settings: dict[str, Any] = {**FIXED, choice: value}
    model = export(checkpoint, target="openvino", **settings).model.SerializeToString()
    with Classifier(model, engine="openvino", threads=threads) as classifier:
        maps = []
        for start in command.progress(range(0, len(images), MAX_BATCH), label=f"{choice} {value}, images / 64"):
            part = slice(start, start + MAX_BATCH)
            inputs = {INPUT_NAME: images[part], TARGET_NAME: labels[part]}
            maps.append(classifier.session.run(inputs, ("saliency",))["saliency"])
    return np.concatenate(maps)


def summarize(agreement: np.ndarray) -> dict[str, float]:
    """Return mean, median and lowest decile of an agreement float64 [N]."""
    return {
        "mean": float(agreement.mean()),
        "median": float(np.median(agreement)),
        "lowest_decile": float(np.quantile(agreement, 0.1)),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Print how far the maps of two exports of one checkpoint agree."""
    parser = command.parser("bench.gradient_price", "Compare the maps of two exports of one checkpoint.", EXAMPLES)
    parser.add_argument("checkpoint", help="quantized ckpt.pt written by python -m train")
    parser.add_argument("--choice", choices=tuple(CHOICES), default="gate", help="what differs (default: gate)")
    parser.add_argument("--data", required=True, help=data.HELP)
    parser.add_argument("--data-root", default="data", help="folder of the data sets' files (default: data)")
    parser.add_argument("--images", type=int, default=1000, help="first test images to explain (default: 1000)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of one inference (default: 1)")
    parser.add_argument("--record", metavar="FILE", help="append the result to a .jsonl file")
    parser.add_argument("--json", action="store_true", help="one JSON line, with the environment")
    factory.add_option(parser)
    options = parser.parse_args(argv)
    factory.allow(*options.arch)
    if options.images < 1 or options.threads < 1:
        raise OptionError(f"--images {options.images} --threads {options.threads}: expected whole numbers from 1")
    check_outputs([options.record], inputs=[options.checkpoint, *sources_of(options.data, options.data_root)])
    checkpoint = checkpoints.load(options.checkpoint)
    test = data.load(
        options.data, options.data_root,
        size=checkpoint.input.size, classes=checkpoint.classes, trained_on=checkpoint.recipe.data_name,
    )  # fmt: skip
    data.check_fits(test, checkpoint.input.size, checkpoint.input.channels, len(checkpoint.classes))
    images, labels = test.images[: options.images], test.labels[: options.images]
    values = CHOICES[options.choice]
    a, b = (saliency(checkpoint, options.choice, v, images, labels, threads=options.threads) for v in values)
    agreement = {"spearman": summarize(spearman(a, b)), "top_overlap": summarize(top_overlap(a, b))}
    where = environment()
    result = {
        "bench": "gradient-price",
        "arch": checkpoint.arch["name"],
        "bits": checkpoint.quant.bits,
        "checkpoint_accuracy": checkpoint.test_accuracy if checkpoint.history else None,
        "data": test.name,
        "n": len(images),
        "engine": "openvino",
        "choice": options.choice,
        "values": list(values),
        **agreement,
        "environment": where,
    }
    if options.record:
        append(options.record, result)
    if options.json:
        print(json.dumps(result))
        return
    print(f"{options.checkpoint}  {checkpoint.arch['name']}, {checkpoint.quant.bits} bit, INT8 on OpenVINO, "
          f"{len(images):,} images of {test.name}")  # fmt: skip
    print(f"maps of {options.choice} {values[0]} against {values[1]}")
    print(f"{'':18}    mean  median  lowest decile")
    for name, row in zip(("Spearman", "top-10 % overlap"), agreement.values(), strict=True):
        print(f"{name:18}{row['mean']:8.3f}{row['median']:8.3f}{row['lowest_decile']:15.3f}")
    print(describe(where))


if __name__ == "__main__":
    command.run(main)
