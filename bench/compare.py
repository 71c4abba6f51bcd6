"""`python -m bench.compare`: one checkpoint on several engines, measured in turns in one process.

The contenders (bench/contenders.py) get the same pixels and give logits: the float network on PyTorch, ONNX
Runtime and OpenVINO, our INT8 exports, and what other makers offer.
"""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module: python -m bench.compare")

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch

from bench import data
from bench.accuracy import confusion_matrix, score
from bench.contenders import OURS, Contender, contenders, missing_peers
from bench.environment import describe, environment
from bench.explainers import OURS_WITH_MAP, explainers
from bench.record import append
from bench.statistics import SETTLE_MS, check_seconds, measure, ratio, summarize
from runtime import command
from runtime.classifier import MAX_BATCH
from runtime.errors import OptionError
from runtime.files import check_writable
from train import checkpoint as checkpoints
from train import factory

EXAMPLES = """
  python -m bench.compare runs/cifar10-resnet20-8bit-sgt/ckpt.pt
  python -m bench.compare ckpt.pt --batch 32 --threads 2
  python -m bench.compare ckpt.pt --data cifar10 --data-root data    # and their accuracy, on the same images
  python -m bench.compare ckpt.pt --explain                   # class and map, against Captum and autograd
  python -m bench.compare ckpt.pt --record bench/results/latency.jsonl
"""

# Until the threads of the contender before have stopped spinning, mostly: see bench.statistics.measure.
_REST_MS = 100.0


@dataclass(frozen=True)
class Quality:
    """What one contender gets right, in percent.

    Args:
        accuracy: of the images.
        sensitivity: macro, one class against the rest.
        specificity: likewise.
        agreement: images put into the same class as by the float network in PyTorch.
    """

    accuracy: float
    sensitivity: float
    specificity: float
    agreement: float


