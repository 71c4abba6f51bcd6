"""Proof that the gradient in a file is autograd's through the trained network, on the codes that the file gives.

Each quantizer of the network gives the codes of the graph, and lets the gradient through where the graph's gate is
open. What is left is float rounding, and what int8 gradients cost where the file has them.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from export.reference import images_at_once
from export.verification.probes import ProbedGraph
from runtime.errors import ModelError
from runtime.manifest import INPUT_NAME, TARGET_NAME
from train.model import QuantizedModel
from train.post_training.hooks import forwards
from train.quantization.quantizers import PACT, InputQuantizer
from train.quantization.straight_through import BELOW_ZERO_STEPS

# Largest difference from autograd's gradient, in its own norm, that half of the images may have. Float32 gradients
# of twelve networks differed by 1e-7 to 1e-6, int8 ones by 0.03 (two_branches) to 0.3 (mobile_net of the tests); a
# gradient of nothing but zeros differs by 1. (A Clip beside a quantizer narrows its gate.)
LARGEST_ERROR = {False: 0.1, True: 0.6}
_IMAGES = 16


@dataclass(frozen=True)
class GradientVerification:
    """The file's gradients against autograd's.

    Args:
        samples: number of images.
        median_error: of the norm of the difference, relative to autograd's gradient.
    """

    samples: int
    median_error: float

    def __str__(self) -> str:
        return f"gradients within {self.median_error:.1g} of autograd's (median of {self.samples} images)"


def verify_gradient(
    probed: ProbedGraph, network: nn.Module, model: QuantizedModel, *, gate: str, int8: bool
) -> GradientVerification:
    """Compare the output `gradient` of a graph with autograd on the network, for each image's true class.

    Args:
        probed: the graph with its gradient.
        network: what it was made from, in evaluation mode.
        model: it was exported from; some of its samples are compared.
        gate: of the gradient, see `export.gradient.append_input_gradient`.
        int8: whether the graph's gradients are products of codes.

    Raises:
        ModelError: the gradient is another one.
    """
    images, labels, feeds = explained_samples(network, model)
    size = images_at_once(math.prod(model.input.size))
    errors = []
    for start in range(0, len(images), size):
        part = slice(start, start + size)
        x, classes = images.detach()[part].requires_grad_(), labels[part].unsqueeze(1)
        found = probed.run({name: value[part] for name, value in feeds.items()})
        with on_codes(network, probed.codes(found), gate):
            (expected,) = torch.autograd.grad(network(x).gather(1, classes).sum(), x)
        difference = (torch.from_numpy(found["gradient"]) - expected).flatten(1).norm(dim=1)
        errors.append(difference / expected.flatten(1).norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny))
    error = float(torch.cat(errors).median())
    check_error("gradient", error, int8=int8)
    return GradientVerification(len(images), error)


def explained_samples(network: nn.Module, model: QuantizedModel) -> tuple[Tensor, Tensor, dict[str, np.ndarray]]:
    """Return some of a model's samples with their classes, for the network and for its graph.

    Returns:
        Normalized images float32 [n, C, H, W], whose gradient autograd computes; their true classes int64 [n], or
        those that the network predicts where they are not known; the inputs of the graph.
    """
    images = model.samples[:_IMAGES]
    x, labels = model.input.normalize(images), model.labels
    with torch.no_grad():
        labels = network(x).argmax(1) if labels is None else labels[: len(x)]
    pixels = images.permute(0, 2, 3, 1).contiguous().numpy()
    return x.requires_grad_(), labels, {INPUT_NAME: pixels, TARGET_NAME: labels.numpy()}


def check_error(name: str, error: float, *, int8: bool) -> None:
    """Raise ModelError where an output differs from autograd's by more than rounding and int8 gradients do."""
    if not error <= LARGEST_ERROR[int8]:
        raise ModelError(
            f"{name}: differs from autograd's by {error:.2g} of its norm, expected {LARGEST_ERROR[int8]} at most; "
            "the export is not exact"
        )


@contextlib.contextmanager
def on_codes(network: nn.Module, codes: Mapping[str, Tensor], gate: str) -> Iterator[None]:
    """Make a network's quantizers give a graph's codes, with the graph's gates.

    Args:
        network: in evaluation mode.
        codes: by quantizer, from `ProbedGraph.codes`.
        gate: of the gradient.
    """
    quantizers = {name: network.get_submodule(name) for name in codes}
    with forwards({quantizers[name]: _giving(quantizers[name], code, gate) for name, code in codes.items()}):
        yield


class _Gated(torch.autograd.Function):
    """Give a value, and pass the gradient on to another one where a gate is open."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(gate)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (gate,) = ctx.saved_tensors
        return grad_outputs[0] * gate, None, None


def _giving(quantizer: nn.Module, code: Tensor, gate: str) -> Callable[[Tensor], Tensor]:
    """Return a forward that makes a quantizer give a graph's codes, with the graph's gate."""
    assert isinstance(quantizer, PACT | InputQuantizer)
    scale = quantizer.scale.detach()

    def forward(values: Tensor) -> Tensor:
        x = values.detach()
        if isinstance(quantizer, InputQuantizer):
            opened = torch.ones_like(x)
        elif gate == "code":
            opened = (quantizer.qmin < code) & (code < quantizer.qmax)
        else:
            low = quantizer.qmin * scale if quantizer.qmin else -BELOW_ZERO_STEPS * scale
            opened = (x >= low) & (x < quantizer.clip_alpha.detach())
        given: Tensor = _Gated.apply(values, code * scale, opened)
        return given

    return forward
