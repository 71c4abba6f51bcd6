"""Cross-layer equalization (Nagel et al. 2019, section 4.1): ranges of channels made alike, in float.

Where two layers have only a ReLU between them, and what pools or copies channel by channel, channel i may be
divided by s_i in the first and multiplied by s_i in the second: the network computes the same. With

    s_i = sqrt(r1_i r2_i) / r2_i                                                     (equation 11)

r1_i and r2_i being the largest weights of channel i in both, the ranges become equal, but for channels whose bias
would outgrow all others of the layer. One alpha then suits more of the channels that share it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from train.quantization.grids import Calls, is_layer, norm_after
from train.quantization.tracing import NORMS, trace

_ROUNDS = 20  # pairs share layers: one round is not the end
# A channel with a bias and next to no weight is constant: its weight's range says nothing of its own. So no bias
# becomes larger than so many times the largest of its layer: one alpha has to hold them all.
_BIAS_GROWTH = 4.0
# f(s x) = s f(x) for s > 0, each channel by itself.
_HOMOGENEOUS = Calls(
    (nn.ReLU, nn.LeakyReLU, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d,
     nn.Identity, nn.Dropout, nn.Dropout2d),
    (F.relu, torch.relu, F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.dropout),
    ("relu",),
)  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """Two layers, and the BatchNorm after the first, if there is one."""

    first: nn.Module
    norm: nn.Module | None
    second: nn.Module


def pairs(model: nn.Module) -> list[Pair]:
    """Return the pairs of layers of a float network that can be equalized, in the order of its forward pass.

    Raises:
        ModelError: torch.fx cannot trace it.
    """
    network = trace(model)
    modules = dict(network.named_modules())
    calls = [str(node.target) for node in network.graph.nodes if node.op == "call_module"]
    found = []
    for node in network.graph.nodes:
        if not is_layer(node, modules):
            continue
        norm_node = norm_after(node, modules)
        second = _next_layer(norm_node or node, modules)
        names = [n for n in (node, norm_node, second) if n is not None]
        # A layer that is called twice would have to be scaled for both of its neighbours.
        if second is None or any(calls.count(str(n.target)) > 1 for n in names):
            continue
        norm = modules[str(norm_node.target)] if norm_node is not None else None
        pair = Pair(modules[str(node.target)], norm, modules[str(second.target)])
        if _fits(pair):
            found.append(pair)
    return found


@torch.no_grad()
def equalize(model: nn.Module) -> int:
    """Equalize a float network in evaluation mode, in place; return how many pairs of layers it has.

    Its outputs stay as they are, up to rounding.

    Raises:
        ModelError: torch.fx cannot trace it.
    """
    found = pairs(model)
    bounds = [_BIAS_GROWTH * float(_bias(pair).abs().max()) for pair in found]
    for _ in range(_ROUNDS):
        for pair, bound in zip(found, bounds, strict=True):
            _equalize(pair, bound)
    return len(found)


def _equalize(pair: Pair, largest_bias: float) -> None:
    first, second = _weight(pair.first), _weight(pair.second)
    columns = _by_input_channel(pair.second, len(first))  # a view: [channels, everything else]
    r1 = first.flatten(1).abs().amax(1)
    if pair.norm is not None:
        r1 = r1 * (pair.norm.weight / torch.sqrt(pair.norm.running_var + pair.norm.eps)).abs()  # type: ignore
    r2 = columns.flatten(1).abs().amax(1)
    scale = torch.sqrt(r1 / r2)
    scale = torch.where((r1 > 0) & (r2 > 0), scale, torch.ones_like(scale))
    scaled = pair.norm if pair.norm is not None else pair.first
    if largest_bias > 0:
        scale = scale.maximum(_bias(pair).abs() / largest_bias)
    weight = _weight(scaled)
    weight.div_(scale.reshape(-1, *[1] * (weight.ndim - 1)))
    if isinstance(scaled.bias, Tensor):
        scaled.bias.div_(scale)
    second.copy_(_to_weight(columns * scale.reshape(-1, *[1] * (columns.ndim - 1)), pair.second))


def _bias(pair: Pair) -> Tensor:
    """Return what the channels of a pair's first layer are moved by, BatchNorm or layer, [channels]."""
    bias = (pair.norm if pair.norm is not None else pair.first).bias
    return bias if isinstance(bias, Tensor) else torch.zeros(1)


def _next_layer(node: fx.Node, modules: dict[str, nn.Module]) -> fx.Node | None:
    """Return the layer that alone reads `node`, through a ReLU and what pools or copies, or None."""
    while len(node.users) == 1:
        node = next(iter(node.users))
        if is_layer(node, modules):
            return node
        if not (_HOMOGENEOUS.include(node, modules) or _flattens_channels(node, modules)):
            return None
    return None


def _flattens_channels(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Return whether [N, C, ...] becomes [N, C * ...]: the columns of a channel stay side by side."""
    module = modules.get(str(node.target)) if node.op == "call_module" else None
    if isinstance(module, nn.Flatten):
        return (module.start_dim, module.end_dim) == (1, -1)
    called = node.target is torch.flatten or (node.op == "call_method" and node.target == "flatten")
    return called and node.args[1:] == (1,) and not node.kwargs


def _fits(pair: Pair) -> bool:
    channels = len(_weight(pair.first))
    if pair.norm is not None:
        affine = isinstance(pair.norm, NORMS) and pair.norm.affine and pair.norm.running_var is not None
        if not affine or pair.norm.num_features != channels:
            return False
    groups = getattr(pair.second, "groups", 1)
    inputs = _weight(pair.second).shape[1] * groups
    if isinstance(pair.second, nn.Linear):
        return inputs % channels == 0
    return inputs == channels and groups in (1, channels)


def _by_input_channel(layer: nn.Module, channels: int) -> Tensor:
    """Return the weight with the axis of the input channels first."""
    weight = _weight(layer)
    groups = getattr(layer, "groups", 1)
    if groups > 1:  # depthwise: each channel has its own filters
        return weight.reshape(channels, -1)
    return weight.reshape(len(weight), channels, -1).transpose(0, 1)


def _to_weight(columns: Tensor, layer: nn.Module) -> Tensor:
    by_output = columns if getattr(layer, "groups", 1) > 1 else columns.transpose(0, 1)
    return by_output.reshape(_weight(layer).shape)


def _weight(layer: nn.Module) -> Tensor:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight
