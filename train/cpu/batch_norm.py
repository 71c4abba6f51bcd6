"""BatchNorm whose second derivative is cheap on the CPU: losses on the input gradient go through it.

Of a step of `asg` on ResNet-20, PyTorch's own second derivative of BatchNorm took a fifth: some twenty passes over
every activation. Here it is five, since a BatchNorm's gradient in its upstream gradient is that gradient again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

Gradients = tuple[Tensor | None, ...]


class _BatchNorm(torch.autograd.Function):
    """y = weight x^ + bias, x^ = (x - m) r, by the mean m and the inverse deviation r of the batch; [N, C, ...].

    The value and the first gradient are PyTorch's, bit for bit.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, momentum: float, eps: float
    ) -> Tensor:
        y: Tensor
        y, m, r = torch.ops.aten.native_batch_norm(x, weight, bias, mean, var, True, momentum, eps)
        ctx.save_for_backward(x, weight, m, r)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Gradients:
        return *_Gradient.apply(grad_outputs[0], *ctx.saved_tensors, ctx.eps), None, None, None, None


class _Gradient(torch.autograd.Function):
    """The gradients of x, weight and bias for the upstream gradient g, itself differentiable.

    With means over an element's channel, written <.>:

        B(g) = weight r (g - <g> - x^ <g x^>)      of x
        N <g x^>, N <g>                            of weight and bias

    B is symmetric, so that for a gradient v that arrives for B(g), with s = <v g> - <v> <g> - <v x^> <g x^>:

        B(v)                                                            of g
        -r (<g x^> B(v) + <v x^> B(g) + weight r s x^)                  of x
        N r s                                                           of weight
    """

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, weight: Tensor, m: Tensor, r: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        of_x, of_weight, of_bias = _gradient(g, x, weight, m, r, eps)
        ctx.save_for_backward(g, x, weight, m, r, of_x, of_weight, of_bias)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        return of_x, of_weight, of_bias

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> Gradients:
        v, of_weight, of_bias = grad_outputs
        g, x, weight, m, r, g_x, g_weight, g_bias = ctx.saved_tensors
        n = x.numel() // x.shape[1]
        shape = (1, -1, *[1] * (x.ndim - 2))
        grads: list[Tensor | None] = [None, None, None]
        if v is not None:
            v_g, v_weight, v_bias = _gradient(v, x, weight, m, r, ctx.eps)
            s = _products(v, g) / n - v_bias / n * (g_bias / n) - v_weight / n * (g_weight / n)
            of_normal = -weight * r * r * s * r
            of_x = torch.addcmul((-of_normal * m).reshape(shape), x, of_normal.reshape(shape))
            of_x.addcmul_(g_x, (-r * v_weight / n).reshape(shape))
            of_x.addcmul_(v_g, (-r * g_weight / n).reshape(shape))
            grads = [v_g, of_x.to(x.dtype), n * r * s]
        if of_weight is not None:  # of the derivative of weight, N <g x^>
            grads[0] = _sum(grads[0], (of_weight * r).reshape(shape) * (x - m.reshape(shape)))
            ones = torch.ones_like(weight)
            grads[1] = _sum(grads[1], _gradient(of_weight.reshape(shape) * g, x, ones, m, r, ctx.eps)[0])
        if of_bias is not None:  # of the derivative of bias, N <g>
            grads[0] = _sum(grads[0], of_bias.reshape(shape).expand_as(g))
        return *grads, None, None, None


class BatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d with the parameters, the buffers and the state of another one."""

    def __init__(self, layer: nn.BatchNorm2d) -> None:
        super().__init__(layer.num_features, layer.eps, layer.momentum, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self.running_mean, self.running_var = layer.running_mean, layer.running_var
        self.num_batches_tracked = layer.num_batches_tracked
        self.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized activations [N, C, H, W]."""
        if not self.training or self.momentum is None or x.numel() == x.shape[1]:
            return super().forward(x)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        y: Tensor = _BatchNorm.apply(
            x, self.weight, self.bias, self.running_mean, self.running_var, self.momentum, self.eps
        )
        return y


def _gradient(g: Tensor, x: Tensor, weight: Tensor, m: Tensor, r: Tensor, eps: float) -> tuple[Tensor, ...]:
    found: tuple[Tensor, ...] = torch.ops.aten.native_batch_norm_backward(
        g, x, weight, None, None, m, r, True, eps, [True, True, True]
    )
    return found


def _products(a: Tensor, b: Tensor) -> Tensor:
    """Return the sum of a * b of every channel, [C], in one pass: as the gradient of a weight of a BatchNorm."""
    zeros = torch.zeros(b.shape[1], dtype=torch.float64 if b.dtype == torch.float64 else torch.float32)
    wanted = [False, True, False]
    found: tuple[Tensor, ...] = torch.ops.aten.native_batch_norm_backward(
        a, b, None, None, None, zeros, torch.ones_like(zeros), True, 0.0, wanted
    )
    return found[1]


def _sum(a: Tensor | None, b: Tensor) -> Tensor:
    return b if a is None else a + b
