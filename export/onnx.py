"""`python -m export.onnx`: a checkpoint becomes one ONNX file that takes pixels and gives logits.

The graph holds everything: layout and normalization of the image, BatchNorm folded, learned alpha and scales as
constants, int8 weight codes, Q/DQ placed for one engine, and the manifest.
"""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module: python -m export.onnx")

import contextlib
import functools
import hashlib
import io
import logging
import shutil
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch
from torch import nn

from export import calibration
from export.deploy_form import DeployForm, FoldedQuantizer, deploy_form
from export.gradient.walk import GATES
from export.graph import prune
from export.operators import OPSET, TARGETS, translations
from export.passes.average_exactly import average_exactly
from export.passes.clip_after_pooling import clip_after_pooling
from export.passes.hold_signed_codes import hold_signed_codes
from export.passes.keep_float import keep_float
from export.passes.keep_rounding import keep_rounding
from export.passes.layer_constants import give_layers_their_constants
from export.passes.move_codes import move_codes
from export.passes.store_float_weights import store_float_weights
from export.passes.take_pixels_as_codes import take_pixels_as_codes
from export.verification.agreement import (
    PRECISIONS,
    Differentiated,
    ExportAgreement,
    differentiate,
    export_agreement,
)
from export.verification.engine_run import EngineRun, run_on_engine
from export.verification.forward import MAX_TIED_SHARE, Verification, verify
from export.verification.gradient import GradientVerification, verify_gradient
from export.verification.probes import CODES_SUFFIX, UNCLIPPED_SUFFIX, probe
from runtime import command
from runtime.errors import ModelError, OptionError
from runtime.files import read_bytes, write_atomically
from runtime.manifest import INPUT_NAME, METADATA_KEY, RESIZES, ImageInput, Manifest, read_manifest
from runtime.onnx_bytes import without_gradient
from runtime.outputs import check_outputs
from train import checkpoint as checkpoints
from train.checkpoint import Checkpoint
from train.data.splits import sources_of
from train.model import QuantizedModel
from train.models import factory
from train.quantization.accumulators import LARGEST_SUM, accumulators, put_biases_on_grid
from train.quantization.quantize import FLOAT_BITS, QuantSpec, describe, warnings_of

NORMALIZED = "normalized"
_NOT_RUN = {"tensorrt": "python -m export.engine builds a plan and checks its layers"}

EXAMPLES = """
  python -m export.onnx runs/mnist-cnn2-8bit-sgt/ckpt.pt --int8
  python -m export.onnx ckpt.pt --int8 --target ort -o model_ort.onnx
  python -m export.onnx ckpt.pt --fp32 -o model_float.onnx
  python -m export.onnx ckpt.pt --int8 --require-agreement 0.9
  python -m export.onnx float.pt --int8 --calibrate --data mnist --qat ckpt.pt    # without training again
"""


@dataclass(frozen=True)
class Exported:
    """A verified file, and what the comparisons found.

    Args:
        data: contents of the file, which is what was verified.
        model: the same as a graph.
        manifest: in the file.
        verification: weights, codes and logits, operator by operator.
        gradients: the same of its gradient; None where it has none.
        engine: the file on its engine; None where that is not installed.
        differentiated: how the gradient was made.
        agreement: its maps beside the float network's.
    """

    data: bytes
    model: onnx.ModelProto
    manifest: Manifest
    verification: Verification
    gradients: GradientVerification | None
    engine: EngineRun | None
    differentiated: Differentiated | None
    agreement: ExportAgreement | None


