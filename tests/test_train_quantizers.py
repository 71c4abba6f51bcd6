from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from export.gradient.rules import quantized as gradient_quantized
from train.quantization.quantizers import (
    PACT,
    SAWB_COEFFICIENTS,
    InputQuantizer,
    WeightQuantizer,
    activation_range,
    weight_qmax,
)
from train.quantization.straight_through import BELOW_ZERO_STEPS, _clip_bounds

BITS = st.integers(2, 8)


def codes_of(quantizer: PACT | InputQuantizer, x: torch.Tensor) -> list[int]:
    return torch.round(quantizer(x) / quantizer.scale).to(torch.int64).tolist()


@pytest.mark.parametrize(
    ("bits", "signed", "full", "expected"),
    [
        (8, False, False, (0, 127)),
        (8, False, True, (0, 255)),
        (8, True, False, (-127, 127)),
        (8, True, True, (-128, 127)),
        (4, False, False, (0, 15)),
        (4, True, False, (-7, 7)),
        (4, True, True, (-7, 7)),
        (3, False, True, (0, 7)),
        (2, False, False, (0, 3)),
        (2, True, False, (-1, 1)),
    ],
)
def test_activation_ranges(bits: int, signed: bool, full: bool, expected: tuple[int, int]) -> None:
    assert activation_range(bits, signed=signed, full_range=full) == expected


def test_pact_rounds_half_to_even_and_saturates() -> None:
    pact = PACT(alpha=15.0, bits=4)  # scale 1
    x = torch.tensor([-3.0, -0.5, 0.5, 1.5, 2.5, 3.5, 14.49, 14.51, 15.0, 15.5, 1e30])
    assert codes_of(pact, x) == [0, 0, 0, 2, 2, 4, 14, 15, 15, 15, 15]


def test_signed_pact_is_symmetric() -> None:
    pact = PACT(alpha=7.0, bits=4, signed=True)
    x = torch.tensor([-1e9, -7.5, -6.5, -2.5, -0.5, 0.5, 2.5, 6.5, 7.5])
    assert codes_of(pact, x) == [-7, -7, -6, -2, 0, 0, 2, 6, 7]


def test_input_grid_is_exact_on_pixels() -> None:
    scale = 1 / (255 * 0.31)
    quantizer = InputQuantizer(scale)
    pixels = torch.arange(256)
    normalized = (pixels.float() - 128) * torch.tensor(scale)
    assert codes_of(quantizer, normalized) == list(range(-128, 128))
    assert torch.equal(quantizer(normalized), normalized)


def test_input_quantizer_passes_the_gradient() -> None:
    x = torch.tensor([-9.0, 0.013, 9.0], requires_grad=True)
    InputQuantizer(0.01)(x).backward(torch.tensor([1.0, 2.0, 3.0]))
    assert x.grad is not None
    assert x.grad.tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("signed", [False, True])
def test_pact_gradients_in_closed_form(signed: bool) -> None:
    pact = PACT(alpha=2.0, bits=4, signed=signed)
    x = torch.tensor([-3.0, -2.0, -1.0, 0.0, 1.0, 1.99, 2.0, 5.0], requires_grad=True)
    upstream = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0])
    pact(x).backward(upstream)
    assert x.grad is not None
    assert pact.alpha.grad is not None
    inside = [0, 0, 4, 8, 16, 32, 0, 0] if signed else [0, 0, 0, 8, 16, 32, 0, 0]
    assert x.grad.tolist() == inside
    assert pact.alpha.grad.item() == (64 + 128 - (3 if signed else 0))


def test_a_full_signed_grid_reaches_one_code_below_minus_alpha() -> None:
    pact = PACT(alpha=127.0, bits=8, signed=True, full_range=True)
    x = torch.tensor([-130.0, -128.0, -127.6, -127.0, 0.4, 126.0, 127.0, 200.0], requires_grad=True)
    y = pact(x)
    assert y.tolist() == [-128, -128, -128, -127, 0, 126, 127, 127]
    y.backward(torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0]))
    assert x.grad is not None
    assert pact.alpha.grad is not None
    assert x.grad.tolist() == [0, 0, 4, 8, 16, 32, 0, 0]
    assert pact.alpha.grad.item() == pytest.approx(64 + 128 - 128 / 127 * (1 + 2), rel=1e-6)


