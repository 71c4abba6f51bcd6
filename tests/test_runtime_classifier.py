from __future__ import annotations

import gc
import threading
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from runtime import Batching, Classifier, ClearpactError, Prediction
from runtime.classifier import MAX_BATCH
from runtime.errors import EngineError, FileError, ImageError, ModelError, OptionError
from runtime.prediction import finite, softmax
from train.checkpoint import Checkpoint
from train.data.images import ImageData

BOTH = pytest.mark.parametrize("engine", ["openvino", "ort"])


@pytest.fixture(scope="module")
def images(digits: ImageData) -> np.ndarray:
    return digits.test_images.permute(0, 2, 3, 1).contiguous().numpy()


@pytest.fixture(scope="module")
def classifier(digits_models: dict[str, Path]) -> Classifier:
    return Classifier(digits_models["openvino"], threads=1)


@BOTH
def test_accuracy_on_all_test_images_is_the_checkpoints(
    digits_models: dict[str, Path],
    digits_checkpoint: Checkpoint,
    digits: ImageData,
    images: np.ndarray,
    engine: str,
) -> None:
    predicted = [p.index for p in Classifier(digits_models["openvino"], engine=engine).predict(list(images))]
    accuracy = 100 * np.mean(predicted == digits.test_labels.numpy())
    assert accuracy == pytest.approx(digits_checkpoint.test_accuracy)
    assert accuracy > 90


def test_a_prediction_says_the_same_in_each_of_its_fields(classifier: Classifier, images: np.ndarray) -> None:
    found = classifier.predict(images[0], top_k=10)
    assert isinstance(found, Prediction)
    probabilities = np.exp(found.logits.astype(float)) / np.exp(found.logits.astype(float)).sum()
    assert found.index == found.logits.argmax()
    assert found.label == classifier.manifest.classes[found.index]
    assert found.probability == pytest.approx(probabilities.max(), rel=1e-12)
    assert found.top[0] == (found.label, found.probability)
    assert [p for _, p in found.top] == pytest.approx(sorted(probabilities, reverse=True), rel=1e-12)
    assert {label for label, _ in found.top} == set(classifier.manifest.classes)


@pytest.mark.parametrize(("top_k", "listed"), [(1, 1), (3, 3), (10, 10), (99, 10)])
def test_top_k_lists_as_many_classes_as_there_are(
    classifier: Classifier, images: np.ndarray, top_k: int, listed: int
) -> None:
    (found,) = classifier.predict(images[:1], top_k=top_k)
    assert len(found.top) == listed


def test_top_k_below_one_is_refused(classifier: Classifier, images: np.ndarray) -> None:
    with pytest.raises(OptionError, match=r"^top_k 0: expected a whole number from 1$"):
        classifier.predict(images[0], top_k=0)


def test_one_image_gives_one_prediction_and_a_batch_or_a_list_gives_a_list(
    classifier: Classifier, images: np.ndarray
) -> None:
    grey = images[0, :, :, 0]
    rgb = np.repeat(images[0], 3, 2)
    expected = classifier.predict(grey)
    assert isinstance(expected, Prediction)
    for single in (images[0], rgb):
        found = classifier.predict(single)
        assert isinstance(found, Prediction)
        assert np.array_equal(found.logits, expected.logits)
    for several in (images[:1], images[:1, :, :, 0], [grey], [images[0]], [rgb]):
        (found,) = classifier.predict(several)
        assert np.array_equal(found.logits, expected.logits)


def test_a_list_may_mix_sizes_and_channels(classifier: Classifier, images: np.ndarray) -> None:
    large = np.kron(images[1, :, :, 0], np.ones((5, 5), np.uint8))
    mixed = [images[0], large, np.repeat(images[2], 3, 2)]
    found = classifier.predict(mixed)
    assert [p.index for p in found] == [classifier.predict(image).index for image in mixed]  # type: ignore[union-attr]
    assert found[0].index == classifier.predict(images[:1])[0].index  # type: ignore[index]


def test_an_empty_list_is_refused(classifier: Classifier) -> None:
    with pytest.raises(ImageError, match=r"^an empty list of images, expected at least one$"):
        classifier.predict([])


