"""The oracle in torch of a graph exported with the gate `code`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from train.quantizers import PACT


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(gate)
        return y.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (gate,) = ctx.saved_tensors
        return grad * gate, None, None


def with_code_gate(network: nn.Module) -> nn.Module:
    """Let every PACT of a fake-quantized network pass the gradient where qmin < code < qmax (0 if unsigned)."""

    def gate(module: PACT, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        code = torch.round(output.detach() / module.scale.detach())
        gated: Tensor = _Gated.apply(inputs[0], output.detach(), (module.qmin < code) & (code < module.qmax))
        return gated

    for module in network.modules():
        if isinstance(module, PACT):
            module.register_forward_hook(gate)
    return network
