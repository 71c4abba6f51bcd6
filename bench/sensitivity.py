"""`python -m bench.sensitivity`: what each layer alone costs at fewer bits, and bits for all of them in a budget.

Nothing is trained: the checkpoint's weights and alphas are kept, and one layer at a time, with the activation it
reads, goes to another grid. What that does to accuracy and to the saliency maps ranks the layers; training with
the suggested bits (`python -m train --bits-file`) is to win the loss back.
"""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module: python -m bench.sensitivity")

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from bench.layers.bit_budget import LayerCost, assign, memory_bits
from bench.measure import data, record
from bench.measure.environment import describe as describe_environment
from bench.measure.environment import environment
from runtime import command
from runtime.errors import OptionError
from runtime.files import write_atomically
from train.choices import QUANTIZED_BITS
from train.data.splits import sources_of
from train.models import factory

if TYPE_CHECKING:
    from bench.networks.other_bits import Effect, Own

EXAMPLES = """
  python -m bench.sensitivity ckpt.pt --data mnist
  python -m bench.sensitivity ckpt.pt --data cifar10 --samples 1000 --mean-bits 4 -o bits.json
  python -m bench.sensitivity ckpt.pt --data cifar10 --size-bytes 100000 -o bits.json
  python -m train --data cifar10 --arch resnet20 --weight-quantizer lsq --init ckpt.pt --bits-file bits.json
"""

# One point of accuracy counts as much as 0.1 of rank correlation.
_MAP_WEIGHT = 0.1


def cost(found: Effect, own: Effect, map_weight: float) -> float:
    """Return points of accuracy lost, and what the maps lost in rank correlation, in percent, times a weight."""
    return max(0.0, own.accuracy - found.accuracy) + map_weight * 100 * (1 - found.spearman)


def main(argv: Sequence[str] | None = None) -> None:
    """Print accuracy and map agreement of each layer at each number of bits, and the suggested assignment."""
    parser = command.parser("bench.sensitivity", "Measure which layer costs what at fewer bits.", EXAMPLES)
    parser.add_argument("checkpoint", help="ckpt.pt written by python -m train")
    parser.add_argument("--data", required=True, help=data.HELP)
    parser.add_argument("--data-root", default="data", help="folder of the data sets' files (default: data)")
    parser.add_argument("--samples", type=int, default=500, help="images, evenly spaced (default: 500)")
    parser.add_argument("--bits", default="8,4,3,2", help="comma-separated, 2 to 8 (default: 8,4,3,2)")
    parser.add_argument("--mean-bits", type=float, help="budget: bits of a weight, mean over all weights")
    parser.add_argument("--size-bytes", type=int, help="budget: bytes of all weights, packed")
    parser.add_argument("--all-layers", action="store_true",
                        help="fewer bits for the first and the last layer too, which else keep 8")  # fmt: skip
    parser.add_argument("--map-weight", type=float, default=_MAP_WEIGHT, metavar="POINTS",
                        help="of accuracy that 0.01 of rank correlation is worth (default: 0.1)")  # fmt: skip
    parser.add_argument("-o", "--output", metavar="JSON", help="write the assignment, for train --bits-file")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    record.add_options(parser)
    factory.add_option(parser)
    options = parser.parse_args(argv)
    factory.allow(*options.arch)
    bits = _check(options)
    import torch  # torch takes seconds to import: --help does without

    from bench.networks.other_bits import effect, layers_of, own_answers
    from train import checkpoint as checkpoints

    checkpoint = checkpoints.load(options.checkpoint)
    stream = data.stream(options.data, options.data_root, size=checkpoint.input.size, classes=checkpoint.classes,
                         trained_on=checkpoint.recipe.data_name)  # fmt: skip
    test = data.collected(stream.evenly_spaced(min(options.samples, len(stream.labels))))
    data.check_fits(test, checkpoint.input.size, checkpoint.input.channels, len(checkpoint.classes))
    if options.threads:
        torch.set_num_threads(options.threads)
    weights = layers_of(checkpoint)
    own = own_answers(checkpoint, test)
    found: dict[str, dict[int, Effect]] = {name: {} for name in weights}
    for name, number in command.progress([(n, b) for n in weights for b in bits], label="layers x bits"):
        found[name][number] = effect(checkpoint, {name: number}, test, own)
    suggested = _suggested(options, weights, found, own)
    together = effect(checkpoint, suggested, test, own) if suggested else None
    size_bits = sum(weights[name] * b for name, b in (suggested or {}).items())
    where = environment()
    result = {
        "bench": "sensitivity",
        "arch": checkpoint.arch["name"],
        "bits": checkpoint.quant.bits,
        "data": test.name,
        "n": len(test.labels),
        "own": asdict(own.effect),
        "weights": weights,
        "layers": {name: {str(b): asdict(e) for b, e in row.items()} for name, row in found.items()},
        "map_weight": options.map_weight,
        "suggested": suggested,
        "suggested_bytes": size_bits / 8 if suggested else None,
        "together": asdict(together) if together else None,
        "environment": where,
    }
    if options.output:
        write_atomically(options.output, json.dumps(suggested, indent=1) + "\n")
    if record.deliver(options, result):
        return
    print(f"{options.checkpoint}  {checkpoint.arch['name']}, {len(test.labels):,} images of {test.name}; "
          f"its own accuracy {own.effect.accuracy:.2f} %")  # fmt: skip
    print(_table(weights, found, suggested))
    if suggested and together:
        print(f"suggested: {size_bits / sum(weights.values()):.2f} bits a weight, {size_bits / 8:,.0f} bytes; "
              f"not trained yet: accuracy {together.accuracy:.2f} %, maps {together.spearman:.3f}")  # fmt: skip
    print(describe_environment(where))


