"""What quantization and export did to the explanations: the file's maps against those of the float network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import torch

from export.deploy_form import deploy_form
from export.verify import reference_run
from runtime.agreement import spearman, top_overlap
from train.checkpoint import Checkpoint


@dataclass(frozen=True)
class MapAgreement:
    """Agreement of saliency maps on real images, means over the images.

    Args:
        samples: number of images.
        spearman: rank correlation of the maps of each image, -1 to 1.
        top_overlap: share of the 10 % most salient pixels in common, 0 to 1.
        float_accuracy: of the float network on these images, in percent.
        exported_accuracy: of the file.
    """

    samples: int
    spearman: float
    top_overlap: float
    float_accuracy: float
    exported_accuracy: float

    def __str__(self) -> str:
        accuracy = f"{self.float_accuracy:.2f} -> {self.exported_accuracy:.2f} %"
        return (
            f"maps against the float network's: Spearman {self.spearman:.3f}, top-10 % overlap "
            f"{self.top_overlap:.3f}; accuracy {accuracy} ({self.samples} images)"
        )


def map_agreement(model: onnx.ModelProto, checkpoint: Checkpoint) -> MapAgreement:
    """Compare the saliency of an exported graph with autograd on the float network, for each image's true class.

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
    expected = gradient.abs().amax(1).numpy()
    run, _ = reference_run(model, [])
    feeds: Mapping[str, np.ndarray] = {
        "image": images.permute(0, 2, 3, 1).contiguous().numpy(),
        "target": labels.numpy(),
    }
    found = run(feeds)
    truth = labels.numpy()
    return MapAgreement(
        samples=len(images),
        spearman=float(spearman(found["saliency"], expected).mean()),
        top_overlap=float(top_overlap(found["saliency"], expected).mean()),
        float_accuracy=100 * float((logits.detach().numpy().argmax(1) == truth).mean()),
        exported_accuracy=100 * float((found["logits"].argmax(1) == truth).mean()),
    )
