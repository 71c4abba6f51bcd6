"""`python -m export.onnx`: a checkpoint or your own network becomes one ONNX file that takes pixels."""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module: python -m export.onnx")

import argparse
import hashlib
import shutil
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from export import image_options
from export.choices import EXPLAIN_HELP, GATES, SALIENCY_PRECISIONS, TARGETS, explanations
from export.memory import keep_freed_memory
from runtime import command
from runtime.errors import OptionError
from runtime.files import read_bytes, write_atomically
from runtime.manifest import RESIZES, Manifest
from runtime.outputs import check_outputs
from train.choices import CALIBRATION_SAMPLES, FLOAT_BITS, QUANTIZED_BITS, SEARCHES
from train.data.splits import sources_of
from train.models import factory

if TYPE_CHECKING:
    from train.model import QuantizedModel

# What may be exported, and the options that say nothing of it.
_CHECKPOINT, _NETWORK, _ONNX_AS_IT_IS = "a checkpoint", "a network of your own", "an ONNX file without --int8"
_ONNX_TO_QUANTIZE = "an ONNX file"
_NOT_OF = {
    _CHECKPOINT: ("state", "classes", "size", "mean", "std", "pixels"),
    _NETWORK: ("calibrate", "qat", "pixels"),
    _ONNX_TO_QUANTIZE: ("state", "calibrate", "qat"),
    _ONNX_AS_IT_IS: (
        "calibrate",
        "state",
        "qat",
        "bits",
        "search",
        "samples",
        "no_equalize",
        "no_bias_correction",
        "no_learned_rounding",
        "saliency_precision",
    ),
}
_NOT_RUN = {"tensorrt": "python -m export.engine builds a plan and checks its layers"}

