"""Turn any `nn.Module` into its PACT-quantized form, without editing its source.

`quantize` traces the module with torch.fx, replaces every ReLU call by a PACT of its own (a ReLU module that is
used three times gets three), registers a weight quantizer on every convolution and linear layer, and puts a
quantizer before any such layer, and any product of two activations as in attention, whose operand would otherwise
not lie on a grid. Everything else stays float and is listed by `describe`.
"""

from __future__ import annotations

import operator
import warnings
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from runtime.errors import ModelError, OptionError
from train.choices import FLOAT_BITS, QUANTIZED_BITS, WEIGHT_METHODS
from train.quantization import grids, signs
from train.quantization.quantizers import INPUT_QMAX, INPUT_QMIN, PACT, InputQuantizer, WeightQuantizer
from train.quantization.tracing import LAYERS, NORMS, copied, cut_softmax, expand_attention, source, trace

Quantizer = PACT | InputQuantizer

# Under which a quantized graph remembers its QuantSpec.
_SPEC = "clearpact.quant"
_ENDS_IN_SOFTMAX = "{} ends in a softmax: what that is given is taken as the logits"
# Field of older checkpoints -> what it is called now.
_RENAMED = {"weights": "weight_quantizer", "full_grid": "full_range", "addends": "quantize_adds"}
_SUMS = (operator.add, operator.iadd, torch.add)


@dataclass(frozen=True)
class QuantSpec:
    """How a network is quantized.

    Args:
        bits: weights and activations, 2 to 8 (32 leaves the network in float).
        weight_quantizer: one of train.choices.WEIGHT_METHODS.
        first_last_bits: bits of the first and the last layer.
        full_range: 8-bit activations use 0..255 (signed: -128..127) instead of 0..127 (-127..127), which every
            engine has; not exact on TensorRT.
        alpha: initial clipping value of every PACT, until `start_alphas` sets it from data.
        layer_bits: bits of single layers by module name, overriding the above.
        quantize_adds: the inputs of an addition before a PACT get 8-bit grids of their own, so that ONNX Runtime
            adds codes.
        bias_grid: evaluated and shipped, biases are whole steps of their accumulators (accumulators.py), so that
            ONNX Runtime's integer kernels add them exactly.
    """

    bits: int = 8
    weight_quantizer: str = "absmax"
    first_last_bits: int = 8
    full_range: bool = False
    alpha: float = 6.0
    layer_bits: dict[str, int] = field(default_factory=dict)
    quantize_adds: bool = False
    bias_grid: bool = True

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
        if self.weight_quantizer not in WEIGHT_METHODS:
            raise OptionError(
                f"weight quantizer {self.weight_quantizer!r}: expected one of {', '.join(WEIGHT_METHODS)}"
            )
        if not self.alpha > 0:
            raise OptionError(f"alpha {self.alpha!r}: expected a positive clipping value")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> QuantSpec:
        """Return the spec a checkpoint holds.

        Raises:
            OptionError: a field is unknown or out of range.
        """
        values = {_RENAMED.get(name, name): value for name, value in values.items()}
        unknown = set(values) - {f.name for f in fields(cls)}
        if unknown:
            raise OptionError(f"quantization spec: unknown fields {sorted(unknown)}; made by a newer version")
        # A network of a version that had no such grid was evaluated, and is to ship, without.
        return cls(**{"bias_grid": False} | values)


@dataclass(frozen=True)
class LayerDescription:
    """What became of one layer: `bits` is None where it stays float, then `reason` says why.

    `activation` is the grid of its input, as text, and `quantizer` who puts it there, as `quantizers` names it.
    """

    name: str
    kind: str
    bits: int | None
    activation: str | None = None
    quantizer: str | None = None
    reason: str = ""


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


def warnings_of(model: nn.Module) -> list[str]:
    """Return a line for each layer whose codes have lost what they stood for: channels that are nothing but 0."""
    return [
        f"{name}: the weights of {count} of {float_weight(model.get_submodule(name)).shape[0]} channels have all "
        "become code 0; nothing that they read counts any more"
        for name, count in all_zero_channels(model, rounded_away=True).items()
    ]


