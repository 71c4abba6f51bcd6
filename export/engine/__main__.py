"""`python -m export.engine`: an ONNX file, or a checkpoint, becomes a TensorRT plan and its sidecar.

The graph is lowered (export/engine/lowering.py), NVIDIA's parser and builder make the plan
(export/engine/builder.py), and `--autotune` measures which precision to keep (export/engine/autotune.py).
"""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module: python -m export.engine")

import argparse
import hashlib
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import numpy as np

from export.choices import EXPLAIN_HELP, explanations
from export.engine import autotune
from export.engine.builder import BuildOptions, BuildResult, build, check_options, load_bindings, parse
from export.engine.gpu import GPU, find_gpu
from export.engine.layers import PLAN_PRECISIONS
from export.engine.lowering import ISLANDS, LoweredGraph, lower
from runtime import command
from runtime.engines.tensorrt.plan import BUILDERS, HARDWARE, PlanSidecar, sidecar_path, this_platform
from runtime.errors import EngineError, ModelError, OptionError
from runtime.files import read_bytes, write_atomically
from runtime.manifest import read_manifest
from runtime.onnx_bytes import output_names, without_gradient
from runtime.outputs import check_outputs
from train.models import factory

_MEBIBYTE = 1 << 20
_CHECKPOINT = b"PK\x03\x04"  # how a file of torch.save begins
_NO_GPU = GPU(name="", compute_capability="", driver="")

EXAMPLES = """
  python -m export.engine ckpt.onnx -o engine.plan --batch 1,8,32
  python -m export.engine ckpt.pt -o engine.plan                 # exports engine.plan.onnx first
  python -m export.engine ckpt.onnx --dry-run                    # what each layer computes in; writes nothing
  python -m export.engine ckpt.onnx --builder tensorrt_rtx       # ahead of time, without a GPU
  python -m export.engine ckpt.onnx --dla-core 0 --no-saliency   # a Jetson's accelerator, class only
  python -m export.engine ckpt.pt --autotune                     # keep the fastest precision on this GPU
"""


@dataclass(frozen=True)
class Source:
    """What a plan is built from.

    Args:
        name: of the ONNX file, for messages.
        onnx: its contents.
        samples: uint8 images [N, H, W, C] and labels [N] of the checkpoint, None where there is none.
    """

    name: str
    onnx: bytes
    samples: tuple[np.ndarray, np.ndarray] | None


@dataclass(frozen=True)
class Plan:
    """A plan, the graph it was built from and its sidecar."""

    lowered: LoweredGraph
    built: BuildResult
    sidecar: PlanSidecar


