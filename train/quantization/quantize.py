"""Turn any `nn.Module` into its PACT-quantized form, without editing its source.

`quantize` traces the module with torch.fx, replaces every ReLU call by a PACT of its own (a ReLU module that is
used three times gets three), registers a weight quantizer on every convolution and linear layer, and puts a
quantizer before any such layer, and any product of two activations as in attention, whose operand would otherwise
not lie on a grid. Everything else stays float; `description.describe` lists it.
"""

from __future__ import annotations

import operator
import warnings
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from runtime.errors import ModelError, OptionError
from train.choices import FLOAT_BITS
from train.quantization import grids, signs
from train.quantization.quantizers import INPUT_QMAX, INPUT_QMIN, PACT, InputQuantizer, WeightQuantizer
from train.quantization.spec import QuantSpec
from train.quantization.tracing import LAYERS, NORMS, copied, cut_softmax, expand_attention, source, trace

Quantizer = PACT | InputQuantizer

# Under which a quantized graph remembers its QuantSpec.
_SPEC = "clearpact.quant"
_ENDS_IN_SOFTMAX = "{} ends in a softmax: what that is given is taken as the logits"
_SUMS = (operator.add, operator.iadd, torch.add)


def quantize(
    model: nn.Module,
    spec: QuantSpec,
    *,
    input_scale: float | None = None,
    input_codes: tuple[int, int] = (INPUT_QMIN, INPUT_QMAX),
    image_shape: tuple[int, ...] | None = None,
) -> nn.Module:
    """Return the quantized form of a copy of `model`; the model itself stays as it is.

    Args:
        model: any module that torch.fx can trace, taking one image tensor [N, C, H, W].
        spec: bits and quantizers; bits = 32 returns the model as it is. A softmax at its end is left out, with a
            warning: a classifier's output are logits.
        input_scale: step of the input's grid (`InputSpec.grid_scale`); None learns a signed clip instead.
        input_codes: smallest and largest of that grid.
        image_shape: channels, height and width of an image: the graph that is quantized and the model are compared
            once, on two random images. None leaves that out.

    Raises:
        ModelError: the module's control flow depends on data, its graph computes something else, it is quantized
            already, or no layer can be quantized.
        OptionError: `spec.layer_bits` names a layer that is not there.
    """
    if spec.bits == FLOAT_BITS:
        return _giving_logits(model)
    for name, module in model.named_modules():
        if isinstance(module, PACT | InputQuantizer | WeightQuantizer):
            raise ModelError(
                f"{type(model).__name__}: is quantized already ({name}); quantize the float network, "
                "or set the bits of this one's training with --bits"
            )
    for name, module in model.named_modules():
        _refuse(name, module)
    graph_module = trace(copied(model), image_shape)
    if cut_softmax(graph_module):
        warnings.warn(_ENDS_IN_SOFTMAX.format(type(model).__name__), stacklevel=2)
    modules = dict(graph_module.named_modules())
    layers = [n for n in graph_module.graph.nodes if grids.is_layer(n, modules)]
    if not layers:
        raise ModelError(f"{type(model).__name__}: no convolution or linear layer found, nothing to quantize")
    bits = _bits_by_layer([str(n.target) for n in layers], spec)

    graph_module.add_module("quantizers", nn.ModuleDict())
    expand_attention(graph_module)
    _replace_relus(graph_module, modules, spec)
    of_input = None if input_scale is None else InputQuantizer(input_scale, input_codes)
    for node in layers:
        _quantize_operand(graph_module, source(node), spec, of_input)
    for node in list(graph_module.graph.nodes):
        for operand in grids.matrix_operands(node, modules):
            _quantize_operand(graph_module, grids.before_views(operand, modules), spec, of_input)
    _assign_activation_bits(graph_module, bits, spec)
    if spec.quantize_adds:
        _quantize_added(graph_module, spec)
    for name, layer_bits in bits.items():
        layer = graph_module.get_submodule(name)
        weight_quantizer = WeightQuantizer(layer.weight, layer_bits, spec.weight_quantizer)  # type: ignore[arg-type]
        parametrize.register_parametrization(layer, "weight", weight_quantizer)
    graph_module.graph.lint()
    graph_module.delete_all_unused_submodules()
    graph_module.recompile()
    graph_module.meta[_SPEC] = spec
    return graph_module