def all_zero_channels(model: nn.Module, *, rounded_away: bool = False) -> dict[str, int]:
    """Return by layer how many of its output channels have no weight code but 0, where there are any.

    Args:
        model: from `quantize`.
        rounded_away: only of channels whose weights are not 0 themselves.
    """
    found = {}
    for name, layer in model.named_modules():
        quantizer = weight_quantizer(layer)
        if quantizer is not None:
            weight = float_weight(layer).flatten(1)
            zero = (quantizer.codes(float_weight(layer)) == 0).flatten(1).all(1)
            count = int((zero & (weight != 0).any(1) if rounded_away else zero).sum())
            if count:
                found[name] = count
    return found


def describe(model: nn.Module) -> list[LayerDescription]:
    """List every layer with parameters and every product of activations: bits and grids, or why it stays float."""
    modules = dict(model.named_modules())
    graph = model.graph if isinstance(model, fx.GraphModule) else None
    calls: dict[str, fx.Node] = {}
    for node in graph.nodes if graph is not None else ():
        calls.setdefault(str(node.target), node)
    rows = []
    for name, module in modules.items():
        if isinstance(module, PACT | WeightQuantizer | parametrize.ParametrizationList | fx.GraphModule):
            continue
        quantizer = weight_quantizer(module)
        kind = type(module).__name__.removeprefix("Parametrized")
        if quantizer is not None:
            operand = source(calls[name]) if name in calls else None
            grid = None if operand is None else _grid(operand, modules)
            read = None if operand is None else grids.grid_source(operand, modules)
            origin = None if read is None else str(read.target).removeprefix("quantizers.")
            rows.append(LayerDescription(name, kind, quantizer.bits, grid, origin))
        elif type(module) is not nn.Module and any(True for _ in module.parameters(recurse=False)):
            rows.append(LayerDescription(name, kind, None, reason=_why_float(module, calls.get(name), modules)))
    return rows + (_describe_functions(graph, modules) if graph is not None else [])


def _describe_functions(graph: fx.Graph, modules: dict[str, nn.Module]) -> list[LayerDescription]:
    """List what is no module: parameters that a forward uses by name, products and attention by function."""
    rows = []
    for node in graph.nodes:
        operands = grids.matrix_operands(node, modules)
        if operands and all(grids.grid_source(operand, modules) for operand in operands):
            bits = max(_quantizer(operand, modules).bits for operand in operands)
            factors = " by ".join(str(_grid(operand, modules)) for operand in operands)
            rows.append(LayerDescription(node.name, "MatMul", bits, factors))
        elif node.op == "get_attr":
            rows.append(LayerDescription(str(node.target), "Parameter", None, reason="used outside of a layer"))
        elif node.target in grids.FLOAT_FUNCTIONS or grids.MATMUL.include(node, modules):
            kind = getattr(node.target, "__name__", str(node.target))
            rows.append(LayerDescription(node.name, kind, None, reason="a function; only layers are quantized"))
    return rows


def _why_float(module: nn.Module, node: fx.Node | None, modules: dict[str, nn.Module]) -> str:
    if isinstance(module, NORMS):
        before = source(node) if node is not None else None
        if before is None or (grids.is_layer(before, modules) and grids.norm_after(before, modules) is node):
            return "folded into the layer before it at export"
        return "not right after a layer, and not folded"
    return "no quantizer for this layer"


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
            quantizer = _quantizer(source(node), modules)
            readers.setdefault(quantizer, []).append(bits[str(node.target)])
        for operand in grids.matrix_operands(node, modules):
            readers.setdefault(_quantizer(operand, modules), []).append(spec.bits)
    for pact in graph_module.get_submodule("quantizers").children():
        if isinstance(pact, PACT):
            pact.set_bits(max(readers.get(pact, [spec.bits])), full_range=spec.full_range)


def _quantizer(node: fx.Node, modules: dict[str, nn.Module]) -> Quantizer:
    """Return the quantizer on whose grid the value of `node` lies."""
    found = grids.grid_source(node, modules)
    assert found is not None
    quantizer = modules[str(found.target)]
    assert isinstance(quantizer, PACT | InputQuantizer)
    return quantizer


def _grid(node: fx.Node, modules: dict[str, nn.Module]) -> str | None:
    if grids.grid_source(node, modules) is None:
        return None
    quantizer = _quantizer(node, modules)
    return f"{quantizer.bits}-bit {quantizer.qmin}..{quantizer.qmax}, scale {quantizer.scale.item():.4g}"
