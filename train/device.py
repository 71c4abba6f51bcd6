"""How a network is laid out on the device that trains it: memory format, precision, faster layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from train.cpu.layers import use_fast_layers


class _Bfloat16(nn.Module):
    """Runs the network's convolutions and products in bfloat16, and returns float32 logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Return logits float32 [N, K] of normalized images float32 [N, C, H, W]."""
        with torch.autocast(images.device.type, torch.bfloat16):
            logits: Tensor = self.model(images)
        return logits.float()


def place(model: nn.Module, device: str) -> nn.Module:
    """Move `model`, in place, to a device ("cpu" or "cuda") in the form that runs fastest there, and return it."""
    if device == "cpu":
        use_fast_layers(model)
        return model
    return model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def in_precision(model: nn.Module, precision: str) -> nn.Module:
    """Return `model` as a step runs it: itself, or itself in bfloat16.

    Weights, scales and alphas stay float32, and so does `model`, which is what is evaluated and saved. Codes below
    256 are exact in bfloat16; products of codes and scales are rounded to 8 bits, which training sees as noise.

    Args:
        model: the network, quantized or not.
        precision: one of train.choices.STEP_PRECISIONS.
    """
    return _Bfloat16(model) if precision == "bfloat16" else model


def computes_bfloat16_slowly(device: str) -> bool:
    """Return whether a device ("cpu" or "cuda") lacks instructions for bfloat16, and so is faster in float32.

    False where PyTorch does not tell what its processor has.
    """
    if device != "cpu" or not hasattr(torch.cpu, "get_capabilities"):
        return False
    has = torch.cpu.get_capabilities()
    return not any(has.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def arrange(images: Tensor, model: nn.Module) -> Tensor:
    """Return normalized images [N, C, H, W] in the memory format in which `model` runs fastest on their device."""
    # Crops come in channels_last, and every layer keeps it.
    on_cpu = images.device.type == "cpu"
    layout = torch.contiguous_format if on_cpu and not _gains_from_channels_last(model) else torch.channels_last
    return images.contiguous(memory_format=layout)


def _gains_from_channels_last(model: nn.Module) -> bool:
    """Return whether a CPU trains `model` faster in channels_last.

    BatchNorm and quantizers are slower in it, depthwise convolutions so much faster in float32, not in bfloat16,
    that they decide: EfficientNet-Lite0 at 128 pixels, half of it frozen, takes 0.6 of the time in float, 0.75 at
    8 bits, and guided 0.95.
    """
    return not isinstance(model, _Bfloat16) and any(
        isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels > 1 for layer in model.modules()
    )
