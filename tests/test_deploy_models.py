"""The shipped checkpoints: small, exact on every target, as accurate and as described as their cards say."""

from __future__ import annotations

from pathlib import Path

import pytest

from export.pipeline import export
from train import checkpoint as checkpoints
from train.choices import FLOAT_BITS

MODELS = sorted((Path(__file__).parents[1] / "deploy" / "models").glob("*.pt"))
every_model = pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)


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


@every_model
@pytest.mark.parametrize("target", ["openvino", "ort", "tensorrt"])
def test_a_model_is_exported_exactly(path: Path, target: str) -> None:
    checkpoint = checkpoints.load(path)
    assert checkpoint.quant.bits != FLOAT_BITS
    found = export(checkpoint, target=target, saliency_precision="float32").verification
    assert found.changed_classes == 0
    assert found.flipped_codes < 1e-5 * found.activation_codes