EXAMPLES = """
  python -m export.onnx runs/mnist-cnn2-8bit-sgt/ckpt.pt --int8
  python -m export.onnx ckpt.pt --int8 --target ort -o model_ort.onnx
  python -m export.onnx ckpt.pt --fp32 -o model_float.onnx
  python -m export.onnx ckpt.pt --int8 --require-agreement 0.9
  python -m export.onnx ckpt.pt --int8 --validation folder:photos    # honest probabilities, and a reference
  python -m export.onnx ckpt.pt --explain layercam    # a map of the last convolution, nearly free
  python -m export.onnx ckpt.pt --explain gradient,gradcam,layercam:stage2
  python -m export.onnx float.pt --int8 --calibrate --data mnist --qat ckpt.pt    # without training again
  python -m export.onnx my_nets:make --state weights.pt --int8 --data folder:photos    # your own
  python -m export.onnx model.onnx --int8 --data folder:photos --mean 0.485 --std 0.229    # float ONNX, of anyone
  python -m export.onnx model.onnx --pixels 255    # as it is: map and manifest, not quantized
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Export one checkpoint; a graph that fails its verification is not written."""
    parser = command.parser("export.onnx", "Export to ONNX: a checkpoint, or a network of your own.", EXAMPLES)
    parser.add_argument("checkpoint", metavar="SOURCE",
                        help="ckpt.pt, module:factory of your own network, or a .onnx file")  # fmt: skip
    precision = parser.add_mutually_exclusive_group()
    precision.add_argument("--int8", action="store_true",
                           help="the trained integer grids, as Q/DQ (default of a quantized network)")  # fmt: skip
    precision.add_argument("--fp32", action="store_true",
                           help="float32: PACT clips and does not round (default of a float network)")  # fmt: skip
    parser.add_argument("--target", choices=TARGETS, default="openvino", help="engine (default: openvino)")
    parser.add_argument("--explain", metavar="METHODS", default="gradient", help=EXPLAIN_HELP)
    parser.add_argument("--no-saliency", action="store_true", help="leave all maps out: class only")
    parser.add_argument("--gate", choices=GATES, default="code",
                        help="where quantized activations pass the gradient (default: code)")  # fmt: skip
    parser.add_argument("--saliency-precision", choices=SALIENCY_PRECISIONS, default="auto",
                        help="of gradients (default: auto, int8 on openvino if maps hardly change)")  # fmt: skip
    parser.add_argument("--require-agreement", type=float, default=-1.0, metavar="SPEARMAN",
                        help="refuse a file whose maps agree less with the float network's")  # fmt: skip
    parser.add_argument("--validation", metavar="NAME",
                        help="labelled images that give the file the temperature of its probabilities and the "
                             "reference of runtime.Monitor; a data set or folder:PATH")  # fmt: skip
    parser.add_argument("-o", "--output", help="file to write (default: the checkpoint's name with .onnx)")
    parser.add_argument("--resize", choices=RESIZES,
                        help="what the runtime does with other sizes (default: as in training)")  # fmt: skip
    factory.add_option(parser)
    _add_calibration_options(parser)
    options = parser.parse_args(argv)
    factory.allow(*options.arch)
    options.saliency, options.cams = explanations(options.explain, no_saliency=options.no_saliency)
    if not options.saliency and options.require_agreement > -1:
        leaves_out = "--no-saliency" if options.no_saliency else f"--explain {options.explain}"
        raise OptionError(f"--require-agreement needs the maps that {leaves_out} leaves out; drop one of them")
    if options.calibrate and options.fp32:
        raise OptionError("--calibrate makes integer grids, which --fp32 leaves out; give --int8")
    keep_freed_memory()
    # Loaded once the options are known to be right: torch takes seconds.
    from export.pipeline import export
    from train.quantization.description import warnings_of

    kind = _kind(options.checkpoint, quantized=options.int8 or options.bits is not None)
    for name in _NOT_OF[kind]:
        if getattr(options, name) != parser.get_default(name):
            raise OptionError(
                f"--{name.replace('_', '-')}: is not for {kind}, which {options.checkpoint} is; drop it"
            )
    if kind == _ONNX_AS_IT_IS:
        _export_onnx(options)
        return
    options.bits = options.bits or 8
    model, output, sha256, layout = _trained(options) if kind == _CHECKPOINT else _own(options)
    int8 = options.int8 or (model.quant.bits != FLOAT_BITS and not options.fp32)
    exported = export(
        model,
        int8=int8,
        target=options.target,
        saliency=options.saliency,
        cams=options.cams,
        gate=options.gate,
        saliency_precision=options.saliency_precision,
        required_agreement=options.require_agreement,
        resize=options.resize,
        float_layout=layout if options.keep_input else "",
        checkpoint_sha256=sha256,
        status=command.status,
    )
    command.status("")
    for layer in exported.manifest.layers:
        form = f"{layer['bits']}-bit codes; input {layer['input']}" if layer["bits"] else "float32"
        print(f"  {layer['name']:20} {layer['kind']:7} {form}")
    for warning in warnings_of(model.network) if int8 else ():
        print(_wrapped(f"warning: {warning}"))
    if int8 and options.target == "ort" and not model.quant.bias_grid:
        print(_wrapped("note: biases moved to whole steps of their sums, which the network was trained without"))
    print(_wrapped(f"verified: {exported.verification}"))
    not_run = f"not run on {options.target}: {_NOT_RUN.get(options.target, 'it is not installed here')}"
    print(_wrapped(f"verified: {exported.engine or not_run}"))
    by_gradient = (exported.gradients, exported.differentiated, exported.agreement)
    for part in filter(None, (*(by_gradient if exported.gradients else ()), *exported.cams)):
        print(_wrapped(f"explains: {part}"))
    if exported.agreement is not None:
        print(_wrapped(f"explains: {exported.agreement.drift}"))
    data = _validated(exported.data, exported.manifest, options)
    write_atomically(output, data)
    gives = _gives(options)
    print(f"{output}: {len(data):,} bytes, {exported.manifest.precision} for {options.target}, {gives}")


def _validated(data: bytes, manifest: Manifest, options: argparse.Namespace) -> bytes:
    """Return a file with its temperature and its reference, where validation images are named."""
    if options.validation is None:
        return data
    from export.validation import validated

    found = validated(data, manifest, options.validation, options.data_root, command.status)
    command.status("")
    for line in found.lines:
        print(_wrapped(line))
    return found.data


def _gives(options: argparse.Namespace) -> str:
    """Return what a file answers with."""
    gives = ["input gradient"] if options.saliency else []
    gives += dict.fromkeys(method for method, _ in options.cams)
    return f"class and {', '.join(gives)}" if gives else "class only"


def _kind(source: str, *, quantized: bool) -> str:
    """Return what is to be exported, by the form of its name."""
    if Path(source).suffix == ".onnx":
        return _ONNX_TO_QUANTIZE if quantized else _ONNX_AS_IT_IS
    return _NETWORK if factory.is_factory(source) and not Path(source).exists() else _CHECKPOINT


def _trained(options: argparse.Namespace) -> tuple[QuantizedModel, Path, str, str]:
    """Return a checkpoint's network, where its export goes, the checkpoint's sha256, and its image's layout."""
    from export import calibration
    from export.layer_names import check_layers
    from train import checkpoint as checkpoints

    source = Path(options.checkpoint)
    checkpoint = checkpoints.load(source)
    check_layers(checkpoint.network(), (checkpoint.input.channels, *checkpoint.input.size), options.cams)
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
    return checkpoint.model(), output, hashlib.sha256(read_bytes(source)).hexdigest(), "NCHW"


def _own(options: argparse.Namespace) -> tuple[QuantizedModel, Path, str, str]:
    """Return the user's own network, where its export goes, its parameters' sha256, and its image's layout."""
    from export import own_network

    source = Path(options.checkpoint)
    is_onnx = source.suffix == ".onnx"
    name = (
        source.with_name(f"{source.stem}_int8.onnx")
        if is_onnx
        else f"{options.checkpoint.rpartition(':')[2]}.onnx"
    )
    output = Path(options.output or name)
    inputs = [*own_network.inputs_of(options), *([source] if is_onnx else [])]
    check_outputs([output], inputs=[*inputs, *sources_of(options.data, options.data_root)])
    model, layout = own_network.run(options, command.status)
    parameters = options.checkpoint if is_onnx else options.state
    sha256 = hashlib.sha256(read_bytes(parameters)).hexdigest() if parameters else ""
    return model, output, sha256, layout


def _export_onnx(options: argparse.Namespace) -> None:
    """Write anyone's ONNX classifier as a file of ours."""
    from export import own_onnx

    source = Path(options.checkpoint)
    output = Path(options.output or source.with_name(f"{source.stem}_clearpact.onnx"))
    inputs = [source, *(Path(path) for path in (options.classes,) if path)]
    check_outputs([output], inputs=[*inputs, *sources_of(options.data, options.data_root)])
    exported = own_onnx.run(options, command.status)
    for line in exported.lines:
        print(_wrapped(line))
    data = _validated(exported.data, exported.manifest, options)
    write_atomically(output, data)
    gives = _gives(options)
    print(f"{output}: {len(data):,} bytes, {exported.manifest.precision} for {options.target}, {gives}")


def _add_calibration_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("post-training quantization, of a float checkpoint or of your own network")
    group.add_argument("--calibrate", action="store_true", help="quantize a checkpoint; writes a .pt too")
    group.add_argument("--data", metavar="NAME", help="its training images (default: what it was trained on)")
    group.add_argument("--data-root", default="data", help="folder of the data sets' files (default: data)")
    group.add_argument("--samples", type=int, default=CALIBRATION_SAMPLES, help="images (default: %(default)d)")
    group.add_argument("--bits", type=int, choices=QUANTIZED_BITS, help="default: 8")
    group.add_argument("--search", choices=SEARCHES, default="best", help="of alpha (default: best)")
    group.add_argument("--no-equalize", action="store_true", help="leave ranges of channels as they are")
    group.add_argument("--no-learned-rounding", action="store_true",
                       help="round weights below 8 bits to the nearest")  # fmt: skip
    group.add_argument("--no-bias-correction", action="store_true", help="leave biases as they are")
    own = parser.add_argument_group("your own network, PyTorch or ONNX; ONNX without --int8 is taken as it is")
    own.add_argument("--state", metavar="FILE", help="its state dict, from torch.save; nothing in the file is run")
    own.add_argument("--classes", metavar="FILE", help="names of the classes, one a line (default: the folders')")
    image_options.add_options(own)
    own.add_argument("--keep-input", action="store_true",
                     help="the file takes normalized floats, as the network did; the runtime makes "
                          "them of pixels")  # fmt: skip
    group.add_argument("--qat", metavar="CKPT", help="report the accuracy of this trained one beside it")


def _wrapped(text: str) -> str:
    """Break a line at words where a terminal would break it anywhere; pipes get it whole."""
    columns = shutil.get_terminal_size((10_000, 24)).columns
    return "\n".join(textwrap.wrap(text, columns - 1, subsequent_indent=" " * 10))


if __name__ == "__main__":
    command.run(main)
