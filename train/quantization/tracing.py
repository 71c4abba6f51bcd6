"""A network as a graph: traced by torch.fx, its in-place operations and dropout written as what they mean.

What a trace cannot hold would be lost without a word, so the graph and the module are run once on the same image.
"""

from __future__ import annotations

import ast
import copy
import functools
import inspect
import linecache
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from runtime.errors import ModelError
from train.quantization.functional_layers import make_layers
from train.quantization.in_place import OUT_OF_PLACE, is_out_of_place, write_out_of_place

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_DROPOUTS: dict[Any, Callable[[float], nn.Module]] = {
    F.dropout: nn.Dropout, F.dropout1d: nn.Dropout1d, F.dropout2d: nn.Dropout2d, F.dropout3d: nn.Dropout3d
}  # fmt: skip


class _Proxy(fx.Proxy):
    """A traced value on which `x += y` is an operation of its own: fx alone takes it for `x = x + y`."""


def _in_place(operation: Callable[..., Any]) -> Callable[[_Proxy, Any], fx.Proxy]:
    def write(self: _Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operation, (self, other), {})

    return write


for _operation in OUT_OF_PLACE:
    setattr(_Proxy, f"__{_operation.__name__}__", _in_place(_operation))


class _Tracer(fx.Tracer):
    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Return the value of a node as what the network's code computes with."""
        return _Proxy(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Accept what a network asserts about its image's shape; refuse any other branch on a value."""
        asker = inspect.currentframe()
        for _ in range(2):  # Proxy.__bool__, and the network's own code
            asker = asker.f_back if asker is not None else None
        if asker is not None and asker.f_lineno in _asserting_lines(asker.f_code.co_filename):
            return True
        return super().to_bool(obj)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Keep whole what is PyTorch's, or computes as its base class there, and what acts in training only."""
        return (
            super().is_leaf_module(m, module_qualified_name) or _is_layer_by_another_name(m) or _depends_on_mode(m)
        )


def trace(
    model: nn.Module, image_shape: tuple[int, ...] | None = None, *, evaluated: bool = False
) -> fx.GraphModule:
    """Return a network as a graph, with in-place operations and functional dropout written as what they mean.

    The graph holds the network's own layers. A GraphModule is returned as it is, if nothing needs rewriting.

    Args:
        model: in any mode, which is left as it is.
        image_shape: channels, height and width of an image: graph and network are compared on two random ones.
        evaluated: the graph is the network's in evaluation and will not be trained; what the network does besides
            in training is left out.

    Raises:
        ModelError: its control flow depends on the data, or on more than dropout between training and evaluation;
            it writes in place into what it reads afterwards by another name; or the graph computes otherwise.
    """
    if isinstance(model, fx.GraphModule) and is_out_of_place(model):
        return model
    graph_of = _evaluation_graph if evaluated else _graph
    graphs = _in_both_modes(model, graph_of)
    if _calls_of(model, graphs[0]) != _calls_of(model, graphs[1]):
        raise ModelError(
            f"{type(model).__name__}: its forward reads self.training, and one graph cannot hold both; "
            "leave that to modules such as nn.Dropout"
        )
    graph = graphs[0]
    traced = fx.GraphModule(model, graph, type(model).__name__)
    write_out_of_place(traced)
    make_layers(traced)
    for node in list(graph.nodes):
        if node.target is torch._assert:
            graph.erase_node(node)
        elif node.target in _DROPOUTS:
            share = node.kwargs.get("p", node.args[1] if len(node.args) > 1 else 0.5)
            traced.add_module(f"{node.name}_module", _DROPOUTS[node.target](share))
            with graph.inserting_after(node):
                module = graph.call_module(f"{node.name}_module", (source(node),))
            node.replace_all_uses_with(module)
            graph.erase_node(node)
    expand_attention(traced)
    graph.eliminate_dead_code()
    traced.recompile()
    if image_shape is not None:
        _compare(model, traced, image_shape)
    return traced


def cut_softmax(network: fx.GraphModule) -> bool:
    """Let a network that ends in a softmax over its classes return what it is given, in place; return whether so.

    Training, verification and `runtime.Classifier` take logits and compute probabilities from them: of
    probabilities they would compute flat ones (0.38 for 0.70).
    """
    (output,) = (node for node in network.graph.nodes if node.op == "output")
    last = output.args[0]
    if not isinstance(last, fx.Node) or last.op not in ("call_module", "call_function", "call_method"):
        return False
    module = network.get_submodule(str(last.target)) if last.op == "call_module" else None
    axis: Any
    if isinstance(module, nn.Softmax):
        axis = module.dim
    elif last.target in (F.softmax, torch.softmax, "softmax"):
        axis = last.kwargs.get("dim", last.args[1] if len(last.args) > 1 else None)
    else:
        return False
    if axis not in (None, 1, -1):
        return False
    output.replace_input_with(last, source(last))
    network.graph.eliminate_dead_code()
    network.recompile()
    return True


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


def copied(model: nn.Module) -> nn.Module:
    """Return a copy of a network that shares nothing with it.

    Raises:
        ModelError: it holds what cannot be copied.
    """
    try:
        return copy.deepcopy(model)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ModelError(
            f"{type(model).__name__}: it cannot be copied ({str(error).splitlines()[0]}); build it anew, or take "
            "off what is computed and kept (of torch.nn.utils.weight_norm: use torch.nn.utils.parametrizations)"
        ) from error


@torch.no_grad()
def _compare(model: nn.Module, traced: fx.GraphModule, image_shape: tuple[int, ...]) -> None:
    """Refuse a graph that computes otherwise than its network, both in evaluation, on two random images."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, *image_shape, generator=generator)
    first_difference: list[str] = []
    outputs: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Callable[..., None]:
        # A copy: a later layer may write in place.
        return lambda module, inputs, output: outputs.setdefault(name, []).append(copy.deepcopy(output))

    def compare(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            expected = outputs[name].pop(0) if outputs.get(name) else None
            if not first_difference and isinstance(output, Tensor) and not _alike(output, expected):
                first_difference.append(name)

        return hook

    called = list(dict.fromkeys(str(n.target) for n in traced.graph.nodes if n.op == "call_module"))
    states = [(buffer, buffer.clone()) for buffer in model.buffers()]
    modes = [(module, module.training) for module in (*model.modules(), *traced.modules())]
    for module in (model, traced):
        module.eval()
    found = []
    try:
        for network, make in ((model, keep), (traced, compare)):
            handles = [
                part.register_forward_hook(make(name))
                for name, part in network.named_modules(remove_duplicate=False)
                if name in called
            ]
            try:
                with torch.random.fork_rng(devices=()):
                    torch.manual_seed(0)
                    found.append(network(images.clone()))
            finally:
                for handle in handles:
                    handle.remove()
    finally:
        for buffer, before in states:
            buffer.copy_(before)
        for module, mode in modes:
            module.training = mode
    if not _alike(found[1], found[0]):
        where = f"from {first_difference[0]!r} on" if first_difference else "after its last layer"
        raise ModelError(
            f"{type(model).__name__}: its graph computes something else {where}; look before it for what a "
            "graph cannot hold (a write in place, a number drawn or counted in forward, a decision)"
        )


def _alike(a: Any, b: Any) -> bool:
    return isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and torch.allclose(
        a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max().nan_to_num()) if b.numel() else 0.0, equal_nan=True
    )  # fmt: skip


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


def _is_layer_by_another_name(module: nn.Module) -> bool:
    """Return whether a module's class is derived from a layer or norm of PyTorch and computes exactly as that."""
    bases = [base for base in type(module).__mro__ if base in (*LAYERS, *NORMS)]
    computes = ("forward", "_conv_forward")
    return bool(bases) and all(
        getattr(type(module), name, None) is getattr(bases[0], name, None) for name in computes
    )


def _depends_on_mode(module: nn.Module) -> bool:
    """Return whether a module without parameters and parts computes something else in training."""
    if any(True for _ in module.children()) or module.state_dict():
        return False
    try:
        graphs = _in_both_modes(module, fx.Tracer().trace)
    except Exception:  # it cannot be traced alone, and the trace of what calls it will say why
        return False
    return _calls_of(module, graphs[0]) != _calls_of(module, graphs[1])


def _evaluation_graph(model: nn.Module) -> fx.Graph:
    return _graph(model.eval())


def _in_both_modes(model: nn.Module, graph_of: Callable[[nn.Module], fx.Graph]) -> tuple[fx.Graph, fx.Graph]:
    """Return the graphs of a network in training and in evaluation."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        return graph_of(model.train()), graph_of(model.eval())
    finally:
        for module, mode in modes:
            module.training = mode


def _calls_of(model: nn.Module, graph: fx.Graph) -> list[tuple[str, Any, Any]]:
    """Return what a graph calls with which arguments, but for whether dropout by function drops."""
    place = {node: f"#{index}" for index, node in enumerate(graph.nodes)}
    calls = []
    for node in graph.nodes:
        drops = node.target in _DROPOUTS or node.target is F.scaled_dot_product_attention
        arguments = str(fx.map_arg((node.args, node.kwargs), lambda n: place[n]))
        target = node.target
        # Every trace names anew what `torch.tensor` makes in forward.
        if node.op == "get_attr" and str(target).startswith("_tensor_constant"):
            constant: Any = getattr(model, str(target))
            target = str(constant.tolist())
        calls.append((node.op, target, () if drops else arguments))
    return calls
