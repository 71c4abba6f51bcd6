"""`python -m bench.training`: what a training step of every method costs, and how many plain steps that is."""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module: python -m bench.training")

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace

import torch

from bench.measure import record
from bench.measure.environment import describe, environment, peak_memory_bytes
from bench.measure.statistics import check_seconds, measure, summarize
from runtime import command
from runtime.errors import OptionError
from runtime.outputs import check_outputs
from train import loop
from train.choices import FLOAT_BITS, QUANTIZED_BITS
from train.data import datasets
from train.data.folders import Reading
from train.data.images import ImageData
from train.data.splits import sources_of
from train.device import PRECISIONS, in_precision, place
from train.losses.methods import new_guidance
from train.losses.saliency import LossTerms, filling
from train.models.build import ARCHITECTURES
from train.quantization.quantize import QuantSpec
from train.recipe import METHODS, Recipe, default_recipe
from train.step import compute_gradients, new_optimizer, update

EXAMPLES = """
  python -m bench.training --data mnist --data-root data
  python -m bench.training --data cifar10 --arch resnet20 --bits 4
  python -m bench.training --data mnist --record bench/results/training.jsonl
"""


def step_of(images: ImageData, arch: str, quant: QuantSpec, recipe: Recipe) -> Callable[[], LossTerms]:
    """Return a function that takes one training step on the CPU, always on the same batch of real images.

    The learning rate is zero, so that the batch is never learned by heart, however often it comes.
    """
    recipe = replace(recipe, lr=0.0)
    checkpoint = loop.start(arch, images, quant, recipe)
    model = in_precision(place(checkpoint.training_network(), "cpu"), recipe.precision).train()
    count = min(recipe.batch_size, len(images.train_images))
    batch = checkpoint.input.normalize(images.train_images[:count])
    labels, index = images.train_labels[:count], torch.arange(count)
    optimizer, generator = new_optimizer(model, recipe), torch.Generator().manual_seed(0)
    guidance = new_guidance(recipe, len(images.train_images))
    if guidance is not None:
        guidance.load_state_dict(checkpoint.guidance)

    def step() -> LossTerms:
        fill = filling(batch, recipe.fill, generator)
        terms = compute_gradients(model, guidance, batch, labels, index, fill, recipe)
        update(optimizer, guidance)
        return terms

    return step


def main(argv: Sequence[str] | None = None) -> None:
    """Print the time of a step of every method and its ratio to a plain one, all measured in turns."""
    parser = command.parser("bench.training", "Measure training steps of all methods, in turns.", EXAMPLES)
    parser.add_argument(
        "--data", type=datasets.check_name, default="mnist", help=f"{datasets.EXPECTED} (default: mnist)"
    )
    parser.add_argument("--data-root", default="data", help="folder of the data sets' files (default: data)")
    parser.add_argument("--arch", choices=tuple(ARCHITECTURES), default="cnn2", help="default: cnn2")
    parser.add_argument("--bits", type=int, choices=(*QUANTIZED_BITS, FLOAT_BITS), default=8, help="default: 8")
    parser.add_argument("--batch-size", type=int, default=128, help="default: 128")
    parser.add_argument("--precision", choices=PRECISIONS, default="float32", help="default: float32")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--seconds", type=float, default=5.0, help="per method (default: 5)")
    parser.add_argument("--record", metavar="FILE", help="append the result, with its environment, to a .jsonl")
    options = parser.parse_args(argv)
    check_seconds(options.seconds)
    check_outputs([options.record], inputs=sources_of(options.data, options.data_root))
    if options.threads < 1:
        raise OptionError(f"--threads {options.threads}: expected a whole number from 1")
    torch.set_num_threads(options.threads)
    reading = Reading(default_recipe(options.data).image_size, workers=None)
    images, quant = datasets.load(options.data, options.data_root, reading), QuantSpec(options.bits)
    steps = {}
    for method in METHODS:
        recipe = replace(
            default_recipe(options.data, method), batch_size=options.batch_size, precision=options.precision
        )
        steps[method] = step_of(images, options.arch, quant, recipe)
    samples = measure(steps, seconds=options.seconds, label="steps")
    rows = {method: summarize(times, options.batch_size) for method, times in samples.items()}
    where = environment()

    print(f"{options.arch} on {options.data}, {options.bits} bits, {options.precision}, "
          f"batches of {options.batch_size}, threads {options.threads}")  # fmt: skip
    print("method      p50 ms   p90 ms   p99 ms     ± ms  images/s   runs   plain steps")
    for method, row in rows.items():
        print(f"{method:8}{row.p50_ms:10.1f}{row.p90_ms:9.1f}{row.p99_ms:9.1f}{row.std_ms:9.1f}"
              f"{row.images_per_second:10,.0f}{row.n:7,}{row.p50_ms / rows['plain'].p50_ms:14.2f}")  # fmt: skip
    print(f"peak memory {peak_memory_bytes() / 2**20:,.0f} MiB")
    print(describe(where))
    if options.record:
        record.append(options.record, {
            "bench": "training step", "data": options.data, "arch": options.arch, "bits": options.bits,
            "batch": options.batch_size, "precision": options.precision, "threads": options.threads,
            "device": "cpu",
            "step": {method: asdict(row) for method, row in rows.items()},
            "plain_steps": {method: row.p50_ms / rows["plain"].p50_ms for method, row in rows.items()},
            "peak_memory_bytes": peak_memory_bytes(), "environment": where,
        })  # fmt: skip


if __name__ == "__main__":
    command.run(main)
