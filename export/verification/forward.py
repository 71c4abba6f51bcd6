"""Proof, before a file is written, that its graph computes the network that was trained.

Four comparisons, each of which names what differs: the weight codes in the file against the checkpoint's; the
codes of every activation on real images, each layer given the same input codes; the logits and classes, likewise;
and the classes of the two networks, each running freely from the pixels.

Graph and network add up in float32, in different orders. Where a sum lies within float32's rounding of the border
between two codes, it may go to either: at such a tie, and nowhere else, a code may differ, by one. The network in
float64 decides what is a tie. Networks that were just quantized have many, since their clips and their sums are
multiples of the same steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from export.deploy_form import DeployForm, folded_layers
from export.operators import along
from export.reference import images_at_once
from export.verification.exact import on_codes
from export.verification.last_layer import logit_step
from export.verification.probes import probe
from export.verification.ties import check_ties, largest_tied_share, nearly_tied
from runtime.errors import ModelError
from train.input_spec import InputSpec
from train.post_training.hooks import forwards
from train.quantization.quantizers import PACT, InputQuantizer

MAX_LOGIT_STEPS = 1.0
# Float32 rounds a logit to so many units of its own last place, whatever its steps: of the largest logit, in eps.
# Where the weights of the last layer are next to nothing, logits are their bias, and a unit is many steps.
ROUNDINGS = 4
# Running freely, one code that differs changes all that follows: of the images with such a code, this share of all
# images may change class. Not counted are those whose two best logits lie as close as those of float32 and float64
# in the trained network itself.
MAX_CHANGED_SHARE = 0.02
# Of values anywhere, 0.002 lie so near a border. In networks fresh from `quantize`, whose clips are multiples of
# the steps before them, many more of one quantizer's do: every engine rounds those otherwise, and nothing counts
# but the comparison layer by layer.
MAX_TIED_SHARE = 0.02
_IMAGES_FOR_TIES = 8


@dataclass(frozen=True)
class Verification:
    """What the comparison found.

    Args:
        samples: number of real images compared.
        weight_codes: number of integer weight codes compared, all equal.
        activation_codes: number of activation codes compared, layer by layer on the same input codes.
        flipped_codes: how many of them differ, each by one step and at a tie.
        tied_share: of the values of that quantizer which has most at ties.
        max_logit_steps: largest difference of a logit on the same input codes, in steps of the last layer: its
            input's scale times its weight's.
        changed_classes: images that change class when both run freely from the pixels, each after a flipped code.
        undecided_classes: those of them whose two best logits are closer than rounding moves them in the network.
        max_logit_difference: largest difference of a logit in that case, in the logits' unit.
        reference: what ran the graph.
    """

    samples: int
    weight_codes: int
    activation_codes: int
    flipped_codes: int
    tied_share: float
    max_logit_steps: float
    changed_classes: int
    undecided_classes: int
    max_logit_difference: float
    reference: str

    def __str__(self) -> str:
        tied = f"all but {self.changed_classes} ({self.undecided_classes} of them nearly tied)"
        classes = tied if self.changed_classes else "all"
        return (
            f"{self.weight_codes:,} weight codes equal; on {self.samples} images {self.flipped_codes} of "
            f"{self.activation_codes:,} activation codes differ, at ties, logits by {self.max_logit_steps:.2f} "
            f"steps ({self.max_logit_difference:.2g} from the pixels on), {classes} classes equal "
            f"({self.reference})"
        )


def verify(
    model: onnx.ModelProto, form: DeployForm, network: nn.Module, input_spec: InputSpec, images: Tensor
) -> Verification:
    """Compare an exported graph with the trained network.

    Args:
        model: the ONNX graph, without its gradient.
        form: deploy form the graph was made from.
        network: the fake-quantized network of the checkpoint, in evaluation mode.
        input_spec: of the network.
        images: real images, uint8 [n, C, H, W].

    Raises:
        ModelError: something differs; the text names the tensor.
    """
    weight_codes = _compare_weights(model, form)
    probed = probe(model, form)
    exact = on_codes(network, (input_spec.channels, *input_spec.size))
    logits, same_codes, flipped, compared, tied_share = [], [], [], 0, 0.0
    free: list[Tensor] = []
    parts = images.split(images_at_once(math.prod(input_spec.size)))
    for part in parts:
        found = probed.run({"image": part.permute(0, 2, 3, 1).contiguous().numpy()})
        codes = probed.codes(found)
        x = input_spec.normalize(part)
        expected, logits_of_codes = run_layer_by_layer(network, network, x, codes)
        difference = {name: (code - expected[name].round()).abs() for name, code in codes.items()}
        differs = any(d.any() for d in difference.values())
        if differs or not free:
            count = len(part) if differs else _IMAGES_FOR_TIES
            given = {name: code[:count] for name, code in codes.items()}
            values = run_layer_by_layer(exact, network, x[:count].double(), given)[0]
            if not free:
                few = {name: value[:_IMAGES_FOR_TIES] for name, value in values.items()}
                tied_share = largest_tied_share(network, few)
            if differs:
                check_ties(difference, values)
        flipped.append(sum((d.flatten(1) > 0).sum(1) for d in difference.values()) + torch.zeros(len(part)))
        compared += sum(d.numel() for d in difference.values())
        logits.append(torch.from_numpy(found["logits"]))
        same_codes.append(logits_of_codes)
        with torch.no_grad():
            free.append(network(x))
    ours, of_codes, trained, flips = (torch.cat(found) for found in (logits, same_codes, free, flipped))
    steps = largest_steps(ours, of_codes, logit_step(form, of_codes))
    if not steps <= MAX_LOGIT_STEPS:
        raise ModelError(
            f"logits: differ from the trained network's by up to {steps:.1f} steps of the last layer, expected "
            f"{MAX_LOGIT_STEPS} at most; the export is not exact"
        )
    changed = ours.argmax(1) != trained.argmax(1)
    undecided = torch.zeros_like(changed)
    if changed.any():
        with torch.no_grad():
            doubled = torch.cat([exact(input_spec.normalize(part).double()) for part in parts])
        undecided = nearly_tied(trained, doubled)
    unexplained = ((ours.argmax(1) != of_codes.argmax(1)) | (changed & (flips == 0))) & ~undecided
    many = (changed & ~undecided).sum() > MAX_CHANGED_SHARE * len(images) and tied_share <= MAX_TIED_SHARE
    if unexplained.any() or many:
        raise ModelError(
            f"logits: {changed.sum()} of {len(images)} images fall into another class than in the trained network "
            f"({unexplained.sum()} without a differing code, {(changed & undecided).sum()} nearly tied), expected "
            "none; the export is not exact"
        )
    return Verification(
        samples=len(images),
        weight_codes=weight_codes,
        activation_codes=compared,
        flipped_codes=int(flips.sum()),
        tied_share=tied_share,
        max_logit_steps=steps,
        changed_classes=int(changed.sum()),
        undecided_classes=int((changed & undecided).sum()),
        max_logit_difference=float((ours - trained).abs().max()),
        reference=probed.reference,
    )


def largest_steps(logits: Tensor, expected: Tensor, step: Tensor) -> float:
    """Return the largest difference of two networks' logits in steps of the last layer.

    What float32 may round otherwise, `ROUNDINGS` eps of an image's largest logit, counts as equal.

    Args:
        logits: float32 [n, K].
        expected: likewise.
        step: [K] or [].
    """
    difference = (logits - expected).abs()
    rounded = ROUNDINGS * torch.finfo(torch.float32).eps * expected.abs().amax(1, keepdim=True)
    return float(torch.where(difference <= rounded, 0.0, difference / step).max())


def _compare_weights(model: onnx.ModelProto, form: DeployForm) -> int:
    """Compare every quantized weight in the file with the checkpoint's codes, bit for bit; return how many codes.

    A weight is codes and scales, or, where the engine runs its layer in float, their products.
    """
    in_file = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    compared = 0
    for name, layer in folded_layers(form).items():
        if layer.codes is None:
            continue
        assert layer.scale is not None
        parts = {"codes": layer.codes, "scale": layer.scale}
        if f"network.{name}.weight" in in_file:
            parts = {"weight": layer.codes * along(layer.scale, layer.axis, layer.codes.ndim)}
        for part, expected in parts.items():
            found = in_file.get(f"network.{name}.{part}")
            if (
                found is None
                or found.dtype != expected.numpy().dtype
                or not np.array_equal(found, expected.numpy())
            ):
                raise ModelError(f"weight {name}.{part}: differs from the checkpoint's; the export is not exact")
        compared += layer.codes.numel()
    return compared


@torch.no_grad()
def run_layer_by_layer(
    network: nn.Module, trained: nn.Module, x: Tensor, codes: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], Tensor]:
    """Run a network with every quantizer's output replaced by the graph's codes: no difference is passed on.

    Args:
        network: the trained network, or its copy in float64.
        trained: the trained network, whose scales count.
        x: normalized images [n, C, H, W], of the network's type.
        codes: of the graph, by quantizer.

    Returns:
        what each quantizer would have given, in steps of its grid: of the trained network its codes, of the copy
        in float64 the values before they are rounded; and the logits [n, K].
    """
    given: dict[str, Tensor] = {}

    def replacing(name: str) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
        quantizer, by = network.get_submodule(name), trained.get_submodule(name)
        assert isinstance(by, PACT | InputQuantizer)
        scale, rounds = by.scale.to(x.dtype), quantizer.forward

        def forward(values: Tensor) -> Tensor:
            given[name] = (rounds(values) if network is trained else values) / scale
            return codes[name].to(x.dtype) * scale

        return quantizer, forward

    with forwards(dict(map(replacing, codes))):
        logits: Tensor = network(x)
    return given, logits