def export(
    source: QuantizedModel | Checkpoint,
    *,
    int8: bool = True,
    target: str = "openvino",
    saliency: bool = True,
    gate: str = "code",
    saliency_precision: str = "auto",
    required_agreement: float = -1.0,
    resize: str | None = None,
    checkpoint_sha256: str = "",
    status: Callable[[str], None] = lambda text: None,
) -> Exported:
    """Return the ONNX graph of a trained network, verified on the checkpoint's real images.

    Args:
        source: a network of any training loop's, or a checkpoint (`train.checkpoint.load`), which contains one.
        int8: keep the trained integer grids as Q/DQ; False gives a float32 graph, of PACT the clip alone.
        target: engine to lower for, one of export.operators.TARGETS.
        saliency: add the input `target` and the outputs `saliency` and `gradient`; a runtime that asks for
            logits alone does not compute them.
        gate: of the gradient at quantized activations, see `export.gradient.append_input_gradient`.
        saliency_precision: "float32"; "int8": gradients of layers with int8 weights are products of codes, see
            export/gradient/int8.py; "auto": int8 on OpenVINO, unless its maps agree less than 0.99 (mean
            Spearman) with float32's, else float32. (ONNX Runtime multiplies codes only between two grids.)
        required_agreement: smallest mean Spearman correlation of the saliency maps with the float network's.
        resize: what the runtime does with images of another size, one of runtime.manifest.RESIZES; None: what
            the model's facts say: of a checkpoint what training did, "crop" for image folders and "bilinear" else.
        checkpoint_sha256: of the file that the network came from, for the manifest.
        status: told what is being done, step by step.

    Raises:
        OptionError: int8 of a network that was trained in float, or an unknown target.
        ModelError: the graph does not compute what was trained (the text names the tensor that differs), or its
            maps agree less than required.
    """
    trained = source.model() if isinstance(source, Checkpoint) else source
    if int8 and trained.quant.bits == FLOAT_BITS:
        raise OptionError(
            "int8 export of a network trained in float; train it with --bits 8, --calibrate it, or export --fp32"
        )
    if saliency_precision not in PRECISIONS:
        raise OptionError(f"saliency precision {saliency_precision!r}: expected one of {', '.join(PRECISIONS)}")
    if saliency_precision == "int8" and not int8:
        raise OptionError("int8 gradients of a float32 graph: they are products of int8 weights; export --int8")
    if target not in TARGETS:
        raise OptionError(f"target {target!r}: expected one of {', '.join(TARGETS)}")
    if int8 and target == "tensorrt":
        _refuse_for_tensorrt(trained.quant)
    status("exporting ...")
    network = trained.evaluated()
    if int8 and target == "ort" and not trained.quant.bias_grid:
        # Its integer kernels would round them, and compute other codes than those that are verified.
        put_biases_on_grid(network, trained.image_shape)
    overflowing = _overflowing(network, trained, target) if int8 else set()
    form = deploy_form(network, trained.input, int8=int8)
    model = _to_onnx(form, trained, target)
    give_layers_their_constants(model)
    _name_values(model, form)
    if target == "ort":
        store_float_weights(model, overflowing)
    differentiated = agreement = gradients = None
    if saliency_precision == "auto" and not (int8 and target == "openvino"):
        saliency_precision = "float32"
    if saliency:
        status("differentiating ...")
        differentiated = differentiate(model, trained, input=NORMALIZED, gate=gate, precision=saliency_precision)
        model = differentiated.model
    # The exporter's shapes served the gradient; lowered, values have others.
    del model.graph.value_info[:]
    for lower in lowerings(target, int8=int8):
        lower(model)
    prune(model.graph)  # of what lowering left without a reader
    resize = resize or trained.facts.resize
    manifest = _manifest(trained, int8=int8, target=target, resize=resize, sha256=checkpoint_sha256)
    onnx.helper.set_model_props(model, {METADATA_KEY: manifest.to_json()})
    onnx.checker.check_model(model, full_check=True)
    # From here on only these bytes count: they are what is verified, last, and what is written.
    data = model.SerializeToString()
    model = onnx.load_model_from_string(data)
    if read_manifest(data, "exported file") != manifest:
        raise ModelError("manifest: another one is in the file; the export is not exact")
    status("verifying on real images ...")
    # A float graph has no grids to compare: its reference is the deploy form.
    reference = network if int8 else form.network
    class_only = onnx.load_model_from_string(without_gradient(data))
    verification = verify(class_only, form, reference, trained.input, trained.samples)
    engine = run_on_engine(
        data, target, reference, trained.input, trained.samples,
        tied=verification.tied_share > MAX_TIED_SHARE,
    )  # fmt: skip
    if saliency:
        status("comparing maps ...")
        assert differentiated is not None
        gradients = verify_gradient(probe(model, form), reference, trained, gate=gate, int8=differentiated.int8)
        agreement = export_agreement(model, trained)
        if agreement.maps.spearman < required_agreement:
            raise ModelError(
                f"saliency: Spearman {agreement.maps.spearman:.3f} with the float network's maps, expected "
                f"{required_agreement} at least; train with more bits, or require less"
            )
    return Exported(data, model, manifest, verification, gradients, engine, differentiated, agreement)


def lowerings(target: str, *, int8: bool) -> list[Callable[[onnx.ModelProto], None]]:
    """Return what is done to a graph, in place and in this order, for one engine."""
    if target == "openvino" and int8:
        return [average_exactly, keep_rounding]
    if target == "ort" and int8:
        return [
            functools.partial(take_pixels_as_codes, normalized=NORMALIZED),
            clip_after_pooling,
            keep_float,
            move_codes,
            hold_signed_codes,
        ]
    return [move_codes] if target == "ort" else []


def _refuse_for_tensorrt(quant: QuantSpec) -> None:
    """Raise OptionError for a network on grids that TensorRT has no exact or no fast form of."""
    if quant.full_grid:
        raise OptionError(
            "target tensorrt: has signed activations only; a network trained with --full-grid has codes 0..255"
        )
    if quant.addends:
        raise OptionError(
            "target tensorrt: adds in the convolution's kernel, before rounding; a network trained with --addends "
            "rounds what it adds; train it without"
        )


