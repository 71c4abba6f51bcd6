"""The oracle in torch of a graph exported with the gate `code`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from train.quantization.quantizers import PACT


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(gate)
        return y.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (gate,) = ctx.saved_tensors
        return grad * gate, None, None


def with_code_gate(network: nn.Module, codes: Mapping[str, Tensor] | None = None) -> nn.Module:
    """Let every PACT of a fake-quantized network pass the gradient where qmin < code < qmax (0 if unsigned).

    With `codes`, of a graph by quantizer, each gives these instead of its own: at a tie, the graph may have
    rounded the other way.
    """

    def hook(given: Tensor | None) -> Callable[..., Tensor]:
        def gate(module: PACT, inputs: tuple[Tensor], output: Tensor) -> Tensor:
            scale = module.scale.detach()
            code = torch.round(output.detach() / scale) if given is None else given.float()
            value = output.detach() if given is None else code * scale
            gated: Tensor = _Gated.apply(inputs[0], value, (module.qmin < code) & (code < module.qmax))
            return gated

        return gate

    for name, module in network.named_modules():
        if isinstance(module, PACT):
            module.register_forward_hook(hook(None if codes is None else codes[name]))
    return network
