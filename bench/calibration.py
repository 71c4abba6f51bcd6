"""`python -m bench.calibration`: what each part of post-training quantization gives, beside training."""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module: python -m bench.calibration")

import itertools
from collections.abc import Sequence
from pathlib import Path

from bench.measure import record
from bench.measure.environment import describe, environment
from runtime import command
from runtime.errors import OptionError
from train.choices import CALIBRATION_SAMPLES, MSE, QUANTIZED_BITS
from train.data.splits import sources_of
from train.models import factory

EXAMPLES = """
  python -m bench.calibration runs/float/ckpt.pt --data-root data
  python -m bench.calibration runs/float/ckpt.pt --bits 8,4,3 --qat runs/8bit/ckpt.pt runs/4bit/ckpt.pt
  python -m bench.calibration runs/float/ckpt.pt --record bench/results/calibration.jsonl
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Print the accuracy of every combination of the parts, of the float network and of trained ones."""
    parser = command.parser("bench.calibration", "Measure post-training quantization, part by part.", EXAMPLES)
    parser.add_argument("checkpoint", help="float ckpt.pt written by python -m train --bits 32")
    parser.add_argument("--data", metavar="NAME", help="data set (default: what it was trained on)")
    parser.add_argument("--data-root", default="data", help="folder of the data sets' files (default: data)")
    parser.add_argument("--bits", default="8,4", help="from 2 to 8, with commas (default: 8,4)")
    parser.add_argument(
        "--samples", type=int, default=CALIBRATION_SAMPLES, help="training images (default: %(default)d)"
    )
    parser.add_argument("--qat", nargs="+", default=[], metavar="CKPT", help="trained ones, to compare with")
    record.add_options(parser, json_line=False)
    factory.add_option(parser)
    options = parser.parse_args(argv)
    # torch takes seconds to import: --help does without
    from export.calibration import accuracy, calibrate, load_images, spec_of, training_sample
    from train import checkpoint as checkpoints

    factory.allow(*options.arch)
    widths = _widths(options.bits)
    checkpoint = checkpoints.load(options.checkpoint)
    sources = sources_of(options.data or checkpoint.recipe.data, options.data_root)
    record.check(options, inputs=[options.checkpoint, *options.qat, *sources])
    trained = [checkpoints.load(path) for path in options.qat]
    images = load_images(checkpoint, Path(options.checkpoint), options.data, options.data_root)
    sample = training_sample(images, options.samples)
    rows: list[dict[str, object]] = []
    parts = itertools.product(widths, (False, True), (False, True), (MSE, "percentile"))
    for bits, equalizes, corrects, search in command.progress(list(parts), label="variants"):
        found = calibrate(
            checkpoint,
            sample,
            spec_of(bits),
            search=search,
            equalizes=equalizes,
            corrects_biases=corrects,
            learns_rounding=False,  # a minute each; what the others give shows without it
        )
        chosen = next(iter(found.errors))
        rows.append({
            "bits": bits, "equalized": equalizes, "biases_corrected": corrects, "search": search, "alpha": chosen,
            "accuracy": accuracy(found.checkpoint, images),
        })  # fmt: skip
    before = accuracy(checkpoint, images)
    qat = [
        {
            "bits": c.quant.bits,
            "method": c.recipe.method,
            "epochs": len(c.history),
            "accuracy": accuracy(c, images),
        }
        for c in trained
    ]
    where = environment()

    print(f"{options.checkpoint}  {checkpoint.arch['name']}, float {before:.2f} % of {len(images.test_labels):,} "
          f"test images of {checkpoint.recipe.data_name}, {len(sample)} training images looked at")  # fmt: skip
    print("bits  equalized  biases corrected  search      alpha     accuracy")
    for row in rows:
        yes = ["yes" if row[name] else "no" for name in ("equalized", "biases_corrected")]
        print(f"{row['bits']:4}  {yes[0]:9}  {yes[1]:16}  {row['search']:10}  {row['alpha']:8}"
              f"{row['accuracy']:8.2f} %")  # fmt: skip
    for trained_row in qat:
        text = f"trained, {trained_row['method']}, {trained_row['epochs']} epochs"
        print(f"{trained_row['bits']:4}  {text:49}{trained_row['accuracy']:8.2f} %")
    print(describe(where))
    record.deliver(options, {
        "bench": "calibration", "arch": checkpoint.arch["name"], "data": checkpoint.recipe.data_name,
        "n": len(images.test_labels), "samples": len(sample), "epochs": len(checkpoint.history),
        "float_accuracy": before, "calibrated": rows, "trained": qat, "environment": where,
    })  # fmt: skip


def _widths(text: str) -> list[int]:
    if not all(part in map(str, QUANTIZED_BITS) for part in text.split(",")):
        raise OptionError(f"--bits {text}: expected whole numbers from 2 to 8, with commas, as in 8,4")
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    command.run(main)
