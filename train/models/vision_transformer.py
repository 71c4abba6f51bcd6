"""DeiT, the vision transformer of Touvron et al. 2021, with attention written as the products that quantize."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runtime.errors import OptionError


class _Attention(nn.Module):
    """Self-attention of tokens [N, T, width], `heads` at a time."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.project = nn.Linear(width, width)
        self.scale = (width // heads) ** -0.5

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        # The scale follows the product: the operands are quantized as they leave their layers.
        shares = F.softmax(query.matmul(key.transpose(2, 3)) * self.scale, dim=-1)
        out: Tensor = self.project(shares.matmul(value).transpose(1, 2).flatten(2))
        return out


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attention = _Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.fc1 = nn.Linear(width, 4 * width)
        self.gelu = nn.GELU()
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        x = x + self.fc2(self.gelu(self.fc1(self.norm2(x))))
        return x


class VisionTransformer(nn.Module):
    """DeiT without distillation: patches and a class token through pre-norm blocks, the class token to logits.

    Args:
        channels: image channels.
        size: image height and width in pixels, multiples of `patch`.
        classes: number of classes.
        patch: height and width of a patch; 0 takes 4 up to 64 pixels and 16 above.
        width: features of a token.
        depth: number of blocks.
        heads: of each attention.

    Raises:
        OptionError: the patches do not cover the image exactly.
    """

    def __init__(
        self,
        channels: int,
        size: tuple[int, int],
        classes: int,
        *,
        patch: int = 0,
        width: int = 192,
        depth: int = 12,
        heads: int = 3,
    ) -> None:
        super().__init__()
        patch = patch or (4 if max(size) <= 64 else 16)
        if size[0] % patch or size[1] % patch:
            raise OptionError(
                f"vision transformer: image size {size[0]}x{size[1]}, expected multiples of its patches' "
                f"{patch} pixels; resize the images"
            )
        tokens = 1 + (size[0] // patch) * (size[1] // patch)
        self.patches = nn.Conv2d(channels, width, patch, patch)
        # The class token and its place are one learned vector: the first row.
        self.position = nn.Parameter(torch.empty(1, tokens, width))
        self.blocks = nn.Sequential(*(_Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.position, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [N, classes] of normalized images [N, C, H, W]."""
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = self.blocks(F.pad(x, (0, 0, 1, 0)) + self.position)
        logits: Tensor = self.head(self.norm(x[:, 0]))
        return logits
