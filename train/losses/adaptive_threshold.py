"""Saliency guidance with a learned threshold and sparse saliency (Lavaei et al. 2025)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train import processes
from train.losses.guidance import LossTerms, frozen_statistics, guided_terms
from train.losses.second_derivatives import second_derivatives
from train.quantization.quantizers import PACT


class AdaptiveThreshold(nn.Module):
    """The threshold epsilon, and the loss that uses and learns it (Algorithm 2).

        S = d CE(f(X), y) / d X                                                        (line 3)
        X~ = X * I(|S| > epsilon)                                                      (line 4)
        L = CE(f(X), y) + lambda_1 KL(f(X) || f(X~)) + lambda_2 ||S||_1 + eta |alpha|  (lines 7 and 9)
        epsilon <- epsilon - gamma dL / d epsilon                                      (line 10)

    ||S||_1 is differentiated through the gradient: its derivative in the weights is a second derivative of the
    network. Where the paper leaves a choice:

    - S is the gradient of the loss, as in Algorithm 2, not of the output, as in its Algorithm 1; of each image's
      own loss, so that it does not shrink with the batch. ||S||_1 sums over an image and averages over the batch.
      For the mask, |S| of a pixel is the largest of its channels', and all of them are masked together.
    - The indicator has no derivative in epsilon. Backward, it counts as sigmoid((|S| - epsilon) / T), T being the
      epsilon of the start; forward, it stays 0 or 1. |S| is held constant in it, since line 8 moves the weights
      by a mask that is given.
    - gamma counts epsilon in units of its start: epsilon / start descends with rate gamma. So one gamma suits all
      data, while the size of S differs by orders of magnitude. Epsilon never falls below 0.
    - L_PACT, the loss that alpha sees, is read as L, and eta |alpha|, summed over the layers, is part of it: alpha
      is one more parameter of the optimizer. Only L's divergence depends on epsilon, and masking rarely lowers it,
      so epsilon tends to fall in training as S does.

    Args:
        start: epsilon at first, > 0; `start_threshold` finds the one that masks a given share.
        rate: gamma.
    """

    start: Tensor

    def __init__(self, start: float, *, rate: float = 0.01) -> None:
        super().__init__()
        self.rate = rate
        self.epsilon = nn.Parameter(torch.tensor(float(start)))
        self.register_buffer("start", torch.tensor(float(start)))

    def loss(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        *,
        kl_weight: float = 1.0,
        saliency_weight: float = 1e-3,
        alpha_weight: float = 1e-4,
        label_smoothing: float = 0.0,
        class_weights: Tensor | None = None,
    ) -> LossTerms:
        """Return L; its backward pass gives the gradients of the weights, of every alpha and of epsilon.

        Args:
            model: returns logits [N, K]; in training mode its BatchNorm statistics see X only, not X~.
            images: normalized, float [N, C, H, W].
            labels: int64 [N].
            kl_weight: lambda_1.
            saliency_weight: lambda_2.
            alpha_weight: eta.
            label_smoothing: of the cross entropy.
            class_weights: of the cross entropy in L, [K]; S stays that of each image's own loss.
        """
        images = images.detach().requires_grad_()
        with second_derivatives(model):
            logits = model(images)
        gradient = loss_gradient(logits, images, labels, label_smoothing=label_smoothing)
        images = images.detach()
        with frozen_statistics(model):
            masked_logits = model(images * self._kept(gradient.detach()))
        terms = guided_terms(
            logits, masked_logits, labels,
            kl_weight=kl_weight, label_smoothing=label_smoothing, class_weights=class_weights,
        )  # fmt: skip
        norm = gradient.abs().flatten(1).sum(1).mean()
        alphas = [m.alpha.abs() for m in model.modules() if isinstance(m, PACT)]
        penalty = alpha_weight * torch.stack(alphas).sum() if alphas else 0.0
        loss = terms.loss + saliency_weight * norm + penalty
        return LossTerms(loss, terms.cross_entropy, terms.divergence, logits, saliency_norm=norm)

    @torch.no_grad()
    def step(self) -> None:
        """Update epsilon by the gradient that the backward pass of `loss` left, and clear it.

        In several processes (`train.processes`) all use the mean of their gradients.
        """
        if self.epsilon.grad is not None:
            self.epsilon.sub_(self.rate * self.start.square() * processes.mean(self.epsilon.grad))
            self.epsilon.clamp_(min=0)
            self.epsilon.grad = None

    def metrics(self) -> dict[str, float]:
        """Return epsilon."""
        return {"threshold": self.epsilon.item()}

    def _kept(self, gradient: Tensor) -> Tensor:
        """Return I(|S| > epsilon), [N, 1, H, W], with the derivative of its smooth stand-in."""
        saliency = gradient.abs().amax(1, keepdim=True)
        smooth = torch.sigmoid((saliency - self.epsilon) / self.start)
        return (saliency > self.epsilon).to(smooth.dtype) + (smooth - smooth.detach())


def loss_gradient(
    logits: Tensor, images: Tensor, labels: Tensor, *, label_smoothing: float = 0.0, differentiable: bool = True
) -> Tensor:
    """Return d CE(f(X), y) / d X of each image's own loss, [N, C, H, W]; less memory if not differentiable."""
    total = F.cross_entropy(logits, labels, label_smoothing=label_smoothing, reduction="sum")
    (gradient,) = torch.autograd.grad(total, images, create_graph=differentiable)
    return gradient


def start_threshold(model: nn.Module, images: Tensor, labels: Tensor, mask_share: float = 0.5) -> float:
    """Return the epsilon that masks `mask_share` of the pixels of these images before training.

    The paper masks |S| <= epsilon in its algorithm and 50 % of the pixels in its text: both hold at the start.

    Args:
        model: in training mode.
        images: normalized training images [N, C, H, W]; a few hundred are enough.
        labels: int64 [N].
        mask_share: 0 to 1.
    """
    images = images.detach().requires_grad_()
    with frozen_statistics(model):
        gradient = loss_gradient(model(images), images, labels, differentiable=False)
    saliency = gradient.abs().amax(1).flatten()
    rank = min(max(1, round(mask_share * len(saliency))), len(saliency))
    return max(saliency.kthvalue(rank).values.item(), torch.finfo(torch.float32).tiny)
