"""The two operators of a deploy-form network, and how each inference engine wants them written in ONNX.

In torch they run as reference arithmetic on integer codes; `torch.onnx.export` turns them into QuantizeLinear and
DequantizeLinear by `translations(target)`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from onnxscript import ir, opset21
from torch import Tensor

OPSET = 21


@torch.library.custom_op("clearpact::fake_quantize", mutates_args=())
def fake_quantize(x: Tensor, alpha: Tensor, scale: Tensor, qmin: int, qmax: int) -> Tensor:
    """Return scale * codes, codes = round(clip(x) / scale), the arithmetic of PACT and of QuantizeLinear.

    Args:
        x: float32, any shape.
        alpha: clipping value, float32 scalar; x is clipped to [0, alpha] (qmin = 0), [-alpha, alpha]
            (qmin = -qmax) or, for the full range of int8, by saturation alone.
        scale: step of the grid, float32 scalar.
        qmin: smallest code.
        qmax: largest code.
    """
    return torch.round(x / scale).clamp(qmin, qmax) * scale


@fake_quantize.register_fake
def _(x: Tensor, alpha: Tensor, scale: Tensor, qmin: int, qmax: int) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("clearpact::dequantize_weight", mutates_args=())
def dequantize_weight(codes: Tensor, scale: Tensor, axis: int) -> Tensor:
    """Return codes * scale, float32, for int8 codes and one scale per output channel [O], which lie on `axis`."""
    return codes * along(scale, axis, codes.ndim)


@dequantize_weight.register_fake
def _(codes: Tensor, scale: Tensor, axis: int) -> Tensor:
    return torch.empty_like(codes, dtype=torch.float32)


def along(scale: Tensor, axis: int, rank: int) -> Tensor:
    """Return scales [O] as a tensor of `rank` axes that broadcasts along `axis`."""
    return scale.reshape([-1 if a == axis else 1 for a in range(rank)])


def translations(target: str) -> dict[Any, Callable[..., Any]]:
    """Return the custom translation table of `torch.onnx.export` for one of TARGETS."""
    lower = {"openvino": _fake_quantize_openvino, "ort": _fake_quantize_ort, "tensorrt": _fake_quantize_tensorrt}
    return {
        torch.ops.clearpact.fake_quantize.default: lower[target],
        torch.ops.clearpact.dequantize_weight.default: _dequantize_weight if target != "ort" else _dequantize_ort,
    }


def _dequantize_weight(codes: Any, scale: Any, axis: int) -> Any:
    return opset21.DequantizeLinear(codes, scale, axis=axis)


def _dequantize_ort(codes: Any, scale: Any, axis: int) -> Any:
    """With a zero point: ONNX Runtime 1.31 makes a QGemm of a Gemm only where its weight states one."""
    return opset21.DequantizeLinear(codes, scale, _constant(np.zeros(scale.shape[0], np.int8)), axis=axis)


def _fake_quantize_openvino(x: Any, alpha: Any, scale: Any, qmin: int, qmax: int) -> Any:
    """Unsigned 8-bit codes with the clip in float: the plugin fuses it into the layer before."""
    zero_point = _zero_point(np.uint8 if qmin == 0 else np.int8)
    # At 0..255 saturation itself is the clip; the plugin would not find that out and pay for both (5 % measured).
    x = x if (qmin, qmax) == (0, 255) else _clip(x, alpha, qmin, qmax)
    return _quantize_dequantize(x, scale, zero_point)


def _fake_quantize_ort(x: Any, alpha: Any, scale: Any, qmin: int, qmax: int) -> Any:
    """The clip on the codes, between Q and DQ, where it does not break the fusion into QLinearConv.

    Signed codes are moved by 128, and pixels by the one that is 0: its integer kernels take and give unsigned
    bytes alike, or signed ones alike.
    """
    shift = 0 if qmin == 0 else 128 if qmax - qmin < 255 else -qmin
    zero_point = _constant(np.array(shift, np.uint8))
    codes = opset21.QuantizeLinear(x, scale, zero_point)
    low, high = qmin + shift, qmax + shift
    if (low, high) != (0, 255):
        codes = opset21.Clip(codes, _constant(np.array(low, np.uint8)), _constant(np.array(high, np.uint8)))
    return opset21.DequantizeLinear(codes, scale, zero_point)


def _fake_quantize_tensorrt(x: Any, alpha: Any, scale: Any, qmin: int, qmax: int) -> Any:
    """Signed 8-bit codes and zero points 0 only; at qmax = 127 saturation itself is the clip at alpha."""
    zero_point = _zero_point(np.int8)
    x = opset21.Relu(x) if (qmin, qmax) == (0, 127) else _clip(x, alpha, qmin, qmax)
    return _quantize_dequantize(x, scale, zero_point)


def _clip(x: Any, alpha: Any, qmin: int, qmax: int) -> Any:
    if qmin == 0:
        return opset21.Clip(x, _constant(np.array(0, np.float32)), alpha)
    if qmin == -qmax:
        return opset21.Clip(x, opset21.Neg(alpha), alpha)
    return x


def _quantize_dequantize(x: Any, scale: Any, zero_point: Any) -> Any:
    return opset21.DequantizeLinear(opset21.QuantizeLinear(x, scale, zero_point), scale, zero_point)


def _zero_point(dtype: Any) -> Any:
    return _constant(np.array(0, dtype))


def _constant(value: np.ndarray) -> Any:
    return opset21.Constant(value=ir.tensor(value))
