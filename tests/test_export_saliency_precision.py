"""Whether a file's gradients are in int8, and how far its maps are the float network's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from export.gradient.joining import NORMALIZED
from export.gradient.walk import append_input_gradient
from export.onnx import main
from export.pipeline import export
from export.verification import agreement
from runtime import Classifier
from runtime.errors import ModelError, OptionError
from runtime.explanations.agreement import spearman
from tests.exports import exported, pixels
from train.checkpoint import Checkpoint


def test_agreement_of_maps_is_reported_and_can_be_required(
    digits_checkpoint: Checkpoint, digits_checkpoint_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    floating = exported(digits_checkpoint, int8=False).agreement
    assert floating is not None
    assert floating.maps.spearman > 0.9999
    assert floating.maps.top_overlap > 0.999
    assert floating.float_accuracy == floating.exported_accuracy
    quantized = exported(digits_checkpoint).agreement
    assert quantized is not None
    assert 0.9 < quantized.maps.spearman < floating.maps.spearman
    assert quantized.maps.samples == 256
    arguments = [str(digits_checkpoint_path), "--int8", "-o", str(tmp_path / "model.onnx"), "--require-agreement"]
    with pytest.raises(
        ModelError, match=r"saliency: Spearman 0\.\d+ with the float network's maps, expected 0\.9999"
    ):
        main([*arguments, "0.9999"])
    assert not (tmp_path / "model.onnx").exists()
    main([*arguments, "0.9"])
    assert str(quantized.maps) in " ".join(capsys.readouterr().out.split())
    with pytest.raises(OptionError, match="--require-agreement needs the maps that --no-saliency leaves out"):
        main([*arguments, "0.9", "--no-saliency"])


def test_gradients_are_int8_on_openvino_and_their_price_is_told(
    digits_checkpoint: Checkpoint, digits_models: dict[str, Path], tmp_path: Path
) -> None:
    made = exported(digits_checkpoint)
    assert made.differentiated is not None
    price = made.differentiated.int8_agreement
    assert price is not None
    assert made.differentiated.int8
    assert price.samples == 256  # of all samples: training images calibrate
    assert 0.99 <= price.spearman < 1
    assert f"gradients in int8; int8's maps against float32's: {price}" == str(made.differentiated)
    images = pixels(digits_checkpoint, 64)
    model = made.model.SerializeToString()
    assert len(model) < len(digits_models["openvino"].read_bytes()) / 2
    rounded, exact = (Classifier(m, threads=1).explain(images) for m in (model, digits_models["openvino"]))
    assert 0.99 <= spearman(rounded.map, exact.map).mean() < 1
    np.testing.assert_array_equal(rounded.logits, exact.logits)


def test_auto_keeps_float32_gradients_where_int8s_maps_agree_too_little(
    digits_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agreement, "LEAST_SPEARMAN", 1.01)
    differentiated = export(digits_checkpoint).differentiated
    assert differentiated is not None
    assert not differentiated.int8
    assert str(differentiated).startswith("gradients in float32; int8's maps against float32's: Spearman 0.99")
    assert differentiated.int8_agreement is not None
    assert differentiated.int8_agreement.samples == 256
    with monkeypatch.context() as large:  # of large images a few decide
        large.setattr(agreement, "_PIXELS_AT_ONCE", 256 * 8 * 8 - 1)
        large.setattr(agreement, "_FIRST_SPEARMAN", 1.01)
        few = export(digits_checkpoint).differentiated
    assert few is not None
    assert few.int8_agreement is not None
    assert few.int8_agreement.samples == 8
    asked = exported(digits_checkpoint, saliency_precision="int8").differentiated
    assert asked is not None
    assert asked.int8


def test_a_class_for_onnx_runtime_that_pools_codes_is_not_differentiated_later(
    digits_checkpoint: Checkpoint,
) -> None:
    model = exported(digits_checkpoint, target="ort", saliency=False).model
    with pytest.raises(ModelError, match=r"or export a checkpoint with its saliency at once$"):
        append_input_gradient(model, input=NORMALIZED)


def test_gradients_are_float32_elsewhere(digits_checkpoint: Checkpoint) -> None:
    for options in ({"target": "ort"}, {"int8": False}, {"saliency_precision": "float32"}):
        made = exported(digits_checkpoint, **options)
        assert str(made.differentiated) == "gradients in float32"
        backward = [n for n in made.model.graph.node if n.output[0].startswith("grad/")]
        assert "QuantizeLinear" not in {n.op_type for n in backward}
        # What it dequantizes are activations before a pooling: the class has their codes from after it.
        dequantized = {n.input[0] for n in backward if n.op_type == "DequantizeLinear"}
        assert dequantized == ({"grad/quantizers.relu2.codes"} if "target" in options else set())
    with pytest.raises(OptionError, match="int8 gradients of a float32 graph"):
        export(digits_checkpoint, int8=False, saliency_precision="int8")
    with pytest.raises(OptionError, match="saliency precision 'int4': expected one of auto, float32, int8"):
        export(digits_checkpoint, saliency_precision="int4")
