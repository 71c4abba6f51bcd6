"""What quantization and export did to the explanations: saliency maps compared on the checkpoint's real images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
import torch

from export.deploy_form import deploy_form
from export.gradient.walk import OUTPUTS, append_input_gradient
from export.reference import reference_run
from runtime.agreement import spearman, top_overlap
from runtime.manifest import INPUT_NAME, TARGET_NAME
from train.checkpoint import Checkpoint

PRECISIONS = ("auto", "float32", "int8")

# Where int8 gradients agree less with float32's, `auto` does without them.
LEAST_SPEARMAN = 0.99


@dataclass(frozen=True)
class MapAgreement:
    """Agreement of two saliency maps on real images, means over the images.

    Args:
        samples: number of images.
        spearman: rank correlation of the maps of each image, -1 to 1.
        top_overlap: share of the 10 % most salient pixels in common, 0 to 1.
    """

    samples: int
    spearman: float
    top_overlap: float

    def __str__(self) -> str:
        return f"Spearman {self.spearman:.3f}, top-10 % overlap {self.top_overlap:.3f} ({self.samples} images)"


@dataclass(frozen=True)
class Differentiated:
    """A graph with its input gradient, and what int8 gradients cost it.

    Args:
        model: with the outputs `saliency` and `gradient`.
        int8: whether its gradients are int8.
        price: agreement of int8 gradients with float32's; None where they were not tried.
    """

    model: onnx.ModelProto
    int8: bool
    price: MapAgreement | None

    def __str__(self) -> str:
        used = "int8" if self.int8 else "float32"
        if self.price is None:
            return f"gradients in {used}"
        return f"gradients in {used}; int8's maps against float32's: {self.price}"


def differentiate(
    model: onnx.ModelProto, checkpoint: Checkpoint, *, input: str, gate: str, precision: str
) -> Differentiated:
    """Append the input gradient, in int8 where that is asked for, or `auto` and nearly free.

    Training images in the checkpoint calibrate the grids, and its samples tell the price. Of a checkpoint without
    them every second sample calibrates, and the others tell.

    Args:
        model: an exported graph.
        checkpoint: it was exported from.
        input: tensor to differentiate by.
        gate: see `export.gradient.append_input_gradient`.
        precision: one of PRECISIONS.
    """
    exact = append_input_gradient(model, input=input, outputs=OUTPUTS, gate=gate)
    if precision == "float32":
        return Differentiated(exact, int8=False, price=None)
    feeds = _feeds(checkpoint)
    feeds[TARGET_NAME] = np.full_like(feeds[TARGET_NAME], -1)
    if checkpoint.calibration_images is None:
        seen, unseen = ({name: value[half::2] for name, value in feeds.items()} for half in (0, 1))
    else:
        pixels = checkpoint.calibration_images.permute(0, 2, 3, 1).contiguous().numpy()
        seen, unseen = {INPUT_NAME: pixels, TARGET_NAME: np.full(len(pixels), -1)}, feeds
    rounded = append_input_gradient(model, input=input, outputs=OUTPUTS, gate=gate, int8_samples=seen)
    price = _agreement(*(reference_run(m)[0](unseen)["saliency"] for m in (rounded, exact)))
    if precision == "auto" and not price.spearman >= LEAST_SPEARMAN:
        return Differentiated(exact, int8=False, price=price)
    return Differentiated(rounded, int8=True, price=price)


@dataclass(frozen=True)
class ExportAgreement:
    """Maps and accuracy of the file beside the float network's, on the same images.

    Args:
        maps: agreement of the maps for each image's true class.
        float_accuracy: of the float network, in percent.
        exported_accuracy: of the file.
    """

    maps: MapAgreement
    float_accuracy: float
    exported_accuracy: float

    def __str__(self) -> str:
        accuracy = f"{self.float_accuracy:.2f} -> {self.exported_accuracy:.2f} %"
        return f"maps against the float network's: {self.maps}; accuracy {accuracy}"


def export_agreement(model: onnx.ModelProto, checkpoint: Checkpoint) -> ExportAgreement:
    """Compare an exported graph with autograd on the float network, for each image's true class.

    The float network is the checkpoint's without its grids: float weights, and of PACT the clip alone.

    Args:
        model: with the output `saliency`.
        checkpoint: it was exported from; its sample images are compared.
    """
    images, labels = checkpoint.samples["images"], checkpoint.samples["labels"]
    network = deploy_form(checkpoint.network(), checkpoint.input, int8=False).network
    x = checkpoint.input.normalize(images).requires_grad_()
    logits = network(x)
    (gradient,) = torch.autograd.grad(logits.gather(1, labels.unsqueeze(1)).sum(), x)
    found = reference_run(model)[0](_feeds(checkpoint))
    truth = labels.numpy()
    return ExportAgreement(
        maps=_agreement(found["saliency"], gradient.abs().amax(1).numpy()),
        float_accuracy=100 * float((logits.detach().numpy().argmax(1) == truth).mean()),
        exported_accuracy=100 * float((found["logits"].argmax(1) == truth).mean()),
    )


def _feeds(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """Return the inputs of an exported graph for the checkpoint's samples and their true classes."""
    images = checkpoint.samples["images"].permute(0, 2, 3, 1).contiguous()
    return {INPUT_NAME: images.numpy(), TARGET_NAME: checkpoint.samples["labels"].numpy()}


def _agreement(maps: np.ndarray, expected: np.ndarray) -> MapAgreement:
    return MapAgreement(
        samples=len(maps),
        spearman=float(spearman(maps, expected).mean()),
        top_overlap=float(top_overlap(maps, expected).mean()),
    )
