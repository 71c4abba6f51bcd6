"""Turn any convolutional `nn.Module` into its PACT-quantized form, without editing its source.

`quantize` traces the module with torch.fx, replaces every ReLU call by a PACT of its own (a ReLU module that is
used three times gets three), registers a weight quantizer on every convolution and linear layer, and puts a
quantizer before any such layer whose input would otherwise not lie on a grid. Everything else stays float and is
listed by `describe`.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from runtime.errors import ModelError, OptionError
from train.quantizers import PACT, InputQuantizer, WeightQuantizer

FLOAT_BITS = 32
QUANTIZED_BITS = (2, 3, 4, 5, 6, 7, 8)
WEIGHT_METHODS = ("absmax", "sawb", "lsq")

Quantizer = PACT | InputQuantizer

_QUANTIZED_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_RELU_MODULES = (nn.ReLU, nn.ReLU6)
_RELU_FUNCTIONS = (F.relu, F.relu6, torch.relu, torch.relu_)
_RELU_METHODS = ("relu", "relu_")
# What hands codes on as they are: a maximum, a copy, another shape. Dropout is the identity when deployed.
_GRID_KEEPING_MODULES = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool2d, nn.Flatten,
                         nn.Unflatten, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d,
                         nn.PixelShuffle, nn.ChannelShuffle)  # fmt: skip
_GRID_KEEPING_FUNCTIONS = (F.max_pool2d, F.adaptive_max_pool2d, F.dropout, torch.flatten, torch.reshape,
                           torch.permute, torch.transpose, torch.squeeze, torch.unsqueeze,
                           operator.getitem)  # fmt: skip
_SUMS = (operator.add, operator.iadd, torch.add)
_GRID_KEEPING_METHODS = (
    "flatten",
    "view",
    "reshape",
    "permute",
    "transpose",
    "contiguous",
    "squeeze",
    "unsqueeze",
)
_SIGN_KEEPING_MODULES = (nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d)
_SIGN_KEEPING_FUNCTIONS = (F.avg_pool2d, F.adaptive_avg_pool2d, torch.mean)
_SIGN_KEEPING_METHODS = ("mean",)


@dataclass(frozen=True)
class QuantSpec:
    """How a network is quantized.

    Args:
        bits: weights and activations, 2 to 8 (32 leaves the network in float).
        weights: weight quantizer, one of WEIGHT_METHODS.
        first_last_bits: bits of the first and the last layer.
        full_grid: 8-bit activations use 0..255 instead of the portable 0..127 (not exact on TensorRT).
        alpha: initial clipping value of every PACT, until `start_alphas` sets it from data.
        layer_bits: bits of single layers by module name, overriding the above.
        addends: what is summed before a PACT gets 8-bit grids of its own, so that ONNX Runtime sums codes.
    """

    bits: int = 8
    weights: str = "absmax"
    first_last_bits: int = 8
    full_grid: bool = False
    alpha: float = 6.0
    layer_bits: dict[str, int] = field(default_factory=dict)
    addends: bool = False

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            OptionError: a field is outside its range.
        """
        if self.bits not in (*QUANTIZED_BITS, FLOAT_BITS):
            raise OptionError(f"bits {self.bits!r}: expected a whole number from 2 to 8, or 32 for float")
        if self.bits == FLOAT_BITS and self.layer_bits:
            raise OptionError(
                "bits 32 leave every layer in float, but bits of single layers are given; choose one"
            )
        for name, bits in {"first and last layer": self.first_last_bits, **self.layer_bits}.items():
            if bits not in QUANTIZED_BITS:
                raise OptionError(f"bits {bits!r} of {name}: expected a whole number from 2 to 8")
        if self.weights not in WEIGHT_METHODS:
            raise OptionError(f"weight quantizer {self.weights!r}: expected one of {', '.join(WEIGHT_METHODS)}")
        if not self.alpha > 0:
            raise OptionError(f"alpha {self.alpha!r}: expected a positive clipping value")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> QuantSpec:
        """Return the spec a checkpoint holds.

        Raises:
            OptionError: a field is unknown or out of range.
        """
        unknown = set(values) - {f.name for f in fields(cls)}
        if unknown:
            raise OptionError(f"quantization spec: unknown fields {sorted(unknown)}; made by a newer version")
        return cls(**values)


@dataclass(frozen=True)
class LayerDescription:
    """What became of one layer: `bits` is None where it stays float, then `reason` says why."""

    name: str
    kind: str
    bits: int | None
    activation: str | None = None
    reason: str = ""