def _overflowing(network: nn.Module, model: QuantizedModel, target: str) -> set[str]:
    """Return the layers that ONNX Runtime must compute in float, since their bias does not fit into its int32.

    Raises:
        ModelError: the products of a layer alone can leave int32, which is where every engine adds them up.
    """
    found = set()
    for call in accumulators(network, model.image_shape):
        if (call.largest > LARGEST_SUM).any():
            raise ModelError(
                f"layer {call.name}: its products of codes can add up to {call.largest.max():.3g}, and engines "
                f"count to {LARGEST_SUM:,}; train it with fewer bits (--bits-file), or pool before it"
            )
        # Where all codes are zero, the deploy form chooses a scale that the bias fits.
        if target == "ort" and (call.overflows & (call.largest > 0)).any():
            found |= {call.name, f"{call.name}_{call.call}"}  # as the deploy form names a layer called twice
    return found


def _to_onnx(form: DeployForm, trained: QuantizedModel, target: str) -> onnx.ModelProto:
    example = trained.samples[:2].permute(0, 2, 3, 1).contiguous()
    if len(example) < 2:
        raise ModelError("samples: fewer than two images, expected more; the file is verified on them")
    with _quiet_exporter():
        program = torch.onnx.export(
            form,
            (example,),
            dynamo=True,
            opset_version=OPSET,
            input_names=[INPUT_NAME],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("N")},),
            custom_translation_table=translations(target),
            verbose=False,
        )
    assert program is not None
    model: onnx.ModelProto = program.model_proto
    return model


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Keep torch's exporter from writing to the terminal what only its authors can act on."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _name_values(model: onnx.ModelProto, form: DeployForm) -> None:
    """Name what later passes and readers look for: the normalized image, and every grid with its codes."""
    names: dict[str, str] = {}
    front = list(model.graph.node[:4])
    if [node.op_type for node in front] not in (["Transpose", "Cast", "Sub", op] for op in ("Mul", "Div")):
        raise ModelError(f"exported graph: starts with {[n.op_type for n in front]}, expected the normalization")
    names[front[-1].output[0]] = NORMALIZED
    # Quantizers stand in the graph in the order of their calls; their values are told apart by what they compute,
    # since the exporter merges equal constants.
    calls = [
        str(node.target)
        for node in form.network.graph.nodes  # type: ignore[union-attr]
        if node.op == "call_module" and isinstance(form.network.get_submodule(str(node.target)), FoldedQuantizer)
    ]
    weights = {t.name for t in model.graph.initializer}
    producer = {name: node for node in model.graph.node for name in node.output}
    dequantized = [n for n in model.graph.node if n.op_type == "DequantizeLinear" and n.input[0] not in weights]
    if len(dequantized) != len(calls) * int(any(m.rounds for m in _folded_quantizers(form))):
        raise ModelError(f"exported graph: {len(dequantized)} activation grids, expected {len(calls)}")
    for node, name in zip(dequantized, calls, strict=False):
        codes = producer[node.input[0]]
        if codes.op_type == "Clip":
            names[codes.input[0]] = f"{name}{UNCLIPPED_SUFFIX}"
        names[node.input[0]] = f"{name}{CODES_SUFFIX}"
        names[node.output[0]] = name
    for node in model.graph.node:
        node.input[:] = [names.get(v, v) for v in node.input]
        node.output[:] = [names.get(v, v) for v in node.output]
    for value in model.graph.value_info:
        value.name = names.get(value.name, value.name)
    # The exporter's notes are stack traces with the paths of this machine.
    del model.graph.metadata_props[:]
    for part in (*model.graph.node, *model.graph.initializer, *model.graph.value_info, *model.graph.input,
                 *model.graph.output):  # fmt: skip
        del part.metadata_props[:]
        part.doc_string = ""


def _folded_quantizers(form: DeployForm) -> list[FoldedQuantizer]:
    return [m for m in form.network.modules() if isinstance(m, FoldedQuantizer)]