def spec_of(network: nn.Module) -> QuantSpec:
    """Return what a network from `quantize` was quantized by; of any other one, float."""
    meta = network.meta if isinstance(network, fx.GraphModule) else {}
    spec: QuantSpec = meta.get(_SPEC) or QuantSpec(FLOAT_BITS)
    return spec


def _refuse(name: str, module: nn.Module) -> None:
    """Refuse a module whose weight or statistics are not there to be folded.

    Raises:
        ModelError: it has no running statistics, or its weight is computed from something else.
    """
    what = f"{name} ({type(module).__name__.removeprefix('Parametrized')})"
    if isinstance(module, NORMS) and module.running_mean is None:
        raise ModelError(
            f"{what}: has no running statistics, so that an image's logits depend on its batch; "
            "make it with track_running_stats=True"
        )
    if isinstance(module, LAYERS) and parametrize.is_parametrized(module):
        by = type(module.parametrizations["weight"][0]).__name__.lstrip("_")  # type: ignore[index]
        raise ModelError(
            f"{what}: its weight is computed by {by}; fold it first: "
            f"torch.nn.utils.parametrize.remove_parametrizations(model.{name}, 'weight')"
        )
    if isinstance(module, LAYERS) and "weight" not in dict(module.named_parameters(recurse=False)):
        raise ModelError(
            f"{what}: its weight is computed before every call; fold it first: "
            f"torch.nn.utils.remove_weight_norm(model.{name}), or remove_spectral_norm"
        )


def _giving_logits(model: nn.Module) -> nn.Module:
    """Return a float network, or a copy without the softmax that it ends in."""
    try:
        network = trace(copied(model))
    except ModelError:  # it can be trained all the same
        return model
    if not cut_softmax(network):
        return model
    warnings.warn(_ENDS_IN_SOFTMAX.format(type(model).__name__), stacklevel=3)
    return network


