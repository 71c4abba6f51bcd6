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
from bench.statistics import SETTLE_MS, check_seconds, measure, summarize
from export.deploy_form import deploy_form
from export.onnx import export
from runtime import command
from runtime.classifier import Classifier
from runtime.errors import OptionError
from runtime.files import check_writable
from runtime.manifest import INPUT_NAME, TARGET_NAME
from train import checkpoint as checkpoints
from train.checkpoint import Checkpoint

EXAMPLES = """
  python -m bench.compare runs/cifar10-resnet20-8bit-sgt/ckpt.pt
  python -m bench.compare ckpt.pt --batch 32 --threads 2
  python -m bench.compare ckpt.pt --explain                   # class and map, against Captum and autograd
  python -m bench.compare ckpt.pt --record bench/results/latency.jsonl
"""

# Until the threads of the contender before have stopped spinning, mostly: see bench.statistics.measure.
_REST_MS = 100.0

OURS = "OpenVINO INT8"
OURS_WITH_MAP = "OpenVINO INT8 + map"


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


def explainers(checkpoint: Checkpoint, images: np.ndarray, *, threads: int) -> dict[str, Callable[[], object]]:
    """Return name -> function that gives logits and the input gradient of the predicted class.

    The opponents run the float network on images that are normalized already, which is less work than ours do; the
    class alone, INT8 on OpenVINO, is there to compare with.

    Raises:
        OptionError: Captum is not installed.
    """
    try:
        from captum.attr import Saliency
    except ImportError:
        raise OptionError("--explain compares with Captum; pip install 'clearpact[peers]'") from None
    network = deploy_form(checkpoint.network(), checkpoint.input, int8=False).network
    x = checkpoint.input.normalize(torch.from_numpy(images).permute(0, 3, 1, 2)).contiguous()
    saliency = Saliency(network)

    def with_captum() -> object:
        with torch.no_grad():
            target = network(x).argmax(1)
        return saliency.attribute(x.requires_grad_(), target)

    def autograd(model: Callable[[torch.Tensor], torch.Tensor]) -> object:
        leaf = x.detach().requires_grad_()
        logits = model(leaf)
        return logits, torch.autograd.grad(logits.amax(1).sum(), leaf)

    compiled = torch.compile(network)
    calls: dict[str, Callable[[], object]] = {
        "Captum Saliency": with_captum,
        "PyTorch autograd": functools.partial(autograd, network),
        "torch.compile autograd": functools.partial(autograd, compiled),
    }
    inputs: dict[str, np.ndarray] = {INPUT_NAME: images, TARGET_NAME: np.full(len(images), -1, np.int64)}
    for name, engine, int8, precision in (
        ("ONNX Runtime FP32 + map", "ort", False, "float32"),
        ("OpenVINO FP32 + map", "openvino", False, "float32"),
        ("ONNX Runtime INT8 + map", "ort", True, "float32"),
        ("OpenVINO INT8 + f32 map", "openvino", True, "float32"),
        (OURS_WITH_MAP, "openvino", True, "auto"),
    ):
        exported = export(checkpoint, int8=int8, target=engine, saliency_precision=precision)
        model = exported.model.SerializeToString()
        session = Classifier(model, engine=engine, threads=threads).session
        calls[name] = functools.partial(session.run, inputs, ("logits", "saliency"))
    calls[OURS] = functools.partial(session.run, {INPUT_NAME: images})
    return calls


def main(argv: Sequence[str] | None = None) -> None:
    """Print the latency of every contender and its ratio to INT8 on OpenVINO."""
    parser = command.parser("bench.compare", "Compare engines on one checkpoint, in turns in one run.", EXAMPLES)
    parser.add_argument("checkpoint", help="quantized ckpt.pt written by python -m train")
    parser.add_argument("--batch", type=int, default=1, help="images at a time (default: 1)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of one inference (default: 1)")
    parser.add_argument("--seconds", type=float, default=5.0, help="per contender (default: 5)")
    parser.add_argument(
        "--explain", action="store_true", help="class and saliency map, against Captum and autograd"
    )
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
    calls = (explainers if options.explain else contenders)(checkpoint, images, threads=options.threads)
    ours = OURS_WITH_MAP if options.explain else OURS
    samples = measure(calls, seconds=options.seconds, rest_ms=_REST_MS if options.threads > 1 else 0.0)
    rows = {name: summarize(times, options.batch) for name, times in samples.items()}
    ratios = {name: float(np.median(times / samples[ours])) for name, times in samples.items()}
    where = environment()
    result = {
        "bench": "compare-explain" if options.explain else "compare",
        "arch": checkpoint.arch["name"],
        "bits": checkpoint.quant.bits,
        "input": list(shape),
        "threads": options.threads,
        "settle_ms": SETTLE_MS,
        "latency": {name: asdict(row) for name, row in rows.items()},
        f"ratio_to_{ours}": ratios,
        "environment": where,
    }
    if options.record:
        append(options.record, result)
    if options.json:
        print(json.dumps(result))
        return
    print(f"{options.checkpoint}  {checkpoint.arch['name']}, input {list(shape)}, threads {options.threads}, "
          f"{len(samples[ours]):,} rounds in turns")  # fmt: skip
    print(f"{'':24}   p50 ms   p90 ms   p99 ms     ± ms  images/s   ratio")
    for name, row in rows.items():
        print(f"{name:24}{row.p50_ms:9.3f}{row.p90_ms:9.3f}{row.p99_ms:9.3f}{row.std_ms:9.3f}"
              f"{row.images_per_second:10,.0f}{ratios[name]:8.2f}")  # fmt: skip
    print(f"ratio: median over rounds of its time / {ours}'s in the same round")
    print(describe(where))


if __name__ == "__main__":
    command.run(main)