def quantize(model: nn.Module, spec: QuantSpec, *, input_scale: float | None = None) -> nn.Module:
    """Return the quantized form of `model`; its parameters are shared with the original, not copied.

    Args:
        model: any module that torch.fx can trace, taking one image tensor [N, C, H, W].
        spec: bits and quantizers; bits = 32 returns the model as it is.
        input_scale: step of the input's int8 grid (`InputSpec.grid_scale`); None learns a signed clip instead.

    Raises:
        ModelError: the module's control flow depends on data, or no layer can be quantized.
        OptionError: `spec.layer_bits` names a layer that is not there.
    """
    if spec.bits == FLOAT_BITS:
        return model
    graph_module = _trace(model)
    modules = dict(graph_module.named_modules())
    layers = [n for n in graph_module.graph.nodes if _is_module(n, modules, _QUANTIZED_LAYERS)]
    if not layers:
        raise ModelError(f"{type(model).__name__}: no convolution or linear layer found, nothing to quantize")
    bits = _bits_by_layer([str(n.target) for n in layers], spec)

    graph_module.add_module("quantizers", nn.ModuleDict())
    _replace_relus(graph_module, modules, spec)
    for node in layers:
        _quantize_input(graph_module, node, spec, input_scale)
    _assign_activation_bits(graph_module, layers, bits, spec)
    if spec.addends:
        _quantize_addends(graph_module, spec)
    for name, layer_bits in bits.items():
        layer = graph_module.get_submodule(name)
        weight_quantizer = WeightQuantizer(layer.weight, layer_bits, spec.weights)  # type: ignore[arg-type]
        parametrize.register_parametrization(layer, "weight", weight_quantizer)
    graph_module.graph.lint()
    graph_module.delete_all_unused_submodules()
    graph_module.recompile()
    return graph_module


