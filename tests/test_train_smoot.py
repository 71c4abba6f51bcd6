from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from train.losses.saliency import Smoot
from train.models.cnn2 import CNN2
from train.quantization.quantize import quantize
from train.quantization.spec import QuantSpec


def literal_smoot(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    percent: list[float],
    kl_weight: float,
    alpha: float,
    mu: float,
    floor: bool,
) -> tuple[Tensor, Tensor, list[float]]:
    """Algorithm 2 of Karkehabadi et al. 2024, image by image, masking with zeros: X~, the loss and the next K."""
    n, channels, height, width = images.shape
    probe = images.clone().requires_grad_()
    total = sum(model(probe)[i, labels[i]] for i in range(n))
    (gradient,) = torch.autograd.grad(total, probe)
    masked = images.clone()
    for i in range(n):
        saliency = [[max(abs(gradient[i, j, r, c].item()) for j in range(channels)) for c in range(width)]
                    for r in range(height)]  # fmt: skip
        pixels = [(saliency[r][c], r, c) for r in range(height) for c in range(width)]
        for _, r, c in sorted(pixels)[: int(percent[i] * height * width / 100)]:
            masked[i, :, r, c] = 0
    clean, dark = model(images).softmax(1), model(masked).softmax(1)
    loss, following = torch.zeros(()), []
    for i in range(n):
        soft = [sorted(p[i].tolist(), reverse=True) for p in (dark, clean)]
        first = soft[0][0] - soft[1][0]
        others = sum(soft[0][rank] - soft[1][rank] for rank in range(1, 5)) / 4
        delta = alpha * first + (1 - alpha) * others
        step = math.floor(mu * delta) if floor else mu * delta
        following.append(max(20, min(80, percent[i] + step)))
        divergence = (clean[i] * (clean[i].log() - dark[i].log())).sum()
        loss = loss + (-clean[i, labels[i]].log() + kl_weight * divergence) / n
    return masked, loss, following


@pytest.mark.parametrize(("bits", "floor"), [(32, False), (4, False), (32, True)])
def test_masks_loss_update_and_shares_equal_the_algorithm_written_out(bits: int, floor: bool) -> None:
    torch.manual_seed(0)
    model = quantize(CNN2(2, (8, 8), 7), QuantSpec(bits), input_scale=1 / 64).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5 if parameter.ndim > 1 else 1)  # confident enough for shares to move
    images, labels = torch.randn(6, 2, 8, 8), torch.tensor([0, 1, 2, 3, 4, 0])
    percent = [50, 20, 80, 33.25, 61.75, 47]
    expected_masked, expected, following = literal_smoot(model, images, labels, percent, 0.3, 0.7, 200, floor)
    model.zero_grad()
    expected.backward()
    updated = {n: p - 0.1 * p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    seen: list[Tensor] = []
    handle = model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
    index = torch.tensor([7, 0, 3, 9, 2, 4])  # the images of a batch lie anywhere in the data set
    smoot = Smoot(10, top1_weight=0.7, speed=200, floor=floor)
    smoot.percent[index] = torch.tensor(percent)
    terms = smoot.loss(model, images, labels, index, kl_weight=0.3, fill="zero")
    handle.remove()
    terms.loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert torch.equal(seen[1], expected_masked)
    assert terms.loss.item() == pytest.approx(expected.item(), abs=1e-5)
    assert smoot.percent[index].tolist() == pytest.approx(following, abs=1e-3)
    assert len({round(a - b, 1) for a, b in zip(following, percent, strict=True)}) > 3
    assert smoot.percent[[1, 5, 6, 8]].tolist() == [50] * 4
    assert len(updated) > 5
    for name, parameter in model.named_parameters():
        if name in updated:
            assert torch.allclose(parameter, updated[name], rtol=0, atol=1e-5), name


@given(st.integers(1, 6), st.integers(2, 12), st.floats(0, 1), st.floats(0, 500), st.integers(0, 999))
@settings(max_examples=60)
def test_shares_stay_in_bounds(n: int, classes: int, weight: float, speed: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    smoot = Smoot(n, top1_weight=weight, speed=speed)
    percent = torch.rand(n, generator=generator) * 60 + 20
    clean, dark = (torch.randn(n, classes, generator=generator) * 5 for _ in range(2))
    following = smoot.adapted(percent, clean, dark)
    assert following.dtype == torch.float32
    assert following.shape == (n,)
    assert following.min() >= 20
    assert following.max() <= 80


def test_more_confidence_under_the_mask_masks_more() -> None:
    smoot = Smoot(2, top1_weight=1.0, speed=10)
    sure, unsure = torch.tensor([[50.0, 0.0, 0.0]]), torch.tensor([[0.0, 0.0, 0.0]])
    percent = torch.tensor([50.0, 50.0])
    clean, dark = torch.cat([unsure, sure]), torch.cat([sure, unsure])
    # 1/3 -> 1 and 1 -> 1/3 are changes of 2/3; ten times that is 6.67, floored 6 up and 7 down.
    assert smoot.adapted(percent, clean, dark).tolist() == pytest.approx([50 + 20 / 3, 50 - 20 / 3], abs=1e-4)
    assert Smoot(2, top1_weight=1.0, speed=10, floor=True).adapted(percent, clean, dark).tolist() == [56, 43]


def test_by_default_a_change_of_one_moves_k_by_one_and_a_half_points() -> None:
    clean, dark = logits_of(torch.tensor([0.9, 0.5, 0.99])), logits_of(torch.tensor([0.5, 0.9, 0.39]))
    # Deltas -0.4, 0.4 and -0.6, of which 0.7 counts, and 0.3 of the mean of the other two: 0.2, -0.2 and 0.3.
    found = Smoot(3).adapted(torch.full((3,), 50.0), clean, dark)
    expected = [
        50 + 1.5 * (0.7 * first + 0.3 * others) for first, others in ((-0.4, 0.2), (0.4, -0.2), (-0.6, 0.3))
    ]
    assert expected == pytest.approx([49.67, 50.33, 49.505])
    assert found.tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, [49.94, 50.06]), ({"floor": True}, [20, 50]), ({"floor": True, "speed": 0.01}, [20, 50])],
)
def test_forty_losses_of_a_thousandth_cost_k_what_they_add_up_to(
    options: dict[str, Any], expected: list[float]
) -> None:
    smoot = Smoot(2, top1_weight=1.0, **options)
    clean, dark = torch.tensor([0.991, 0.990]), torch.tensor([0.990, 0.991])
    for _ in range(40):
        smoot.percent.copy_(smoot.adapted(smoot.percent, logits_of(clean), logits_of(dark)))
    assert smoot.percent.tolist() == pytest.approx(expected, abs=1e-3)


def logits_of(highest: Tensor) -> Tensor:
    """Return logits [N, 3] whose softmax is `highest` [N] and two equal rests."""
    rest = (1 - highest) / 2
    return torch.stack([highest, rest, rest], 1).log()


def test_whole_shares_of_older_checkpoints_load() -> None:
    smoot = Smoot(3)
    smoot.load_state_dict({"percent": torch.tensor([20, 47, 80], dtype=torch.int32)})
    assert smoot.percent.tolist() == [20.0, 47.0, 80.0]
    assert smoot.percent.dtype == torch.float32


def test_metrics_are_of_all_training_images() -> None:
    smoot = Smoot(5)
    smoot.percent.copy_(torch.tensor([20, 30, 47, 60, 71]))
    assert smoot.metrics() == {
        "mask_percent_min": 20.0, "mask_percent_median": 47.0, "mask_percent_max": 71.0
    }  # fmt: skip
