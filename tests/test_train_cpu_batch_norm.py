from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from train.cpu.batch_norm import BatchNorm2d
from train.cpu.layers import use_fast_layers
from train.losses.saliency import AdaptiveThreshold
from train.losses.second_derivatives import second_derivatives
from train.models.resnet20 import ResNet20
from train.quantization.quantize import quantize, start_alphas
from train.quantization.spec import QuantSpec


def pair(channels: int, dtype: torch.dtype = torch.float32) -> tuple[nn.BatchNorm2d, BatchNorm2d]:
    """Return PyTorch's layer, and ours with buffers of its own and equal parameters, one of them negative."""
    torch.manual_seed(0)
    made = []
    weight, bias = torch.randn(channels, dtype=dtype), torch.randn(channels, dtype=dtype)
    for _ in range(2):
        layer = nn.BatchNorm2d(channels, eps=1e-3, momentum=0.3).to(dtype)
        with torch.no_grad():
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
        made.append(layer)
    return made[0], BatchNorm2d(made[1])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("momentum", [0.3, 0.0])
def test_values_statistics_and_first_gradients_are_those_of_pytorch_bit_for_bit(
    layout: torch.memory_format, momentum: float
) -> None:
    layers = pair(5)
    found: list[list[Tensor]] = []
    for layer in layers:
        torch.manual_seed(1)
        layer.momentum = momentum
        for _ in range(2):
            x = (2 + 3 * torch.randn(4, 5, 6, 3)).contiguous(memory_format=layout).requires_grad_()
            y = layer(x)
            y.backward(torch.randn(y.shape))
        assert x.grad is not None
        parameters = [p.grad for p in layer.parameters() if p.grad is not None]
        found.append([y, x.grad, *parameters, *layer.buffers(), layer.eval()(x)])
    assert len(found[0]) == 8
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_all_first_and_second_derivatives_are_those_of_finite_differences() -> None:
    _, layer = pair(2, torch.float64)

    def normalized(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        found: Tensor = functional_call(layer, {"weight": weight, "bias": bias}, (x,))
        return found

    inputs = (
        torch.randn(3, 2, 4, 3, dtype=torch.float64, requires_grad=True),
        torch.tensor([1.3, 0.0], dtype=torch.float64, requires_grad=True),
        torch.tensor([0.1, -0.2], dtype=torch.float64, requires_grad=True),
    )
    assert torch.autograd.gradcheck(normalized, inputs)
    assert torch.autograd.gradgradcheck(normalized, inputs)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 0.02)])
def test_second_derivatives_are_those_of_pytorch_up_to_rounding(dtype: torch.dtype, tolerance: float) -> None:
    found = []
    for layer in pair(16):
        torch.manual_seed(1)
        x = torch.randn(8, 16, 9, 9).to(dtype).requires_grad_()
        y = layer(x)
        (gradient,) = torch.autograd.grad(y.float().sin().sum(), x, create_graph=True)
        (gradient.float().square().sum() + y.float().pow(3).sum()).backward()
        assert x.grad is not None
        assert layer.weight.grad is not None
        assert x.grad.dtype == dtype
        found.append((x.grad.float(), layer.weight.grad))
    for a, b in zip(*found, strict=True):
        assert a.abs().max() > 1
        assert (a - b).abs().max() <= tolerance * a.abs().max()


def test_the_loss_on_the_input_gradient_and_its_gradients_stay_those_of_pytorchs_layers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    model = quantize(ResNet20(2, (8, 8), 5), QuantSpec(4), input_scale=1 / 64)
    images, labels = torch.randn(6, 2, 8, 8), torch.arange(6) % 5
    start_alphas(model, images)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    found: list[tuple[Tensor, dict[str, Tensor]]] = []
    for fast in (False, True):
        context = second_derivatives if fast else nullcontext
        monkeypatch.setattr("train.losses.adaptive_threshold.second_derivatives", context)
        if fast:
            use_fast_layers(model)
            assert sum(isinstance(m, BatchNorm2d) for m in model.modules()) == 19
        model.load_state_dict(state)
        model.train().zero_grad()
        terms = AdaptiveThreshold(0.01).loss(model, images, labels, saliency_weight=0.02)
        terms.loss.backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found.append((terms.loss.detach(), gradients | dict(model.named_buffers())))
    (loss, slow), (again, fast_ones) = found
    assert torch.equal(loss, again)
    assert slow.keys() == fast_ones.keys()
    assert len(slow) > 80
    for name, value in slow.items():
        scale = value.abs().max().double()
        assert (value.double() - fast_ones[name]).abs().max() <= 1e-4 * scale + 1e-7, name


def test_one_value_a_channel_is_refused_as_by_pytorch() -> None:
    for layer in pair(3):
        with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
            layer(torch.zeros(1, 3, 1, 1))


def test_layers_without_parameters_or_statistics_stay_pytorchs() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3, affine=False), nn.BatchNorm2d(3, track_running_stats=False))
    use_fast_layers(model)
    assert [type(layer) for layer in model] == [nn.BatchNorm2d, nn.BatchNorm2d]
