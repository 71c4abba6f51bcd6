"""A checkpoint's network with other bits in some layers, not trained again, and what that does to its answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from torch import nn

from bench.measure.data import LabelledImages
from bench.networks.checkpoint import as_network
from runtime.classifier import MAX_BATCH
from runtime.explanations.agreement import spearman
from train import checkpoint as checkpoints
from train.checkpoint import Checkpoint
from train.choices import FLOAT_BITS
from train.quantization.description import describe
from train.quantization.quantize import float_weight, start_alphas
from train.quantization.spec import QuantSpec


@dataclass(frozen=True)
class Effect:
    """What some layers' bits do to a network.

    Args:
        accuracy: in percent of the samples.
        spearman: rank correlation of its maps with the checkpoint's own, of the class that one predicts, mean.
    """

    accuracy: float
    spearman: float


@dataclass(frozen=True)
class Own:
    """The checkpoint's own answers on the samples: predicted classes int64 [N], maps float32 [N, H, W]."""

    effect: Effect
    predicted: np.ndarray
    maps: np.ndarray


def network_with_bits(checkpoint: Checkpoint, bits: Mapping[str, int]) -> nn.Module:
    """Return the checkpoint's network, not trained again, with other bits in some layers.

    Alphas stay; an LSQ step starts from its layer's weights. Of a float checkpoint the other layers get 8 bits,
    and alphas come from its samples.

    Args:
        checkpoint: of any bits.
        bits: by layer name.

    Raises:
        OptionError: no layer of that name, or bits out of range.
    """
    is_float = checkpoint.quant.bits == FLOAT_BITS
    own = QuantSpec(8) if is_float else checkpoint.quant
    spec = replace(own, layer_bits={**own.layer_bits, **bits})
    network = checkpoints.new_network(checkpoint.arch, spec, checkpoint.input, checkpoint.float_state())
    if is_float:
        network.eval()
        start_alphas(network, checkpoint.input.normalize(checkpoint.samples["images"]))
        return network
    steps = {f"{name}.parametrizations.weight.0.learned_scale" for name in bits}
    kept = {name: value for name, value in checkpoint.state_dict.items() if name not in steps}
    network.load_state_dict(network.state_dict() | kept)
    return network.eval()


def own_answers(checkpoint: Checkpoint, test: LabelledImages) -> Own:
    """Return what the checkpoint's network, float or quantized, makes of the samples.

    Biases stay where training left them, as in the networks of other bits: the grids of their sums are others.
    """
    logits, maps = _explained(
        checkpoint.training_network().eval(), checkpoint, test.images, np.full(len(test.labels), -1)
    )
    predicted = logits.argmax(1)
    return Own(Effect(_accuracy(predicted, test.labels), 1.0), predicted, maps)


def effect(checkpoint: Checkpoint, bits: Mapping[str, int], test: LabelledImages, own: Own) -> Effect:
    """Return what other bits in some layers do."""
    logits, maps = _explained(network_with_bits(checkpoint, bits), checkpoint, test.images, own.predicted)
    return Effect(_accuracy(logits.argmax(1), test.labels), float(spearman(maps, own.maps).mean()))


def layers_of(checkpoint: Checkpoint) -> dict[str, int]:
    """Return the number of weights of every layer that can be quantized, by name, in forward order."""
    network = network_with_bits(checkpoint, {})
    names = [layer.name for layer in describe(network) if layer.bits is not None]
    return {name: float_weight(network.get_submodule(name)).numel() for name in names}


def _explained(
    module: nn.Module, checkpoint: Checkpoint, images: np.ndarray, target: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return logits [N, K] and maps [N, H, W] of all images."""
    network = as_network(module, checkpoint, "", "")
    starts = range(0, len(images), MAX_BATCH)
    parts = [network.explain(images[s : s + MAX_BATCH], target[s : s + MAX_BATCH]) for s in starts]
    return np.concatenate([logits for logits, _ in parts]), np.concatenate([maps for _, maps in parts])


def _accuracy(predicted: np.ndarray, labels: np.ndarray) -> float:
    return 100 * float((predicted == labels).mean())
