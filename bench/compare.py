"""`python -m bench.compare`: one checkpoint on several engines, measured in turns, in several fresh processes.

The contenders get the same pixels and give logits: the float network on PyTorch, ONNX Runtime and OpenVINO, our
INT8 exports, and what other makers offer (peers/contenders.py); with an NVIDIA GPU, also on CUDA and TensorRT
(peers/gpu_contenders.py).
"""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module: python -m bench.compare")

import tempfile
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.measure import data, record
from bench.measure.environment import describe
from bench.measure.ratios import FEWEST_INSTANCES, read_ratio
from bench.measure.record import missing_by_reason
from bench.measure.statistics import batch_sizes, check_seconds, missing_percentiles, percentile, told
from bench.peers.names import OURS, OURS_WITH_MAP, PTQ
from runtime import command
from runtime.errors import OptionError
from train.data.splits import sources_of
from train.models import factory

EXAMPLES = """
  python -m bench.compare runs/cifar10-resnet20-8bit-sgt/ckpt.pt
  python -m bench.compare ckpt.pt --batch 1,32 --threads 2
  python -m bench.compare ckpt.pt --data cifar10 --data-root data    # accuracy and maps, on the same images
  python -m bench.compare ckpt.pt --data cifar10 --only-ptq --threads 2     # the ratios to NNCF and ONNX Runtime
  python -m bench.compare ckpt.pt --explain                   # class and map, against Captum and autograd
  python -m bench.compare ckpt.pt --record bench/results/latency.jsonl
"""


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
    parser.add_argument("--seconds", type=float, default=5.0, help="per contender, of all instances (default: 5)")
    parser.add_argument("--instances", type=int, default=8,
                        help="fresh processes that measure all contenders; with 5 at least, ratios have intervals "
                        "(default: 8)")  # fmt: skip
    parser.add_argument("--starts", type=int, default=3,
                        help="fresh processes of each, for cold start and memory (default: 3)")  # fmt: skip
    parser.add_argument(
        "--no-peers", action="store_true", help="leave torch.compile, bf16, CUDA and others' PTQ out"
    )
    parser.add_argument("--only-ptq", action="store_true",
                        help="ours beside each engine's own quantization after training, alone")  # fmt: skip
    parser.add_argument(
        "--explain", action="store_true", help="class and saliency map, against Captum and autograd"
    )
    record.add_options(parser)
    factory.add_option(parser)
    options = parser.parse_args(argv)
    import torch  # torch takes seconds to import: --help does without

    from bench.peers.comparison import compared, test_images
    from train import checkpoint as checkpoints

    factory.allow(*options.arch)
    batches = batch_sizes(options.batch)
    if min(options.threads, options.map_images, options.instances) < 1 or options.starts < 0:
        raise OptionError("--threads, --map-images, --instances: expected whole numbers from 1; --starts: from 0")
    if options.explain and options.data:
        raise OptionError("--explain with --data: accuracy is compared without --explain; drop one of them")
    if options.only_ptq and (options.no_peers or options.explain):
        raise OptionError(
            "--only-ptq with --no-peers or --explain: these have no such contenders; drop one of them"
        )
    check_seconds(options.seconds)
    record.check(options, inputs=[options.checkpoint, *sources_of(options.data, options.data_root)])
    checkpoint = checkpoints.load(options.checkpoint)
    test = test_images(options, checkpoint) if options.data else None
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        results = list(compared(options, checkpoint, batches, test, Path(folder)))
    for result in results:
        record.deliver(options, result)
    if not options.json:
        print(_report(options.checkpoint, results))


def _report(checkpoint: str, results: Sequence[Mapping[str, Any]]) -> str:
    last = results[-1]
    ours = OURS if last["bench"] == "compare" else OURS_WITH_MAP
    lines = []
    for result in results:
        rows = result["latency"]
        n, instances = rows[ours]["n"], result["instances"]
        lines += [f"{checkpoint}  {last['arch']}, input {result['input']}, threads {last['threads']}",
                  f"{n:,} rounds in turns, fresh processes: {instances}; each warmed up "
                  f"{result['warm_up_seconds']:g} s",
                  f"{'':24}   p50 ms   p99 ms    ratio   95 % interval"]  # fmt: skip
        for name, row in rows.items():
            by = read_ratio(result[f"ratio_to_{ours}"][name])
            interval = "" if by.low is None else f"{by.low:9.3f} .. {by.high:.3f}"
            lines.append(f"{name:24}{row['p50_ms']:9.3f}{told(percentile(row, 99)):>9}{by.ratio:9.3f}{interval}")
        for name, recorded in result["ratio_to_ptq"].items():
            lines.append(f"{name:24}{read_ratio(recorded).told(3)} times {PTQ[name]}")
        lines += missing_percentiles([n], [99])
    lines += _wrapped(f"ratio: mean over instances of the median over rounds of its time / {ours}'s", "")
    lines += _wrapped(
        "interval: bootstrap over instances, and over the rounds within each"
        if last["instances"] >= FEWEST_INSTANCES
        else f"no interval with --instances {last['instances']}; it needs {FEWEST_INSTANCES}",
        "",
    )
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
