"""In-place operations of a traced network: written as what they mean, or refused where a graph cannot say it."""

from __future__ import annotations

import builtins
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from runtime.errors import ModelError

# Python's own in-place operators, and what each computes.
OUT_OF_PLACE: dict[Callable[..., Any], Callable[..., Any]] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    operator.ifloordiv: operator.floordiv,
    operator.imod: operator.mod,
    operator.ipow: operator.pow,
    operator.imatmul: operator.matmul,
}
# The result shares memory with the first operand, or may do so.
_VIEW_FUNCTIONS = (
    operator.getitem, builtins.getattr, torch.flatten, torch.reshape, torch.permute, torch.transpose,
    torch.squeeze, torch.unsqueeze, torch.chunk, torch.split, torch.tensor_split, torch.unbind, torch.narrow,
    torch.select, torch.swapaxes, torch.movedim, torch.ravel, torch.detach, torch.diagonal, torch.unflatten,
    F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout,
)  # fmt: skip
_VIEW_METHODS = {
    "flatten", "unflatten", "view", "view_as", "reshape", "reshape_as", "permute", "transpose", "t", "contiguous",
    "squeeze", "unsqueeze", "chunk", "split", "tensor_split", "unbind", "narrow", "select", "expand", "expand_as",
    "swapaxes", "swapdims", "movedim", "moveaxis", "ravel", "detach", "diagonal", "unfold", "to", "type",
    "type_as", "float", "cpu", "cuda",
}  # fmt: skip
_VIEW_MODULES = (
    nn.Flatten, nn.Unflatten, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)  # fmt: skip


def writes_in_place(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Return whether a call changes its first operand instead of making a new value."""
    if node.op == "call_module":
        return bool(getattr(modules[str(node.target)], "inplace", False))
    if node.op == "call_method":
        return _is_named_in_place(str(node.target))
    return node.op == "call_function" and (
        node.target in OUT_OF_PLACE
        or node.kwargs.get("inplace") is True
        or _is_named_in_place(getattr(node.target, "__name__", ""))
    )


def is_out_of_place(network: fx.GraphModule) -> bool:
    """Return whether nothing reads by its old name what an in-place call has changed."""
    modules = dict(network.named_modules())
    return not any(
        writes_in_place(node, modules) and _read_later(node, network.graph, modules)
        for node in network.graph.nodes
    )


def write_out_of_place(network: fx.GraphModule) -> None:
    """Let the readers that come after an in-place call read its result, in place.

    Raises:
        ModelError: a call writes into memory that something else reads afterwards, or into `out=`.
    """
    modules: dict[str, nn.Module] = dict(network.named_modules())
    for node in list(network.graph.nodes):
        if node.kwargs.get("out") is not None:
            raise ModelError(
                f"{_called(node, modules)}: writes into out=, which a graph cannot show; use its result"
            )
        if not writes_in_place(node, modules):
            continue
        written = _first(node)
        for alias, user in _read_later(node, network.graph, modules):
            if alias is not written:
                raise ModelError(
                    f"{_called(node, modules)}: writes in place into a part or view of {alias.name!r}, which "
                    f"{user.name!r} reads afterwards; write it out of place (x = f(x), inplace=False)"
                )
            user.replace_input_with(written, node)
        node.target = OUT_OF_PLACE.get(node.target, node.target)


def _read_later(node: fx.Node, graph: fx.Graph, modules: dict[str, nn.Module]) -> list[tuple[fx.Node, fx.Node]]:
    """Return who reads after an in-place call what shares memory with its operand: (what, reader)."""
    order = {other: place for place, other in enumerate(graph.nodes)}
    return [
        (alias, user)
        for alias in _aliases(_first(node), graph, modules)
        if order[alias] < order[node]
        for user in alias.users
        if order[user] > order[node]
    ]


def _aliases(value: fx.Node, graph: fx.Graph, modules: dict[str, nn.Module]) -> set[fx.Node]:
    """Return all nodes whose values may share memory with `value`."""
    base = value
    while _is_view(base, modules):
        base = _first(base)
    found = {base}
    for node in graph.nodes:
        if _is_view(node, modules) and _first(node) in found:
            found.add(node)
    return found


def _is_view(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        view: Any = isinstance(modules.get(str(node.target)), _VIEW_MODULES)
    elif node.op == "call_method":
        view = node.target in _VIEW_METHODS
    else:
        view = node.op == "call_function" and node.target in _VIEW_FUNCTIONS
    return bool(view or (node.op.startswith("call_") and writes_in_place(node, modules))) and bool(
        node.all_input_nodes
    )


def _first(node: fx.Node) -> fx.Node:
    first = node.args[0] if node.args else next(iter(node.kwargs.values()))
    return first if isinstance(first, fx.Node) else node.all_input_nodes[0]


def _is_named_in_place(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")


def _called(node: fx.Node, modules: dict[str, nn.Module]) -> str:
    """Return what a call is named in the network's own words."""
    if node.op == "call_module":
        return f"{node.target} ({type(modules[str(node.target)]).__name__})"
    return str(getattr(node.target, "__name__", node.target))
