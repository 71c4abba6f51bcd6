"""`python -m bench.training`: what a training step of every method costs, and how many plain steps that is."""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module: python -m bench.training")

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from bench.measure import record
from bench.measure.environment import describe, environment, peak_memory_bytes
from bench.measure.ratios import ratio
from bench.measure.statistics import check_seconds, measure, missing_percentiles, summarize, told
from runtime import command
from runtime.errors import OptionError
from train.choices import FLOAT_BITS, METHODS, QUANTIZED_BITS, STEP_PRECISIONS
from train.data import names
from train.data.splits import sources_of
from train.models import factory

if TYPE_CHECKING:
    from train.data.images import ImageData
    from train.quantization.spec import QuantSpec
    from train.recipe import Recipe

EXAMPLES = """
  python -m bench.training --data mnist --data-root data
  python -m bench.training --data cifar10 --arch resnet20 --bits 4
  python -m bench.training --data cifar10 --arch my_project.nets:small_net    # your own network
  python -m bench.training --data mnist --compile          # plain and sgt beside themselves under torch.compile
  python -m bench.training --data mnist --record bench/results/training.jsonl
"""

COMPILED = ("plain", "sgt")  # asg differentiates its gradients once more, which torch.compile does not offer


def main(argv: Sequence[str] | None = None) -> None:
    """Print the time of a step of every method and its ratio to a plain one, all measured in turns."""
    parser = command.parser("bench.training", "Measure training steps of all methods, in turns.", EXAMPLES)
    parser.add_argument(
        "--data", type=names.check_name, default="mnist", help=f"{names.EXPECTED} (default: mnist)"
    )
    parser.add_argument("--data-root", default="data", help="folder of the data sets' files (default: data)")
    parser.add_argument("--arch", type=factory.named, metavar="NAME", default="cnn2",
                        help="a network of ours, or your own module:factory, as given to train "
                             "(default: cnn2)")  # fmt: skip
    parser.add_argument("--bits", type=int, choices=(*QUANTIZED_BITS, FLOAT_BITS), default=8, help="default: 8")
    parser.add_argument("--batch-size", type=int, default=128, help="default: 128")
    parser.add_argument("--precision", choices=STEP_PRECISIONS, default="float32", help="default: float32")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--seconds", type=float, default=5.0, help="per method (default: 5)")
    parser.add_argument("--compile", action="store_true",
                        help="plain and sgt alone, eager and by torch.compile, which takes minutes")  # fmt: skip
    record.add_options(parser, json_line=False)
    options = parser.parse_args(argv)
    check_seconds(options.seconds)
    record.check(options, inputs=sources_of(options.data, options.data_root))
    if options.threads < 1:
        raise OptionError(f"--threads {options.threads}: expected a whole number from 1")
    import torch  # torch takes seconds to import: --help does without

    from bench.measure.training_step import first_images, step_of
    from train.data import datasets
    from train.data.folders import Reading
    from train.quantization.spec import QuantSpec
    from train.recipe import default_recipe

    torch.set_num_threads(options.threads)
    reading = Reading(default_recipe(options.data).image_size, workers=None)
    command.status("reading the images")
    # One batch is timed: the other images are let go before the networks take their memory.
    images = first_images(datasets.load(options.data, options.data_root, reading), options.batch_size)
    quant, steps = QuantSpec(options.bits), {}
    recipes = {
        method: replace(
            default_recipe(options.data, method), batch_size=options.batch_size, precision=options.precision
        )
        for method in (COMPILED if options.compile else METHODS)
    }
    for method, recipe in recipes.items():
        command.status(f"preparing a step of {method}")
        steps[method] = step_of(images, options.arch, quant, recipe)
    command.status("")
    if options.compile:
        _beside_compiled(options, images, quant, recipes, steps)
        return
    samples = measure(steps, seconds=options.seconds, label="steps")
    rows = {method: summarize(times) for method, times in samples.items()}
    # Of each round, and then the median: a machine that slows down for a while slows both down.
    plain_steps = {method: ratio([times], [samples["plain"]]).ratio for method, times in samples.items()}
    where = environment()

    print(_setting(options))
    print("method      p50 ms   p90 ms     ± ms   runs   plain steps")
    for method, row in rows.items():
        print(f"{method:8}{row.p50_ms:10.1f}{told(row.p90_ms, 1):>9}{row.std_ms:9.1f}{row.n:7,}"
              f"{plain_steps[method]:14.2f}")  # fmt: skip
    for reason in missing_percentiles([row.n for row in rows.values()], [90]):
        print(reason)
    print(f"peak memory {peak_memory_bytes() / 2**20:,.0f} MiB")
    print(describe(where))
    record.deliver(options, {
        "bench": "training step", **_recorded(options),
        "step": {method: asdict(row) for method, row in rows.items()},
        "plain_steps": plain_steps, "peak_memory_bytes": peak_memory_bytes(), "environment": where,
    })  # fmt: skip