@torch.no_grad()
def start_alphas(model: nn.Module, images: Tensor, *, quantile: float = 0.999) -> None:
    """Set every PACT's alpha to a quantile of the magnitudes it is about to clip, layer after layer.

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
            quantizer.alpha.copy_(positive.kthvalue(rank).values)  # type: ignore[operator]

    handles = [m.register_forward_pre_hook(set_alpha) for m in model.modules() if isinstance(m, PACT)]
    if not handles:
        return
    try:
        model(images)
    finally:
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


def describe(model: nn.Module) -> list[LayerDescription]:
    """List every layer with parameters: its bits, the grid of its input, or why it stays float."""
    rows = []
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if isinstance(module, PACT | WeightQuantizer | parametrize.ParametrizationList):
            continue
        quantizer = weight_quantizer(module)
        kind = type(module).__name__.removeprefix("Parametrized")
        if quantizer is not None:
            rows.append(LayerDescription(name, kind, quantizer.bits, _input_grid(model, modules, name)))
        elif any(True for _ in module.parameters(recurse=False)):
            norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
            reason = "folded into the layer before it at export" if norm else "no quantizer for this layer"
            rows.append(LayerDescription(name, kind, None, reason=reason))
    return rows


def _trace(model: nn.Module) -> fx.GraphModule:
    try:
        return fx.symbolic_trace(model)
    except (fx.proxy.TraceError, TypeError) as error:
        raise ModelError(
            f"{type(model).__name__}: torch.fx cannot trace it ({str(error).splitlines()[0]}); "
            "make its control flow independent of the data"
        ) from error


def _bits_by_layer(names: list[str], spec: QuantSpec) -> dict[str, int]:
    unknown = set(spec.layer_bits) - set(names)
    if unknown:
        raise OptionError(f"layer bits: no layer named {sorted(unknown)[0]!r}; expected one of {', '.join(names)}")
    bits = dict.fromkeys(names, spec.bits)
    bits[names[0]] = bits[names[-1]] = spec.first_last_bits
    return bits | spec.layer_bits


def _replace_relus(graph_module: fx.GraphModule, modules: dict[str, nn.Module], spec: QuantSpec) -> None:
    for node in list(graph_module.graph.nodes):
        if _calls(node, modules, _RELU_MODULES, _RELU_FUNCTIONS, _RELU_METHODS):
            _insert(graph_module, node, node.name, PACT(spec.alpha, 8, full_grid=spec.full_grid), node.args[0])
            graph_module.graph.erase_node(node)


def _quantize_input(
    graph_module: fx.GraphModule, node: fx.Node, spec: QuantSpec, input_scale: float | None
) -> None:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    if _grid_source(graph_module, source) is not None:
        return
    if source.op == "placeholder" and input_scale is not None:
        quantizer: Quantizer = InputQuantizer(input_scale)
    else:
        signed = not _never_negative(graph_module, source)
        quantizer = PACT(spec.alpha, 8, signed=signed, full_grid=spec.full_grid)
    _insert(graph_module, source, f"{source.name}_grid", quantizer, source)


def _quantize_addends(graph_module: fx.GraphModule, spec: QuantSpec) -> None:
    """Put a grid on every addend that has none, of the sums that are rounded next."""
    modules = dict(graph_module.named_modules())
    for node in list(graph_module.graph.nodes):
        is_sum = node.op == "call_function" and node.target in _SUMS
        if is_sum and any(_is_module(user, modules, (PACT,)) for user in node.users):
            for source in node.all_input_nodes:
                if _grid_source(graph_module, source) is None:
                    signed = not _never_negative(graph_module, source)
                    quantizer = PACT(spec.alpha, 8, signed=signed, full_grid=spec.full_grid)
                    _insert(graph_module, source, f"{source.name}_grid", quantizer, source)


def _insert(graph_module: fx.GraphModule, node: fx.Node, name: str, module: Quantizer, source: Any) -> None:
    """Put `module` after `node`, and let every user of `node` read the quantized value instead."""
    graph_module.get_submodule("quantizers").add_module(name, module)
    with graph_module.graph.inserting_after(node):
        quantized = graph_module.graph.call_module(f"quantizers.{name}", (source,))
    node.replace_all_uses_with(quantized, delete_user_cb=lambda user: user is not quantized)


def _assign_activation_bits(
    graph_module: fx.GraphModule, layers: list[fx.Node], bits: dict[str, int], spec: QuantSpec
) -> None:
    """Give each activation the bits of the layer that reads it, the most where several do."""
    readers: dict[str, list[int]] = {}
    for node in layers:
        source = _grid_source(graph_module, node.args[0])  # type: ignore[arg-type]
        assert source is not None
        readers.setdefault(str(source.target), []).append(bits[str(node.target)])
    for name, quantizer in graph_module.get_submodule("quantizers").named_children():
        if isinstance(quantizer, PACT):
            chosen = max(readers.get(f"quantizers.{name}", [spec.bits]))
            quantizer.set_bits(chosen, full_grid=spec.full_grid)


def _grid_source(graph_module: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """Return the quantizer whose grid the value of `node` lies on, or None."""
    modules = dict(graph_module.named_modules())
    while True:
        if _is_module(node, modules, (PACT, InputQuantizer)):
            return node
        keeps = _calls(node, modules, _GRID_KEEPING_MODULES, _GRID_KEEPING_FUNCTIONS, _GRID_KEEPING_METHODS)
        keeps = keeps or _pads_with_zeros(node)
        if not keeps or not isinstance(node.args[0], fx.Node):
            return None
        node = node.args[0]


def _pads_with_zeros(node: fx.Node) -> bool:
    if node.target is not F.pad:
        return False
    value = node.kwargs.get("value", node.args[3] if len(node.args) > 3 else None)
    return value in (None, 0)


def _never_negative(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    modules = dict(graph_module.named_modules())
    module_types = _SIGN_KEEPING_MODULES + _GRID_KEEPING_MODULES
    functions = _SIGN_KEEPING_FUNCTIONS + _GRID_KEEPING_FUNCTIONS
    methods = _SIGN_KEEPING_METHODS + _GRID_KEEPING_METHODS
    while _calls(node, modules, module_types, functions, methods):
        node = node.args[0]  # type: ignore[assignment]
    if _is_module(node, modules, (nn.Sigmoid,)) or node.target in (torch.sigmoid, F.sigmoid, "sigmoid"):
        return True
    quantizer = modules.get(str(node.target)) if node.op == "call_module" else None
    return isinstance(quantizer, PACT) and quantizer.qmin == 0


def _input_grid(model: nn.Module, modules: dict[str, nn.Module], name: str) -> str | None:
    if not isinstance(model, fx.GraphModule):
        return None
    node = next(n for n in model.graph.nodes if n.op == "call_module" and n.target == name)
    source = _grid_source(model, node.args[0])
    if source is None:
        return None
    quantizer = modules[str(source.target)]
    assert isinstance(quantizer, PACT | InputQuantizer)
    return f"{quantizer.bits}-bit {quantizer.qmin}..{quantizer.qmax}, scale {quantizer.scale.item():.4g}"


def _is_module(node: fx.Node, modules: dict[str, nn.Module], types: tuple[type, ...]) -> bool:
    return node.op == "call_module" and isinstance(modules.get(str(node.target)), types)


def _calls(
    node: fx.Node,
    modules: dict[str, nn.Module],
    types: tuple[type, ...],
    functions: tuple[Any, ...],
    methods: tuple[str, ...],
) -> bool:
    if node.op == "call_function":
        return node.target in functions
    if node.op == "call_method":
        return node.target in methods
    return _is_module(node, modules, types)
