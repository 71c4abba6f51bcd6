"""`python -m bench.compare`: one checkpoint on several engines, measured in turns in one process.

The contenders get the same pixels and give logits: the float network on PyTorch, ONNX Runtime and OpenVINO, our
INT8 exports, and what other makers offer (peers/contenders.py); with an NVIDIA GPU, also on CUDA and TensorRT
(peers/gpu_contenders.py).
"""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module: python -m bench.compare")

import contextlib
import functools
import json
import tempfile
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.measure import data
from bench.measure.environment import describe, environment
from bench.measure.first_prediction import first_predictions
from bench.measure.record import append, missing_by_reason
from bench.measure.statistics import SETTLE_MS, batch_sizes, check_seconds, measure, ratio, summarize
from bench.measure.streams import ImageStream, cores
from bench.networks.network import Network
from bench.peers.contenders import OURS, Contender, Found, contenders, explaining_networks
from bench.peers.cpu import PTQ
from bench.peers.explainers import OURS_WITH_MAP, explainers
from bench.peers.gpu_contenders import OURS_ON_GPU, gpu_contenders, gpu_explaining_networks, gpu_name
from bench.peers.gpu_explainers import gpu_explainers
from bench.peers.qualities import map_qualities, qualities
from runtime import command
from runtime.errors import EngineError, OptionError
from runtime.outputs import check_outputs
from train import checkpoint as checkpoints
from train.checkpoint import Checkpoint
from train.data.splits import sources_of
from train.models import factory
from train.quantization.quantizers import activation_range

EXAMPLES = """
  python -m bench.compare runs/cifar10-resnet20-8bit-sgt/ckpt.pt
  python -m bench.compare ckpt.pt --batch 1,32 --threads 2
  python -m bench.compare ckpt.pt --data cifar10 --data-root data    # accuracy and maps, on the same images
  python -m bench.compare ckpt.pt --explain                   # class and map, against Captum and autograd
  python -m bench.compare ckpt.pt --record bench/results/latency.jsonl
"""

# Until the threads of the contender before have stopped spinning, mostly: see bench.measure.statistics.measure.
_REST_MS = 100.0


def main(argv: Sequence[str] | None = None) -> None:
    """Print the latency of every contender and its ratio to INT8 on OpenVINO."""
    parser = command.parser("bench.compare", "Compare engines on one checkpoint, in turns in one run.", EXAMPLES)
    parser.add_argument("checkpoint", help="quantized ckpt.pt written by python -m train")
    parser.add_argument("--data", help=f"also accuracy: {data.HELP}")
    parser.add_argument("--data-root", default="data", help="folder of the data sets' files (default: data)")
    parser.add_argument("--map-images", type=int, default=500,
                        help="images of --data to measure maps on, evenly spaced (default: 500)")  # fmt: skip
    parser.add_argument("--batch", default="1", help="images at a time, comma-separated (default: 1)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of one inference (default: 1)")
    parser.add_argument("--seconds", type=float, default=5.0, help="per contender (default: 5)")
    parser.add_argument("--starts", type=int, default=3,
                        help="fresh processes of each, for cold start and memory (default: 3)")  # fmt: skip
    parser.add_argument(
        "--no-peers", action="store_true", help="leave torch.compile, bf16, CUDA and others' PTQ out"
    )
    parser.add_argument(
        "--explain", action="store_true", help="class and saliency map, against Captum and autograd"
    )
    parser.add_argument("--record", metavar="FILE", help="append the result to a .jsonl file")
    parser.add_argument("--json", action="store_true", help="one JSON line, with the environment")
    factory.add_option(parser)
    options = parser.parse_args(argv)
    factory.allow(*options.arch)
    batches = batch_sizes(options.batch)
    if options.threads < 1 or options.map_images < 1 or options.starts < 0:
        raise OptionError("--threads, --map-images: expected whole numbers from 1; --starts: from 0")
    if options.explain and options.data:
        raise OptionError("--explain with --data: accuracy is compared without --explain; drop one of them")
    check_seconds(options.seconds)
    check_outputs([options.record], inputs=[options.checkpoint, *sources_of(options.data, options.data_root)])
    checkpoint = checkpoints.load(options.checkpoint)
    test = _test(options, checkpoint) if options.data else None
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        results = list(_compared(options, checkpoint, batches, test, Path(folder)))
    for result in results:
        if options.record:
            append(options.record, result)
        if options.json:
            print(json.dumps(result))
    if not options.json:
        print(_report(options.checkpoint, results))


