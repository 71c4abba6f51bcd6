"""Temperature and reference: fitted after quantization, on the engine's logits, and stored in the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch.nn import functional as F

from export.onnx import main
from export.probabilities import calibration, fit_temperature, of_sums, sums
from export.validation import Validated, validated
from runtime import Classifier
from runtime.errors import OptionError
from runtime.manifest import Manifest
from runtime.prediction import softmax
from runtime.reference import in_distribution_scores, region_shares
from tests.exports import exported
from train.checkpoint import Checkpoint
from train.data.images import ImageData


@pytest.fixture(scope="module")
def checked(digits_checkpoint: Checkpoint) -> Validated:
    result = exported(digits_checkpoint)
    return validated(result.data, result.manifest, "digits", "data", lambda text: None)


LOGITS = arrays.arrays(np.float32, (40, 5), elements=st.floats(-20, 20, width=32))
LABELS = arrays.arrays(np.int64, 40, elements=st.integers(0, 4))


@given(logits=LOGITS, labels=LABELS, temperature=st.floats(0.2, 5))
def test_the_numbers_are_those_of_the_papers(logits: np.ndarray, labels: np.ndarray, temperature: float) -> None:
    found = calibration(logits, labels, temperature)
    scaled, truth = torch.from_numpy(logits).double() / temperature, torch.from_numpy(labels)
    assert found.nll == pytest.approx(float(F.cross_entropy(scaled, truth)), abs=1e-9)
    probabilities = scaled.softmax(1)
    assert found.brier == pytest.approx(
        float(((probabilities - F.one_hot(truth, 5)) ** 2).sum(1).mean()), abs=1e-9
    )
    confidence, predicted = probabilities.max(1)
    ece = 0.0
    for low in range(15):
        inside = (confidence * 15).long().clamp(max=14) == low
        if inside.any():
            gap = (predicted[inside] == truth[inside]).double().mean() - confidence[inside].mean()
            ece += float(gap.abs() * inside.double().mean())
    assert found.ece_percent == pytest.approx(100 * ece, abs=1e-6)
    halves = sums(logits[:7], labels[:7], temperature) + sums(logits[7:], labels[7:], temperature)
    assert of_sums(halves).nll == pytest.approx(found.nll)


@pytest.mark.parametrize("truth", [0.4, 1.0, 3.0])
def test_the_temperature_of_logits_that_were_multiplied_is_found(truth: float) -> None:
    rng = np.random.default_rng(0)
    honest = 2 * rng.normal(size=(20_000, 6))
    labels = np.array([rng.choice(6, p=p) for p in softmax(honest)])
    assert fit_temperature(honest * truth, labels) == pytest.approx(truth, rel=0.03)


@given(logits=LOGITS, labels=LABELS)
def test_no_other_temperature_has_a_smaller_loss(logits: np.ndarray, labels: np.ndarray) -> None:
    best = fit_temperature(logits, labels)
    assert 0.05 - 1e-9 <= best <= 20 + 1e-9
    loss = calibration(logits, labels, best).nll
    for factor in (0.9, 1.1):
        if 0.05 <= best * factor <= 20:
            assert calibration(logits, labels, best * factor).nll >= loss - 1e-9


def test_scores_are_the_negative_energy() -> None:
    logits = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32) * 30
    expected = torch.logsumexp(torch.from_numpy(logits).double(), 1).numpy()
    np.testing.assert_allclose(in_distribution_scores(logits), expected, rtol=1e-12)


@given(size=st.tuples(st.integers(1, 40), st.integers(1, 40)))
def test_regions_share_a_map(size: tuple[int, int]) -> None:
    maps = np.random.default_rng(0).random((2, *size)).astype(np.float32)
    maps[1] = 0
    shares = region_shares(maps)
    np.testing.assert_allclose(shares.sum(1), 1)
    np.testing.assert_allclose(shares[1], 1 / 9)
    row, column = min(2, 3 * (size[0] - 1) // size[0]), min(2, 3 * (size[1] - 1) // size[1])
    one = np.zeros((1, *size), np.float32)
    one[0, -1, -1] = 5
    assert region_shares(one)[0].argmax() == 3 * row + column


def test_the_file_knows_and_the_classifier_uses_it(
    checked: Validated, digits: ImageData, digits_checkpoint: Checkpoint
) -> None:
    frames = digits.test_images[::2].permute(0, 2, 3, 1).contiguous().numpy()
    labels = digits.test_labels[::2].numpy()
    with Classifier(checked.data, threads=1) as classifier:
        manifest, logits = classifier.manifest, classifier.logits(frames)
        one = classifier.predict(frames[0])
        caption = classifier.explain(frames[0])._caption()
    assert manifest == checked.manifest
    assert manifest.temperature == pytest.approx(fit_temperature(logits, labels), rel=1e-3)
    assert manifest.temperature != 1
    assert one.probability == pytest.approx(softmax(one.logits / manifest.temperature).max())
    assert one.raw_probability == pytest.approx(softmax(one.logits).max())
    assert caption.startswith(f"{one.label} {one.probability:.1%}")
    reference = manifest.reference
    assert reference is not None
    assert reference.images == len(labels)
    assert sum(reference.class_shares) == pytest.approx(1)
    assert sum(reference.map_shares) == pytest.approx(1)
    assert (in_distribution_scores(logits) >= reference.threshold).mean() == pytest.approx(0.95, abs=0.01)
    assert "with the temperature ECE" in checked.lines[1]
    # What runs is what was verified.
    original = onnx.load_from_string(exported(digits_checkpoint).data)
    assert onnx.load_from_string(checked.data).graph == original.graph


def test_a_margin_below_one_is_within_a_single_code(checked: Validated, digits_checkpoint: Checkpoint) -> None:
    """The step is the most by which one code of the last layer's input moves the gap of two logits."""
    step = checked.manifest.logit_step
    assert step is not None
    from export.deploy_form import deploy_form, folded_layers

    model = digits_checkpoint.model()
    form = deploy_form(model.evaluated(), model.input, int8=True)
    last = list(folded_layers(form).values())[-1]
    scale = form.network.get_submodule("quantizers.relu3").scale
    assert last.codes is not None
    assert last.scale is not None
    weight = (last.codes * last.scale.reshape(-1, 1)).double().numpy()
    gaps = [abs(weight[a] - weight[b]).max() for a in range(10) for b in range(10)]
    assert step == pytest.approx(max(gaps) * float(scale))
    frame = model.samples[0].permute(1, 2, 0).numpy()
    with Classifier(checked.data, threads=1) as classifier:
        found = classifier.predict(frame)
    best = np.sort(found.logits)[::-1]
    assert found.margin == pytest.approx(float(best[0] - best[1]) / step)
    assert exported(digits_checkpoint, int8=False).manifest.logit_step is None


def test_older_files_are_read(checked: Validated) -> None:
    import json

    values = json.loads(checked.manifest.to_json())
    for name in ("temperature", "reference", "logit_step", "cams"):
        del values[name]
    old = Manifest.from_json(json.dumps(values), "old")
    assert (old.temperature, old.reference, old.logit_step, old.cams) == (1.0, None, None, ())


@pytest.mark.slow
def test_the_command_takes_validation_images(
    digits_checkpoint_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "model.onnx"
    main([str(digits_checkpoint_path), "--no-saliency", "--validation", "digits", "-o", str(output)])
    out = " ".join(capsys.readouterr().out.split())
    assert "probabilities: temperature" in out
    with Classifier(output, threads=1) as classifier:
        assert classifier.manifest.reference is not None
        assert classifier.manifest.reference.map_shares == ()


def test_images_of_other_classes_are_refused(checked: Validated) -> None:
    other = Manifest(**{**vars(checked.manifest), "classes": ("a", "b")})
    with pytest.raises(OptionError, match="--validation digits: 10 classes, expected the model's 2"):
        validated(checked.data, other, "digits", "data", lambda text: None)
