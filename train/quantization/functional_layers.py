"""Convolutions and linear layers that a network calls as functions of its own parameters, made modules.

`F.conv2d(x, self.weight, self.bias, ...)` in a forward, as in the "same" convolutions of networks that came from
TensorFlow, is a layer like any other: only a module can hold the quantizer of its weight.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

_CONVOLUTIONS: dict[Any, type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]] = {
    torch.conv1d: nn.Conv1d, torch.conv2d: nn.Conv2d, torch.conv3d: nn.Conv3d,
    F.conv1d: nn.Conv1d, F.conv2d: nn.Conv2d, F.conv3d: nn.Conv3d,
}  # fmt: skip
_ARGUMENTS = inspect.Signature([
    inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default)
    for name, default in (("input", None), ("weight", None), ("bias", None), ("stride", 1), ("padding", 0),
                          ("dilation", 1), ("groups", 1))
])  # fmt: skip


def make_layers(network: fx.GraphModule) -> None:
    """Replace, in place, every such call by one of a module with the same parameters.

    The module stands where the parameters' owner stood, so that their names stay; where the owner is more than a
    holder of parameters, it is named after the weight.
    """
    made: dict[tuple[Any, ...], str] = {}
    for node in list(network.graph.nodes):
        if node.op != "call_function" or node.target not in (*_CONVOLUTIONS, F.linear):
            continue
        try:
            given = _ARGUMENTS.bind(*node.args, **node.kwargs)
        except TypeError:
            continue
        given.apply_defaults()
        x, weight, bias, *settings = given.arguments.values()
        if not _is_parameter(network, weight) or not (bias is None or _is_parameter(network, bias)):
            continue
        if any(isinstance(setting, fx.Node) for value in settings for setting in _flat(value)):
            continue  # a stride that depends on the image
        key = (node.target, str(weight.target), str(bias.target) if bias else None, str(settings))
        if key not in made:
            made[key] = _add(network, node.target, weight, bias, settings)
        with network.graph.inserting_after(node):
            call = network.graph.call_module(made[key], (x,))
        node.replace_all_uses_with(call)
        network.graph.erase_node(node)


def _add(
    network: fx.GraphModule,
    function: Callable[..., Any],
    weight: fx.Node,
    bias: fx.Node | None,
    settings: list[Any],
) -> str:
    """Put a layer with these parameters into the network and return its name."""
    w, b = (_attribute(network, node) if node is not None else None for node in (weight, bias))
    assert isinstance(w, nn.Parameter)
    layer: nn.Module
    with torch.device("meta"):  # its own parameters are never read
        if function is F.linear:
            layer = nn.Linear(w.shape[1], w.shape[0], bias=b is not None)
        else:
            stride, padding, dilation, groups = settings
            kind: Any = _CONVOLUTIONS[function]
            channels, kernel = (w.shape[1] * groups, w.shape[0]), tuple(w.shape[2:])
            layer = kind(*channels, kernel, stride, padding, dilation, groups, b is not None)
    for parameter, value in (("weight", w), ("bias", b)):
        setattr(layer, parameter, value)
    path, _, attribute = str(weight.target).rpartition(".")
    owner = network.get_submodule(path)
    parameters = {name for name, _ in owner.named_parameters(recurse=False)}
    called = any(n.op == "call_module" and n.target == path for n in network.graph.nodes)
    if (
        path
        and attribute == "weight"
        and type(owner) is nn.Module
        and not called
        and parameters <= {"weight", "bias"}
    ):
        for name, child in owner.named_children():
            layer.add_module(name, child)
        name = path
    else:
        name = f"{path}.{attribute}_layer" if path else f"{attribute}_layer"
    network.add_submodule(name, layer.train(owner.training))
    return name


def _is_parameter(network: fx.GraphModule, node: Any) -> bool:
    return (
        isinstance(node, fx.Node) and node.op == "get_attr" and isinstance(_attribute(network, node), nn.Parameter)
    )


def _attribute(network: fx.GraphModule, node: fx.Node) -> Tensor | None:
    path, _, name = str(node.target).rpartition(".")
    found: Tensor | None = getattr(network.get_submodule(path), name, None)
    return found


def _flat(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,)
