"""SMOOT (Karkehabadi et al. 2024): saliency-guided training that learns how much of each image to mask."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from train.losses.guidance import LossTerms, filling, guided_terms, label_saliency, least_salient, masked_forward


class Smoot(nn.Module):
    """The mask share K of every training image, and the loss that uses and adapts it (Algorithm 2).

    K is a percentage. After a step, an image whose masked form is classified with more confidence than the
    image itself is masked more the next time it is seen, one with less confidence is masked less:

        delta_1 = soft_1(X~) - soft_1(X)                                  (equation 1)
        delta_2 = mean over i = 2..n of soft_i(X~) - soft_i(X)            (equation 2)
        delta = alpha delta_1 + (1 - alpha) delta_2                       (equation 3)
        K <- clamp(K + mu delta, K_min, K_max)                            (equation 4)

    Where the paper can be read in two ways: soft_i is "the i-th highest softmax output", so X and X~ are each
    sorted by themselves and the i-th places compared, whichever classes stand there. K is taken as the percentage
    that the text and K_min, K_max speak of, not as the number of pixels of its tables. alpha is 0.7 in the text,
    0.95 (MNIST, Fashion-MNIST) and 0.8 (other data) in Table I. The divergence is KL(f(X) || f(X~)) as in
    equation 5; equation 6 defines it with the opposite sign, which would reward it.

    Equation 4 is printed with a floor around mu delta, and mu is not published. Here K keeps its fraction, and mu
    is 1.5. The floor takes a whole point off K for every negative delta, however small: the medians of the
    paper's Tables II and III, 49.5 % (MNIST) and 47.4 % (Fashion-MNIST), are then out of reach. docs/train.md has
    the figures, and says what no reading reproduces.

    Args:
        n: number of training images.
        start: K of every image at first, in percent.
        lowest: K_min.
        highest: K_max.
        ranks: n of equation 2; all classes where there are fewer.
        top1_weight: alpha of equation 3.
        speed: mu of equation 4, percentage points of K for a delta of 1.
        floor: round mu delta down to whole points, as printed.
    """

    percent: Tensor

    def __init__(
        self,
        n: int,
        *,
        start: int = 50,
        lowest: int = 20,
        highest: int = 80,
        ranks: int = 5,
        top1_weight: float = 0.7,
        speed: float = 1.5,
        floor: bool = False,
    ) -> None:
        super().__init__()
        self.lowest, self.highest = lowest, highest
        self.ranks, self.top1_weight, self.speed, self.floor = ranks, top1_weight, speed, floor
        self.register_buffer("percent", torch.full((n,), float(start)))

    def loss(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        index: Tensor,
        *,
        kl_weight: float = 1.0,
        fill: str | Tensor = "random",
        label_smoothing: float = 0.0,
        class_weights: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> LossTerms:
        """Return CE(f(X), y) + kl_weight * KL(f(X) || f(X~)) (equation 5), and adapt K of these images.

        Args:
            model: returns logits [N, K]; in training mode its BatchNorm statistics see X only, not X~.
            images: normalized, float [N, C, H, W].
            labels: int64 [N].
            index: which training images they are, int64 [N], each once.
            kl_weight: lambda of the paper.
            fill: what masked pixels hold; see `train.losses.guidance.filling`.
            label_smoothing: of the cross entropy.
            class_weights: of the cross entropy, [K].
            generator: random numbers of the fill, on the images' device.
        """
        images = images.detach().requires_grad_()
        logits = model(images)
        saliency = label_saliency(logits, images, labels)
        images = images.detach()
        percent = self.percent[index]
        masked = least_salient(saliency, (percent * saliency[0].numel() / 100).long())
        masked_logits = masked_forward(model, images, masked, filling(images, fill, generator))
        self.percent[index] = self.adapted(percent, logits.detach(), masked_logits.detach())
        return guided_terms(
            logits, masked_logits, labels,
            kl_weight=kl_weight, label_smoothing=label_smoothing, class_weights=class_weights,
        )  # fmt: skip

    def adapted(self, percent: Tensor, logits: Tensor, masked_logits: Tensor) -> Tensor:
        """Return the next K (equations 1 to 4) of images with K `percent` [N] and these two logits [N, K]."""
        ranks = min(self.ranks, logits.shape[1])
        change = masked_logits.softmax(1).topk(ranks).values - logits.softmax(1).topk(ranks).values
        delta = self.top1_weight * change[:, 0] + (1 - self.top1_weight) * change[:, 1:].mean(1)
        step = torch.floor(self.speed * delta) if self.floor else self.speed * delta
        return (percent + step).clamp(self.lowest, self.highest)

    def metrics(self) -> dict[str, float]:
        """Return the smallest, median and largest K, in percent."""
        percent = self.percent.double()
        return {
            "mask_percent_min": percent.min().item(),
            "mask_percent_median": percent.median().item(),
            "mask_percent_max": percent.max().item(),
        }
