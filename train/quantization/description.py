"""What became of each layer of a quantized network, as lines for a person: grids, bits, reasons, warnings."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx, nn
from torch.nn.utils import parametrize

from train.quantization import grids
from train.quantization.quantize import float_weight, quantizer_of, weight_quantizer
from train.quantization.quantizers import PACT, WeightQuantizer
from train.quantization.tracing import NORMS, source


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
            bits = max(quantizer_of(operand, modules).bits for operand in operands)
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


def _grid(node: fx.Node, modules: dict[str, nn.Module]) -> str | None:
    if grids.grid_source(node, modules) is None:
        return None
    quantizer = quantizer_of(node, modules)
    return f"{quantizer.bits}-bit {quantizer.qmin}..{quantizer.qmax}, scale {quantizer.scale.item():.4g}"
