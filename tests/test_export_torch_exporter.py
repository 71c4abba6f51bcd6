"""Transformers and their kin of torchvision, written by PyTorch's own exporter, become class and map."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torchvision import models
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformerBlockV2

from export.onnx import main
from runtime.session import open_session

CLASSES = 7
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "ConvNeXt": (
        lambda: models.ConvNeXt([CNBlockConfig(16, 24, 1), CNBlockConfig(24, None, 1)], num_classes=7),
        32,
    ),
    "ViT": (lambda: models.VisionTransformer(32, 16, 1, 2, 16, 32, num_classes=7), 32),
    "Swin": (lambda: models.SwinTransformer([4, 4], 16, [1, 1], [2, 2], [4, 4], num_classes=7), 32),
    "Swin V2": (
        lambda: models.SwinTransformer(
            [4, 4], 16, [1, 1], [2, 2], [4, 4], num_classes=7, block=SwinTransformerBlockV2,
            downsample_layer=PatchMergingV2,
        ),
        32,
    ),
    "MaxViT": (
        lambda: models.MaxVit((64, 64), 8, 2, [16, 24], [1, 1], 8, 0.0, num_classes=7),
        64,
    ),
}  # fmt: skip
SLOW = {"Swin V2", "MaxViT"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "opset"),
    [
        pytest.param(name, opset, marks=pytest.mark.slow if name in SLOW or opset == 18 else ())
        for name in NETWORKS
        for opset in (18, 23)
    ],
)
def test_the_map_is_autograds(name: str, opset: int, tmp_path: Path) -> None:
    make, side = NETWORKS[name]
    torch.manual_seed(0)
    network = make().eval()
    for parameter in network.parameters():  # a new vision transformer's head is 0
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    path, output = tmp_path / "net.onnx", tmp_path / "ours.onnx"
    torch.onnx.export(
        network, (torch.randn(2, 3, side, side),), path, dynamo=True, opset_version=opset, verbose=False,
        dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
    )  # fmt: skip
    pixels = np.random.default_rng(0).integers(0, 256, (3, side, side, 3), dtype=np.uint8)
    image = ((torch.tensor(pixels).float() / 255 - 0.5) / 0.25).permute(0, 3, 1, 2).requires_grad_()
    logits = network(image)
    logits[[0, 1, 2], [0, 1, 2]].sum().backward()
    assert image.grad is not None
    expected = image.grad.abs().amax(1).numpy()
    for engine in ("openvino", "ort"):
        main([str(path), "--target", engine, "--mean", "0.5", "--std", "0.25", "-o", str(output)])
        session = open_session(output.read_bytes(), engine=engine)
        found = session.run({"image": pixels, "target": np.arange(3)}, ("logits", "saliency"))
        np.testing.assert_allclose(found["logits"], logits.detach(), atol=1e-5)
        np.testing.assert_allclose(found["saliency"], expected, atol=1e-4 * expected.max())
