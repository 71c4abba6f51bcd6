"""`python -m bench.agreement A B`: two networks on the same images: class, logits and maps.

The two are whatever explains itself: exported files, on one engine or on two; a plan and the file that it was
built from; a checkpoint and its export; two exports of one checkpoint that differ in a single option. The maps are
those of the class that B predicts.
"""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module: python -m bench.agreement")

import contextlib
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from bench.measure import record
from bench.measure.data import HELP
from bench.measure.environment import describe, environment
from bench.measure.streams import cores
from bench.networks.agreement import TARGETS, Agreement, compare
from bench.networks.network import Network, find
from bench.networks.opened import open_networks, stream_for
from runtime import command
from runtime.errors import OptionError
from runtime.explanations.agreement import MEASURES
from runtime.session import ENGINES
from train.data.splits import sources_of
from train.models import factory

EXAMPLES = """
  python -m bench.agreement ckpt.onnx ckpt.pt --data mnist          # what export did
  python -m bench.agreement ckpt.onnx ckpt.pt --float --data mnist  # what quantization did as well
  python -m bench.agreement ckpt.onnx ckpt.onnx --engine ort --engine openvino --data mnist_test.npz
  python -m bench.agreement engine.plan ckpt.onnx --data mnist_test.npz --images 1000 --json
  python -m bench.agreement code.onnx ste.onnx --data mnist --target true    # two exports: --gate code, --gate ste
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Print how many images differ in class, how far the logits lie apart, and how much the maps agree."""
    options = _parser().parse_args(argv)
    factory.allow(*options.arch)
    command.check_counts(options, images=1, threads=1)
    if len(options.engine) > 2:
        raise OptionError(f"--engine: given {len(options.engine)} times, expected once for both, or of A and of B")
    inputs = [*map(find, (options.a, options.b)), *sources_of(options.data, options.data_root)]
    record.check(options, inputs=inputs)
    workers = options.threads or cores()
    engines = (options.engine * 2)[:2] if options.engine else [None, None]
    with contextlib.ExitStack() as stack:
        sides = []
        for path, engine, with_float in ((options.a, engines[0], False), (options.b, engines[1], options.float)):
            *_, side = open_networks(
                path, engine=engine, threads=1, parallel_runs=workers, with_float=with_float, classes_only=True
            )
            stack.callback(side.close)
            sides.append(side)
        test = stream_for(sides, options.data, options.data_root)
        if options.images is not None:
            test = test.evenly_spaced(options.images)
        found = compare(sides[0], sides[1], test, target=options.target, workers=workers)
    where = environment()
    result = {
        "bench": "agreement",
        "networks": [{"model": side.name, "precision": side.precision, "engine": side.engine} for side in sides],
        "data": test.name,
        "target": options.target,
        **asdict(found),
        "environment": where,
    }
    if record.deliver(options, result):
        return
    print(_report(found, sides, test.name, options.target))
    print(describe(where))


def _parser() -> Any:
    parser = command.parser("bench.agreement", "Compare two networks on the same images.", EXAMPLES)
    parser.add_argument("a", metavar="A", help="exported .onnx, plan, ckpt.pt or run folder")
    parser.add_argument("b", metavar="B", help="another, or the same on another engine; A is compared with it")
    parser.add_argument("--data", required=True, help=HELP)
    parser.add_argument("--data-root", default="data", help="folder of the data sets' files (default: data)")
    parser.add_argument("--images", type=int, help="how many, evenly spaced over the test split (default: all)")
    parser.add_argument("--target", choices=TARGETS, default="predicted",
                        help="the class whose maps are compared (default: predicted, by B)")  # fmt: skip
    parser.add_argument("--float", action="store_true", help="take the float network of B, a checkpoint")
    parser.add_argument("--engine", choices=tuple(ENGINES), action="append", default=[],
                        help="of .onnx files (default: as exported); twice: of A, then of B")  # fmt: skip
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    record.add_options(parser)
    factory.add_option(parser)
    return parser


def _report(found: Agreement, sides: Sequence[Network], data: str, target: str) -> str:
    lines = [
        f"{letter}  {side.name}, {side.precision}, {side.engine}" for letter, side in zip("AB", sides, strict=True)
    ]
    lines.append(
        f"{found.differing:,} of {found.images:,} images of {data} in another class, logits differ by at most "
        f"{found.largest_difference:.2%} of the largest"
    )
    rows = (found.spearman, found.pearson, found.ssim, found.top_overlap, found.top_20_overlap)
    if found.spearman is None:
        without = " and ".join(letter for letter, side in zip("AB", sides, strict=True) if not side.explains)
        return "\n".join([*lines, f"{without} without maps: exported or built with --no-saliency"])
    head = f"maps of the {target} class"
    lines.append(f"{head:30}    mean  median  lowest decile   least (image)  same class")
    for name, row in zip(MEASURES, rows, strict=True):
        if row is not None:
            agreeing = f"{found.same_class[name]:8.3f}" if found.same_class else "       -"
            lines.append(
                f"{name:30}{row.mean:8.3f}{row.median:8.3f}{row.lowest_decile:15.3f}{row.least:8.3f} "
                f"{f'({row.least_image})':9}{agreeing}"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    command.run(main)