def _manifest(model: QuantizedModel, *, int8: bool, target: str, resize: str, sha256: str) -> Manifest:
    image = model.input
    layers = [
        {
            "name": row.name,
            "kind": row.kind,
            "bits": row.bits if int8 else None,
            "input": row.activation if int8 else None,
        }
        for row in describe(model.network)
        if "folded" not in row.reason
    ]
    return Manifest(
        arch=model.facts.arch,
        precision="int8" if int8 else "fp32",
        target=target,
        input=ImageInput(image.size, image.channels, image.mean, image.std, resize),
        classes=model.classes,
        layers=tuple(layers),
        metrics=dict(model.facts.metrics),
        data=model.facts.data,
        checkpoint=sha256,
        versions={"torch": str(torch.__version__), "onnx": onnx.__version__},
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Export one checkpoint; a graph that fails its verification is not written."""
    parser = command.parser("export.onnx", "Export a checkpoint to ONNX, verified before it is written.", EXAMPLES)
    parser.add_argument("checkpoint", help="ckpt.pt written by python -m train")
    precision = parser.add_mutually_exclusive_group(required=True)
    precision.add_argument("--int8", action="store_true", help="the trained integer grids, as Q/DQ (8 to 2 bits)")
    precision.add_argument("--fp32", action="store_true", help="float32; of PACT the clip alone")
    parser.add_argument("--target", choices=TARGETS, default="openvino", help="engine (default: openvino)")
    parser.add_argument("--no-saliency", action="store_true", help="leave the input gradient out: class only")
    parser.add_argument("--gate", choices=GATES, default="code",
                        help="where quantized activations pass the gradient (default: code)")  # fmt: skip
    parser.add_argument("--saliency-precision", choices=PRECISIONS, default="auto",
                        help="of gradients (default: auto, int8 on openvino if maps hardly change)")  # fmt: skip
    parser.add_argument("--require-agreement", type=float, default=-1.0, metavar="SPEARMAN",
                        help="refuse a file whose maps agree less with the float network's")  # fmt: skip
    parser.add_argument("-o", "--output", help="file to write (default: the checkpoint's name with .onnx)")
    parser.add_argument("--resize", choices=RESIZES,
                        help="what the runtime does with other sizes (default: as in training)")  # fmt: skip
    factory.add_option(parser)
    calibration.add_options(parser)
    options = parser.parse_args(argv)
    factory.allow(*options.arch)
    if options.no_saliency and options.require_agreement > -1:
        raise OptionError("--require-agreement needs the maps that --no-saliency leaves out; drop one of them")
    if options.calibrate and not options.int8:
        raise OptionError("--calibrate makes integer grids, which --fp32 leaves out; give --int8")
    source = Path(options.checkpoint)
    checkpoint = checkpoints.load(source)
    inputs = [source]
    if options.calibrate:
        output = Path(options.output or source.with_name(f"{source.stem}_ptq.onnx"))
        inputs += [Path(path) for path in (options.qat,) if path]
        inputs += sources_of(options.data or checkpoint.recipe.data, options.data_root)
        check_outputs([output, output.with_suffix(".pt")], inputs=inputs)
        checkpoint = calibration.run(options, checkpoint, command.status)
        source = output.with_suffix(".pt")
        checkpoints.save(checkpoint, source)
        print(f"{source}: the calibrated checkpoint")
    else:
        output = Path(options.output or source.with_suffix(".onnx"))
        check_outputs([output], inputs=inputs)
    sha256 = hashlib.sha256(read_bytes(source)).hexdigest()
    exported = export(
        checkpoint,
        int8=options.int8,
        target=options.target,
        saliency=not options.no_saliency,
        gate=options.gate,
        saliency_precision=options.saliency_precision,
        required_agreement=options.require_agreement,
        resize=options.resize,
        checkpoint_sha256=sha256,
        status=command.status,
    )
    command.status("")
    for layer in exported.manifest.layers:
        form = f"{layer['bits']}-bit codes; input {layer['input']}" if layer["bits"] else "float32"
        print(f"  {layer['name']:20} {layer['kind']:7} {form}")
    for warning in warnings_of(checkpoint.network()) if options.int8 else ():
        print(_wrapped(f"warning: {warning}"))
    if options.int8 and options.target == "ort" and not checkpoint.quant.bias_grid:
        print(_wrapped("note: biases moved to whole steps of their sums, which the network was trained without"))
    print(_wrapped(f"verified: {exported.verification}"))
    not_run = f"not run on {options.target}: {_NOT_RUN.get(options.target, 'it is not installed here')}"
    print(_wrapped(f"verified: {exported.engine or not_run}"))
    for part in filter(None, (exported.gradients, exported.differentiated, exported.agreement)):
        print(_wrapped(f"explains: {part}"))
    write_atomically(output, exported.data)
    gives = "class only" if options.no_saliency else "class and input gradient"
    print(f"{output}: {len(exported.data):,} bytes, {exported.manifest.precision} for {options.target}, {gives}")


def _wrapped(text: str) -> str:
    """Break a line at words where a terminal would break it anywhere; pipes get it whole."""
    columns = shutil.get_terminal_size((10_000, 24)).columns
    return "\n".join(textwrap.wrap(text, columns - 1, subsequent_indent=" " * 10))


if __name__ == "__main__":
    command.run(main)
