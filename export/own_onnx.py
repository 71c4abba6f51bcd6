"""Anyone's ONNX classifier becomes a file of ours as it is: pixels in, class and map out, with a manifest.

Nothing is quantized. The file's logits are compared with the original's, image by image, in the graph as written
and on the engine.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from export.gradient.cam import find_cams
from export.gradient.joining import NORMALIZED, first_line, write_as_today
from export.gradient.walk import OUTPUTS, append_input_gradient
from export.graph import prune
from export.model_file import input_names, read_model
from export.own_network import LARGEST_DIFFERENCE, difference_of
from export.passes.average_exactly import average_exactly
from export.passes.hold_signed_codes import hold_signed_codes
from export.passes.keep_input import keep_input
from export.passes.keep_rounding import keep_rounding
from export.reference import reference_run
from export.sources.images import real_images
from export.sources.onnx_file import OnnxClassifier, read_classifier, with_pixels
from export.sources.own_input import check_kept, class_names, labelled, onnx_input
from export.sources.q_operators import has_q_operators
from export.verification.cams import CamVerification, run_cams
from runtime.errors import EngineError, ModelError, OptionError
from runtime.explanations.agreement import spearman
from runtime.files import read_bytes
from runtime.manifest import INPUT_NAME, METADATA_KEY, TARGET_NAME, ImageInput, Manifest
from runtime.session import ENGINES, open_session
from train.input_spec import InputSpec

# By so much of the logits' size codes differ of a quantized file that nobody lowered for the engine.
LARGEST_OF_CODES = 0.1
# How an engine is made to compute the codes that a quantized file says; nothing is quantized again.
_LOWERINGS = {"openvino": (average_exactly, keep_rounding), "ort": (hold_signed_codes,)}
_RANDOM_IMAGES = 16
_COMPARED_IMAGES = 64


@dataclass(frozen=True)
class OwnOnnx:
    """The finished file and what is known of it.

    Args:
        data: contents of the file.
        manifest: in the file.
        lines: what the comparisons found.
    """

    data: bytes
    manifest: Manifest
    lines: tuple[str, ...]


def run(options: argparse.Namespace, status: Callable[[str], None]) -> OwnOnnx:
    """Return the file of a classifier that a command line names.

    Raises:
        OptionError: an option does not fit the file.
        FileError: a file or an image cannot be read.
        ModelError: it is no classifier, an operator has no gradient, or the result computes something else.
    """
    path = Path(options.checkpoint)
    if options.target not in ENGINES:
        raise OptionError(f"--target {options.target}: expected one of {', '.join(ENGINES)} for an ONNX file")
    found = read_classifier(path, options.size)
    spec = onnx_input(options, found)
    check_kept(options, found)
    labels = None
    names: tuple[str, ...] = ()
    pixels = np.random.default_rng(0).integers(
        0, 256, (_RANDOM_IMAGES, *spec.size, found.channels), dtype=np.uint8
    )
    if options.data is not None:
        status("reading images ...")
        images = real_images(options.data, options.data_root, spec, 2)
        names = class_names(options.classes, images.classes, found.classes)
        images = labelled(images, names)
        labels = images.labels.numpy() if images.labels is not None else None
        pixels = np.ascontiguousarray(images.test.permute(0, 2, 3, 1).numpy())
    names = names or class_names(options.classes, (), found.classes)
    exported = as_it_is(
        found, spec, names, target=options.target, saliency=options.saliency, cams=options.cams, gate=options.gate,
        arch=path.stem, sha256=hashlib.sha256(read_bytes(path)).hexdigest(), resize=options.resize or "crop",
        kept=options.keep_input,
    )  # fmt: skip
    status("verifying ...")
    original, _ = read_model(path)
    write_as_today(original)
    kind = "real" if options.data is not None else "random"
    lines = compared(original, found, exported, spec, pixels[:_COMPARED_IMAGES], target=options.target, kind=kind)
    if labels is not None:
        logits = _on_engine(exported, options.target, pixels, ("logits",))
        if logits is not None:
            right = 100 * float((logits["logits"].argmax(1) == labels).mean())
            lines.append(f"accuracy on {len(labels):,} images of {options.data}: {right:.2f} %")
    status("")
    return OwnOnnx(exported.data, exported.manifest, tuple(lines))


def as_it_is(
    found: OnnxClassifier,
    input_spec: InputSpec,
    classes: Sequence[str],
    *,
    target: str = "openvino",
    saliency: bool = True,
    cams: Sequence[tuple[str, str]] = (),
    gate: str = "code",
    arch: str = "own",
    sha256: str = "",
    resize: str = "crop",
    kept: bool = False,
) -> OwnOnnx:
    """Return a classifier as a file of ours, not verified: its normalization, its gradient and a manifest added.

    Args:
        found: from `export.sources.onnx_file.read_classifier`.
        input_spec: how pixels become what it takes.
        classes: names, in the order of the logits.
        target: engine that the manifest names.
        saliency: add the input gradient.
        cams: class activation maps as pairs of method and layer, see `export.gradient.cam.find_cams`.
        gate: see `export.gradient.append_input_gradient`.
        arch: the network's name in the manifest.
        sha256: of the file it came from.
        resize: what the runtime does with images of another size, one of runtime.manifest.RESIZES.
        kept: the file takes normalized floats in its own layout, as before; see runtime/float_input.py.

    Raises:
        ModelError: an operator has no gradient, or there is no such layer.
    """
    mean, std = (np.asarray(values, np.float64) for values in (input_spec.mean, input_spec.std))
    model = with_pixels(found, input_spec.size, mean, std)
    if kept:
        keep_input(model, normalized=NORMALIZED, layout=found.layout)
    quantized = any(node.op_type == "DequantizeLinear" for node in model.graph.node)
    maps = find_cams(model, cams)
    if saliency or maps:
        outputs = OUTPUTS if saliency else ()
        model = append_input_gradient(
            model, input=NORMALIZED, logits="logits", outputs=outputs, cams=maps, gate=gate
        )
    for lower in _LOWERINGS[target] if quantized else ():
        lower(model)
    prune(model.graph)  # of what the file had without a reader, and what lowering left so
    image = ImageInput(input_spec.size, input_spec.channels, input_spec.mean, input_spec.std, resize)
    manifest = Manifest(
        arch=arch, precision="int8" if quantized else "fp32", target=target, input=image, classes=tuple(classes),
        checkpoint=sha256, versions={"onnx": onnx.__version__}, cams=tuple(cam.output for cam in maps),
        float_layout=found.layout if kept else "",
    )  # fmt: skip
    onnx.helper.set_model_props(model, {METADATA_KEY: manifest.to_json()})
    onnx.checker.check_model(model, full_check=True)
    return OwnOnnx(model.SerializeToString(), manifest, ())


def compared(
    original: onnx.ModelProto,
    found: OnnxClassifier,
    exported: OwnOnnx,
    input_spec: InputSpec,
    pixels: np.ndarray,
    *,
    target: str,
    kind: str,
) -> list[str]:
    """Compare a file with the classifier it was made of and say what was found.

    Args:
        original: the classifier as it came.
        found: what was understood of it.
        exported: the file.
        input_spec: how pixels become what the classifier takes.
        pixels: images uint8 [n, H, W, C].
        target: engine that the file is also run on, where it is installed.
        kind: of the images, for the text.

    Raises:
        ModelError: the file gives other logits.
    """
    if found.integers is None:
        mean, std = (np.asarray(values, np.float32) for values in (input_spec.mean, input_spec.std))
        images = (pixels.astype(np.float32) - 255 * mean) / (255 * std)
        images = images.astype(onnx.helper.tensor_dtype_to_np_dtype(found.kinds[0]))
    else:
        images = found.integers.codes(pixels)
    images = np.ascontiguousarray(images if found.layout == "NHWC" else images.transpose(0, 3, 1, 2))
    (image,) = input_names(original)
    try:
        run_original, runner = reference_run(original, [found.result])
        outputs = [run_original({image: images[i : i + 1]}) for i in range(len(images))]
    except Exception as error:  # of whichever library runs it
        height, width = input_spec.size
        raise ModelError(
            f"the file itself does not run on an image of {height}x{width} ({first_line(error)}); check --size"
        ) from None
    expected = np.concatenate([output[found.result].reshape(1, -1) for output in outputs]).astype(np.float32)
    as_logits = not found.gives_probabilities
    model = onnx.load_model_from_string(exported.data)
    explains = any(value.name == TARGET_NAME for value in model.graph.input)
    feeds = {INPUT_NAME: pixels}
    if explains:
        feeds[TARGET_NAME] = np.full(len(pixels), -1)
    inside = reference_run(model)[0](feeds)
    largest = LARGEST_OF_CODES if exported.manifest.precision == "int8" else LARGEST_DIFFERENCE
    # The file rounds its own probabilities, or sums of codes, where ours does not.
    rounds = found.gives_probabilities or has_q_operators(original)
    lines = [
        f"verified: on {len(pixels)} {kind} images "
        + _difference(inside["logits"], expected, as_logits, runner, largest if rounds else LARGEST_DIFFERENCE)
    ]
    wanted = ("logits", "saliency") if "saliency" in inside else ("logits",)
    engine = _on_engine(exported, target, pixels, wanted)
    if engine is None:
        lines.append(f"verified: not run on {target}: it is not installed here")
        return lines
    lines.append(f"verified: {_difference(engine['logits'], expected, as_logits, target, largest)}")
    if "saliency" in inside:
        agreement = spearman(engine["saliency"], inside["saliency"]).mean()
        lines.append(f"explains: maps on {target} against the graph's: Spearman {agreement:.3f}")
        if not inside["saliency"].any():
            lines[-1] = f"explains: every map is 0 on {kind} images; give real ones with --data"
    cams = exported.manifest.cams
    for cam, run in zip(cams, run_cams(exported.data, target, cams, feeds, inside), strict=True):
        lines.append(f"explains: {CamVerification(cam, len(pixels), None, *run)}")
    return lines


def _difference(logits: np.ndarray, expected: np.ndarray, as_logits: bool, runner: str, largest: float) -> str:
    """Say how far logits are from the original's output; raise ModelError where they are another network's."""
    if not as_logits:
        logits = np.exp(logits - logits.max(1, keepdims=True))
        logits = logits / logits.sum(1, keepdims=True)
    difference = difference_of(logits, expected)
    changed = int((logits.argmax(1) != expected.argmax(1)).sum())
    classes = "all classes equal" if not changed else f"{changed} of {len(logits)} classes differ"
    if not difference <= largest:
        raise ModelError(
            f"on {runner}: logits differ by {difference:.2g} of their size (median), {classes}; expected the "
            f"original's, within {largest}; export for another --target, or report the network"
        )
    return f"logits by {difference:.1g} of their size (median), {classes} ({runner})"


def _on_engine(
    exported: OwnOnnx, target: str, pixels: np.ndarray, outputs: tuple[str, ...]
) -> dict[str, np.ndarray] | None:
    try:
        session = open_session(exported.data, engine=target)
    except EngineError:
        return None
    feeds = {INPUT_NAME: pixels}
    if len(outputs) > 1:
        feeds[TARGET_NAME] = np.full(len(pixels), -1)
    try:
        return session.run(feeds, outputs)
    finally:
        session.close()