@given(st.floats(0.5, 8.0), st.integers(0, 10_000))
@settings(deadline=None, max_examples=50)
def test_alpha_gradient_is_that_of_the_clip_by_finite_differences(alpha: float, seed: int) -> None:
    x = torch.randn(64, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 4
    upstream = torch.randn(64, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1))
    h = 1e-6
    if (x - alpha).abs().min() < 2 * h:
        x = x + 4 * h
    pact = PACT(alpha, bits=8).double()
    pact(x).backward(upstream)

    def clipped(value: float) -> float:
        return float((x.clamp(0, value) * upstream).sum())

    numeric = (clipped(alpha + h) - clipped(alpha - h)) / (2 * h)
    assert pact.alpha.grad is not None
    assert pact.alpha.grad.item() == pytest.approx(numeric, abs=1e-7)


@given(BITS, st.booleans(), st.floats(0.01, 100.0), st.integers(0, 10_000))
@settings(deadline=None, max_examples=60)
def test_pact_equals_its_equations_written_out(bits: int, signed: bool, alpha: float, seed: int) -> None:
    """Choi et al. 2018, equations 1 to 3; only at a rounding error from alpha may the gate differ.

    Sums that are 0 but for float rounding are 0: the gate opens 2^-10 steps below.
    """
    pact = PACT(alpha, bits, signed=signed)
    generator = torch.Generator().manual_seed(seed)
    clip = pact.alpha.detach()
    x = torch.cat([torch.randn(2000, generator=generator) * clip, torch.stack([clip, -clip, 0 * clip, -0 * clip])])
    upstream = torch.randn(x.shape, generator=generator)
    lower = -clip if signed else 0 * clip
    scale = clip / pact.qmax
    expected = torch.round(torch.minimum(torch.maximum(x, lower), clip) / scale) * scale
    above, below = x >= clip, (x <= lower if signed else x < -(2.0**-10) * scale)
    unsure = (x.abs() - clip).abs() <= 3e-7 * clip
    unsure[-4:] = False
    probe = x.clone().requires_grad_()
    y = pact(probe)
    y.backward(upstream)
    assert torch.equal(y, expected)
    assert probe.grad is not None
    assert torch.equal(probe.grad[~unsure], torch.where(above | below, 0, upstream)[~unsure])
    assert pact.alpha.grad is not None
    if not unsure.any():
        sums = upstream.double()[above].sum() - (upstream.double()[below].sum() if signed else 0)
        assert pact.alpha.grad.item() == pytest.approx(float(sums), rel=1e-4, abs=1e-4)


def test_the_graphs_gate_opens_where_training_s_does() -> None:
    assert gradient_quantized.BELOW_ZERO_STEPS == BELOW_ZERO_STEPS == 2.0**-10


def test_pact_gates_in_bfloat16_as_in_float32() -> None:
    x = torch.tensor([-1.0, 0.0, 1.0, 1.984375, 2.0, 3.0])
    gates = []
    for dtype in (torch.float32, torch.bfloat16):
        pact = PACT(alpha=2.0, bits=8)
        probe = x.to(dtype, copy=True).requires_grad_()
        pact(probe).sum().backward()
        assert probe.grad is not None
        assert pact.alpha.grad is not None
        gates.append((probe.grad.tolist(), pact.alpha.grad.item(), pact.alpha.grad.dtype))
    assert gates[0] == gates[1] == ([0, 1, 1, 1, 0, 0], 2.0, torch.float32)


def test_pact_allows_a_second_derivative() -> None:
    pact = PACT(alpha=2.0, bits=8)
    weight = torch.tensor([0.5, 1.5, 3.0], requires_grad=True)
    x = torch.tensor([1.0, 1.0, 1.0], requires_grad=True)
    (gradient,) = torch.autograd.grad(pact(weight * x).sum(), x, create_graph=True)
    assert gradient.tolist() == [0.5, 1.5, 0.0]
    gradient.sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [1.0, 1.0, 0.0]


def test_alpha_never_becomes_negative_and_can_come_back() -> None:
    pact = PACT(alpha=-1.0, bits=4)
    y = pact(torch.tensor([0.5]))
    assert y.item() == pytest.approx(PACT.MIN_ALPHA)
    y.backward()
    assert pact.alpha.grad is not None
    assert pact.alpha.grad.item() == 1.0


@given(BITS, st.integers(1, 5), st.integers(0, 10_000), st.sampled_from(["absmax", "sawb", "lsq"]))
@settings(deadline=None, max_examples=100)
def test_fake_quantized_weight_is_exactly_scale_times_codes(bits: int, out: int, seed: int, method: str) -> None:
    weight = torch.randn(out, 3, 3, 3, generator=torch.Generator().manual_seed(seed))
    quantizer = WeightQuantizer(weight, bits, method)
    codes, scale = quantizer.codes(weight), quantizer.scale(weight)
    assert codes.dtype == torch.int8
    assert codes.abs().max() <= weight_qmax(bits)
    assert torch.equal(quantizer(weight), codes * scale.reshape(-1, 1, 1, 1))


