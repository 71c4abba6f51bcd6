"""Which values of a traced network lie on a quantizer's grid."""

from __future__ import annotations

import builtins
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn

from train.quantization.quantizers import PACT, InputQuantizer
from train.quantization.tracing import LAYERS, NORMS, source


class Calls(NamedTuple):
    """Ways to call one operation: as a module, a function or a method of a tensor."""

    modules: tuple[type[nn.Module], ...] = ()
    functions: tuple[Callable[..., Any], ...] = ()
    methods: tuple[str, ...] = ()

    def include(self, node: fx.Node, modules: dict[str, nn.Module]) -> bool:
        """Return whether `node` is such a call."""
        if node.op == "call_function":
            return node.target in self.functions
        if node.op == "call_method":
            return node.target in self.methods
        return node.op == "call_module" and isinstance(modules.get(str(node.target)), self.modules)


MATMUL = Calls((), (torch.matmul, torch.bmm, operator.matmul), ("matmul", "bmm"))
# What hands codes on as they are: a maximum, a copy, another shape, a part, zeros around. Dropout is the identity
# when deployed.
_GRID_KEEPING = Calls(
    (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool2d, nn.Flatten, nn.Unflatten, nn.Identity,
     nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle, nn.ZeroPad2d),
    (F.max_pool1d, F.max_pool2d, F.max_pool3d, F.adaptive_max_pool2d, F.dropout, torch.flatten, torch.reshape,
     torch.permute, torch.transpose, torch.squeeze, torch.unsqueeze, torch.chunk, torch.split, torch.unbind,
     operator.getitem, torch.amax, F.pixel_shuffle, F.pixel_unshuffle, F.unfold),
    ("flatten", "unflatten", "view", "reshape", "permute", "transpose", "contiguous", "squeeze", "unsqueeze",
     "chunk", "split", "unbind", "unfold", "amax", "expand", "swapaxes", "movedim"),
)  # fmt: skip
_VIEWS = Calls(
    (nn.Flatten, nn.Unflatten),
    (torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.squeeze, torch.unsqueeze),
    ("flatten", "unflatten", "view", "reshape", "permute", "transpose", "contiguous", "squeeze", "unsqueeze",
     "swapaxes", "movedim"),
)  # fmt: skip
# What multiplies, but is no layer whose weight could be given a quantizer.
FLOAT_FUNCTIONS = (
    F.conv1d, F.conv2d, F.conv3d, F.conv_transpose2d, F.linear, F.bilinear, F.scaled_dot_product_attention,
    F.multi_head_attention_forward, torch.einsum, torch.addmm, torch.baddbmm,
)  # fmt: skip
JOINS = Calls((), (torch.cat, torch.concat, torch.stack))


def is_layer(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Return whether `node` calls a convolution or linear layer."""
    return node.op == "call_module" and isinstance(modules.get(str(node.target)), LAYERS)


def norm_after(node: fx.Node, modules: dict[str, nn.Module]) -> fx.Node | None:
    """Return the BatchNorm call that alone reads `node`, or None."""
    users = list(node.users)
    if len(users) == 1 and users[0].op == "call_module" and isinstance(modules.get(str(users[0].target)), NORMS):
        return users[0]
    return None


def matrix_operands(node: fx.Node, modules: dict[str, nn.Module]) -> list[fx.Node]:
    """Return both operands of a product of two activations, none for any other node."""
    if not MATMUL.include(node, modules) or len(node.args) != 2:
        return []
    operands = [a for a in node.args if isinstance(a, fx.Node) and a.op != "get_attr"]
    return operands if len(operands) == 2 else []


def origin(node: fx.Node, modules: dict[str, nn.Module]) -> fx.Node:
    """Return where the elements of `node` were computed, before they were moved, selected or copied."""
    while _GRID_KEEPING.include(node, modules) or _takes_attribute(node) or _pads_with_zeros(node):
        node = source(node)
    return node


def before_views(node: fx.Node, modules: dict[str, nn.Module]) -> fx.Node:
    """Return what `node` is another shape of: quantized there, codes are moved instead of floats."""
    while _VIEWS.include(node, modules) or _takes_attribute(node):
        node = source(node)
    return node


def grid_source(node: fx.Node, modules: dict[str, nn.Module]) -> fx.Node | None:
    """Return the quantizer whose grid the value of `node` lies on, or None."""
    node = origin(node, modules)
    if node.op == "call_module" and isinstance(modules.get(str(node.target)), PACT | InputQuantizer):
        return node
    if JOINS.include(node, modules):
        sources = {grid_source(part, modules) for part in parts(node)}
        return sources.pop() if len(sources) == 1 else None
    return None


def _takes_attribute(node: fx.Node) -> bool:
    return node.target is builtins.getattr and node.args[1] in ("T", "mT")


def _pads_with_zeros(node: fx.Node) -> bool:
    if node.target is not F.pad:
        return False
    given: dict[str, Any] = {
        **dict(zip(("input", "pad", "mode", "value"), node.args, strict=False)),
        **node.kwargs,
    }
    return given.get("mode", "constant") == "constant" and not given.get("value")


def parts(node: fx.Node) -> list[fx.Node]:
    """Return what a call of JOINS puts together."""
    joined: Any = node.args[0] if node.args else node.kwargs["tensors"]
    return list(joined)
