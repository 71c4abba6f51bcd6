"""The deploy form of a trained network: BatchNorm folded, alpha and scales turned into constants.

Folding is exact. y = gamma (conv(x) - mu) / sigma + beta multiplies each output channel's scale by gamma / sigma
and moves the bias; the integer codes that were trained are the codes that ship (a negative gamma flips their
sign).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from export.operators import dequantize_weight, fake_quantize
from train.input_spec import InputSpec
from train.quantization.grids import grid_source, is_layer, norm_after
from train.quantization.quantize import float_weight, weight_quantizer
from train.quantization.quantizers import PACT, InputQuantizer
from train.quantization.tracing import source, trace


class FoldedLayer(nn.Module):
    """A convolution or linear layer whose weight is int8 codes and one scale per output channel, or float.

    Channels lie on `axis` of the weight: 0, or 1 where a linear layer's weight is kept as the matrix [I, O] that a
    product with more than two axes takes in ONNX; engines would not multiply codes that are turned on the way.
    """

    codes: Tensor | None
    scale: Tensor | None
    weight: Tensor | None
    bias: Tensor

    def __init__(
        self,
        layer: nn.Module,
        codes: Tensor | None,
        scale: Tensor | None,
        weight: Tensor | None,
        bias: Tensor,
        *,
        axis: int = 0,
    ):
        super().__init__()
        if axis == 1:
            codes, weight = (None if w is None else w.t().contiguous() for w in (codes, weight))
        for name, value in (("codes", codes), ("scale", scale), ("weight", weight), ("bias", bias)):
            self.register_buffer(name, value)
        self.axis = axis
        # A list keeps the layer out of this module's own parameters: only its geometry is used.
        self._geometry = [layer]

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to float32 x, as it was trained."""
        layer = self._geometry[0]
        if self.codes is not None and self.scale is not None:
            weight = dequantize_weight(self.codes, self.scale, self.axis)
        else:
            assert self.weight is not None
            weight = self.weight
        if self.axis == 1:
            return torch.matmul(x, weight) + self.bias
        if isinstance(layer, nn.Linear):
            return F.linear(x, weight, self.bias)
        return layer._conv_forward(x, weight, self.bias)  # type: ignore[operator]


class FoldedQuantizer(nn.Module):
    """An activation quantizer with constant alpha and scale. Without rounding it only clips."""

    alpha: Tensor
    scale: Tensor

    def __init__(self, quantizer: PACT | InputQuantizer, *, rounds: bool) -> None:
        super().__init__()
        self.register_buffer("scale", quantizer.scale.detach().clone())
        alpha = quantizer.clip_alpha if isinstance(quantizer, PACT) else self.scale * quantizer.qmax
        self.register_buffer("alpha", alpha.detach().clone())
        self.qmin, self.qmax, self.bits = quantizer.qmin, quantizer.qmax, quantizer.bits
        self.clips = isinstance(quantizer, PACT)
        self.rounds = rounds

    def forward(self, x: Tensor) -> Tensor:
        """Return the activation on its grid."""
        if self.rounds:
            return fake_quantize(x, self.alpha, self.scale, self.qmin, self.qmax)
        if not self.clips:
            return x
        return torch.clamp(x, self.alpha * (self.qmin / self.qmax), self.alpha)


class DeployForm(nn.Module):
    """From the camera's pixels to logits: image uint8 [N, H, W, C] -> logits float32 [N, K]."""

    def __init__(self, network: nn.Module, input_spec: InputSpec) -> None:
        super().__init__()
        self.network = network
        self.input_spec = input_spec

    def forward(self, image: Tensor) -> Tensor:
        """Return logits [N, K] of uint8 images [N, H, W, C]."""
        logits: Tensor = self.network(self.input_spec.normalize(image.permute(0, 3, 1, 2)))
        return logits


@dataclass(frozen=True)
class FoldedWeight:
    """Weight of one layer as it ships: int8 codes [O, ...] and scales [O]."""

    codes: Tensor
    scale: Tensor


def deploy_form(network: nn.Module, input_spec: InputSpec, *, int8: bool = True) -> DeployForm:
    """Return the deploy form of a trained network in evaluation mode; the network is left as it was.

    Args:
        network: from `Checkpoint.network`.
        input_spec: size and normalization of its image.
        int8: keep the integer grids; False keeps float weights, and PACT only clips.
    """
    module = copy.deepcopy(trace(network)).eval()
    modules = dict(module.named_modules())
    with torch.no_grad():
        ShapeProp(module).propagate(torch.zeros(1, input_spec.channels, *input_spec.size))
    for node in list(module.graph.nodes):
        layer = modules.get(str(node.target)) if node.op == "call_module" else None
        if is_layer(node, modules):
            assert layer is not None
            rows = isinstance(layer, nn.Linear) and len(node.meta["tensor_meta"].shape) > 2
            # BatchNorm of rows of features normalizes by row: its axis is not the layer's.
            norm_node = None if rows else norm_after(node, modules)
            norm = modules[str(norm_node.target)] if norm_node is not None else None
            # A layer called twice may be followed by different norms: every call gets a module of its own.
            name = _unique(module, f"{node.target}", node)
            grid = grid_source(source(node), modules)
            inputs = modules[str(grid.target)].scale.detach() if grid is not None else None
            folded = _fold(layer, norm, inputs if int8 else None, int8=int8, axis=int(rows))
            # What the network calls inside the layer, such as its padding.
            for child_name, child in layer.named_children():
                if child_name != "parametrizations":
                    folded.add_module(child_name, child)
            module.add_submodule(name, folded)
            node.target = name
            if norm_node is not None:
                norm_node.replace_all_uses_with(node)
                module.graph.erase_node(norm_node)
        elif isinstance(layer, PACT | InputQuantizer):
            module.add_submodule(str(node.target), FoldedQuantizer(layer, rounds=int8))
        elif isinstance(layer, nn.Dropout | nn.Dropout1d | nn.Dropout2d | nn.Identity):
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
        elif _averages_globally(node, layer):
            _replace_by_mean(module, node)
    module.delete_all_unused_submodules()
    module.recompile()
    return DeployForm(module, input_spec).eval()