@BOTH
@pytest.mark.parametrize("name", ["openvino", "float"])
def test_any_number_of_images_gives_what_they_give_one_by_one(
    digits_models: dict[str, Path], images: np.ndarray, engine: str, name: str
) -> None:
    classifier = Classifier(digits_models[name], engine=engine)
    single = np.concatenate([classifier.logits(images[i]) for i in range(70)])
    assert MAX_BATCH < 70
    worst = max(np.abs(classifier.logits(images[:n]) - single[:n]).max() for n in range(1, 71))
    # The same codes in every batch; float sums may be taken in another order. Measured: 0 to 2.9e-6.
    assert worst < 1e-5


def test_openvino_gives_the_same_bits_in_every_batch(classifier: Classifier, images: np.ndarray) -> None:
    single = np.concatenate([classifier.logits(image) for image in images[:70]])
    for n in (2, 3, 63, 64, 65, 70):
        assert np.array_equal(classifier.logits(images[:n]), single[:n])


@BOTH
def test_eight_threads_share_one_classifier_and_get_exactly_the_single_threaded_results(
    digits_models: dict[str, Path], images: np.ndarray, engine: str
) -> None:
    classifier = Classifier(digits_models["openvino"], engine=engine, threads=1)
    expected = [classifier.predict(image) for image in images]
    found: list[list[Prediction]] = [[] for _ in range(8)]
    start = threading.Barrier(8)

    def work(number: int) -> None:
        start.wait()
        for image in np.roll(images, number * 45, axis=0):
            found[number].append(classifier.predict(image))  # type: ignore[arg-type]

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, predictions in enumerate(found):
        assert len(predictions) == len(images)
        for index, prediction in enumerate(predictions):
            reference = expected[(index - number * 45) % len(images)]
            assert np.array_equal(prediction.logits, reference.logits)  # type: ignore[union-attr]
            assert prediction.top == reference.top  # type: ignore[union-attr]


def test_contents_of_a_file_are_as_good_as_its_path(
    classifier: Classifier, digits_models: dict[str, Path], images: np.ndarray
) -> None:
    from_bytes = Classifier(digits_models["openvino"].read_bytes(), threads=1)
    assert from_bytes.manifest == classifier.manifest
    assert np.array_equal(from_bytes.logits(images[:5]), classifier.logits(images[:5]))
    assert np.array_equal(
        Classifier(str(digits_models["openvino"])).logits(images[:5]), classifier.logits(images[:5])
    )


@BOTH
def test_leaving_the_with_block_closes_the_model_even_after_an_error(
    digits_models: dict[str, Path], images: np.ndarray, engine: str
) -> None:
    with pytest.raises(ImageError), Classifier(digits_models["openvino"], engine=engine) as classifier:  # noqa: PT012
        classifier.predict(images[0])
        classifier.predict(images[0].astype(float))
    with pytest.raises(EngineError, match=r"the model is closed; open it again$"):
        classifier.predict(images[0])
    classifier.close()
    assert classifier.manifest.arch == "cnn2"


def test_errors_of_bytes_name_them_so() -> None:
    with pytest.raises(ClearpactError, match=r"^model bytes: an empty file, expected an ONNX file"):
        Classifier(b"")


@pytest.mark.parametrize("call", ["predict", "explain"])
def test_three_planes_are_not_three_grey_images(classifier: Classifier, images: np.ndarray, call: str) -> None:
    planes = np.ascontiguousarray(np.repeat(images[0], 3, 2).transpose(2, 0, 1))
    message = (
        r"^image of shape \[3, 8, 8\], .*; put the channels last, or give three grey images as \[3, 8, 8, 1\]"
    )
    with pytest.raises(ImageError, match=message):
        getattr(classifier, call)(planes)
    with pytest.raises(ImageError, match=r"^element 0 of the list: shape \[3, 8, 8\], expected one image"):
        getattr(classifier, call)([planes])
    assert len(classifier.predict(images[:3])) == 3  # type: ignore[arg-type]
    assert len(classifier.predict(list(images[:3, ..., 0]))) == 3
    assert len(classifier.explain(list(images[:3, ..., 0])).label) == 3  # type: ignore[arg-type]


