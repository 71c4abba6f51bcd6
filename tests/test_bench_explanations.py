"""What explanations are worth: imputation, methods and their costs, sanity checks, attacks, other images."""

from __future__ import annotations

import json
import warnings
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import outliers, robustness, saliency, sanity
from bench.measure.streams import ImageStream
from bench.networks.attacks import fgsm, pgd
from bench.networks.imputation import impute
from bench.networks.methods import measure_methods, methods_of, pasted
from bench.networks.randomized import layers_from_the_head, randomized
from export.reference import reference_run
from runtime import Classifier
from runtime.errors import ModelError, OptionError
from tests.exports import exported
from train.checkpoint import Checkpoint
from train.data.images import ImageData

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from quantus.functions.perturb_func import noisy_linear_imputation


@pytest.fixture(scope="module")
def model(digits_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits checkpoint with its gradient and a map of its last convolution."""
    path = tmp_path_factory.mktemp("explained") / "model.onnx"
    result = exported(digits_checkpoint, cams=(("layercam", ""),), saliency_precision="float32")
    path.write_bytes(result.data)
    return path


# ROAD.


@settings(max_examples=20)
@given(st.integers(0, 999), st.integers(4, 12), st.integers(4, 12), st.floats(0.05, 0.8))
def test_removed_pixels_are_the_means_of_their_neighbours(
    seed: int, height: int, width: int, share: float
) -> None:
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    removed = rng.random((height, width)) < share
    removed[0, 0] = False
    filled = impute(image, removed, noise=0)
    np.testing.assert_array_equal(filled[~removed], image[~removed])
    padded = np.pad(filled.astype(float), ((1, 1), (1, 1), (0, 0)), constant_values=np.nan)
    for row, column in zip(*np.nonzero(removed), strict=True):
        window = padded[row : row + 3, column : column + 3]
        weights = np.array([[1, 2, 1], [2, 0, 2], [1, 2, 1]]) / 12.0
        weights = np.where(np.isnan(window[:, :, 0]), 0, weights)
        mean = np.nansum(window * weights[..., None], axis=(0, 1)) / weights.sum()
        assert np.abs(filled[row, column] - mean).max() <= 1.01  # each rounded to whole levels


def test_away_from_the_border_it_is_quantus() -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (12, 12, 1), dtype=np.uint8)
    removed = np.zeros((12, 12), bool)
    removed[3:9, 4:8] = rng.random((6, 4)) < 0.7
    theirs = noisy_linear_imputation(image.transpose(2, 0, 1).astype(float), np.flatnonzero(removed), noise=0.0)
    ours = impute(image, removed, noise=0)
    assert np.abs(ours - np.asarray(theirs).reshape(12, 12, 1)).max() <= 0.51
    assert (ours != image).any()


# Methods and their costs.


def test_every_method_gets_a_row(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(model), "--data", "digits", "--images", "20", "--method"]
    saliency.main([*arguments, "gradient,input_x_gradient,layercam", "--json", "--plot", str(tmp_path / "m.png")])
    rows = json.loads(capsys.readouterr().out)["methods"]
    assert [row["method"] for row in rows] == ["gradient", "input_x_gradient", "layercam:conv2"]
    for row in rows:
        assert row["accuracy"] >= 90
        assert 0 <= row["road"] <= 100
        assert 0 <= row["energy"] <= 1
        assert row["ms"] > 0
        assert row["times_class"] > 1
    assert (tmp_path / "m.png").stat().st_size > 5_000
    saliency.main([str(model), "--data", "digits", "--images", "64", "--json"])
    (expected,) = json.loads(capsys.readouterr().out)["networks"]
    saliency.main([str(model), "--data", "digits", "--images", "64", "--json", "--method", "gradient"])
    (row,) = json.loads(capsys.readouterr().out)["methods"]
    assert row["masked_auc"] == pytest.approx(expected["masked_auc"])
    assert row["deletion_auc"] == pytest.approx(expected["deletion_auc"])


def test_methods_keep_no_image_longer_than_its_batch(model: Path, digits: ImageData) -> None:
    images = digits.test_images[:32].permute(0, 2, 3, 1).contiguous().numpy()
    labels, batches = digits.test_labels[:32].numpy(), []

    def read(positions: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for part in positions.reshape(-1, min(4, len(positions))):
            batch = images[part]
            batches.append(weakref.ref(batch))
            # The first image, whose cost is measured; the batch before, while its successor is made; and that.
            assert sum(found() is not None for found in batches) <= 3
            yield batch, labels[part]

    test = ImageStream("digits", (8, 8, 1), labels, np.arange(32), read)
    asked = "gradient,layercam"
    rows = measure_methods(model, "digits", test, asked, engine=None, fill="black", canvas="blur")
    assert len(batches) == 1 + 2 * 8
    whole = replace(test, read=lambda positions: iter([(images[positions], labels[positions])]))
    expected = measure_methods(model, "digits", whole, asked, engine=None, fill="black", canvas="blur")
    for row, other in zip(rows, expected, strict=True):
        assert row["located_images"] == other["located_images"] > 0
        for name in ("accuracy", "masked_auc", "deletion_auc", "insertion_auc", "road", "energy", "pointing"):
            assert row[name] == pytest.approx(other[name]), name


def test_methods_that_a_file_does_not_offer(model: Path) -> None:
    with Classifier(model, threads=1) as classifier:
        manifest, outputs = classifier.manifest, classifier.session.outputs
    assert len(methods_of(manifest, outputs, "all")) == 5
    with pytest.raises(OptionError, match=r"--method gradcam: the file offers gradient, .*layercam:conv2"):
        methods_of(manifest, outputs, "gradcam")
    with pytest.raises(OptionError, match="--method cam: expected all or some of gradient"):
        methods_of(manifest, outputs, "cam")


def test_pasted_images_lie_in_their_boxes() -> None:
    images = np.full((5, 20, 30, 1), 200, np.uint8)
    fields, boxes = pasted(images)
    assert len(set(map(str, boxes))) > 1
    for field, box in zip(fields, boxes, strict=True):
        assert (field[box] == 200).all()
        assert field[box].shape == (12, 18, 1)
        assert field.sum() == 200 * 12 * 18


# Sanity: weights that are random.


def test_random_weights_keep_their_codes_and_change_the_maps(model: Path, digits: ImageData) -> None:
    data = model.read_bytes()
    layers = layers_from_the_head(data)
    assert len(layers) == 4
    feeds = {"image": digits.test_images[:8].permute(0, 2, 3, 1).contiguous().numpy(), "target": np.full(8, 3)}
    trained, same, other = (
        reference_run(onnx.load_from_string(file))[0](feeds)
        for file in (data, randomized(data, []), randomized(data, layers))
    )
    np.testing.assert_allclose(same["gradient"], trained["gradient"], atol=1e-5)
    np.testing.assert_allclose(same["cam_conv2"], trained["cam_conv2"], atol=1e-5)
    assert not np.allclose(other["logits"], trained["logits"], atol=0.1)
    before, after = (
        {
            t.name: np.sort(onnx.numpy_helper.to_array(t).ravel())
            for t in onnx.load_from_string(f).graph.initializer
        }
        for f in (data, randomized(data, layers))
    )
    for layer in layers:
        for name in layer.tensors:
            np.testing.assert_array_equal(before[name], after[name])


def test_the_command_says_which_maps_change(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(model), "--data", "digits", "--images", "16", "--stages", "2"]
    sanity.main([*arguments, "--method", "gradient,layercam", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert [row["layers"] for row in found["rows"]] == [2, 2, 4, 4]
    assert all(row["spearman"] < 0.99 for row in found["rows"])
    assert found["passed"].keys() == {"gradient", "layercam:conv2"}


# Attacks.


def test_attacks_stay_in_their_box_and_find_more_the_harder_they_try(model: Path, digits: ImageData) -> None:
    images = digits.test_images[:64].permute(0, 2, 3, 1).contiguous().numpy()
    labels = digits.test_labels[:64].numpy()
    with Classifier(model, threads=1) as classifier:
        accuracy = {"clean": float((classifier.logits(images).argmax(1) == labels).mean())}
        for name, attack in (("fgsm", fgsm), ("pgd", pgd)):
            for levels in (8, 40):
                moved = attack(classifier.session, images, labels, levels)
                assert moved.dtype == np.uint8
                assert np.abs(moved.astype(int) - images).max() == levels
                accuracy[f"{name} {levels}"] = float((classifier.logits(moved).argmax(1) == labels).mean())
        # As many random steps find far fewer.
        noise = np.random.default_rng(0).choice([-40, 40], images.shape)
        noisy = np.clip(images.astype(int) + noise, 0, 255).astype(np.uint8)
        accuracy["noise 40"] = float((classifier.logits(noisy).argmax(1) == labels).mean())
    assert accuracy["clean"] > 0.9
    assert accuracy["pgd 40"] <= accuracy["fgsm 40"] < accuracy["noise 40"]
    assert accuracy["fgsm 40"] < accuracy["fgsm 8"] <= accuracy["clean"]


def test_robustness_of_files(
    model: Path, digits_checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    robustness.main([str(model), "--data", "digits", "--images", "40", "--json"])
    (row,) = json.loads(capsys.readouterr().out)["networks"]
    assert list(row["accuracy"]) == ["clean", "FGSM 2", "PGD 2", "FGSM 8", "PGD 8"]
    assert row["accuracy"]["PGD 8"] <= row["accuracy"]["clean"]
    only = tmp_path / "class.onnx"
    only.write_bytes(exported(digits_checkpoint, saliency=False).data)
    with pytest.raises(ModelError, match="gives no gradient to attack it by"):
        robustness.main([str(only), "--data", "digits"])


# Images of other things.


def test_separation_is_the_area_under_the_curve() -> None:
    rng = np.random.default_rng(0)
    inside, outside = rng.normal(1, 1, 4000), rng.normal(-1, 1, 4000)
    found = outliers.separated(inside, outside)
    assert found["auroc"] == pytest.approx(92.14, abs=0.5)  # Phi(sqrt(2))
    assert found["fpr95"] == pytest.approx(36.1, abs=3)  # 1 - Phi(2 - 1.645)
    assert outliers.separated(inside + 100, outside) == {"auroc": 100.0, "fpr95": 0.0}


def test_noise_is_told_from_digits(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (100, 8, 8, 1), dtype=np.uint8)
    np.savez(tmp_path / "noise.npz", images=noise, labels=np.zeros(100, np.int64))
    outliers.main([str(model), "--data", "digits", "--against", str(tmp_path / "noise.npz"), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["n"][1] == 100
    assert found["energy"]["auroc"] > 70
    assert found["flagged"] is None
