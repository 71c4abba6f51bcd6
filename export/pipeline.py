"""A trained network becomes the bytes of an ONNX file: the passes, in their order, and the proof at the end.

fold -> export -> name -> gradient -> lower for the target -> manifest -> verify the final bytes. The graph holds
everything: layout and normalization of the image, BatchNorm folded, learned alpha and scales as constants, int8
weight codes, Q/DQ placed for one engine, and the manifest.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import onnx
import torch
from torch import nn

from export.choices import SALIENCY_PRECISIONS, TARGETS
from export.deploy_form import deploy_form
from export.from_torch import to_onnx
from export.gradient.cam import find_cams
from export.gradient.joining import NORMALIZED
from export.gradient.walk import OUTPUTS
from export.graph import prune
from export.passes.average_exactly import average_exactly
from export.passes.clip_after_pooling import clip_after_pooling
from export.passes.hold_signed_codes import hold_signed_codes
from export.passes.keep_float import keep_float
from export.passes.keep_input import keep_input
from export.passes.keep_rounding import keep_rounding
from export.passes.move_codes import move_codes
from export.passes.own_constants import own_constants
from export.passes.store_float_weights import store_float_weights
from export.passes.take_pixels_as_codes import take_pixels_as_codes
from export.verification.agreement import ExportAgreement, GradientGraph, differentiate, export_agreement
from export.verification.cams import CamVerification, verify_cams
from export.verification.engine_run import EngineRun, run_on_engine
from export.verification.forward import MAX_TIED_SHARE, Verification, verify
from export.verification.gradient import GradientVerification, verify_gradient
from export.verification.last_layer import code_step
from export.verification.probes import probe
from runtime.errors import ModelError, OptionError
from runtime.manifest import METADATA_KEY, ImageInput, Manifest, read_manifest
from runtime.onnx_bytes import without_gradient
from runtime.session import ENGINES
from train.checkpoint import Checkpoint
from train.choices import FLOAT_BITS
from train.model import QuantizedModel
from train.quantization.accumulators import LARGEST_SUM, accumulators, put_biases_on_grid
from train.quantization.description import describe
from train.quantization.spec import QuantSpec


@dataclass(frozen=True)
class ExportResult:
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
        cams: its maps of layers, beside autograd's, and their prices.
    """

    data: bytes
    model: onnx.ModelProto
    manifest: Manifest
    verification: Verification
    gradients: GradientVerification | None
    engine: EngineRun | None
    differentiated: GradientGraph | None
    agreement: ExportAgreement | None
    cams: tuple[CamVerification, ...] = ()