def fold_weight(layer: nn.Module, norm: nn.Module | None) -> FoldedWeight:
    """Return the codes and scales of a quantized layer with the BatchNorm that follows it folded in."""
    quantizer = weight_quantizer(layer)
    assert quantizer is not None
    weight = float_weight(layer)
    codes, scale = quantizer.codes(weight), quantizer.scale(weight).detach()
    if norm is not None:
        factor = _norm_factor(norm)
        sign = factor.sign().to(torch.int8).reshape(-1, *[1] * (codes.ndim - 1))
        codes = codes * sign
        # gamma = 0 switches a channel off: codes 0, and any positive scale, since a scale must not be 0.
        scale = torch.where(factor == 0, torch.ones_like(scale), scale * factor.abs())
    return FoldedWeight(codes, scale)


def _fold(
    layer: nn.Module, norm: nn.Module | None, input_scale: Tensor | None, *, int8: bool, axis: int
) -> FoldedLayer:
    bias = layer.bias if layer.bias is not None else torch.zeros(float_weight(layer).shape[0])
    bias = bias.detach().clone()  # type: ignore[operator]
    if norm is not None:
        mean, beta = norm.running_mean, norm.bias
        assert isinstance(mean, Tensor)
        shift = beta.detach() if isinstance(beta, Tensor) else torch.zeros_like(mean)
        bias = (bias - mean) * _norm_factor(norm) + shift
    if int8 and weight_quantizer(layer) is not None:
        folded = fold_weight(layer, norm)
        codes, scale = folded.codes, folded.scale
        if input_scale is not None:
            # Any scale will do for codes that are all zero. With this one the bias, all that such a channel has,
            # is a whole number of accumulator steps that fits into an engine's int32.
            dead = (codes.flatten(1) == 0).all(1)
            fitting = (bias.abs() / input_scale / 2**20).clamp_min(torch.finfo(torch.float32).tiny)
            scale = torch.where(dead, torch.where(bias == 0, torch.ones_like(scale), fitting), scale)
        return FoldedLayer(layer, codes, scale, None, bias, axis=axis)
    weight = float_weight(layer).detach()
    if norm is not None:
        weight = weight * _norm_factor(norm).reshape(-1, *[1] * (weight.ndim - 1))
    return FoldedLayer(layer, None, None, weight.clone(), bias, axis=axis)


def _norm_factor(norm: nn.Module) -> Tensor:
    """Return gamma / sigma, float32 [O]."""
    variance, gamma, eps = norm.running_var, norm.weight, norm.eps
    assert isinstance(variance, Tensor)
    assert isinstance(eps, float)
    factor = 1 / torch.sqrt(variance + eps)
    return factor * gamma.detach() if isinstance(gamma, Tensor) else factor


def _averages_globally(node: fx.Node, layer: nn.Module | None) -> bool:
    size: object = None
    if isinstance(layer, nn.AdaptiveAvgPool2d):
        size = layer.output_size
    elif node.target is F.adaptive_avg_pool2d:
        size = node.kwargs.get("output_size", node.args[-1])
    return size in (1, (1, 1), [1, 1])


def _replace_by_mean(module: fx.GraphModule, node: fx.Node) -> None:
    # torch.export turns adaptive pooling into a mean and an as_strided, which becomes a dozen of shape operators.
    with module.graph.inserting_before(node):
        mean = module.graph.call_function(torch.mean, (node.args[0], (2, 3)), {"keepdim": True})
    node.replace_all_uses_with(mean)
    module.graph.erase_node(node)


def _unique(module: fx.GraphModule, name: str, node: fx.Node) -> str:
    calls = [n for n in module.graph.nodes if n.op == "call_module" and n.target == name]
    return name if calls == [node] else f"{name}_{node.name}"


def folded_layers(form: DeployForm) -> dict[str, FoldedLayer]:
    """Return the folded layers of a deploy form by name, in the order of the forward pass."""
    found = {n: m for n, m in form.network.named_modules() if isinstance(m, FoldedLayer)}
    called = [str(node.target) for node in form.network.graph.nodes]  # type: ignore[union-attr]
    return {name: found[name] for name in called if name in found}