def test_absmax_codes_round_half_to_even() -> None:
    weight = torch.tensor([[0.5, 1.5, -2.5, 3.5, -7.0], [14.0, 1.0, -3.0, -13.0, 0.0]])
    quantizer = WeightQuantizer(weight, 4, "absmax")
    assert quantizer.scale(weight).tolist() == [1.0, 2.0]
    assert quantizer.codes(weight).tolist() == [[0, 2, -2, 4, -7], [7, 0, -2, -6, 0]]


def test_a_channel_of_zeros_stays_zero() -> None:
    weight = torch.zeros(2, 4)
    for method in ("absmax", "sawb", "lsq"):
        quantizer = WeightQuantizer(weight, 4, method)
        assert torch.equal(quantizer(weight), weight)
        assert quantizer.scale(weight).min() > 0


def test_straight_through_weight_gradient() -> None:
    layer = nn.Linear(3, 2)
    quantizer = WeightQuantizer(layer.weight, 2, "absmax")
    weight = layer.weight.detach().clone().requires_grad_()
    upstream = torch.arange(6.0).reshape(2, 3)
    quantizer(weight).backward(upstream)
    assert weight.grad is not None
    assert torch.equal(weight.grad, upstream)


def test_lsq_gradients_match_the_paper() -> None:
    """Esser et al. 2020, equation 3: -w/s + round(w/s) inside, the bound outside, times 1 / sqrt(n qmax)."""
    weight = torch.tensor([[0.3, -1.6, 9.0, -9.0]], requires_grad=True)
    quantizer = WeightQuantizer(weight, 3, "lsq")
    quantizer.learned_scale.data.fill_(1.0)
    upstream = torch.tensor([[1.0, 10.0, 100.0, 1000.0]])
    quantizer(weight).backward(upstream)
    assert weight.grad is not None
    assert weight.grad.tolist() == [[1.0, 10.0, 0.0, 0.0]]
    expected = (1 * (0 - 0.3) + 10 * (-2 + 1.6) + 100 * 3 + 1000 * -3) / math.sqrt(4 * 3)
    assert quantizer.learned_scale.grad is not None
    assert quantizer.learned_scale.grad.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("bits", "n"), [(2, 20_001), (4, 20_001), pytest.param(8, 200_001, marks=pytest.mark.slow)]
)
def test_sawb_coefficients_are_the_fit_over_six_distributions(bits: int, n: int) -> None:
    """Choi et al. 2018, section 3: regress the best clip on the two moments, here for grids that hold zero."""
    uniform = (np.arange(n) + 0.5) / n
    samples = [
        stats.norm.ppf(uniform), 2 * uniform - 1, stats.laplace.ppf(uniform), stats.logistic.ppf(uniform),
        2 * stats.triang.ppf(uniform, 0.5) - 1, stats.vonmises(1).ppf((np.arange(2001) + 0.5) / 2001),
    ]  # fmt: skip
    qmax = weight_qmax(bits)
    ratios, best = [], []
    for w in samples:
        rms, mean = np.sqrt((w**2).mean()), np.abs(w).mean()
        alphas = np.linspace(0.5 * rms, min(12 * rms, 1.02 * np.abs(w).max()), 300)
        errors = [((np.clip(np.rint(w * qmax / a), -qmax, qmax) * a / qmax - w) ** 2).mean() for a in alphas]
        ratios.append(rms / mean)
        best.append(alphas[int(np.argmin(errors))] / mean)
    slope, intercept = np.polyfit(ratios, best, 1)
    c1, c2 = SAWB_COEFFICIENTS[bits]
    assert c1 == pytest.approx(slope, rel=0.03)
    assert c2 == pytest.approx(-intercept, rel=0.03)


def test_sawb_beats_absmax_at_two_bits_on_a_normal_weight() -> None:
    weight = torch.randn(4, 4096, generator=torch.Generator().manual_seed(0))
    error = {
        m: float((WeightQuantizer(weight, 2, m)(weight) - weight).square().mean()) for m in ("absmax", "sawb")
    }
    assert error["sawb"] < 0.25 < error["absmax"]


def literal_pact(x: float, alpha: float, bits: int) -> float:
    """Choi et al. 2018, equations 1 and 2: y = 0.5 (|x| - |x - alpha| + alpha), rounded to 2^bits - 1 steps."""
    y = 0.5 * (abs(x) - abs(x - alpha) + alpha)
    n = 2**bits - 1
    return round(y * n / alpha) * alpha / n  # Python rounds half to even