def export(
    source: QuantizedModel | Checkpoint,
    *,
    int8: bool = True,
    target: str = "openvino",
    saliency: bool = True,
    cams: Sequence[tuple[str, str]] = (),
    gate: str = "code",
    saliency_precision: str = "auto",
    required_agreement: float = -1.0,
    resize: str | None = None,
    float_layout: str = "",
    checkpoint_sha256: str = "",
    status: Callable[[str], None] = lambda text: None,
) -> ExportResult:
    """Return the ONNX graph of a trained network, verified on the checkpoint's real images.

    Args:
        source: a network of any training loop's, or a checkpoint (`train.checkpoint.load`), which contains one.
        int8: keep the trained integer grids as Q/DQ; False gives a float32 graph in which PACT only clips.
        target: engine to lower for, one of export.operators.TARGETS.
        saliency: add the input `target` and the outputs `saliency` and `gradient`; a runtime that asks for
            logits alone does not compute them.
        cams: class activation maps as pairs of method and layer, see `export.gradient.cam.find_cams`.
        gate: of the gradient at quantized activations, see `export.gradient.append_input_gradient`.
        saliency_precision: "float32"; "int8": gradients of layers with int8 weights are products of codes, see
            export/gradient/int8.py; "auto": int8 on OpenVINO, unless its maps agree less than 0.99 (mean
            Spearman) with float32's, else float32. (ONNX Runtime multiplies codes only between two grids.)
        required_agreement: smallest mean Spearman correlation of the saliency maps with the float network's.
        resize: what the runtime does with images of another size, one of runtime.manifest.RESIZES; None: what
            the model's facts say: of a checkpoint what training did, "crop" for image folders and "bilinear" else.
        float_layout: "NCHW" or "NHWC": the file takes normalized floats in this layout, see
            runtime/float_input.py; "": pixels.
        checkpoint_sha256: of the file that the network came from, for the manifest.
        status: told what is being done, step by step.

    Raises:
        OptionError: int8 of a network that was trained in float, or an unknown target.
        ModelError: the graph does not compute what was trained (the text names the tensor that differs), or its
            maps agree less than required.
    """
    quant = source.quant
    if int8 and quant.bits == FLOAT_BITS:
        raise OptionError(
            "int8 export of a network trained in float; train it with --bits 8, --calibrate it, or export --fp32"
        )
    if saliency_precision not in SALIENCY_PRECISIONS:
        raise OptionError(
            f"saliency precision {saliency_precision!r}: expected one of {', '.join(SALIENCY_PRECISIONS)}"
        )
    if saliency_precision == "int8" and not int8:
        raise OptionError("int8 gradients of a float32 graph: they are products of int8 weights; export --int8")
    if target not in TARGETS:
        raise OptionError(f"target {target!r}: expected one of {', '.join(TARGETS)}")
    if float_layout and target not in ENGINES:
        raise OptionError(
            f"--keep-input: a plan of {target} takes pixels; drop it, or export for {' or '.join(ENGINES)}"
        )
    if int8 and target == "tensorrt":
        _refuse_for_tensorrt(quant)
    status("exporting ...")
    trained = source.model() if isinstance(source, Checkpoint) else source
    network = trained.evaluated()
    if int8 and target == "ort" and not quant.bias_grid:
        # Its integer kernels would round them, and compute other codes than those that are verified.
        put_biases_on_grid(network, trained.image_shape)
    overflowing = _overflowing(network, trained, target) if int8 else set()
    form = deploy_form(network, trained.input, int8=int8)
    model = to_onnx(form, trained, target)
    if target == "ort":
        store_float_weights(model, overflowing)
    differentiated = agreement = gradients = None
    maps = find_cams(model, cams)
    verified_maps: tuple[CamVerification, ...] = ()
    if saliency_precision == "auto" and not (int8 and target == "openvino"):
        saliency_precision = "float32"
    if saliency or maps:
        status("differentiating ...")
        differentiated = differentiate(
            model, trained, input=NORMALIZED, gate=gate, precision=saliency_precision,
            outputs=OUTPUTS if saliency else (), cams=maps,
        )  # fmt: skip
        model = onnx.ModelProto()
        model.CopyFrom(differentiated.model)
    # The exporter's shapes served the gradient; lowered, values have others.
    del model.graph.value_info[:]
    if float_layout:
        keep_input(model, normalized=NORMALIZED, layout=float_layout)
    for lower in lowerings(target, int8=int8, takes_pixels=not float_layout):
        lower(model)
    prune(model.graph)  # of what lowering left without a reader
    resize = resize or trained.facts.resize
    manifest = _manifest(trained, int8=int8, target=target, resize=resize, sha256=checkpoint_sha256)
    manifest = replace(
        manifest, cams=tuple(cam.output for cam in maps), logit_step=code_step(form), float_layout=float_layout
    )
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
    if differentiated is not None:
        status("comparing maps ...")
        probed = probe(model, form)
        verified_maps = verify_cams(
            probed, data, reference, trained, maps, differentiated.model,
            target=target, gate=gate, int8=differentiated.int8,
        ) if maps else ()  # fmt: skip
    if saliency:
        assert differentiated is not None
        gradients = verify_gradient(probed, reference, trained, gate=gate, int8=differentiated.int8)
        agreement = export_agreement(model, trained)
        if agreement.maps.spearman < required_agreement:
            raise ModelError(
                f"saliency: Spearman {agreement.maps.spearman:.3f} with the float network's maps, expected "
                f"{required_agreement} at least; train with more bits, or require less"
            )
    return ExportResult(
        data, model, manifest, verification, gradients, engine, differentiated, agreement, verified_maps
    )


def lowerings(target: str, *, int8: bool, takes_pixels: bool = True) -> list[Callable[[onnx.ModelProto], None]]:
    """Return what is done to a graph, in place and in this order, for one engine."""
    if target == "openvino" and int8:
        return [average_exactly, keep_rounding, own_constants]
    if target == "ort" and int8:
        codes = [functools.partial(take_pixels_as_codes, normalized=NORMALIZED)] if takes_pixels else []
        return [*codes, clip_after_pooling, keep_float, move_codes, hold_signed_codes, own_constants]
    return [move_codes] if target == "ort" else []


def _refuse_for_tensorrt(quant: QuantSpec) -> None:
    """Raise OptionError for a network on grids that TensorRT has no exact or no fast form of."""
    if quant.full_range:
        raise OptionError(
            "target tensorrt: has signed activations only, and this network has codes 0..255; train it without "
            "--full-range, or calibrate it for this target"
        )
    if quant.quantize_adds:
        raise OptionError(
            "target tensorrt: adds in the convolution's kernel, before rounding; a network trained with "
            "--quantize-adds rounds what it adds; train it without"
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
