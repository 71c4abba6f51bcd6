from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from runtime.errors import OptionError
from train.models.build import ARCHITECTURES, build
from train.models.vision_transformer import VisionTransformer
from train.quantization.description import describe
from train.quantization.quantize import quantize, quantizers, start_alphas
from train.quantization.spec import QuantSpec


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("arch", list(ARCHITECTURES))
def test_every_architecture_takes_gray_and_color_images_of_many_sizes(arch: str, channels: int) -> None:
    for size in ((32, 32), (28, 28), (64, 48)):
        model = build(arch, channels=channels, size=size, classes=7).eval()
        with torch.no_grad():
            assert model(torch.zeros(2, channels, *size)).shape == (2, 7)


@pytest.mark.parametrize(
    ("arch", "size", "parameters"),
    [("resnet18", 224, 11_689_512), ("mobilenet_v2", 224, 3_504_872), ("deit_tiny", 224, 5_717_224)],
)
def test_sizes_are_those_of_the_papers(arch: str, size: int, parameters: int) -> None:
    """With 1000 classes. DeiT-tiny has 5,717,416 with its class token, which is one with its place here."""
    model = build(arch, channels=3, size=(size, size), classes=1000)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_deit_tiny_has_the_published_shape() -> None:
    for size, patch in ((32, 4), (64, 4), (224, 16)):
        model = build("deit_tiny", channels=3, size=(size, size), classes=10)
        assert isinstance(model, VisionTransformer)
        assert model.patches.kernel_size == (patch, patch)
        assert model.position.shape == (1, 1 + (size // patch) ** 2, 192)
        assert len(model.blocks) == 12
        assert {block.attention.heads for block in model.blocks} == {3}


def test_attention_is_pytorchs() -> None:
    torch.manual_seed(0)
    attention = VisionTransformer(3, (8, 8), 4, width=24, depth=1).blocks[0].attention
    reference = torch.nn.MultiheadAttention(24, 3, batch_first=True)
    layers = (attention.query, attention.key, attention.value)
    with torch.no_grad():
        reference.in_proj_weight.copy_(torch.cat([layer.weight for layer in layers]))
        reference.in_proj_bias.copy_(torch.cat([layer.bias for layer in layers]))
        reference.out_proj.load_state_dict(attention.project.state_dict())
    x = torch.randn(2, 5, 24)
    assert torch.allclose(attention(x), reference(x, x, x)[0], atol=1e-6)


def test_a_transformer_multiplies_codes_everywhere_but_in_its_norms() -> None:
    torch.manual_seed(0)
    model = VisionTransformer(3, (16, 16), 4, width=24, depth=2).eval()
    x = torch.randn(16, 3, 16, 16)
    torch.nn.init.normal_(model.head.weight)
    expected = model(x)
    quantized = quantize(model, QuantSpec(8), input_scale=5 / 127).eval()
    start_alphas(quantized, x, quantile=1.0)
    assert F.cosine_similarity(quantized(x), expected).min() > 0.999
    rows = describe(quantized)
    # Patches and head; query, key, value, projection and two layers of each block; and its two products.
    assert [row.kind for row in rows if row.bits].count("Linear") == 1 + 2 * 6
    assert [row.kind for row in rows if row.bits].count("MatMul") == 2 * 2
    assert {row.kind for row in rows if not row.bits} == {"LayerNorm", "Parameter"}
    shares = {name: q.qmin for name, q in quantizers(quantized).items() if "softmax" in name}
    assert list(shares.values()) == [0, 0]


def test_images_that_patches_do_not_cover_are_refused() -> None:
    with pytest.raises(
        OptionError, match=r"image size 30x30, expected multiples of its patches' 4 pixels; resize"
    ):
        build("deit_tiny", channels=3, size=(30, 30), classes=10)


def test_an_unknown_architecture_is_refused() -> None:
    with pytest.raises(OptionError, match="architecture 'resnet9000': expected one of cnn2, resnet20, resnet18"):
        build("resnet9000", channels=3, size=(32, 32), classes=10)


def test_a_new_transformer_knows_nothing() -> None:
    torch.manual_seed(0)
    logits = VisionTransformer(3, (16, 16), 10, depth=2)(torch.randn(64, 3, 16, 16))
    assert F.cross_entropy(logits, torch.arange(64) % 10).item() == pytest.approx(math.log(10), abs=0.1)