def qualities(calls: Mapping[str, Contender], test: data.LabelledImages, classes: int) -> dict[str, Quality]:
    """Return the quality of every contender on the same images; the first of them is what they agree with."""
    predicted: dict[str, np.ndarray] = {}
    for name, contender in calls.items():
        parts = [
            contender.classify(test.images[start : start + MAX_BATCH]).argmax(1)
            for start in command.progress(range(0, len(test.images), MAX_BATCH), label=f"{name}, images / 64")
        ]
        predicted[name] = np.concatenate(parts)
    reference = next(iter(predicted.values()))
    found = {}
    for name, values in predicted.items():
        scores = score(confusion_matrix(test.labels, values, classes))
        agreement = 100 * float((values == reference).mean())
        found[name] = Quality(scores.accuracy, scores.sensitivity, scores.specificity, agreement)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Print the latency of every contender and its ratio to INT8 on OpenVINO."""
    parser = command.parser("bench.compare", "Compare engines on one checkpoint, in turns in one run.", EXAMPLES)
    parser.add_argument("checkpoint", help="quantized ckpt.pt written by python -m train")
    parser.add_argument("--data", help=f"also accuracy: {data.HELP}")
    parser.add_argument("--data-root", default="data", help="folder of the data sets' files (default: data)")
    parser.add_argument("--batch", type=int, default=1, help="images at a time (default: 1)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of one inference (default: 1)")
    parser.add_argument("--seconds", type=float, default=5.0, help="per contender (default: 5)")
    parser.add_argument("--no-peers", action="store_true", help="leave torch.compile, bf16 and others' PTQ out")
    parser.add_argument(
        "--explain", action="store_true", help="class and saliency map, against Captum and autograd"
    )
    parser.add_argument("--record", metavar="FILE", help="append the result to a .jsonl file")
    parser.add_argument("--json", action="store_true", help="one JSON line, with the environment")
    factory.add_option(parser)
    options = parser.parse_args(argv)
    factory.allow(*options.arch)
    if options.batch < 1 or options.threads < 1:
        raise OptionError(f"--batch {options.batch} --threads {options.threads}: expected whole numbers from 1")
    if options.explain and options.data:
        raise OptionError("--explain with --data: accuracy is compared without --explain; drop one of them")
    check_seconds(options.seconds)
    if options.record:
        check_writable(options.record)
    checkpoint = checkpoints.load(options.checkpoint)
    test = (
        data.load(
            options.data, options.data_root,
            size=checkpoint.input.size, classes=checkpoint.classes, trained_on=checkpoint.recipe.data_name,
        )
        if options.data
        else None
    )  # fmt: skip
    if test is not None:
        data.check_fits(test, checkpoint.input.size, checkpoint.input.channels, len(checkpoint.classes))
    torch.set_num_threads(options.threads)
    shape = (options.batch, *checkpoint.input.size, checkpoint.input.channels)
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    command.status("preparing the contenders ...")
    found: dict[str, Contender] = {}
    if options.explain:
        calls = explainers(checkpoint, images, threads=options.threads)
    else:
        found = contenders(checkpoint, threads=options.threads, peers=not options.no_peers)
        calls = {name: functools.partial(contender.classify, images) for name, contender in found.items()}
    command.status("")
    missing = missing_peers(found) if found and not options.no_peers else []
    ours = OURS_WITH_MAP if options.explain else OURS
    samples = measure(calls, seconds=options.seconds, rest_ms=_REST_MS if options.threads > 1 else 0.0)
    rows = {name: summarize(times, options.batch) for name, times in samples.items()}
    ratios = {name: ratio(times, samples[ours]) for name, times in samples.items()}
    quality = qualities(found, test, len(checkpoint.classes)) if test is not None else {}
    where = environment()
    result = {
        "bench": "compare-explain" if options.explain else "compare",
        "arch": checkpoint.arch["name"],
        "bits": checkpoint.quant.bits,
        "input": list(shape),
        "threads": options.threads,
        "settle_ms": SETTLE_MS,
        "latency": {name: asdict(row) for name, row in rows.items()},
        f"ratio_to_{ours}": {name: asdict(value) for name, value in ratios.items()},
        "file_bytes": {name: contender.file_bytes for name, contender in found.items()},
        "data": test.name if test is not None else None,
        "quality": {name: asdict(value) for name, value in quality.items()},
        "missing": missing,
        "environment": where,
    }
    if options.record:
        append(options.record, result)
    if options.json:
        print(json.dumps(result))
        return
    print(f"{options.checkpoint}  {checkpoint.arch['name']}, input {list(shape)}, threads {options.threads}, "
          f"{len(samples[ours]):,} rounds in turns")  # fmt: skip
    print(f"{'':24}   p50 ms   p99 ms  images/s   ratio   95 % interval")
    for name, row in rows.items():
        by = ratios[name]
        print(f"{name:24}{row.p50_ms:9.3f}{row.p99_ms:9.3f}"
              f"{row.images_per_second:10,.0f}{by.median:8.2f}{by.low:9.2f} ..{by.high:5.2f}")  # fmt: skip
    print(f"ratio: median over rounds of its time / {ours}'s in the same round; interval: bootstrap")
    if test is not None:
        print(_quality_table(test.name, quality, found))
    for name in missing:
        print(f"not compared: {name}; pip install 'clearpact[peers]'")
    print(describe(where))


def _quality_table(data_name: str, quality: Mapping[str, Quality], found: Mapping[str, Contender]) -> str:
    lines = [f"\n{'on ' + data_name:24}accuracy  sensitivity  specificity  as float  file kB"]
    for name, row in quality.items():
        size = f"{found[name].file_bytes / 1000:,.0f}" if found[name].file_bytes else "-"
        lines.append(f"{name:24}{row.accuracy:8.2f}{row.sensitivity:13.2f}{row.specificity:13.2f}"
                     f"{row.agreement:10.2f}{size:>9}")  # fmt: skip
    return "\n".join(lines)


if __name__ == "__main__":
    command.run(main)