def _beside_compiled(
    options: argparse.Namespace,
    images: ImageData,
    quant: QuantSpec,
    recipes: Mapping[str, Recipe],
    eager: Mapping[str, Callable[[], object]],
) -> None:
    """Print each step beside itself under torch.compile, in turns, or why that one does not run."""
    import torch._functorch.config as functorch

    from bench.measure.training_step import first_step, step_of

    steps, firsts = dict(eager), {}
    # Guided steps go backward through one graph twice: once to the pixels, once to the parameters.
    with functorch.patch("donated_buffer", False):
        for method, recipe in recipes.items():
            command.status(f"compiling a step of {method}")
            compiled = step_of(images, options.arch, quant, recipe, compiled=True)
            firsts[method] = first_step(compiled)
            if not firsts[method].failure:
                steps[f"{method}, compiled"] = compiled
        command.status("")
        samples = measure(steps, seconds=options.seconds, label="steps")
    rows = {name: summarize(times) for name, times in samples.items()}
    times_eager = {
        method: ratio([samples[f"{method}, compiled"]], [samples[method]]).ratio
        for method in recipes
        if f"{method}, compiled" in samples
    }
    where = environment()
    print(_setting(options))
    print("method             p50 ms     ± ms   runs   times eager")
    for name, row in rows.items():
        method = name.removesuffix(", compiled")
        times = f"{times_eager[method]:14.2f}" if name != method else ""
        print(f"{name:16}{row.p50_ms:9.1f}{row.std_ms:9.1f}{row.n:7,}{times}")
    for method, first in firsts.items():
        if first.failure:
            print(f"{method}, compiled: not measured: {first.failure}")
            continue
        breaks = "; ".join(f"{reason} ({n} times)" for reason, n in first.graph_breaks.items())
        print(f"{method}, compiled: its first step took {first.seconds:.0f} s; "
              + (f"parts left to Python: {breaks}" if breaks else "nothing is left to Python"))  # fmt: skip
    print(describe(where))
    record.deliver(options, {
        "bench": "compiled step", **_recorded(options),
        "step": {name: asdict(row) for name, row in rows.items()},
        "times_eager": times_eager,
        "first": {method: asdict(first) for method, first in firsts.items()},
        "peak_memory_bytes": peak_memory_bytes(), "environment": where,
    })  # fmt: skip


def _setting(options: argparse.Namespace) -> str:
    return (
        f"{options.arch} on {options.data}, {options.bits} bits, {options.precision}, "
        f"batches of {options.batch_size}, threads {options.threads}"
    )


def _recorded(options: argparse.Namespace) -> dict[str, object]:
    return {
        "data": options.data, "arch": options.arch, "bits": options.bits, "batch": options.batch_size,
        "precision": options.precision, "threads": options.threads, "device": "cpu",
    }  # fmt: skip


if __name__ == "__main__":
    command.run(main)