def main(argv: Sequence[str] | None = None) -> None:
    """Build a plan; nothing is written where the graph, the parser or the builder fails."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = _parser().parse_args(arguments)
    factory.allow(*options.arch)
    build_options = _build_options(options)
    options.saliency, options.cams = explanations(options.explain, no_saliency=options.no_saliency)
    output = Path(options.output or Path(options.model).with_suffix(".plan"))
    cache = Path(options.timing_cache or output.with_name(f"{output.name}.cache"))
    contents = read_bytes(options.model)
    if options.explain != "gradient" and not contents.startswith(_CHECKPOINT):
        raise OptionError(
            f"--explain {options.explain}: {options.model} has the maps it was exported with; give the checkpoint"
        )
    if options.autotune and not contents.startswith(_CHECKPOINT):
        raise OptionError(f"--autotune: {options.model} holds no labelled samples; give the checkpoint instead")
    if not options.dry_run:
        trt, builder = load_bindings(options.builder)
        check_options(builder, build_options)
        graph = output.with_name(f"{output.name}.onnx") if contents.startswith(_CHECKPOINT) else None
        check_outputs([output, sidecar_path(output), cache, graph], inputs=[options.model])
        gpu = find_gpu() if builder == "tensorrt" or options.autotune else _NO_GPU
    source = _source(options, contents, output)
    manifest = read_manifest(source.onnx, source.name)
    if manifest.float_layout:
        raise ModelError(f"{source.name}: takes normalized floats; export it without --keep-input")
    precisions = PLAN_PRECISIONS if options.autotune else (options.precision,)
    graphs = {
        name: lower(source.onnx, source.name, precision=name, islands=options.islands) for name in precisions
    }
    if options.dry_run:
        for lowered in graphs.values():
            _dry_run(options.builder, lowered, source.name)
        return
    template = PlanSidecar(
        manifest=manifest,
        onnx_sha256=hashlib.sha256(source.onnx).hexdigest(),
        plan_sha256="",
        builder=builder,
        builder_version=trt.__version__,
        version_compatible=build_options.version_compatible,
        compute_capability=gpu.compute_capability if builder == "tensorrt" else "",
        hardware=build_options.hardware,
        device=gpu.name,
        driver=gpu.driver,
        platform=this_platform(),
        dla_core=build_options.dla_core,
        batch=build_options.batch,
        rebuild=f"python -m export.engine {shlex.join(arguments)}",
    )
    known = read_bytes(cache) if cache.exists() else b""
    plans: dict[str, Plan] = {}
    for name, lowered in graphs.items():
        plans[name] = _plan(trt, lowered, source.name, build_options, known, template)
        known = plans[name].built.timing_cache
    plan = plans[_autotuned(plans, source, options) if options.autotune else options.precision]
    _report(plan)
    if known:
        write_atomically(cache, known)
    write_atomically(output, plan.built.plan)
    # Last: a plan without its sidecar is not a whole one.
    write_atomically(sidecar_path(output), plan.sidecar.to_json())
    gives = ", ".join(output_names(plan.lowered.onnx))
    print(f"{output}: {len(plan.built.plan):,} bytes, {plan.sidecar.label}, batch {options.batch}, gives {gives}")


def _parser() -> argparse.ArgumentParser:
    parser = command.parser("export.engine", "Build a TensorRT plan from an exported model.", EXAMPLES)
    add = parser.add_argument
    add("model", help="ONNX file of python -m export.onnx --target tensorrt, or a checkpoint")
    add("-o", "--output", help="plan to write (default: the model's name with .plan)")
    add("--batch", default="1", help="batch size, or smallest, most frequent and largest: 1,8,32 (default: 1)")
    add("--precision", choices=PLAN_PRECISIONS, default="mixed",
        help="INT8 where it is faster, wherever the file has it, or in no layer (default: mixed)")  # fmt: skip
    add("--islands", choices=ISLANDS, default="fp16", help="type of what is not INT8 (default: fp16)")
    add("--explain", metavar="METHODS", default="gradient", help=f"of a checkpoint: {EXPLAIN_HELP}")
    add("--no-saliency", action="store_true", help="leave all maps out: a plan computes all it gives")
    add("--builder", choices=("auto", *BUILDERS), default="auto",
        help="tensorrt, for this GPU; tensorrt_rtx, ahead of time (default: the first installed)")  # fmt: skip
    add("--workspace", type=int, metavar="MIB", help="most memory of one kernel (default: left to the builder)")
    add("--level", type=int, default=3, help="effort of the builder, 0 to 5 (default: 3)")
    add("--version-compatible", action="store_true", help="run on later releases of TensorRT, too")
    add("--hardware", choices=HARDWARE, default=HARDWARE[0], help="GPUs the plan runs on (default: same)")
    add("--dla-core", type=int, metavar="N", help="run on a Jetson's DLA, with the GPU for what it cannot compute")
    add("--timing-cache", metavar="FILE", help="reused by the next build (default: PLAN.cache)")
    add("--dry-run", action="store_true", help="check, choose and parse; build and write nothing")
    add("--autotune", action="store_true", help="build all precisions, measure them here, keep the fastest")
    factory.add_option(parser)
    add("--max-accuracy-drop", type=float, default=0.5, metavar="POINTS",
        help="of --autotune, below the exported graph (default: 0.5)")  # fmt: skip
    add("--min-agreement", type=float, default=0.95, metavar="SPEARMAN",
        help="of --autotune, of the maps with the exported graph's (default: 0.95)")  # fmt: skip
    return parser


def _build_options(options: argparse.Namespace) -> BuildOptions:
    try:
        sizes = [int(size) for size in options.batch.split(",")]
    except ValueError:
        sizes = []
    if len(sizes) == 1:
        sizes *= 3
    if len(sizes) != 3 or sizes != sorted(sizes) or sizes[0] < 1:
        raise OptionError(
            f"--batch {options.batch}: expected one whole number from 1, or three rising ones: 1,8,32"
        )
    if options.workspace is not None and options.workspace < 1:
        raise OptionError(f"--workspace {options.workspace}: expected MiB from 1")
    return BuildOptions(
        batch=(sizes[0], sizes[1], sizes[2]),
        workspace_bytes=None if options.workspace is None else options.workspace * _MEBIBYTE,
        level=options.level,
        version_compatible=options.version_compatible,
        hardware=options.hardware,
        dla_core=options.dla_core,
    )


def _source(options: argparse.Namespace, contents: bytes, output: Path) -> Source:
    """Return the ONNX file that was given, or that of the checkpoint that was."""
    if not contents.startswith(_CHECKPOINT):
        model = without_gradient(contents) if options.no_saliency else contents
        return Source(str(options.model), model, None)
    try:
        from export.pipeline import export
        from train import checkpoint as checkpoints
        from train.choices import FLOAT_BITS
    except ImportError as error:
        raise EngineError(
            f"{options.model}: a checkpoint needs torch ({error}); pip install 'clearpact[export]', or give the "
            "ONNX file that was exported elsewhere"
        ) from None
    checkpoint = checkpoints.load(options.model)
    exported = export(
        checkpoint,
        int8=checkpoint.quant.bits != FLOAT_BITS,
        target="tensorrt",
        saliency=options.saliency,
        cams=options.cams,
        checkpoint_sha256=hashlib.sha256(contents).hexdigest(),
        status=command.status,
    )
    command.status("")
    model, path = exported.model.SerializeToString(), output.with_name(f"{output.name}.onnx")
    if not options.dry_run:
        write_atomically(path, model)
    images = checkpoint.samples["images"].permute(0, 2, 3, 1).contiguous().numpy()
    return Source(str(path), model, (images, checkpoint.samples["labels"].numpy()))


def _dry_run(builder: str, lowered: LoweredGraph, source: str) -> None:
    _print_layers(lowered)
    try:
        trt, name = load_bindings(builder)
    except EngineError as error:
        print(f"not parsed: {error}")
        return
    for warning in parse(trt, lowered.onnx, source):
        print(f"warning: {warning}")
    print(f"{source}: parsed by {BUILDERS[name]} {trt.__version__}; nothing was built or written")


def _plan(
    trt: ModuleType, lowered: LoweredGraph, source: str, options: BuildOptions, cache: bytes, template: PlanSidecar
) -> Plan:
    command.status("building ...")
    built = build(trt, template.builder, lowered.onnx, source, options, cache)
    command.status("")
    sidecar = replace(
        template, plan_sha256=hashlib.sha256(built.plan).hexdigest(), int8_layers=lowered.int8_layers
    )
    return Plan(lowered, built, sidecar)


def _autotuned(plans: dict[str, Plan], source: Source, options: argparse.Namespace) -> str:
    """Measure every plan on the samples, print the table and return the precision to keep."""
    assert source.samples is not None
    images, labels = source.samples
    expected = autotune.expected_outputs(source.onnx, images, labels)
    measured = {
        name: autotune.measure_plan(plan.built.plan, plan.sidecar, images, labels, expected)
        for name, plan in plans.items()
    }
    budget = autotune.Budget(options.max_accuracy_drop, options.min_agreement)
    accuracy = autotune.accuracy(expected, labels)
    chosen = autotune.choose(measured, accuracy, budget)
    print(f"{len(images)} samples; the exported graph: {accuracy:.2f} %; batch {plans[chosen].sidecar.batch[1]}")
    print(autotune.table(measured, accuracy, budget, chosen))
    return chosen


def _report(plan: Plan) -> None:
    """Print what each layer computes in, and what of it the builder did otherwise."""
    _print_layers(plan.lowered)
    for warning in plan.built.warnings:
        print(f"warning: {warning}")
    products = plan.built.products
    if products is None:
        return
    for name in plan.lowered.int8_layers:
        if "Int8" not in products.get(name, ()):
            print(f"warning: {name}: meant for INT8, but the builder computes it otherwise")


def _print_layers(lowered: LoweredGraph) -> None:
    for layer in lowered.layers:
        print(f"  {layer}")
    counts = Counter(layer.precision for layer in lowered.layers)
    print(f"{', '.join(f'{count} layers in {name}' for name, count in counts.items())}")


if __name__ == "__main__":
    command.run(main)
