"""`python -m bench.compare`: one checkpoint on several engines, measured in turns in one process.

The contenders get the same pixels and give logits: PyTorch eager and ONNX Runtime in float32, and the INT8 exports
on OpenVINO and ONNX Runtime.
"""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module: python -m bench.compare")

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict

import numpy as np
import torch

from bench.environment import describe, environment
from bench.record import append
from bench.statistics import check_seconds, measure, summarize
from export.deploy_form import deploy_form
from export.onnx import export
from runtime import command
from runtime.classifier import Classifier
from runtime.errors import OptionError
from runtime.files import check_writable
from runtime.manifest import INPUT_NAME
from train import checkpoint as checkpoints
from train.checkpoint import Checkpoint

EXAMPLES = """
  python -m bench.compare runs/cifar10-resnet20-8bit-sgt/ckpt.pt
  python -m bench.compare ckpt.pt --batch 32 --threads 2
  python -m bench.compare ckpt.pt --record bench/results/latency.jsonl
"""

OURS = "OpenVINO INT8"


def contenders(checkpoint: Checkpoint, images: np.ndarray, *, threads: int) -> dict[str, Callable[[], object]]:
    """Return name -> function that classifies `images` uint8 [N, H, W, C] to logits [N, K]."""
    float_form = deploy_form(checkpoint.network(), checkpoint.input, int8=False)
    pixels = torch.from_numpy(images)

    def eager() -> object:
        with torch.inference_mode():
            return float_form(pixels).numpy()

    calls: dict[str, Callable[[], object]] = {"PyTorch FP32": eager}
    for name, engine, target, int8 in (
        ("ONNX Runtime FP32", "ort", "ort", False),
        ("OpenVINO FP32", "openvino", "openvino", False),
        ("ONNX Runtime INT8", "ort", "ort", True),
        (OURS, "openvino", "openvino", True),
    ):
        model = export(checkpoint, int8=int8, target=target, saliency=False).model.SerializeToString()
        session = Classifier(model, engine=engine, threads=threads).session
        calls[name] = functools.partial(session.run, {INPUT_NAME: images})
    return calls


def main(argv: Sequence[str] | None = None) -> None:
    """Print the latency of every contender and its ratio to INT8 on OpenVINO."""
    parser = command.parser("bench.compare", "Compare engines on one checkpoint, in turns in one run.", EXAMPLES)
    parser.add_argument("checkpoint", help="quantized ckpt.pt written by python -m train")
    parser.add_argument("--batch", type=int, default=1, help="images at a time (default: 1)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of one inference (default: 1)")
    parser.add_argument("--seconds", type=float, default=5.0, help="per contender (default: 5)")
    parser.add_argument("--record", metavar="FILE", help="append the result to a .jsonl file")
    parser.add_argument("--json", action="store_true", help="one JSON line, with the environment")
    options = parser.parse_args(argv)
    if options.batch < 1 or options.threads < 1:
        raise OptionError(f"--batch {options.batch} --threads {options.threads}: expected whole numbers from 1")
    check_seconds(options.seconds)
    if options.record:
        check_writable(options.record)
    checkpoint = checkpoints.load(options.checkpoint)
    torch.set_num_threads(options.threads)
    shape = (options.batch, *checkpoint.input.size, checkpoint.input.channels)
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    samples = measure(contenders(checkpoint, images, threads=options.threads), seconds=options.seconds)
    rows = {name: summarize(times, options.batch) for name, times in samples.items()}
    ratios = {name: float(np.median(times / samples[OURS])) for name, times in samples.items()}
    where = environment()
    result = {
        "bench": "compare",
        "arch": checkpoint.arch["name"],
        "bits": checkpoint.quant.bits,
        "input": list(shape),
        "threads": options.threads,
        "latency": {name: asdict(row) for name, row in rows.items()},
        "ratio_to_openvino_int8": ratios,
        "environment": where,
    }
    if options.record:
        append(options.record, result)
    if options.json:
        print(json.dumps(result))
        return
    print(f"{options.checkpoint}  {checkpoint.arch['name']}, input {list(shape)}, threads {options.threads}, "
          f"{len(samples[OURS]):,} rounds in turns")  # fmt: skip
    print("                     p50 ms   p90 ms   p99 ms     ± ms   images/s   ratio")
    for name, row in rows.items():
        print(f"{name:18}{row.p50_ms:9.3f}{row.p90_ms:9.3f}{row.p99_ms:9.3f}{row.std_ms:9.3f}"
              f"{row.images_per_second:11,.0f}{ratios[name]:8.2f}")  # fmt: skip
    print(f"ratio: median over rounds of its time / {OURS}'s in the same round")
    print(describe(where))


if __name__ == "__main__":
    command.run(main)
