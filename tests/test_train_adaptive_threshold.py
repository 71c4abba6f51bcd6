from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.pipeline import export
from runtime.errors import ModelError
from train import loop
from train.data.images import ImageData
from train.losses.adaptive_threshold import loss_gradient
from train.losses.saliency import AdaptiveThreshold, start_threshold
from train.losses.second_derivatives import second_derivatives
from train.models.cnn2 import CNN2
from train.models.resnet20 import ResNet20
from train.quantization.quantize import quantize, start_alphas
from train.quantization.quantizers import PACT
from train.quantization.spec import QuantSpec
from train.recipe import default_recipe
from train.step import compute_gradients

LAMBDA1, LAMBDA2, ETA, GAMMA = 0.3, 0.02, 0.05, 0.01


def literal_asg(
    model: nn.Module, images: Tensor, labels: Tensor, epsilon: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Algorithm 2 of Lavaei et al. 2025 pixel by pixel: X~ and L, which knows no derivative in epsilon but
    that of the sigmoid of the given temperature."""
    n, channels, height, width = images.shape
    probe = images.clone().requires_grad_()
    total = sum(F.cross_entropy(model(probe)[i : i + 1], labels[i : i + 1]) for i in range(n))
    (s,) = torch.autograd.grad(total, probe, create_graph=True)
    all_masked = []
    for i in range(n):
        rows = []
        for r in range(height):
            row = []
            for c in range(width):
                magnitude = max(abs(s[i, channel, r, c].item()) for channel in range(channels))
                smooth = 1 / (1 + torch.exp(-(magnitude - epsilon) / temperature))
                kept = float(magnitude > epsilon.item()) + (smooth - smooth.detach())
                row.append(images[i, :, r, c] * kept)
            rows.append(torch.stack(row, 1))
        all_masked.append(torch.stack(rows, 1))
    masked = torch.stack(all_masked)
    clean, dark = model(images).softmax(1), model(masked).softmax(1)
    loss = torch.zeros(())
    for i in range(n):
        divergence = (clean[i] * (clean[i].log() - dark[i].log())).sum()
        norm = sum(abs(s[i, j, r, c]) for j in range(channels) for r in range(height) for c in range(width))
        loss = loss + (-clean[i, labels[i]].log() + LAMBDA1 * divergence + LAMBDA2 * norm) / n
    for module in model.modules():
        if isinstance(module, PACT):
            loss = loss + ETA * abs(module.alpha)
    return masked.detach(), loss


def toy(bits: int) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = quantize(CNN2(2, (8, 8), 7), QuantSpec(bits), input_scale=1 / 64).eval()
    images, labels = torch.randn(5, 2, 8, 8), torch.tensor([0, 1, 2, 3, 4])
    start_alphas(model, images)
    return model, images, labels


@pytest.mark.parametrize("bits", [32, 4])
def test_mask_loss_and_updates_equal_the_algorithm_written_out(bits: int) -> None:
    model, images, labels = toy(bits)
    start = start_threshold(model, images, labels, 0.4)
    epsilon = torch.tensor(1.3 * start, requires_grad=True)
    expected_masked, expected = literal_asg(model, images, labels, epsilon, start)
    expected.backward()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer.step()
    updated = {n: p.detach().clone() for n, p in model.named_parameters()}
    assert epsilon.grad is not None
    next_epsilon = epsilon.item() - GAMMA * start**2 * epsilon.grad.item()

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(before[name])
    model.zero_grad()
    threshold = AdaptiveThreshold(start, rate=GAMMA)
    threshold.epsilon.data.fill_(1.3 * start)
    seen: list[Tensor] = []
    handle = model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
    terms = threshold.loss(model, images, labels, kl_weight=LAMBDA1, saliency_weight=LAMBDA2, alpha_weight=ETA)
    handle.remove()
    terms.loss.backward()
    torch.optim.Adam(model.parameters(), lr=1e-3).step()
    threshold.step()

    assert 0.3 < (seen[1] == 0).float().mean() < 0.9
    assert torch.equal(seen[1] == 0, expected_masked == 0)
    assert torch.allclose(seen[1], expected_masked, atol=1e-6)
    assert terms.loss.item() == pytest.approx(expected.item(), abs=1e-5)
    assert threshold.epsilon.item() == pytest.approx(next_epsilon, rel=1e-5)
    assert next_epsilon != 1.3 * start
    assert len(gradients) > 5
    for name, parameter in model.named_parameters():
        if name in gradients:
            assert parameter.grad is not None
            assert torch.allclose(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6), name
            # Adam divides by the gradient's own size: where that is rounding noise, so is the update.
            sure = gradients[name].abs() > 1e-6
            assert torch.allclose(parameter[sure], updated[name][sure], rtol=0, atol=1e-5), name


def test_l1_term_is_differentiated_through_the_gradient() -> None:
    """Finite differences of ||d CE / d X||_1 along random directions of the weights, in double precision."""
    torch.manual_seed(0)
    model = ResNet20(2, (8, 8), 5).double().eval()
    images = torch.randn(3, 2, 8, 8, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2])

    def loss(threshold: AdaptiveThreshold) -> Tensor:
        terms = threshold.loss(model, images, labels, kl_weight=0.0, saliency_weight=1.0, alpha_weight=0.0)
        return terms.loss - terms.cross_entropy

    threshold = AdaptiveThreshold(1e-9)
    norm = loss(threshold)
    norm.backward()
    probe = images.clone().requires_grad_()
    total = sum(F.cross_entropy(model(probe)[i : i + 1], labels[i : i + 1]) for i in range(3))
    (gradient,) = torch.autograd.grad(total, probe)
    assert norm.item() == pytest.approx(gradient.abs().sum().item() / 3, rel=1e-9)
    h = 1e-7
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        direction = torch.randn_like(parameter)
        direction /= direction.norm()
        analytic = (parameter.grad * direction).sum().item()
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(sign * h * direction)
            ends.append(loss(threshold).item())
            with torch.no_grad():
                parameter.sub_(sign * h * direction)
        assert analytic == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_threshold_starts_where_it_masks_the_share(share: float) -> None:
    model, images, labels = toy(8)
    epsilon = start_threshold(model, images, labels, share)
    probe = images.clone().requires_grad_()
    saliency = loss_gradient(model(probe), probe, labels).abs().amax(1)
    assert (saliency <= epsilon).double().mean().item() == pytest.approx(share, abs=2 / saliency.numel())


def test_a_gradient_that_is_not_differentiable_is_the_same_bit_for_bit() -> None:
    model, images, labels = toy(4)
    probe = images.clone().requires_grad_()
    kept, plain = (loss_gradient(model(probe), probe, labels, differentiable=d) for d in (True, False))
    assert torch.equal(kept, plain)
    assert (kept.requires_grad, plain.requires_grad) == (True, False)
    assert plain.abs().max() > 0


def test_threshold_never_becomes_negative() -> None:
    threshold = AdaptiveThreshold(0.5, rate=1.0)
    threshold.epsilon.grad = torch.tensor(1e9)
    threshold.step()
    assert threshold.epsilon.item() == 0.0
    assert threshold.epsilon.grad is None
    assert threshold.metrics() == {"threshold": 0.0}


def test_a_model_trained_so_is_accurate_and_exports(digits: ImageData, tmp_path: Path) -> None:
    recipe = dataclasses.replace(default_recipe("digits", "asg"), epochs=6, lr=3e-3)
    checkpoint = loop.fit(loop.start("cnn2", digits, QuantSpec(4), recipe), digits, tmp_path / "a.pt")
    first, last = checkpoint.history[0], checkpoint.history[-1]
    assert last["test_accuracy"] > 90
    assert 0 <= last["threshold"] < first["threshold"]
    assert checkpoint.guidance["epsilon"].item() == last["threshold"]
    terms = last["train_cross_entropy"] + last["train_divergence"] + 1e-3 * last["train_saliency_norm"]
    alphas = sum(value for key, value in last.items() if key.startswith("alpha/"))
    assert last["train_loss"] == pytest.approx(terms + 1e-4 * alphas, abs=1e-4)
    assert export(checkpoint, int8=True).model.graph.node


class _Gated(nn.Module):
    """Attention and Hardsigmoid, as PyTorch computes them or written out."""

    def __init__(self, *, written_out: bool) -> None:
        super().__init__()
        self.projection, self.head, self.written_out = nn.Linear(6, 18), nn.Linear(6, 5), written_out

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.projection(x.flatten(2)).unsqueeze(1).chunk(3, dim=-1)
        if self.written_out:
            attended = (query @ key.transpose(-1, -2) / 6**0.5).softmax(-1) @ value
            gate = F.relu6(attended + 3) / 6
        else:
            attended = F.scaled_dot_product_attention(query, key, value)
            gate = F.hardsigmoid(attended)
        logits: Tensor = self.head((4 * attended * gate).mean((1, 2)))
        return logits


def test_layers_that_pytorch_differentiates_once_are_differentiated_twice() -> None:
    torch.manual_seed(0)
    one, other = (_Gated(written_out=written_out).double() for written_out in (False, True))
    other.load_state_dict(one.state_dict())
    images, labels = 3 * torch.randn(4, 7, 2, 3, dtype=torch.float64), torch.arange(4)
    for model in (one, other):
        terms = AdaptiveThreshold(1e-3).double().loss(model, images, labels, saliency_weight=0.1)
        terms.loss.backward()
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert a.grad is not None
        assert a.grad.abs().max() > 0
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("inplace", [False, True])
def test_hardsigmoid_has_pytorchs_values_and_first_gradient_and_writes_where_it_is_told(inplace: bool) -> None:
    found = []
    for context in (nullcontext(), second_derivatives(nn.Identity())):
        x = torch.linspace(-5, 5, 1001).requires_grad_()
        with context:
            before = x * 1
            y = F.hardsigmoid(before, inplace=inplace)
        assert (before is y) == inplace
        (gradient,) = torch.autograd.grad(before.square().sum() if inplace else y.square().sum(), x)
        found.append((y, gradient))
    (y, gradient), (again, ours) = found
    assert torch.equal(y, again)
    torch.testing.assert_close(gradient, ours, rtol=1e-6, atol=0)


def test_what_cannot_be_differentiated_twice_is_one_line() -> None:
    class Direct(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = torch.ops.aten.hardsigmoid(x).mean((2, 3))  # not the function that has a stand-in
            return logits

    model = nn.Sequential(nn.Conv2d(1, 3, 3), Direct())
    images, labels, recipe = torch.randn(3, 1, 8, 8), torch.arange(3), default_recipe("digits", "asg")
    message = "^asg: PyTorch has no second derivative of aten::hardsigmoid_backward; write that layer in other"
    with pytest.raises(ModelError, match=message):
        compute_gradients(model, AdaptiveThreshold(0.01), images, labels, labels, images, recipe)
