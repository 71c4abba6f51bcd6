"""Proof, before a file is written, that its graph computes the network that was trained.

Four comparisons, each of which names what differs: the weight codes in the file against the checkpoint's; the
codes of every activation on real images, each layer given the same input codes; the logits and classes, likewise;
and the classes of the two networks, each running freely from the pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from export.deploy_form import DeployForm, FoldedQuantizer, folded_layers
from export.operators import along
from export.reference import reference_run
from runtime.errors import ModelError
from train.data import InputSpec
from train.quantizers import PACT, InputQuantizer

# Float32 sums in another order may move a value across a rounding boundary: then a code differs by one step. More
# than this share of a tensor's codes, or more than one step, is no such accident when both got the same input.
MAX_FLIPPED_SHARE = 1e-3
MAX_LOGIT_STEPS = 1.0
# Running freely, one code that differs changes all that follows: of the images with such a code, this share of all
# images may change class (those whose two best logits are nearly equal). An image without one may not.
MAX_CHANGED_SHARE = 0.02
CODES_SUFFIX = ".codes"


@dataclass(frozen=True)
class Verification:
    """What the comparison found.

    Args:
        samples: number of real images compared.
        weight_codes: number of integer weight codes compared, all equal.
        activation_codes: number of activation codes compared, layer by layer on the same input codes.
        flipped_codes: how many of them differ, each by one step.
        max_logit_steps: largest difference of a logit on the same input codes, in steps of the last layer: its
            input's scale times its weight's.
        changed_classes: images that change class when both run freely from the pixels, each after a flipped code.
        max_logit_difference: largest difference of a logit in that case, in the logits' unit.
        reference: what ran the graph.
    """

    samples: int
    weight_codes: int
    activation_codes: int
    flipped_codes: int
    max_logit_steps: float
    changed_classes: int
    max_logit_difference: float
    reference: str

    def __str__(self) -> str:
        classes = f"all but {self.changed_classes}" if self.changed_classes else "all"
        return (
            f"{self.weight_codes:,} weight codes equal; on {self.samples} images {self.flipped_codes} of "
            f"{self.activation_codes:,} activation codes differ, logits by {self.max_logit_steps:.2f} steps "
            f"({self.max_logit_difference:.2g} from the pixels on), {classes} classes equal ({self.reference})"
        )


def verify(
    model: onnx.ModelProto, form: DeployForm, network: nn.Module, input_spec: InputSpec, images: Tensor
) -> Verification:
    """Compare an exported graph with the trained network.

    Args:
        model: the ONNX graph; quantizer `q` has its codes in the value `q.codes`.
        form: deploy form the graph was made from.
        network: the fake-quantized network of the checkpoint, in evaluation mode.
        input_spec: of the network.
        images: real images, uint8 [n, C, H, W].

    Raises:
        ModelError: something differs; the text names the tensor.
    """
    weight_codes = _compare_weights(model, form)
    names = [n for n, m in form.network.named_modules() if isinstance(m, FoldedQuantizer) and m.rounds]
    run, reference = reference_run(model, [f"{name}{CODES_SUFFIX}" for name in names])
    found = run({"image": images.permute(0, 2, 3, 1).contiguous().numpy()})
    zero_points = zero_points_of(model)
    codes = {
        name: found[f"{name}{CODES_SUFFIX}"].astype(np.int32) - zero_points[f"{name}{CODES_SUFFIX}"]
        for name in names
    }
    expected_codes, logits_on_same_codes = _run_layer_by_layer(network, input_spec, images, codes)

    flipped = np.zeros(len(images), dtype=np.int64)
    for name, expected in expected_codes.items():
        difference = np.abs(codes[name] - expected)
        count = int(np.count_nonzero(difference))
        if difference.max() > 1 or count > max(MAX_FLIPPED_SHARE * difference.size, 1):
            raise ModelError(
                f"activation {name}: {count} of {difference.size} codes differ from the trained network's, up to "
                f"{difference.max()}, expected {MAX_FLIPPED_SHARE:.1%} at most, by 1; the export is not exact"
            )
        flipped += np.count_nonzero(difference.reshape(len(images), -1), axis=1)

    logits = found["logits"]
    steps = float((np.abs(logits - logits_on_same_codes) / _logit_step(form)).max())
    if not steps <= MAX_LOGIT_STEPS:
        raise ModelError(
            f"logits: differ from the trained network's by up to {steps:.1f} steps of the last layer, expected "
            f"{MAX_LOGIT_STEPS} at most; the export is not exact"
        )
    with torch.no_grad():
        free_logits = network(input_spec.normalize(images)).numpy()
    changed = logits.argmax(1) != free_logits.argmax(1)
    unexplained = (logits.argmax(1) != logits_on_same_codes.argmax(1)) | (changed & (flipped == 0))
    if unexplained.any() or changed.sum() > MAX_CHANGED_SHARE * len(images):
        raise ModelError(
            f"logits: {changed.sum()} of {len(images)} images fall into another class than in the trained network "
            f"({unexplained.sum()} without a differing code), expected none; the export is not exact"
        )
    return Verification(
        samples=len(images),
        weight_codes=weight_codes,
        activation_codes=sum(c.size for c in codes.values()),
        flipped_codes=int(flipped.sum()),
        max_logit_steps=steps,
        changed_classes=int(changed.sum()),
        max_logit_difference=float(np.abs(logits - free_logits).max()),
        reference=reference,
    )


def zero_points_of(model: onnx.ModelProto) -> dict[str, int]:
    """Return the zero point of every activation's codes: an engine may store signed ones in unsigned bytes."""
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    nodes = [n for n in model.graph.node if n.op_type == "DequantizeLinear" and n.input[0].endswith(CODES_SUFFIX)]
    return {n.input[0]: int(constants[n.input[2]]) for n in nodes if n.input[0] not in constants}


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


def _run_layer_by_layer(
    network: nn.Module, input_spec: InputSpec, images: Tensor, codes: Mapping[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Run the trained network with every quantizer's output replaced by `codes`: no difference is passed on.

    Returns the codes that each quantizer would have given, and the logits.
    """
    expected: dict[str, np.ndarray] = {}

    def replace(name: str) -> Callable[..., Tensor]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            assert isinstance(module, PACT | InputQuantizer)
            expected[name] = torch.round(output / module.scale).to(torch.int32).numpy()
            return torch.from_numpy(codes[name]) * module.scale

        return hook

    handles = [network.get_submodule(name).register_forward_hook(replace(name)) for name in codes]
    try:
        with torch.no_grad():
            logits = network(input_spec.normalize(images)).numpy()
    finally:
        for handle in handles:
            handle.remove()
    return expected, logits


def _logit_step(form: DeployForm) -> np.ndarray:
    """Return the value of one accumulator step of the last layer, float [K] or [1]; 1e-4 in a float network."""
    last = list(folded_layers(form).values())[-1]
    scales = [m.scale for m in form.network.modules() if isinstance(m, FoldedQuantizer)]
    if last.scale is None or not scales:
        return np.array([1e-4])
    return (scales[-1] * last.scale).numpy()
