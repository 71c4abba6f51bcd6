"""Which values of a traced network are never negative, and which calls are a ReLU by whatever name.

A value is signed until every argument of what computes it is understood: a signed grid that could be unsigned
loses half of its codes, but an unsigned one that had to be signed loses every negative value.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from train.quantization.grids import JOINS, Calls, origin, parts
from train.quantization.quantizers import PACT
from train.quantization.tracing import source

_RELU = Calls((nn.ReLU,), (F.relu, F.relu_, torch.relu, torch.relu_), ("relu", "relu_"))
_RELU6 = Calls((nn.ReLU6,), (F.relu6,))
_HARDTANH = Calls((nn.Hardtanh,), (F.hardtanh, F.hardtanh_))
_CLAMP = Calls((), (torch.clamp, torch.clip, torch.clamp_, torch.clip_), ("clamp", "clip", "clamp_", "clip_"))
_CLAMP_MIN = Calls((), (torch.clamp_min, torch.clamp_min_), ("clamp_min", "clamp_min_"))
_NEVER_NEGATIVE = Calls(
    (nn.Sigmoid, nn.Hardsigmoid, nn.Softmax, nn.Softmax2d, nn.Softplus),
    (torch.sigmoid, F.sigmoid, F.hardsigmoid, torch.softmax, F.softmax, F.softplus, torch.abs, torch.square,
     torch.exp, torch.sqrt, operator.abs),
    ("sigmoid", "softmax", "abs", "square", "exp", "sqrt"),
)  # fmt: skip
# Means of what they are given. A divisor of one's own may be negative.
_AVERAGES = Calls(
    (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d,
     torch.mean),
    ("mean",),
)  # fmt: skip
_SUMS = Calls((), (operator.add, torch.add), ("add", "add_"))
_PRODUCTS = Calls((), (operator.mul, torch.mul, torch.multiply), ("mul", "mul_", "multiply"))


def relu_bound(node: fx.Node, modules: dict[str, nn.Module]) -> float | None:
    """Return up to which value a call clips what it is given, from 0 on; None where it is no such clip.

    It is infinity for a ReLU, 6 for ReLU6, m for `clamp(0, m)` and `Hardtanh(0, m)`.
    """
    low: Any
    high: Any
    if _RELU6.include(node, modules):
        return 6.0
    if _RELU.include(node, modules):
        return math.inf
    if _HARDTANH.include(node, modules):
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, nn.Hardtanh):
            given = {"min_val": module.min_val, "max_val": module.max_val}
        else:
            given = _arguments(node, ("input", "min_val", "max_val"))
        low, high = given.get("min_val", -1.0), given.get("max_val", 1.0)
    elif _CLAMP.include(node, modules) or _CLAMP_MIN.include(node, modules):
        given = _arguments(node, ("input", "min", "max"))
        low, high = given.get("min"), given.get("max")
    else:
        return None
    high = math.inf if high is None else high
    if not _is_number(low) or low != 0 or not _is_number(high) or not high > 0:
        return None
    return float(high)


def never_negative(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Return whether the graph shows that no element of `node` is ever below zero."""
    node = origin(node, modules)
    while _AVERAGES.include(node, modules):
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        names = ("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
        average = node.target is not torch.mean and node.op == "call_function"
        divisor = _arguments(node, names).get("divisor_override") if average else None
        divisor = getattr(module, "divisor_override", divisor)
        if divisor is not None and not (_is_number(divisor) and divisor > 0):
            return False
        node = origin(source(node), modules)
    if _SUMS.include(node, modules) or _PRODUCTS.include(node, modules):
        given = _arguments(node, ("input", "other"))
        if set(given) - {"input", "other", "alpha"} or len(node.args) > 2:
            return False
        return all(
            never_negative(value, modules) if isinstance(value, fx.Node) else _is_number(value) and value >= 0
            for value in given.values()
        )
    if JOINS.include(node, modules):
        return all(never_negative(part, modules) for part in parts(node))
    if node.kwargs.get("out") is not None:
        return False
    quantizer = modules.get(str(node.target)) if node.op == "call_module" else None
    if isinstance(quantizer, PACT):
        return quantizer.qmin == 0
    return _NEVER_NEGATIVE.include(node, modules) or relu_bound(node, modules) is not None


def _arguments(node: fx.Node, names: tuple[str, ...]) -> dict[str, Any]:
    """Return the arguments of a call by name; a method's first one is named `self` or `input`."""
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    if "self" in given:
        given["input"] = given.pop("self")
    return given


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
