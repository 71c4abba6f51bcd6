"""The shipped checkpoints: small, exact on every target, as accurate and as described as their cards say."""

from __future__ import annotations

from pathlib import Path

import pytest

from export.pipeline import export
from train import checkpoint as checkpoints
from train.choices import FLOAT_BITS

MODELS = sorted((Path(__file__).parents[1] / "deploy" / "models").glob("*.pt"))
every_model = pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
TARGETS = ("openvino", "ort", "tensorrt")
# An export of a ResNet-20 takes 10 s: of the three, one target is tried in 8 bits, and another in 2.
QUICK = {
    "cifar10-resnet20-8bit-sgt": {"openvino"}, "cifar10-resnet20-4bit-sgt-seed1": set(),
    "cifar10-resnet20-2bit-sgt": {"ort"},
}  # fmt: skip
EXPORTS = [
    pytest.param(
        path, target, id=f"{target}-{path.stem}",
        marks=() if target in QUICK.get(path.stem, TARGETS) else pytest.mark.slow,
    )
    for path in MODELS for target in TARGETS
]  # fmt: skip


def test_models_are_shipped() -> None:
    assert "mnist-cnn2-8bit-sgt" in [path.stem for path in MODELS]


@every_model
def test_a_model_is_small_and_its_card_tells_its_accuracy(path: Path) -> None:
    checkpoint = checkpoints.load(path)
    assert path.stat().st_size < 6_000_000
    assert checkpoint.optimizer == {}
    card = path.with_suffix(".md").read_text()
    assert f"| test accuracy | {checkpoint.test_accuracy:.2f} % |" in card
    assert f"| file | {path.stat().st_size:,} bytes |" in card
    assert "| masked-accuracy AUC | " in card


@pytest.mark.parametrize(("path", "target"), EXPORTS)
def test_a_model_is_exported_exactly(path: Path, target: str) -> None:
    checkpoint = checkpoints.load(path)
    assert checkpoint.quant.bits != FLOAT_BITS
    found = export(checkpoint, target=target, saliency_precision="float32").verification
    assert found.changed_classes == 0
    assert found.flipped_codes < 1e-5 * found.activation_codes