def _test(options: Any, checkpoint: Checkpoint) -> ImageStream:
    test = data.stream(
        options.data, options.data_root,
        size=checkpoint.input.size, classes=checkpoint.classes, trained_on=checkpoint.recipe.data_name,
    )  # fmt: skip
    data.check_fits(test, checkpoint.input.size, checkpoint.input.channels, len(checkpoint.classes))
    return test


def _compared(
    options: Any, checkpoint: Checkpoint, batches: Sequence[int], test: ImageStream | None, folder: Path
) -> Iterator[dict[str, Any]]:
    """Yield the result of each batch size; what does not depend on it is in all of them."""
    size = (*checkpoint.input.size, checkpoint.input.channels)
    command.status("preparing the contenders ...")
    found: Found[Contender] = Found({}, {})
    if not options.explain:
        found = contenders(checkpoint, folder, threads=options.threads, peers=not options.no_peers)
        found |= gpu_contenders(
            checkpoint, folder, batches=batches, threads=options.threads, peers=not options.no_peers
        )
    command.status("")
    latencies = {batch: _latency(options, checkpoint, (batch, *size), found, folder) for batch in batches}
    loadings = {name: contender.loading for name, contender in found.ready.items()} if options.starts else {}
    starts = first_predictions(loadings, shape=size, threads=options.threads, starts=options.starts)
    quality = qualities(found.ready, test, len(checkpoint.classes)) if test is not None else {}
    maps, networks = {}, Found[Network]({}, {})
    if test is not None:
        networks = Found(explaining_networks(checkpoint, folder, workers=cores()), {})
        if OURS_ON_GPU in found.ready:
            networks |= gpu_explaining_networks(checkpoint, folder)
        some = test.evenly_spaced(min(options.map_images, len(test.labels)))
        maps = map_qualities(networks.ready, some, workers=cores())
    where = environment()
    with contextlib.suppress(EngineError):
        where["gpu"] = gpu_name()
    for latency in latencies.values():
        yield latency | {
            "file_bytes": {name: contender.file_bytes for name, contender in found.ready.items()},
            "starts": options.starts,
            "first_prediction": {name: asdict(value) for name, value in starts.items()},
            "data": test.name if test is not None else None,
            "quality": {name: asdict(value) for name, value in quality.items()},
            "map_images": options.map_images if maps else None,
            "maps": {name: asdict(value) for name, value in maps.items()},
            "missing": latency["missing"] | networks.missing,
            "environment": where,
        }


def _latency(
    options: Any, checkpoint: Checkpoint, shape: tuple[int, ...], found: Found[Contender], folder: Path
) -> dict[str, Any]:
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    calls: Found[Callable[[], object]]
    if options.explain:
        calls = Found(explainers(checkpoint, images, threads=options.threads), {})
        calls |= gpu_explainers(checkpoint, images, folder, peers=not options.no_peers)
    else:
        ready = {name: functools.partial(contender.classify, images) for name, contender in found.ready.items()}
        calls = Found(dict(ready), found.missing)
    ours = OURS_WITH_MAP if options.explain else OURS
    samples = measure(calls.ready, seconds=options.seconds, rest_ms=_REST_MS if options.threads > 1 else 0.0)
    return {
        "bench": "compare-explain" if options.explain else "compare",
        "arch": checkpoint.arch["name"],
        "bits": checkpoint.quant.bits,
        "grid": _grid(checkpoint),
        "trained_on": checkpoint.recipe.data_name,
        "input": list(shape),
        "threads": options.threads,
        "settle_ms": SETTLE_MS,
        "latency": {name: asdict(summarize(times, shape[0])) for name, times in samples.items()},
        f"ratio_to_{ours}": {name: asdict(ratio(times, samples[ours])) for name, times in samples.items()},
        "ratio_to_ptq": {
            name: asdict(ratio(samples[name], samples[ptq]))
            for name, ptq in PTQ.items()
            if {name, ptq} <= set(samples)
        },
        "missing": calls.missing,
    }


