"""Fake quantizers: the integer grids of weights, activations and the input image, as modules.

Rounding is half to even everywhere, as in torch.round, ONNX QuantizeLinear and TensorRT. A fake-quantized
tensor is always ``scale * codes`` with integer codes held as float32, so that export can read the codes off.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from train.quantization.straight_through import (
    at_least,
    clip_to_grid,
    learned_step,
    round_in_place,
    round_to_grid,
    straight_through,
)

INPUT_QMIN, INPUT_QMAX = -128, 127

# alpha = c1 sqrt(E[w^2]) - c2 E[|w|] minimizes the squared error of a symmetric grid with 2^b - 1 levels. Fitted
# as in Choi et al. 2018 (SAWB, section 3) over six distributions (normal, uniform, Laplace, logistic, triangle,
# von Mises); the paper's own coefficients belong to grids with 2^b levels and no zero.
SAWB_COEFFICIENTS: dict[int, tuple[float, float]] = {
    2: (2.540, 1.621),
    3: (6.893, 6.246),
    4: (11.844, 11.886),
    5: (16.911, 17.791),
    6: (22.190, 24.014),
    7: (27.459, 30.258),
    8: (32.789, 36.600),
}


def weight_qmax(bits: int) -> int:
    """Return the largest weight code: codes lie in [-qmax, qmax], qmax = 2^(bits - 1) - 1."""
    return 2 ** (bits - 1) - 1


def activation_range(bits: int, *, signed: bool = False, full_range: bool = False) -> tuple[int, int]:
    """Return (qmin, qmax) of a PACT grid.

    Unsigned codes are 0..2^bits - 1, except that 8 bits use 0..127, which every engine can represent, unless
    `full_range` asks for 0..255. Signed codes are -(2^(bits - 1) - 1)..2^(bits - 1) - 1, and with `full_range` one
    more at 8 bits, -128..127, so that saturation alone is the clip of both kinds.
    """
    if signed:
        return -weight_qmax(bits) - int(bits == 8 and full_range), weight_qmax(bits)
    if bits == 8 and not full_range:
        return 0, 127
    return 0, 2**bits - 1


class PACT(nn.Module):
    """Learned clipping and quantization of an activation (Choi et al. 2018, equations 1 and 2).

    Unsigned: y = clip(x, 0, alpha); signed: y = clip(x, alpha * qmin / qmax, alpha), which is -alpha but for codes
    from -128; both rounded to the grid with scale = alpha / qmax. Gradients are straight-through: dy/dx = 1 on
    0 <= x < alpha (if signed, strictly between the bounds), dy/dalpha = 1 where x >= alpha (if signed, qmin / qmax
    at the lower bound and below). The 0 is 2^-10 steps wide: sums that are 0 are so in float32 up to rounding.

    Args:
        alpha: initial clipping value, > 0, in the activation's own unit.
        bits: 2 to 8.
        signed: the activation takes negative values (tokens, GELU, an un-rectified input).
        full_range: 8 bits use 0..255 instead of 0..127, signed -128..127 instead of -127..127.

    Attributes:
        largest_start: where `start_alphas` starts at most: the bound of the activation it replaces.
    """

    MIN_ALPHA = 1e-4

    def __init__(self, alpha: float, bits: int, *, signed: bool = False, full_range: bool = False) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.tensor(float(alpha)))
        self.signed = signed
        self.largest_start = math.inf
        self.set_bits(bits, full_range=full_range)

    def set_bits(self, bits: int, *, full_range: bool = False) -> None:
        """Change the number of bits; alpha stays."""
        self.bits = bits
        self.qmin, self.qmax = activation_range(bits, signed=self.signed, full_range=full_range)

    @property
    def clip_alpha(self) -> Tensor:
        """Alpha as the forward pass uses it: never below MIN_ALPHA, with a gradient that can lead back up."""
        return straight_through(self.alpha, self.alpha.clamp_min(self.MIN_ALPHA))

    @property
    def scale(self) -> Tensor:
        """The step of the grid, alpha / qmax, float32 scalar."""
        return self.clip_alpha / self.qmax

    def forward(self, x: Tensor) -> Tensor:
        """Return the fake-quantized activation: same shape, float32."""
        if not torch.is_grad_enabled():  # the same numbers, in memory that nobody needs again
            scale = self.scale
            return round_in_place(x / scale, self.qmin, self.qmax).mul_(scale)
        return clip_to_grid(x, self.clip_alpha, self.qmin, self.qmax)

    def extra_repr(self) -> str:
        """Show the grid in the module's printed form."""
        return f"alpha={self.alpha.item():.4g}, bits={self.bits}, codes={self.qmin}..{self.qmax}"


