"""A network as a graph: traced by torch.fx, its in-place operations and dropout written as what they mean."""

from __future__ import annotations

import ast
import functools
import inspect
import linecache
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from runtime.errors import ModelError

_OUT_OF_PLACE = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}
_DROPOUTS: dict[Any, Callable[[float], nn.Module]] = {
    F.dropout: nn.Dropout, F.dropout1d: nn.Dropout1d, F.dropout2d: nn.Dropout2d, F.dropout3d: nn.Dropout3d
}  # fmt: skip


class _Tracer(fx.Tracer):
    def to_bool(self, obj: fx.Proxy) -> bool:
        """Hold what a network asserts about its image's shape for true; refuse any other decision."""
        asker = inspect.currentframe()
        for _ in range(2):  # Proxy.__bool__, and the network's own code
            asker = asker.f_back if asker is not None else None
        if asker is not None and asker.f_lineno in _asserting_lines(asker.f_code.co_filename):
            return True
        return super().to_bool(obj)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Keep whole what is part of PyTorch, and small modules that act in training only, such as DropPath."""
        return super().is_leaf_module(m, module_qualified_name) or _depends_on_mode(m)


def trace(model: nn.Module) -> fx.GraphModule:
    """Return a network as a graph, with in-place operations and functional dropout written as what they mean.

    Raises:
        ModelError: its control flow depends on the data, or on more than dropout between training and evaluation.
    """
    if isinstance(model, fx.GraphModule):
        return model
    graphs = _in_both_modes(model, _graph)
    if _calls_of(graphs[0]) != _calls_of(graphs[1]):
        raise ModelError(
            f"{type(model).__name__}: its forward reads self.training, and one graph cannot hold both; "
            "leave that to modules such as nn.Dropout"
        )
    graph = graphs[0]
    traced = fx.GraphModule(model, graph, type(model).__name__)
    modules = dict(traced.named_modules())
    for node in list(graph.nodes):
        if node.target is torch._assert:
            graph.erase_node(node)
        elif _writes_in_place(node, modules):
            source(node).replace_all_uses_with(node, delete_user_cb=functools.partial(operator.lt, node))
            node.target = _OUT_OF_PLACE.get(node.target, node.target)
        elif node.target in _DROPOUTS:
            share = node.kwargs.get("p", node.args[1] if len(node.args) > 1 else 0.5)
            traced.add_module(f"{node.name}_module", _DROPOUTS[node.target](share))
            with graph.inserting_after(node):
                module = graph.call_module(f"{node.name}_module", (source(node),))
            node.replace_all_uses_with(module)
            graph.erase_node(node)
    graph.eliminate_dead_code()
    traced.recompile()
    return traced


def source(node: fx.Node) -> fx.Node:
    """Return the first operand of a call, which must be a tensor."""
    first = node.args[0] if node.args else node.kwargs["input"]
    assert isinstance(first, fx.Node)
    return first


def expand_attention(network: fx.GraphModule) -> None:
    """Write F.scaled_dot_product_attention as its two products, in place, where it has no mask."""
    for node in list(network.graph.nodes):
        if node.target is not F.scaled_dot_product_attention:
            continue
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
        given = dict(zip(names, node.args, strict=False)) | node.kwargs
        if given.get("attn_mask") is not None or given.get("is_causal") or given.get("enable_gqa"):
            continue
        query, key, value = (given[name] for name in names[:3])
        graph = network.graph
        with graph.inserting_before(node):
            scale = given.get("scale")
            if scale is None:
                scale = graph.call_function(operator.pow, (graph.call_method("size", (query, -1)), -0.5))
            turned = graph.call_method("transpose", (key, -2, -1))
            scores = graph.call_function(torch.matmul, (query, turned))
            shares = graph.call_function(
                F.softmax, (graph.call_function(operator.mul, (scores, scale)),), {"dim": -1}
            )
            if given.get("dropout_p"):
                network.add_module(f"{node.name}_dropout", nn.Dropout(given["dropout_p"]))
                shares = graph.call_module(f"{node.name}_dropout", (shares,))
            product = graph.call_function(torch.matmul, (shares, value))
        node.replace_all_uses_with(product)
        graph.erase_node(node)


def _graph(model: nn.Module) -> fx.Graph:
    try:
        return _Tracer().trace(model)
    except (fx.proxy.TraceError, TypeError, RuntimeError) as error:
        raise ModelError(
            f"{type(model).__name__}: torch.fx cannot trace it ({str(error).splitlines()[0]}); "
            "make its control flow independent of the data"
        ) from error


@functools.cache
def _asserting_lines(path: str) -> frozenset[int]:
    """Return the lines of a source file, where it can be read, that belong to an assert statement."""
    try:
        tree = ast.parse("".join(linecache.getlines(path)))
    except SyntaxError:
        return frozenset()
    asserts = [node for node in ast.walk(tree) if isinstance(node, ast.Assert)]
    return frozenset(line for node in asserts for line in range(node.lineno, (node.end_lineno or 0) + 1))


def _depends_on_mode(module: nn.Module) -> bool:
    """Return whether a module without parameters and parts computes something else in training."""
    if any(True for _ in module.children()) or module.state_dict():
        return False
    try:
        graphs = _in_both_modes(module, fx.Tracer().trace)
    except Exception:  # it cannot be traced alone, and the trace of what calls it will say why
        return False
    return _calls_of(graphs[0]) != _calls_of(graphs[1])


def _in_both_modes(model: nn.Module, graph_of: Callable[[nn.Module], fx.Graph]) -> tuple[fx.Graph, fx.Graph]:
    """Return the graphs of a network in training and in evaluation."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        return graph_of(model.train()), graph_of(model.eval())
    finally:
        for module, mode in modes:
            module.training = mode


def _calls_of(graph: fx.Graph) -> list[tuple[str, Any, Any]]:
    """Return what a graph calls with which arguments, but for whether dropout by function drops."""
    calls = []
    for node in graph.nodes:
        drops = node.target in _DROPOUTS or node.target is F.scaled_dot_product_attention
        numbers = () if drops else (node.args, node.kwargs)
        calls.append((node.op, node.target, str(numbers)))
    return calls


def _writes_in_place(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return bool(getattr(modules[str(node.target)], "inplace", False))
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    return node.op == "call_function" and (
        node.target in _OUT_OF_PLACE
        or node.target is torch.relu_
        or (node.kwargs.get("inplace") is True and node.target not in _DROPOUTS)
    )
