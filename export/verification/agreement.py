"""What quantization and export did to the explanations: saliency maps compared on the checkpoint's real images."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx
import torch

from export.deploy_form import deploy_form
from export.gradient.cam import Cam
from export.gradient.walk import OUTPUTS, append_input_gradient
from export.reference import images_at_once, reference_run, run_in_parts
from runtime.explanations.agreement import MEASURES, spearman
from runtime.manifest import INPUT_NAME, TARGET_NAME
from train.model import QuantizedModel

# Where int8 gradients agree less with float32's, `auto` does without them.
LEAST_SPEARMAN = 0.99
# So many images are named whose maps agree least.
_WORST = 3
# Where they agree much less on a few images already, `auto` looks at no more. Of so few pixels altogether,
# building the graph takes longer than running it, and one trial of all images is cheaper than two.
_FIRST_IMAGES, _FIRST_SPEARMAN = 8, 0.95
_PIXELS_AT_ONCE = 1 << 19


@dataclass(frozen=True)
class MapAgreement:
    """Agreement of two saliency maps on real images, means over the images.

    Args:
        samples: number of images.
        spearman: rank correlation of the maps of each image, -1 to 1.
        top_overlap: share of the 10 % most salient pixels in common, 0 to 1.
        pearson: linear correlation, -1 to 1.
        ssim: structural similarity, -1 to 1.
        top_20_overlap: as top_overlap, of 20 %.
    """

    samples: int
    spearman: float
    top_overlap: float
    pearson: float
    ssim: float
    top_20_overlap: float

    def __str__(self) -> str:
        return f"Spearman {self.spearman:.3f}, top-10 % overlap {self.top_overlap:.3f} ({self.samples} images)"

    @property
    def drift(self) -> str:
        """All measures as text."""
        return (
            f"Spearman {self.spearman:.3f}, Pearson {self.pearson:.3f}, SSIM {self.ssim:.3f}, top-10 % overlap "
            f"{self.top_overlap:.3f}, top-20 % overlap {self.top_20_overlap:.3f} ({self.samples} images)"
        )


@dataclass(frozen=True)
class GradientGraph:
    """A graph with its input gradient, and how its gradients are computed.

    Args:
        model: with the outputs `saliency` and `gradient`, where they are asked for, and the maps of layers.
        int8: whether its gradients are int8.
        int8_agreement: agreement of int8 gradients with float32's; None where they were not tried.
    """

    model: onnx.ModelProto
    int8: bool
    int8_agreement: MapAgreement | None

    def __str__(self) -> str:
        used = "int8" if self.int8 else "float32"
        if self.int8_agreement is None:
            return f"gradients in {used}"
        return f"gradients in {used}; int8's maps against float32's: {self.int8_agreement}"


def differentiate(
    graph: onnx.ModelProto,
    model: QuantizedModel,
    *,
    input: str,
    gate: str,
    precision: str,
    outputs: Sequence[str] = OUTPUTS,
    cams: Sequence[Cam] = (),
) -> GradientGraph:
    """Append the input gradient, in int8 where that is asked for, or `auto` and nearly free, and maps of layers.

    The model's calibration images give the grids, and on its samples the maps are compared. Where it has no
    calibration images, every second sample gives the grids, and the others are compared.

    Args:
        graph: exported.
        model: it was exported from.
        input: tensor to differentiate by.
        gate: see `export.gradient.append_input_gradient`.
        precision: one of export.choices.SALIENCY_PRECISIONS; of maps of layers alone the gradients are float32.
        outputs: of the input gradient, both or none.
        cams: maps of layers.
    """
    append = functools.partial(append_input_gradient, graph, input=input, outputs=outputs, cams=cams, gate=gate)
    exact = append()
    if precision == "float32" or not outputs:
        return GradientGraph(exact, int8=False, int8_agreement=None)
    feeds = _feeds(model)
    feeds[TARGET_NAME] = np.full_like(feeds[TARGET_NAME], -1)
    if model.calibration_images is None:
        seen, unseen = ({name: value[half::2] for name, value in feeds.items()} for half in (0, 1))
    else:
        pixels = model.calibration_images.permute(0, 2, 3, 1).contiguous().numpy()
        seen, unseen = {INPUT_NAME: pixels, TARGET_NAME: np.full(len(pixels), -1)}, feeds

    def tried(count: int | None) -> tuple[onnx.ModelProto, MapAgreement]:
        few, others = ({name: value[:count] for name, value in half.items()} for half in (seen, unseen))
        rounded = append(int8_samples=few)
        maps = (run_in_parts(reference_run(m)[0], others, ["saliency"])["saliency"] for m in (rounded, exact))
        return rounded, _agreement(*maps)

    images = unseen[INPUT_NAME]
    many_pixels = images[..., 0].size > _PIXELS_AT_ONCE
    if precision == "auto" and len(images) > _FIRST_IMAGES and many_pixels:
        _, maps = tried(_FIRST_IMAGES)
        if not maps.spearman >= _FIRST_SPEARMAN:
            return GradientGraph(exact, int8=False, int8_agreement=maps)
    rounded, maps = tried(None)
    if precision == "auto" and not maps.spearman >= LEAST_SPEARMAN:
        return GradientGraph(exact, int8=False, int8_agreement=maps)
    return GradientGraph(rounded, int8=True, int8_agreement=maps)


@dataclass(frozen=True)
class ExportAgreement:
    """Maps and classes of the file beside the float network's, on the same images.

    Args:
        reference: which float network: "the float network" that was quantized after training, or "the trained
            network without rounding".
        maps: agreement of the maps for each image's true class.
        float_accuracy: of the float network, in percent; None where the images have no labels.
        exported_accuracy: of the file; without labels, how often it gives the float network's class.
        same_class: agreement of the maps of the images that both put into one class; None where there is none.
        worst: numbers of the images whose maps agree least, the worst first.
    """

    reference: str
    maps: MapAgreement
    float_accuracy: float | None
    exported_accuracy: float
    same_class: MapAgreement | None = None
    worst: tuple[int, ...] = ()

    @property
    def drift(self) -> str:
        """How far the explanations moved, as text."""
        same = f"; where the class is the same {self.same_class.drift}" if self.same_class else ""
        worst = ", ".join(map(str, self.worst))
        return f"drift of the maps: {self.maps.drift}{same}; least alike are samples {worst}"

    def __str__(self) -> str:
        classes = f"its class on {self.exported_accuracy:.2f} %"
        if self.float_accuracy is not None:
            classes = f"accuracy {self.float_accuracy:.2f} -> {self.exported_accuracy:.2f} %"
        return f"maps against those of {self.reference}: {self.maps}; {classes}"


def export_agreement(graph: onnx.ModelProto, model: QuantizedModel) -> ExportAgreement:
    """Compare an exported graph with autograd on the float network, for each image's true class.

    The float network is the one that was quantized after training, where the model has it; else the model's own
    without its grids: float weights, and PACT's clips without rounding.

    Args:
        graph: with the output `saliency`.
        model: it was exported from; its samples are compared.
    """
    network = model.original or deploy_form(model.evaluated(), model.input, int8=False).network
    floats: list[torch.Tensor] = []
    gradients: list[torch.Tensor] = []
    for part in model.samples.split(images_at_once(math.prod(model.input.size))):
        x = model.input.normalize(part).requires_grad_()
        logits = network(x)
        done = sum(map(len, floats))
        known = logits.argmax(1) if model.labels is None else model.labels[done : done + len(part)]
        gradients += torch.autograd.grad(logits.gather(1, known.unsqueeze(1)).sum(), x)
        floats.append(logits.detach())
    floating, gradient = torch.cat(floats), torch.cat(gradients)
    truth = floating.argmax(1) if model.labels is None else model.labels
    feeds = _feeds(replace(model, labels=truth))
    found = run_in_parts(reference_run(graph)[0], feeds, ["logits", "saliency"])
    right = {name: (values.argmax(1) == truth.numpy()).mean() for name, values in
             (("float", floating.numpy()), ("exported", found["logits"]))}  # fmt: skip
    maps, expected = found["saliency"], gradient.abs().amax(1).numpy()
    same = found["logits"].argmax(1) == floating.numpy().argmax(1)
    agreement = _agreement(maps, expected)
    return ExportAgreement(
        reference="the trained network without rounding" if model.original is None else "the float network",
        maps=agreement,
        same_class=agreement if same.all() else _agreement(maps[same], expected[same]) if same.any() else None,
        worst=tuple(map(int, spearman(maps, expected).argsort()[:_WORST])),
        float_accuracy=None if model.labels is None else 100 * float(right["float"]),
        exported_accuracy=100 * float(right["exported"]),
    )


def _feeds(model: QuantizedModel) -> dict[str, np.ndarray]:
    """Return the inputs of an exported graph for the samples and their classes, -1 where they have none."""
    images = model.samples.permute(0, 2, 3, 1).contiguous()
    labels = np.full(len(images), -1) if model.labels is None else model.labels.numpy()
    return {INPUT_NAME: images.numpy(), TARGET_NAME: labels}


def _agreement(maps: np.ndarray, expected: np.ndarray) -> MapAgreement:
    means = {name: float(measure(maps, expected).mean()) for name, measure in MEASURES.items()}
    return MapAgreement(
        samples=len(maps),
        spearman=means["Spearman"],
        top_overlap=means["top-10 % overlap"],
        pearson=means["Pearson"],
        ssim=means["SSIM"],
        top_20_overlap=means["top-20 % overlap"],
    )
