from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from train.losses.guidance import filling, frozen_statistics, least_salient
from train.losses.saliency import plain_loss, sgt_loss
from train.models.cnn2 import CNN2
from train.models.resnet20 import ResNet20
from train.quantization.quantize import quantize
from train.quantization.spec import QuantSpec


def literal_sgt(model: nn.Module, images: Tensor, labels: Tensor, share: float, kl_weight: float) -> Tensor:
    """Algorithm 1 of Ismail et al. 2021, image by image and pixel by pixel, masking with zeros."""
    probe = images.clone().requires_grad_()
    logits = model(probe)
    total = torch.stack([logits[i, labels[i]] for i in range(len(labels))]).sum()
    (gradient,) = torch.autograd.grad(total, probe)
    masked = images.clone()
    _, _, height, width = images.shape
    for i in range(len(images)):
        pixels = [(float(gradient[i, :, r, c].abs().max()), r, c) for r in range(height) for c in range(width)]
        for _, r, c in sorted(pixels)[: int(share * height * width)]:
            masked[i, :, r, c] = 0
    clean, dark = model(images).softmax(1), model(masked).softmax(1)
    divergence = sum((clean[i] * (clean[i].log() - dark[i].log())).sum() for i in range(len(images))) / len(images)
    return F.cross_entropy(model(images), labels) + kl_weight * divergence


@pytest.mark.parametrize("bits", [32, 4])
def test_loss_and_its_gradient_equal_the_algorithm_written_out(bits: int) -> None:
    torch.manual_seed(0)
    model = quantize(CNN2(2, (8, 8), 5), QuantSpec(bits), input_scale=1 / 64).eval()
    images, labels = torch.randn(6, 2, 8, 8), torch.tensor([0, 1, 2, 3, 4, 0])
    expected = literal_sgt(model, images, labels, 0.5, 0.3)
    expected.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    terms = sgt_loss(model, images, labels, mask_share=0.5, kl_weight=0.3, fill="zero")
    terms.loss.backward()
    assert terms.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert len(gradients) > 5
    for name, parameter in model.named_parameters():
        if name in gradients:
            assert parameter.grad is not None
            assert torch.allclose(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6), name


def test_without_masking_the_divergence_is_zero() -> None:
    model = CNN2(1, (8, 8), 3).eval()
    images, labels = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
    terms = sgt_loss(model, images, labels, mask_share=0.0)
    assert terms.divergence.item() == pytest.approx(0, abs=1e-6)
    assert terms.loss.item() == pytest.approx(plain_loss(model, images, labels).loss.item(), rel=1e-6)


@given(st.integers(1, 4), st.integers(2, 9), st.integers(2, 9), st.data())
@settings(max_examples=60)
def test_mask_takes_exactly_the_least_salient_pixels(n: int, height: int, width: int, data: st.DataObject) -> None:
    counts = data.draw(st.lists(st.integers(0, height * width), min_size=n, max_size=n))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    saliency = torch.stack([torch.randperm(height * width, generator=generator) for _ in range(n)]).float()
    expected = saliency < torch.tensor(counts).reshape(-1, 1)
    saliency = saliency.reshape(n, height, width)
    assert torch.equal(least_salient(saliency, torch.tensor(counts)).reshape(n, -1), expected)
    assert torch.equal(least_salient(saliency, counts[0])[0].flatten(), expected[0])


def test_ties_are_broken_so_that_the_count_is_exact() -> None:
    masked = least_salient(torch.zeros(3, 4, 4), torch.tensor([0, 4, 16]))
    assert masked.sum((1, 2)).tolist() == [0, 4, 16]


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.29, 29), (0.57, 57), (0.999, 99), (1.0, 100)])
def test_share_counts_whole_pixels(share: float, count: int) -> None:
    class Recorder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(100, 3)

        def forward(self, x: Tensor) -> Tensor:
            self.zeros = int((x == 0).sum())
            return self.fc(x.flatten(1))

    model = Recorder()
    sgt_loss(model, torch.rand(1, 1, 10, 10) + 1, torch.tensor([0]), mask_share=share, fill="zero")
    assert model.zeros == count


def test_random_filling_stays_in_the_range_of_its_image_and_is_repeatable() -> None:
    images = torch.stack([torch.rand(1, 16, 16), torch.rand(1, 16, 16) * 5 + 3])
    filled, again, other = (filling(images, "random", torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(filled, again)
    assert not torch.equal(filled, other)
    for image, new in zip(images, filled, strict=True):
        assert image.min() <= new.min() < new.max() <= image.max()


def test_other_fillings() -> None:
    images = torch.arange(32.0).reshape(1, 2, 4, 4)
    assert filling(images, "mean").unique().tolist() == [7.5, 23.5]
    assert filling(images, "zero").unique().tolist() == [0.0]
    assert filling(images, images + 1) is not images
    assert torch.equal(filling(images, images + 1), images + 1)


def test_masked_images_leave_the_running_statistics_alone() -> None:
    torch.manual_seed(0)
    clean, guided = ResNet20(3, (8, 8), 4).train(), ResNet20(3, (8, 8), 4).train()
    guided.load_state_dict(clean.state_dict())
    images, labels = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
    plain_loss(clean, images, labels)
    sgt_loss(guided, images, labels)
    for (name, a), (_, b) in zip(clean.named_buffers(), guided.named_buffers(), strict=True):
        assert torch.equal(a, b), name


def test_frozen_statistics_are_thawed_after_an_error() -> None:
    norm = nn.BatchNorm2d(2).train()

    def forward_then_fail() -> None:
        with frozen_statistics(norm):
            norm(torch.randn(4, 2, 3, 3) + 5)
            raise KeyError

    with pytest.raises(KeyError):
        forward_then_fail()
    assert norm.running_mean is not None
    assert norm.num_batches_tracked is not None
    assert norm.running_mean.tolist() == [0.0, 0.0]
    assert norm.momentum == 0.1
    norm(torch.randn(4, 2, 3, 3) + 5)
    assert norm.num_batches_tracked.item() == 1
    assert norm.running_mean.min() > 0.3