@pytest.mark.parametrize("call", ["predict", "explain", "logits"])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "^None instead of an image: there is no frame"),
        (b"\x89PNG", "^4 bytes instead of pixels; give the path of a file, or PIL.Image.open of them$"),
        ([], "^an empty list of images, expected at least one$"),
        ((), "^an empty list of images, expected at least one$"),
        ([None], "^None instead of an image"),
        ([b"\x89PNG"], "^4 bytes instead of pixels"),
        ([[[1, 2], [3]]], "^list that is no array .*; give images of several sizes as a list of arrays$"),
        ([[1, 2], [3]], "dtype int64"),
        (np.array([["a", "b"]]), "^image of dtype <U1, expected uint8"),
        (np.zeros((8, 8)), "^image of dtype float64, expected uint8 .*; pass pixels 0..255 as np.uint8$"),
        (np.zeros((8, 8), np.int16), "^image of dtype int16"),
        (np.zeros((8, 8), object), "^image of dtype object"),
        (object(), "^image of dtype object"),
        (7, "^image of dtype int64"),
    ],
)
def test_what_is_no_image_is_our_error(classifier: Classifier, call: str, given: object, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        getattr(classifier, call)(given)


@pytest.mark.parametrize("call", ["predict", "explain"])
def test_a_list_holds_one_image_an_element(classifier: Classifier, images: np.ndarray, call: str) -> None:
    with pytest.raises(ImageError, match=r"^element 1 of the list: a batch of shape \[4, 8, 8, 1\], expected one"):
        getattr(classifier, call)([images[0], images[:4]])
    with pytest.raises(ImageError, match=r"^element 0 of the list: shape \[4, 8, 8\], expected one image"):
        getattr(classifier, call)([images[:4, ..., 0]])
    of_one = [images[:1], images[0], images[0, ..., 0], images[:1, ..., 0]]
    found = [p.logits for p in classifier.predict(tuple(of_one))]  # type: ignore[union-attr, arg-type]
    assert all(np.array_equal(logits, found[0]) for logits in found)
    assert np.array_equal(classifier.explain(of_one).logits, np.stack(found))


def test_images_of_two_sizes_are_explained_one_by_one(classifier: Classifier, images: np.ndarray) -> None:
    with pytest.raises(ImageError, match=r"^images of shapes \[\[8, 8, 1\], \[9, 9, 1\]\], expected one shape"):
        classifier.explain([images[0], np.zeros((9, 9), np.uint8)])


@pytest.mark.parametrize("mode", ["P", "LA", "RGBA", "1", "L"])
def test_a_pil_image_is_classified_as_its_file_is(classifier: Classifier, digits: ImageData, mode: str) -> None:
    shown = Image.fromarray(digits.test_images[1, 0].numpy()).convert(mode)
    expected = classifier.predict(np.asarray(shown.convert("RGB")))
    for found in (classifier.predict(shown), classifier.predict([shown])[0]):
        assert np.array_equal(found.logits, expected.logits)  # type: ignore[union-attr]
    assert np.array_equal(classifier.explain(shown).logits, expected.logits)  # type: ignore[union-attr]
    assert classifier.explain(shown).overlay().shape == (8, 8, 3)
    with pytest.raises(ImageError, match=r"^PIL image: has I;16 pixels, expected 8 bits"):
        classifier.predict(Image.new("I;16", (8, 8)))


def test_a_map_that_is_not_finite_raises_instead_of_being_black(
    digits_models: dict[str, Path], images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a plan whose gradients overflow in half precision."""
    classifier = Classifier(digits_models["ort"])
    run = classifier.session.run

    def overflowing(*given: object) -> dict[str, np.ndarray]:
        found = run(*given)
        found["gradient"][1, 0, 3, 4] = np.nan
        return found

    monkeypatch.setattr(classifier.session, "run", overflowing)
    with pytest.raises(ModelError, match=r"^image 1 of 3: the model gives gradients that are not finite \(1 such"):
        classifier.explain(images[:3])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_raise_instead_of_being_class_0(value: float) -> None:
    logits = np.zeros((3, 4), np.float32)
    assert finite(logits) is logits
    logits[1, 2] = value
    with pytest.raises(
        ModelError, match=r"^image 1 of 3: the model gives logits that are not finite \(1 such image"
    ):
        finite(logits)


def test_a_damaged_model_says_so_for_its_class_and_its_map(
    digits_models: dict[str, Path], images: np.ndarray, tmp_path: Path
) -> None:
    model = onnx.load(digits_models["float"])
    bias = next(t for t in model.graph.initializer if t.name.endswith("fc2.bias"))
    bias.CopyFrom(onnx.numpy_helper.from_array(np.full(10, np.nan, np.float32), bias.name))
    onnx.save(model, tmp_path / "nan.onnx")
    damaged = Classifier(tmp_path / "nan.onnx", engine="ort")
    for call in (damaged.predict, damaged.explain, damaged.logits):
        with pytest.raises(ModelError, match=r"^image 0 of 2: the model gives logits that are not finite"):
            call(images[:2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "smoothgrad", "samples": "3"}, "^samples '3': expected a whole number from 1$"),
        ({"method": "smoothgrad", "samples": 2.5}, r"^samples 2.5: expected a whole number from 1$"),
        ({"method": "smoothgrad", "noise": "a"}, "^noise 'a': expected a share"),
        ({"method": "smoothgrad", "seed": "x"}, "^seed 'x': expected a whole number from 0$"),
        ({"method": "integrated_gradients", "steps": None}, "^steps None: expected a whole number"),
        ({"method": "integrated_gradients", "baseline": "black"}, "^baseline 'black': expected a pixel level"),
        ({"target": "cat"}, "^target 'cat': expected one class index"),
        ({"target": [[1], [2, 3]]}, r"^target \[\[1\], \[2, 3\]\]: expected one class index"),
    ],
)
def test_a_text_for_a_number_is_our_error(
    classifier: Classifier, images: np.ndarray, arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        classifier.explain(images[0], **arguments)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=r"^top_k '3': expected a whole number from 1$"):
        classifier.predict(images[0], top_k="3")  # type: ignore[call-overload]


def test_threads_are_a_number(digits_models: dict[str, Path]) -> None:
    with pytest.raises(OptionError, match=r"^threads '2': expected a whole number from 1$"):
        Classifier(digits_models["ort"], threads="2")  # type: ignore[arg-type]


def test_softmax_is_exact_for_logits_that_overflow_an_exponential() -> None:
    assert softmax(np.array([1000.0, 1000.0, -1000.0], np.float32)).tolist() == [0.5, 0.5, 0.0]
    assert softmax(np.log(np.array([[1.0, 3.0]]))).tolist() == [pytest.approx([0.25, 0.75], rel=1e-15)]


@pytest.mark.parametrize("call", ["predict", "explain", "logits"])
def test_paths_and_pil_images_are_what_they_show(
    digits_models: dict[str, Path], images: np.ndarray, tmp_path: Path, call: str
) -> None:
    classifier = Classifier(digits_models["ort"])
    path = tmp_path / "photo.png"
    Image.fromarray(images[0, ..., 0]).save(path)
    run = getattr(classifier, call)
    expected = run(images[0, ..., 0])
    for photo in (path, str(path), Image.open(path)):
        found = run(photo)
        found, wanted = (getattr(value, "logits", value) for value in (found, expected))
        assert np.array_equal(found, wanted)
    several = run([path, Image.open(path), images[0]])
    assert len(getattr(several, "logits", several)) == 3
    for missing in (tmp_path / "absent.png", [str(tmp_path / "absent.png")]):
        with pytest.raises(FileError, match=r"absent\.png: no such file; check the path$"):
            run(missing)


def test_what_is_submitted_at_the_same_time_is_run_together_and_each_gets_its_own(
    digits_models: dict[str, Path], images: np.ndarray
) -> None:
    with Classifier(digits_models["openvino"], batching=Batching(max_batch=4, max_wait_ms=500)) as classifier:
        expected = classifier.predict(images[:11])
        sizes: list[int] = []
        run = classifier.session.run
        classifier.session.run = lambda inputs, *more: sizes.append(len(inputs["image"])) or run(inputs, *more)
        futures = [classifier.submit(image, top_k=2) for image in images[:11]]
        found = [future.result() for future in futures]
    assert [p.index for p in found] == [p.index for p in expected]
    assert all(np.allclose(p.logits, e.logits, atol=1e-5) for p, e in zip(found, expected, strict=True))
    assert all(len(p.top) == 2 for p in found)
    assert sizes == [4, 4, 2, 1]


def test_an_image_waits_for_others_no_longer_than_it_may(
    digits_models: dict[str, Path], images: np.ndarray
) -> None:
    with Classifier(digits_models["ort"], batching=Batching(max_batch=64, max_wait_ms=50)) as classifier:
        classifier.predict(images[0])
        began = time.perf_counter()
        classifier.submit(images[0]).result(timeout=30)
        assert time.perf_counter() - began >= 0.05


def test_errors_of_submitted_images_are_their_own(
    digits_models: dict[str, Path], images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    classifier = Classifier(digits_models["ort"], batching=Batching(max_wait_ms=300))
    for wrong, error in ((None, ImageError), (images[:2], ImageError), ("absent.png", FileError)):
        with pytest.raises(error):
            classifier.submit(wrong)
    with pytest.raises(OptionError, match=r"^top_k 0"):
        classifier.submit(images[0], top_k=0)
    run = classifier.session.run
    infinite = np.zeros((3, 10), np.float32)
    infinite[1] = np.inf
    monkeypatch.setattr(classifier.session, "run", lambda inputs, *_: {"logits": infinite[: len(inputs["image"])]})
    futures = [classifier.submit(image) for image in images[:3]]
    # Two and one run: in both the second row is infinite, and the first is not.
    assert futures[0].result().index == 0
    with pytest.raises(ModelError, match="not finite"):
        futures[1].result()
    monkeypatch.setattr(classifier.session, "run", run)
    cancelled = [classifier.submit(image) for image in images[:2]]
    assert cancelled[0].cancel() or cancelled[0].done()
    assert cancelled[1].result().index >= 0
    classifier.close()
    classifier.close()
    with pytest.raises(EngineError, match=r"^the model is closed; open it again$"):
        classifier.submit(images[0])


def test_a_classifier_that_is_dropped_ends_its_thread(digits_models: dict[str, Path], images: np.ndarray) -> None:
    classifier = Classifier(digits_models["ort"])
    classifier.submit(images[0]).result()
    (thread,) = (thread for thread in threading.enumerate() if thread.name == "clearpact-batches")
    del classifier
    gc.collect()
    thread.join(timeout=10)
    assert not thread.is_alive()


@given(st.integers(1, 200))
def test_any_number_of_images_is_a_sum_of_few_sizes(most: int) -> None:
    ladder = Batching(max_batch=most).ladder()
    assert ladder == tuple(sorted(set(ladder), reverse=True))
    assert (ladder[0], ladder[-1]) == (most, 1)
    assert len(ladder) <= most.bit_length() + 1


def test_after_warming_up_nothing_is_compiled(digits_models: dict[str, Path], images: np.ndarray) -> None:
    classifier = Classifier(digits_models["openvino"])
    classifier.warm_up(np.int64(2), explain=True)
    classifier.warm_up((1, 3))
    kept = dict(classifier.session._variants)  # type: ignore[attr-defined]
    assert sorted(kept) == [
        (1, ("logits",)), (2, ("logits",)), (2, ("logits", "gradient")), (3, ("logits",)),
    ]  # fmt: skip
    for n in (1, 2, 3):
        classifier.predict(images[:n])
    assert classifier.session._variants == kept  # type: ignore[attr-defined]
    for wrong in (0, 65, 1.5, [1, 100]):
        with pytest.raises(OptionError, match=r"^batch .*: expected whole numbers from 1 to 64$"):
            classifier.warm_up(wrong)  # type: ignore[arg-type]


def test_its_text_says_what_it_is(digits_models: dict[str, Path]) -> None:
    classifier = Classifier(digits_models["openvino"])
    version = classifier.session.version
    assert repr(classifier) == f"<Classifier: cnn2, int8, 8x8x1 -> 10 classes, openvino {version} on cpu>"
    classifier.close()
    assert repr(classifier).endswith("on cpu, closed>")


@pytest.mark.parametrize(
    ("name", "value"), [("max_batch", 0), ("max_batch", 2.5), ("max_wait_ms", -1), ("max_wait_ms", float("nan"))]
)
def test_batching_refuses_what_makes_no_sense(name: str, value: float) -> None:
    with pytest.raises(OptionError, match=f"^{name} "):
        Batching(**{name: value})