@torch.no_grad()
def start_alphas(model: nn.Module, images: Tensor, *, quantile: float = 0.999) -> None:
    """Set every PACT's alpha to a quantile of the magnitudes it is about to clip, layer after layer.

    The statistics of BatchNorm stay as they are.

    A constant start such as the paper's 10 leaves most codes unused until the decay has brought alpha down.

    Args:
        model: from `quantize`.
        images: normalized training images [N, C, H, W]; a few hundred are enough.
        quantile: share of the positive activations that are not clipped at the start.
    """

    def set_alpha(quantizer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        magnitudes = (inputs[0].abs() if quantizer.qmin else inputs[0].clamp_min(0)).flatten()
        positive = magnitudes[magnitudes > 0]
        if len(positive):
            rank = max(1, round(quantile * len(positive)))
            alpha = positive.kthvalue(rank).values.clamp_max(quantizer.largest_start)  # type: ignore[arg-type]
            quantizer.alpha.copy_(alpha)  # type: ignore[operator]

    handles = [m.register_forward_pre_hook(set_alpha) for m in model.modules() if isinstance(m, PACT)]
    if not handles:
        return
    statistics = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        model(images)
    finally:
        for buffer, before in statistics:
            buffer.copy_(before)
        for handle in handles:
            handle.remove()


def quantizers(model: nn.Module) -> dict[str, Quantizer]:
    """Return the activation quantizers of a model by short name, in the order of the forward pass."""
    found = {n: m for n, m in model.named_modules() if isinstance(m, PACT | InputQuantizer)}
    if isinstance(model, fx.GraphModule):
        order = [str(n.target) for n in model.graph.nodes if n.op == "call_module"]
        found = dict(sorted(found.items(), key=lambda item: order.index(item[0])))
    return {name.removeprefix("quantizers."): module for name, module in found.items()}


def weight_quantizer(layer: nn.Module) -> WeightQuantizer | None:
    """Return the weight quantizer of a layer, or None where its weight is float."""
    if not parametrize.is_parametrized(layer, "weight"):
        return None
    first = layer.parametrizations["weight"][0]  # type: ignore[index]
    return first if isinstance(first, WeightQuantizer) else None


def float_weight(layer: nn.Module) -> Tensor:
    """Return the float weight that training updates, below any quantizer."""
    weight: Any = layer.weight
    if weight_quantizer(layer) is not None:
        weight = layer.parametrizations["weight"].original  # type: ignore[index, union-attr]
    assert isinstance(weight, Tensor)
    return weight


def _bits_by_layer(names: list[str], spec: QuantSpec) -> dict[str, int]:
    unknown = set(spec.layer_bits) - set(names)
    if unknown:
        raise OptionError(f"layer bits: no layer named {sorted(unknown)[0]!r}; expected one of {', '.join(names)}")
    bits = dict.fromkeys(names, spec.bits)
    bits[names[0]] = bits[names[-1]] = spec.first_last_bits
    return bits | spec.layer_bits


def _replace_relus(graph_module: fx.GraphModule, modules: dict[str, nn.Module], spec: QuantSpec) -> None:
    for node in list(graph_module.graph.nodes):
        bound = signs.relu_bound(node, modules)
        if bound is not None:
            pact = PACT(spec.alpha, 8, full_range=spec.full_range)
            pact.largest_start = bound
            _insert(graph_module, node, node.name, pact, source(node))
            graph_module.graph.erase_node(node)


def _quantize_operand(
    graph_module: fx.GraphModule, operand: fx.Node, spec: QuantSpec, of_input: InputQuantizer | None
) -> None:
    """Put a quantizer after `operand`, where its value is not on a grid already."""
    modules = dict(graph_module.named_modules())
    if grids.grid_source(operand, modules) is not None:
        return
    origin = grids.origin(operand, modules)
    quantizer: Quantizer
    if origin.op == "placeholder" and of_input is not None:
        operand, quantizer = origin, of_input
    else:
        signed = not signs.never_negative(operand, modules)
        quantizer = PACT(spec.alpha, 8, signed=signed, full_range=spec.full_range)
    _insert(graph_module, operand, f"{operand.name}_grid", quantizer, operand)


def _quantize_added(graph_module: fx.GraphModule, spec: QuantSpec) -> None:
    """Put a grid on every addend that has none, of the sums that are rounded next."""
    modules = dict(graph_module.named_modules())
    for node in list(graph_module.graph.nodes):
        is_sum = node.op == "call_function" and node.target in _SUMS
        if is_sum and any(isinstance(modules.get(str(user.target)), PACT) for user in node.users):
            for operand in node.all_input_nodes:
                _quantize_operand(graph_module, operand, spec, None)


def _insert(graph_module: fx.GraphModule, node: fx.Node, name: str, module: Quantizer, operand: fx.Node) -> None:
    """Put `module` after `node`, and let every user of `node` read the quantized value instead."""
    graph_module.get_submodule("quantizers").add_module(name, module)
    with graph_module.graph.inserting_after(node):
        quantized = graph_module.graph.call_module(f"quantizers.{name}", (operand,))
    node.replace_all_uses_with(quantized, delete_user_cb=lambda user: user is not quantized)


def _assign_activation_bits(graph_module: fx.GraphModule, bits: dict[str, int], spec: QuantSpec) -> None:
    """Give each activation the bits of the layer that reads it, the most where several do."""
    modules = dict(graph_module.named_modules())
    readers: dict[Quantizer, list[int]] = {}
    for node in graph_module.graph.nodes:
        if grids.is_layer(node, modules):
            quantizer = quantizer_of(source(node), modules)
            readers.setdefault(quantizer, []).append(bits[str(node.target)])
        for operand in grids.matrix_operands(node, modules):
            readers.setdefault(quantizer_of(operand, modules), []).append(spec.bits)
    for pact in graph_module.get_submodule("quantizers").children():
        if isinstance(pact, PACT):
            pact.set_bits(max(readers.get(pact, [spec.bits])), full_range=spec.full_range)


def quantizer_of(node: fx.Node, modules: dict[str, nn.Module]) -> Quantizer:
    """Return the quantizer on whose grid the value of `node` lies."""
    found = grids.grid_source(node, modules)
    assert found is not None
    quantizer = modules[str(found.target)]
    assert isinstance(quantizer, PACT | InputQuantizer)
    return quantizer