class InputQuantizer(nn.Module):
    """The grid of the input image: 8-bit codes with a fixed scale.

    With normalization (p / 255 - 128 / 255) / s and scale = 1 / (255 s) the codes are p - 128 and nothing is lost.

    Args:
        scale: step of the normalized image, > 0.
        codes: smallest and largest, 255 apart; others than int8's are for engines whose zero point is free.
    """

    scale: Tensor

    def __init__(self, scale: float, codes: tuple[int, int] = (INPUT_QMIN, INPUT_QMAX)) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(float(scale)))
        self.bits = 8
        self.qmin, self.qmax = codes

    def forward(self, x: Tensor) -> Tensor:
        """Return the image on its grid; the gradient passes straight through."""
        return round_to_grid(x, self.scale, self.qmin, self.qmax)

    def extra_repr(self) -> str:
        """Show the grid in the module's printed form."""
        return f"scale={self.scale.item():.4g}, codes={self.qmin}..{self.qmax}"


class WeightQuantizer(nn.Module):
    """Symmetric fake quantization of a weight, one scale per output channel (axis 0).

    Registered as a parametrization, so that `layer.weight` is the fake-quantized weight.

    Args:
        weight: the float weight [O, ...] whose statistics start a learned scale.
        bits: 2 to 8.
        method: "absmax" (scale = max|w| / qmax), "sawb" (statistics-aware, Choi et al. 2018)
            or "lsq" (learned, Esser et al. 2020).
    """

    # A learned step is no smaller than this share of the one at which the largest weight is the largest code: at
    # zero it would get no gradient, and its channel could not be learned any more.
    MIN_SHARE = 2.0**-10

    def __init__(self, weight: Tensor, bits: int, method: str) -> None:
        super().__init__()
        self.bits = bits
        self.method = method
        self.qmax = weight_qmax(bits)
        if method == "lsq":
            start = 2 * weight.detach().abs().flatten(1).mean(1) / math.sqrt(self.qmax)
            self.learned_scale = nn.Parameter(start.clamp_min(torch.finfo(torch.float32).tiny))

    def scale(self, weight: Tensor) -> Tensor:
        """Return the positive scale of each output channel, float32 [O]."""
        smallest = torch.finfo(torch.float32).tiny
        flat = weight.detach().flatten(1)
        largest = flat.abs().amax(1)
        if self.method == "lsq":
            floor = largest * (self.MIN_SHARE / self.qmax)
            return at_least(self.learned_scale, floor.clamp_min(smallest))
        if self.method == "sawb":
            c1, c2 = SAWB_COEFFICIENTS[self.bits]
            optimum = c1 * flat.square().mean(1).sqrt() - c2 * flat.abs().mean(1)
            # The regression leaves its domain on a few extreme channels (one weight, a constant one).
            largest = torch.where(optimum > 0, torch.minimum(optimum, largest), largest)
        return (largest / self.qmax).clamp_min(smallest)

    def codes(self, weight: Tensor) -> Tensor:
        """Return the integer codes of the float weight, int8, same shape."""
        ratio = weight.detach() / _along_first_axis(self.scale(weight), weight)
        return round_in_place(ratio, -self.qmax, self.qmax).to(torch.int8)

    def forward(self, weight: Tensor) -> Tensor:
        """Return scale * codes, with a straight-through gradient (and LSQ's gradient for a learned scale)."""
        scale = _along_first_axis(self.scale(weight), weight)
        if self.method == "lsq":
            return learned_step(weight, scale, self.qmax)
        return round_to_grid(weight, scale, -self.qmax, self.qmax)

    def extra_repr(self) -> str:
        """Show the grid in the module's printed form."""
        return f"bits={self.bits}, method={self.method}"


def _along_first_axis(per_channel: Tensor, weight: Tensor) -> Tensor:
    return per_channel.reshape(-1, *[1] * (weight.ndim - 1))