def _grid(checkpoint: Checkpoint) -> str:
    """Return the codes of the activations, such as "0..127", and whether what is added is on grids, too."""
    quant = checkpoint.quant
    _, qmax = activation_range(quant.bits, full_grid=quant.full_grid)
    return f"0..{qmax}{', addends' if quant.addends else ''}"


def _report(checkpoint: str, results: Sequence[Mapping[str, Any]]) -> str:
    last = results[-1]
    ours = OURS if last["bench"] == "compare" else OURS_WITH_MAP
    lines = []
    for result in results:
        n = result["latency"][ours]["n"]
        lines += [f"{checkpoint}  {last['arch']}, input {result['input']}, threads {last['threads']}, "
                  f"{n:,} rounds in turns",
                  f"{'':24}   p50 ms   p99 ms  images/s   ratio   95 % interval"]  # fmt: skip
        for name, row in result["latency"].items():
            by = result[f"ratio_to_{ours}"][name]
            lines.append(f"{name:24}{row['p50_ms']:9.3f}{row['p99_ms']:9.3f}{row['images_per_second']:10,.0f}"
                         f"{by['median']:8.2f}{by['low']:9.2f} ..{by['high']:5.2f}")  # fmt: skip
        for name, by in result["ratio_to_ptq"].items():
            times = f"{by['median']:.3f} times {PTQ[name]} ({by['low']:.3f} .. {by['high']:.3f})"
            lines.append(f"{name:24}{times}")
    lines.append(f"ratio: median over rounds of its time / {ours}'s in the same round; interval: bootstrap")
    if last["quality"]:
        lines += ["", f"{'on ' + last['data']:24}accuracy  sensitivity  specificity  as float"]
        for name, row in last["quality"].items():
            lines.append(f"{name:24}{row['accuracy']:8.2f}{row['sensitivity']:13.2f}{row['specificity']:13.2f}"
                         f"{row['agreement']:10.2f}")  # fmt: skip
    if last["file_bytes"]:
        lines += ["", f"{'':24}cold start ms  peak MB  file kB  masked AUC  float maps"]
        for name, file_bytes in last["file_bytes"].items():
            start, maps = last["first_prediction"].get(name), last["maps"].get(name)
            cells = [f"{start['cold_start_ms']:.0f}" if start else "-",
                     f"{start['peak_memory_bytes'] / 1e6:.0f}" if start else "-",
                     f"{file_bytes / 1000:,.0f}" if file_bytes else "-",
                     f"{maps['masked_auc']:.2f}" if maps else "-",
                     f"{maps['spearman']:.3f}" if maps else "-"]  # fmt: skip
            lines.append(f"{name:24}{cells[0]:>13}{cells[1]:>9}{cells[2]:>9}{cells[3]:>12}{cells[4]:>12}")
        lines.append("cold start: of a fresh process, to its first prediction; float maps: rank correlation")
    for reason, names in missing_by_reason(last).items():
        lines += _wrapped(f"not compared: {', '.join(names)}", "")
        # What to do, behind the semicolon, gets a line of its own: it is copied.
        for part in reason.split("; "):
            lines += _wrapped(part, "  ")
    return "\n".join([*lines, describe(last["environment"])])


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, 80, initial_indent=indent, subsequent_indent=f"{indent}  ",
                         break_long_words=False, break_on_hyphens=False)  # fmt: skip


if __name__ == "__main__":
    command.run(main)
