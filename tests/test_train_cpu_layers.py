from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from train.cpu.layers import use_fast_layers
from train.models.cnn2 import CNN2
from train.models.resnet20 import ResNet20
from train.quantization.quantize import quantize
from train.quantization.spec import QuantSpec


@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(2, 9), st.integers(2, 9),
    st.sampled_from([{"kernel_size": 2}, {"kernel_size": (2, 1)}, {"kernel_size": 2, "stride": 1},
                     {"kernel_size": 2, "padding": 1}, {"kernel_size": 2, "ceil_mode": True},
                     {"kernel_size": 2, "dilation": 1, "stride": (1, 2)}]),
    st.integers(0, 999),
)  # fmt: skip
def test_pooling_and_its_gradient_are_those_of_pytorch_bit_for_bit(
    n: int, channels: int, height: int, width: int, options: dict[str, object], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Codes of a coarse grid: most maxima are shared, and the position of the first one must win.
    images = torch.randint(0, 3, (n, channels, height, width), generator=generator).float()
    slow = nn.Sequential(nn.MaxPool2d(**options))  # type: ignore[arg-type]
    fast = nn.Sequential(nn.MaxPool2d(**options))  # type: ignore[arg-type]
    use_fast_layers(fast)
    assert type(fast[0]) is not nn.MaxPool2d
    a, b = images.clone().requires_grad_(), images.clone().requires_grad_()
    y, z = slow(a), fast(b)
    assert torch.equal(y, z)
    upstream = torch.randn(y.shape, generator=generator)
    y.backward(upstream)
    z.backward(upstream)
    assert a.grad is not None
    assert b.grad is not None
    assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("p", [0.25, 0.5])
def test_dropout_drops_its_share_and_keeps_the_mean(p: float) -> None:
    fast = nn.Sequential(nn.Dropout(p))
    use_fast_layers(fast)
    torch.manual_seed(0)
    x = torch.ones(100_001, requires_grad=True)
    y = fast.train()(x)
    assert set(y.detach().unique().tolist()) == {0.0, torch.tensor(1 / (1 - p)).item()}
    assert float((y == 0).float().mean()) == pytest.approx(p, abs=0.01)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())  # type: ignore[arg-type]
    assert torch.equal(fast.eval()(x), x)


def test_dropout_is_repeatable_and_differs_from_call_to_call() -> None:
    fast = nn.Sequential(nn.Dropout(0.5)).train()
    use_fast_layers(fast)
    x = torch.ones(1000)
    torch.manual_seed(3)
    first, second = fast(x), fast(x)
    torch.manual_seed(3)
    assert torch.equal(fast(x), first)
    assert not torch.equal(first, second)


def test_a_share_that_no_byte_can_decide_stays_pytorchs() -> None:
    model = nn.Sequential(nn.Dropout(0.1), nn.MaxPool2d(2, return_indices=True))
    use_fast_layers(model)
    assert [type(layer) for layer in model] == [nn.Dropout, nn.MaxPool2d]


@pytest.mark.parametrize("arch", [CNN2, ResNet20])
def test_networks_keep_their_numbers_and_parameters(arch: type[CNN2] | type[ResNet20]) -> None:
    torch.manual_seed(0)
    model = quantize(arch(1, (12, 12), 4), QuantSpec(4), input_scale=1 / 64).eval()
    images = torch.randn(3, 1, 12, 12)
    before, state = model(images), {k: v.clone() for k, v in model.state_dict().items()}
    use_fast_layers(model)
    assert torch.equal(model(images), before)
    assert list(model.state_dict()) == list(state)
