from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from tests.toy_models import FunctionalNet, randomize_norms
from train.models.build import build
from train.post_training.equalization import equalize, pairs


class Chain(nn.Module):
    """A pair of every kind: BatchNorm between, depthwise after, pooling, and columns of a flattened image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.conv2 = nn.Conv2d(6, 5, 3)
        self.fc1 = nn.Linear(5 * 3 * 3, 7)
        self.fc2 = nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(torch.relu(self.norm(self.conv1(x))))
        x = nn.functional.max_pool2d(nn.functional.relu(self.conv2(x.relu())), 2)
        return self.fc2(nn.functional.relu(self.fc1(x.flatten(1))))


def uneven(model: nn.Module) -> nn.Module:
    """Return the model with channels whose ranges differ by orders of magnitude."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = torch.exp(2 * torch.randn(len(parameter), generator=generator))
            parameter.mul_(spread.reshape(-1, *[1] * (parameter.ndim - 1)))
    return randomize_norms(model).double().eval()


@pytest.mark.parametrize("biased", [True, False])
def test_an_equalized_network_computes_the_same_with_equal_ranges(biased: bool) -> None:
    model = uneven(Chain())
    if not biased:
        for layer in (model.fc1, model.norm):
            nn.init.zeros_(layer.bias)
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    before = model(x)
    assert equalize(model) == 4
    assert torch.allclose(model(x), before, rtol=1e-9)
    if biased:  # of channels with little weight the biases hold the ranges back
        return
    # The last pair: rows of one, columns of the other.
    r1, r2 = model.fc1.weight.abs().amax(1), model.fc2.weight.abs().amax(0)
    assert torch.allclose(r1, r2, rtol=1e-3)
    # Through a BatchNorm, what counts is the weight it is folded into; its channel 0 is switched off by gamma.
    factor = model.norm.weight / torch.sqrt(model.norm.running_var + model.norm.eps)
    r1, r2 = (model.conv1.weight.flatten(1).abs().amax(1) * factor.abs()), model.depthwise.weight.flatten(1)
    assert torch.allclose(r1[1:], r2.abs().amax(1)[1:], rtol=1e-3)


@pytest.mark.parametrize(("arch", "size", "count"), [("cnn2", 14, 3), ("resnet20", 16, 9)])
def test_our_networks_stay_what_they_are(arch: str, size: int, count: int) -> None:
    model = uneven(build(arch, channels=3, size=(size, size), classes=5))
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    before = model(x)
    assert equalize(model) == count
    assert torch.allclose(model(x), before, rtol=1e-8)


def test_a_clip_at_6_is_passed_by_no_scale() -> None:
    layers = nn.Conv2d(3, 4, 3), nn.ReLU6(), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 2, 3)
    assert [pair.first for pair in pairs(nn.Sequential(*layers))] == [layers[2]]


def test_layers_called_twice_or_read_by_others_are_left_alone() -> None:
    model = uneven(FunctionalNet())
    before = copy.deepcopy(model.state_dict())
    assert pairs(model) == []
    equalize(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_channel_without_weight_does_not_outgrow_the_others() -> None:
    """BatchNorm leaves one channel next to no weight, and a bias: alone it would decide alpha for all."""
    first, norm, second = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)
    with torch.no_grad():
        norm.weight[1], norm.bias[:] = 1e-8, torch.tensor([0.5, 1.0, -2.0, 0.1])
    model = nn.Sequential(first, norm, nn.ReLU(), second).double().eval()
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    before = model(x)
    assert equalize(model) == 1
    assert torch.allclose(model(x), before, rtol=1e-9)
    assert norm.bias.abs().max().item() == pytest.approx(4 * 2.0)  # of 10,000 times as much