def _check(options: Any) -> list[int]:
    """Return the numbers of bits to measure, having checked the options before long work."""
    parts = options.bits.split(",")
    if not all(part.strip().isdecimal() and int(part) in QUANTIZED_BITS for part in parts):
        raise OptionError(f"--bits {options.bits}: expected whole numbers from 2 to 8, comma-separated")
    if options.samples < 1 or (options.threads is not None and options.threads < 1):
        raise OptionError("--samples, --threads: expected whole numbers from 1")
    if not options.map_weight >= 0:
        raise OptionError(f"--map-weight {options.map_weight}: expected a number from 0")
    if options.mean_bits is not None and options.size_bytes is not None:
        raise OptionError("--mean-bits and --size-bytes: expected one budget; drop one of them")
    if options.output and options.mean_bits is None and options.size_bytes is None:
        raise OptionError("-o: expected a budget to assign bits in; add --mean-bits 4, or --size-bytes")
    inputs = [options.checkpoint, *sources_of(options.data, options.data_root)]
    record.check(options, inputs=inputs, outputs=[options.output])
    return sorted({int(part) for part in parts}, reverse=True)


def _suggested(
    options: Any, weights: Mapping[str, int], found: Mapping[str, Mapping[int, Effect]], own: Own
) -> dict[str, int] | None:
    if options.mean_bits is None and options.size_bytes is None:
        return None
    first, *_, last = weights
    layers = []
    for name, row in found.items():
        costs = {bits: cost(each, own.effect, options.map_weight) for bits, each in row.items()}
        fixed = name in (first, last) and not options.all_layers
        layers.append(LayerCost(name, weights[name], {8: 0.0} if fixed else costs))
    total = sum(weights.values())
    budget_bits = 8 * options.size_bytes if options.mean_bits is None else int(options.mean_bits * total)
    suggested = assign(layers, budget_bits)
    assert memory_bits(layers, suggested) <= budget_bits
    return suggested


def _table(
    weights: Mapping[str, int],
    found: Mapping[str, Mapping[int, Effect]],
    suggested: Mapping[str, int] | None,
) -> str:
    bits = list(next(iter(found.values())))
    width = max(5, *map(len, weights))
    head = "".join(f"{f'{b} bit':>14}" for b in bits)
    lines = [f"{'layer':{width}}  weights{head}{'  suggested' if suggested else ''}"]
    for name, row in found.items():
        cells = "".join(f"{each.accuracy:8.2f} {each.spearman:5.3f}" for each in row.values())
        chosen = f"{suggested[name]:11}" if suggested else ""
        lines.append(f"{name:{width}}{weights[name]:9,}{cells}{chosen}")
    return "\n".join([*lines, "each layer alone: accuracy in percent, rank correlation of the maps"])


if __name__ == "__main__":
    command.run(main)
