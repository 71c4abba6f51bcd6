"""`python -m bench.robustness`: accuracy under attacks that the exported file itself computes."""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module: python -m bench.robustness")

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.measure import data, record
from bench.measure.environment import describe, environment
from bench.networks.attacks import fgsm, pgd
from bench.networks.network import display_name
from runtime import command
from runtime.classifier import Classifier
from runtime.errors import ModelError
from runtime.session import ENGINES
from train.data.splits import sources_of
from train.models import factory

EXAMPLES = """
  python -m bench.robustness ckpt.onnx --data cifar10
  python -m bench.robustness float.onnx int8.onnx plain.onnx sgt.onnx --data mnist --images 1000
"""

LEVELS = (2, 8)


def measure(classifier: Classifier, images: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return the accuracy in percent without and under each attack, by its name.

    Args:
        classifier: of a file with its gradient.
        images: uint8 [N, H, W, C] of its size.
        labels: int64 [N].

    Raises:
        ModelError: the file does not have its gradient.
    """
    if "gradient" not in classifier.session.outputs:
        raise ModelError("the file gives no gradient to attack it by; export it again with --explain gradient")
    session, size = classifier.session, 64
    attacks: dict[str, Callable[..., np.ndarray]] = {"clean": lambda found, truth: found}
    for levels in LEVELS:
        attacks[f"FGSM {levels}"] = functools.partial(fgsm, session, levels=levels)
        attacks[f"PGD {levels}"] = functools.partial(pgd, session, levels=levels)
    right = dict.fromkeys(attacks, 0)
    starts = range(0, len(images), size)
    for start in command.progress(starts, label="attacking, images / 64", total=len(starts)):
        part, truth = np.ascontiguousarray(images[start : start + size]), labels[start : start + size]
        for name, attack in attacks.items():
            right[name] += int((session.run({"image": attack(part, truth)})["logits"].argmax(1) == truth).sum())
    return {name: 100 * count / len(images) for name, count in right.items()}


def main(argv: Sequence[str] | None = None) -> None:
    """Print one row per file, for a person or as one JSON line."""
    parser = command.parser(
        "bench.robustness",
        "Measure accuracy under attacks computed by a file's own gradient.",
        EXAMPLES,
    )
    parser.add_argument("models", nargs="+", metavar="model", help="exported .onnx files with their gradient")
    parser.add_argument("--data", required=True, help=data.HELP)
    parser.add_argument("--data-root", default="data", help="folder of the data sets' files (default: data)")
    parser.add_argument("--images", type=int, default=500, help="how many, evenly spaced (default: 500)")
    parser.add_argument("--engine", choices=tuple(ENGINES), help="default: the one a file was exported for")
    record.add_options(parser)
    factory.add_option(parser)
    options = parser.parse_args(argv)
    factory.allow(*options.arch)
    command.check_counts(options, images=1)
    inputs = [*map(Path, options.models), *sources_of(options.data, options.data_root)]
    record.check(options, inputs=inputs)
    rows: list[dict[str, Any]] = []
    for path in options.models:
        with Classifier(path, engine=options.engine, threads=1) as classifier:
            manifest = classifier.manifest
            test = data.stream(
                options.data, options.data_root,
                size=manifest.input.size, classes=manifest.classes, trained_on=manifest.data,
            )  # fmt: skip
            data.check_fits(test, manifest.input.size, manifest.input.channels, len(manifest.classes))
            some = data.collected(test.evenly_spaced(min(options.images, len(test.positions))))
            found = measure(classifier, some.images, some.labels)
        rows.append({"model": display_name(Path(path)), "precision": manifest.precision, "accuracy": found})
    where = environment()
    result = {
        "bench": "robustness", "data": test.name, "n": len(some.labels), "levels": LEVELS, "networks": rows,
        "environment": where,
    }  # fmt: skip
    if record.deliver(options, result):
        return
    print(f"accuracy in percent on {len(some.labels):,} images of {test.name}; attacks move a channel by 2 or 8")
    names = list(rows[0]["accuracy"])
    print(f"{'':42}" + "".join(f"{name:>9}" for name in names))
    for row in rows:
        values = "".join(f"{row['accuracy'][name]:9.2f}" for name in names)
        print(f"{row['model'][-34:]:35}{row['precision']:7}{values}")
    print(describe(where))


if __name__ == "__main__":
    command.run(main)
