"""`python -m bench.ptq`: quantization after training, beside NNCF and ONNX Runtime on the same images.

Accuracy is that of the labels where they name the network's classes; else how often a file gives the float
network's class.
"""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module: python -m bench.ptq")

import functools
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.measure import record
from bench.measure.environment import describe, environment
from bench.measure.statistics import check_seconds, measure, summarize
from bench.networks import floating
from runtime import command
from runtime.errors import OptionError
from train.choices import QUANTIZED_BITS

if TYPE_CHECKING:
    from bench.peers.after_training import Quantized

EXAMPLES = """
  python -m bench.ptq my_nets:make --state weights.pt --data cifar10 --bits 8,4,3
  python -m bench.ptq my_nets:make --data folder:photos --mean 0.5 --std 0.5 --samples 300 --images 1000
  python -m bench.ptq my_nets:make --data folder:photos --engines openvino --record ptq.jsonl
"""
_BATCH = 50
# Until the threads of the contender before have stopped spinning.
_REST_MS = 100.0


def main(argv: Sequence[str] | None = None) -> None:
    """Print seconds, lines, accuracy and latency of every maker's file."""
    parser = command.parser("bench.ptq", "Quantize after training, beside others.", EXAMPLES)
    floating.add_options(parser, samples=300, images=10_000)
    parser.add_argument("--bits", default="8", help="of ours, with commas (default: 8)")
    parser.add_argument("--engines", default="openvino,ort", help="with commas (default: openvino,ort)")
    parser.add_argument("--threads", type=int, default=1, help="of one inference (default: 1)")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each latency (default: 3)")
    record.add_options(parser)
    options = parser.parse_args(argv)
    check_seconds(options.seconds)
    bits = [int(part) for part in _listed("--bits", options.bits, list(map(str, QUANTIZED_BITS)))]
    engines = _listed("--engines", options.engines, ["openvino", "ort"])
    record.check(options, inputs=[options.state, options.network])
    # torch takes seconds to import: --help does without
    from bench.peers.after_training import made

    command.status("reading images ...")
    loaded = floating.load(options)
    images = loaded.images
    found = made(
        loaded.network, loaded.input_spec, images, loaded.classes,
        bits=bits, engines=engines, threads=options.threads, status=command.status,
    )  # fmt: skip
    pixels = np.ascontiguousarray(images.test.permute(0, 2, 3, 1).numpy())
    parts = np.array_split(pixels, math.ceil(len(pixels) / _BATCH))
    given = {
        name: np.concatenate([one.classify(part).argmax(1) for part in command.progress(parts, label=name)])
        for name, one in found.items()
    }
    truth = given["float"] if images.labels is None else images.labels.numpy()
    calls = {name: functools.partial(one.classify, pixels[:1]) for name, one in found.items()}
    times = measure(calls, seconds=options.seconds, rest_ms=_REST_MS if options.threads > 1 else 0.0)
    rows = {name: _row(name, one, found, given, truth, times) for name, one in found.items()}
    result = {
        "bench": "ptq", "network": options.network, "data": images.name, "samples": len(images.calibration),
        "n": len(pixels), "truth": "labels" if images.labels is not None else "float classes",
        "size": list(loaded.input_spec.size), "threads": options.threads, "rows": rows,
        "environment": environment(),
    }  # fmt: skip
    if not record.deliver(options, result):
        _show(result)


def _show(result: dict[str, Any]) -> None:
    of = "the labels" if result["truth"] == "labels" else "the float network's classes"
    print(
        f"{result['network']}, {result['samples']} images calibrate, {result['n']:,} others of {result['data']}; "
        f"accuracy by {of}; threads {result['threads']}"
    )
    print(f"{'':25}{'quantized':>10}{'file':>8}{'lines':>6}{'accuracy':>10}{'p50':>10}")
    for name, row in result["rows"].items():
        print(f"{name:25}{row['quantizing_s']:8.1f} s{row['file_s']:6.1f} s{row['lines']:6}"
              f"{row['accuracy']:8.2f} %{row['latency']['p50_ms']:7.3f} ms")  # fmt: skip
        if "beside" in row:
            beside = row["beside"]
            print(f"    {beside['accuracy']:+.2f} ± {beside['standard_error']:.2f} % beside {beside['name']}, "
                  f"in {beside['times']:.3f} of its time")  # fmt: skip
    print(describe(result["environment"]))


def _row(
    name: str, one: Quantized, found: dict[str, Quantized], given: dict[str, np.ndarray], truth: np.ndarray,
    times: dict[str, np.ndarray],
) -> dict[str, Any]:  # fmt: skip
    row: dict[str, Any] = {key: value for key, value in vars(one).items() if key != "classify"}
    row["accuracy"] = 100 * float((given[name] == truth).mean())
    row["latency"] = asdict(summarize(times[name]))
    peers = [n for n, other in found.items() if other.engine == one.engine and other.lines > one.lines > 0]
    if peers:
        (peer,) = peers
        wins = (given[name] == truth).astype(float) - (given[peer] == truth)
        row["beside"] = {
            "name": peer, "accuracy": 100 * float(wins.mean()),
            "standard_error": 100 * float(wins.std() / math.sqrt(len(wins))),
            "times": float(np.median(times[name] / times[peer])),
        }  # fmt: skip
    return row


def _listed(option: str, text: str, known: list[str]) -> list[str]:
    parts = text.split(",")
    if not set(parts) <= set(known) or len(set(parts)) < len(parts):
        raise OptionError(f"{option} {text}: expected some of {', '.join(known)}, each once, with commas")
    return parts


if __name__ == "__main__":
    command.run(main)