@given(st.floats(0.1, 20), st.integers(2, 8), st.integers(0, 999))
def test_pact_is_the_equations_written_out(alpha: float, bits: int, seed: int) -> None:
    x = (
        torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * alpha
    ).requires_grad_()
    pact = PACT(alpha, bits, full_range=True).double()
    y = pact(x)
    exact = pact.alpha.item()  # alpha was rounded to float32
    assert y.tolist() == pytest.approx([literal_pact(value, exact, bits) for value in x.tolist()], abs=1e-5)
    y.sum().backward()
    assert x.grad is not None
    assert pact.alpha.grad is not None
    # Equation 3: d y_q / d alpha = 1 where x >= alpha, else 0; d y_q / d x = 1 between. Its 0 is a little wide.
    assert pact.alpha.grad.item() == sum(value >= exact for value in x.tolist())
    zero = -BELOW_ZERO_STEPS * exact / (2**bits - 1)
    assert x.grad.tolist() == [float(zero < value < exact) for value in x.tolist()]


@given(BITS, st.integers(1, 3), st.integers(0, 999))
def test_sawb_is_the_equation_written_out(bits: int, out: int, seed: int) -> None:
    """Choi et al. 2018 (SAWB), section 3: alpha = c1 sqrt(E[w^2]) - c2 E[|w|], here of each output channel."""
    weight = torch.randn(out, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    quantizer = WeightQuantizer(weight, bits, "sawb")
    quantized, (c1, c2), qmax = quantizer(weight), SAWB_COEFFICIENTS[bits], 2 ** (bits - 1) - 1
    for row, found in zip(weight.tolist(), quantized.tolist(), strict=True):
        alpha = c1 * math.sqrt(sum(w * w for w in row) / 64) - c2 * sum(abs(w) for w in row) / 64
        if not 0 < alpha < max(map(abs, row)):  # outside the regression's domain: see WeightQuantizer.scale
            alpha = max(map(abs, row))
        expected = [round(max(-alpha, min(alpha, w)) * qmax / alpha) * alpha / qmax for w in row]
        assert found == pytest.approx(expected, abs=1e-5)


@given(BITS, st.floats(0.05, 1.0), st.integers(0, 999))
def test_lsq_is_the_equations_written_out(bits: int, step: float, seed: int) -> None:
    """Esser et al. 2020, equations 1, 2, 3, 5 and section 2.2, with a symmetric grid."""
    weight = torch.randn(
        1, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    ).requires_grad_()
    quantizer = WeightQuantizer(weight, bits, "lsq").double()
    quantizer.learned_scale.data.fill_(step)
    quantized, q = quantizer(weight), 2 ** (bits - 1) - 1
    quantized.sum().backward()
    expected, gradient_w, gradient_s = [], [], 0.0
    for w in weight[0].tolist():
        ratio = w / step
        expected.append(round(max(-q, min(q, ratio))) * step)
        inside = -q < ratio < q
        gradient_w.append(1.0 if inside else 0.0)
        gradient_s += round(ratio) - ratio if inside else math.copysign(q, ratio)
    assert quantized[0].tolist() == pytest.approx(expected, abs=1e-5)
    assert weight.grad is not None
    assert weight.grad[0].tolist() == gradient_w
    assert quantizer.learned_scale.grad is not None
    assert quantizer.learned_scale.grad.item() == pytest.approx(gradient_s / math.sqrt(50 * q), abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_clip_bounds_are_neighbouring_floats(dtype: torch.dtype) -> None:
    for qmax in range(1, 257):
        clip = torch.tensor(qmax * (1 - 2 * torch.finfo(torch.float32).eps), dtype=dtype)
        below = torch.nextafter(clip, torch.zeros_like(clip))
        assert _clip_bounds(qmax, dtype) == (below.item(), clip.item())


@pytest.mark.parametrize("signed", [False, True])
def test_pact_compiles_as_one_graph_with_equal_gradients(signed: bool) -> None:
    layer = PACT(1.0, 4, signed=signed)
    found = []
    for run in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):  # which raises at a break
        x = torch.linspace(-3, 3, 50, requires_grad=True)
        layer.zero_grad()
        y = run(x)
        y.backward(torch.linspace(1, 2, 50))
        assert x.grad is not None
        assert layer.alpha.grad is not None
        found.append((y.detach(), x.grad, layer.alpha.grad.clone()))
    assert found[0][2] != 0
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
