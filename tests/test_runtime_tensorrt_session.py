"""The TensorRT session against strict models of CUDA and TensorRT: no GPU has run any of this."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime import Classifier
from runtime.engines.tensorrt.session import open as open_plan
from runtime.errors import EngineError, ImageError, ModelError
from tests.fake_cuda import FakeGpu, on_host, to_device
from tests.fake_tensorrt import (
    CHANNELS,
    CLASSES,
    SIZE,
    VERSION,
    images,
    install,
    network,
    write_plan,
)

ALL = ("logits", "saliency", "gradient")


def copies_and_launches(gpu: FakeGpu, since: int) -> list[str]:
    wanted = ("cudaMemcpyAsync", "execute_async_v3", "cudaGraphLaunch", "cudaStreamBeginCapture")
    return [name for name in gpu.calls[since:] if name in wanted]


def test_outputs_are_the_networks_on_batches_in_any_order(gpu: FakeGpu, plan: Path) -> None:
    with Classifier(plan) as classifier:
        session = classifier.session
        assert (session.engine, session.version, session.device) == ("tensorrt", VERSION, "cuda:0")
        assert set(session.outputs) == set(ALL)
        assert session.max_batch == 8
        for index, n in enumerate([1, 1, 1, 8, 8, 8, 1, 3, 3, 3, 1, 1]):
            batch, target = images(n, index), np.arange(n) % CLASSES
            found = session.run({"image": batch, "target": target}, ALL)
            for name, expected in network(batch, target).items():
                np.testing.assert_array_equal(found[name], expected)
                assert found[name].dtype == np.float32


@given(sizes=st.lists(st.integers(1, 8), min_size=1, max_size=12))
def test_any_sequence_of_batches_breaks_no_rule(
    sizes: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    gpu = FakeGpu()
    path = write_plan(tmp_path_factory.mktemp("plan") / "engine.plan")
    with pytest.MonkeyPatch.context() as patch:
        install(patch, gpu)
        session = open_plan(path)
        for index, n in enumerate(sizes):
            outputs = [("logits",), ALL][index % 2]
            found = session.run({"image": images(n, index)}, outputs)
            assert set(found) == set(outputs)
            np.testing.assert_array_equal(found["logits"], network(images(n, index), None)["logits"])
        session.close()
    del session
    gpu.assert_clean()


def test_a_shape_is_enqueued_once_recorded_once_and_then_launched(gpu: FakeGpu, plan: Path) -> None:
    session = open_plan(plan)
    seen = []
    for n in (2, 2, 2, 2, 5, 5, 5):
        since = len(gpu.calls)
        session.run({"image": images(n)})
        seen.append(copies_and_launches(gpu, since))
    whole = ["cudaMemcpyAsync", "cudaMemcpyAsync", "execute_async_v3", "cudaMemcpyAsync"]
    recorded = ["cudaStreamBeginCapture", *whole, "cudaGraphLaunch"]
    assert seen == [
        whole,
        recorded,
        ["cudaGraphLaunch"],
        ["cudaGraphLaunch"],
        whole,
        recorded,
        ["cudaGraphLaunch"],
    ]
    session.close()


def test_without_graphs_every_run_is_enqueued(gpu: FakeGpu, plan: Path) -> None:
    session = open_plan(plan, graphs=False)
    for _ in range(4):
        session.run({"image": images(2)})
    assert "cudaStreamBeginCapture" not in gpu.calls
    session.close()


def test_a_plan_that_cannot_be_recorded_is_enqueued_and_gives_the_same(gpu: FakeGpu, tmp_path: Path) -> None:
    session = open_plan(write_plan(tmp_path / "loop.plan", recordable=False))
    for index in range(4):
        found = session.run({"image": images(2, index)})
        np.testing.assert_array_equal(found["logits"], network(images(2, index), None)["logits"])
    assert gpu.calls.count("cudaStreamBeginCapture") == 1
    session.close()


def test_only_what_is_asked_for_is_copied_back(gpu: FakeGpu, plan: Path) -> None:
    session = open_plan(plan)
    before = gpu.bytes_copied
    session.run({"image": images(2)})
    up, logits = 2 * np.prod(SIZE) * CHANNELS + 2 * 8, 2 * CLASSES * 4
    assert gpu.bytes_copied - before == up + logits
    session.close()


def test_predict_and_explain_through_a_classifier(gpu: FakeGpu, plan: Path) -> None:
    batch = images(20)
    with Classifier(plan) as classifier:
        predictions = classifier.predict(batch)  # 20 images in runs of 8
        expected = network(batch, None)
        assert [p.index for p in predictions] == expected["logits"].argmax(1).tolist()
        explanation = classifier.explain(batch[0], target=3)
        np.testing.assert_array_equal(
            explanation.attribution[:, :, :] if explanation.attribution.ndim == 3 else explanation.attribution[0],
            network(batch[:1], np.array([3]))["gradient"][0],
        )


def test_a_plan_of_classes_only_takes_no_target_and_explains_nothing(gpu: FakeGpu, tmp_path: Path) -> None:
    with Classifier(write_plan(tmp_path / "class.plan", saliency=False)) as classifier:
        assert classifier.session.outputs == ("logits",)
        assert classifier.predict(images(1)[0]).index == network(images(1), None)["logits"].argmax()
        with pytest.raises(ModelError, match=r"^this model gives classes only"):
            classifier.explain(images(1)[0])
        with pytest.raises(
            ModelError, match=r"class.plan: gives no saliency but logits; build it with that output$"
        ):
            classifier.session.run({"image": images(1)}, ("logits", "saliency"))


def test_threads_run_side_by_side_each_with_a_context_of_its_own(gpu: FakeGpu, plan: Path) -> None:
    session = open_plan(plan)
    barrier, wrong = threading.Barrier(4), []

    def work(seed: int) -> None:
        barrier.wait()
        for index in range(20):
            batch = images(1 + index % 2, seed * 100 + index)
            found = session.run({"image": batch}, ALL)
            for name, expected in network(batch, None).items():
                if not np.array_equal(found[name], expected):
                    wrong.append((seed, index, name))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert 1 <= gpu.objects.count("context") <= 4
    session.close()


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (
            {"image": images(9)},
            r"^image of shape \[9, 4, 5, 3\]: .*engine.plan takes \[1 to 8, 4, 5, 3\]; pass such",
        ),
        ({"image": images(1)[:, :3]}, r"^image of shape \[1, 3, 5, 3\]: .* takes \[1 to 8, 4, 5, 3\]"),
        ({"image": images(1)[0]}, r"^image of shape \[4, 5, 3\]: "),
        ({"image": images(0)}, r"^image of shape \[0, 4, 5, 3\]: "),
        ({"image": images(1).astype(np.float32)}, "^image of dtype float32: expected uint8; convert it$"),
        (
            {"image": images(1), "target": np.zeros((1, 1), np.int64)},
            r"^target of shape \[1, 1\]: .* takes \[1 to 8\]",
        ),
        ({"image": images(1), "target": np.zeros(1, np.int32)}, "^target of dtype int32: expected int64"),
    ],
)
def test_inputs_outside_the_profile_are_refused_in_one_line(
    gpu: FakeGpu, plan: Path, inputs: dict[str, np.ndarray], message: str
) -> None:
    session = open_plan(plan)
    with pytest.raises(ImageError, match=message) as caught:
        session.run(inputs)
    assert "\n" not in str(caught.value)
    np.testing.assert_array_equal(session.run({"image": images(1)})["logits"], network(images(1), None)["logits"])
    session.close()


def test_masked_and_strided_device_arrays_are_refused(gpu: FakeGpu, plan: Path) -> None:
    session = open_plan(plan)
    interface = {"version": 3, "shape": (1, 4, 5, 3), "typestr": "|u1", "data": (4096, False)}
    for more in ({"strides": (60, 1, 12, 4)}, {"mask": object()}):
        with pytest.raises(
            ImageError, match=r"^image: a device array with strides .*, expected a C-contiguous one"
        ):
            session.run({"image": SimpleNamespace(__cuda_array_interface__={**interface, **more})})
    session.close()


@pytest.mark.parametrize("batch", [(4, 4, 4), (3, 4, 8)])
def test_fewer_images_than_the_plan_takes_are_filled_up(
    gpu: FakeGpu, tmp_path: Path, batch: tuple[int, int, int]
) -> None:
    gpu.cudaSetDevice(0)
    session = open_plan(write_plan(tmp_path / "four.plan", batch=batch))
    for n in (1, 4, 2, 2, 2, 3):
        target = np.arange(n)
        expected = network(images(n, n), target)
        found = session.run({"image": images(n, n), "target": target}, ALL)
        image = to_device(gpu, images(n, n))
        on_device = session.run({"image": image, "target": target}, ALL)
        for name in ALL:
            np.testing.assert_array_equal(found[name], expected[name])
            np.testing.assert_array_equal(on_host(gpu, on_device[name]), expected[name])
        del on_device
        gpu.cudaFree(image.address)
    with pytest.raises(ImageError, match=rf"takes \[1 to {batch[2]}, 4, 5, 3\]"):
        session.run({"image": images(batch[2] + 1)})
    with pytest.raises(ImageError, match=r"^target of shape \[3\]: 2 images; give one for each$"):
        session.run({"image": images(2), "target": np.zeros(3, np.int64)})
    session.close()


def test_shapes_in_turns_are_launched_by_graphs(gpu: FakeGpu, plan: Path) -> None:
    with Classifier(plan) as classifier:
        for index in range(50):
            batch = images(9, index)  # a run of 8 and one of 1
            assert [p.index for p in classifier.predict(batch)] == network(batch, None)["logits"].argmax(
                1
            ).tolist()
        assert gpu.calls.count("cudaGraphLaunch") == 98
        assert gpu.calls.count("cudaStreamBeginCapture") == 2
        assert gpu.calls.count("set_input_shape") <= 8
        for n in (2, 3, 4, 5, 6, 7) * 10:
            classifier.session.run({"image": images(n)})
        assert gpu.objects.count("context") <= 4


def test_memory_for_one_worker_alone_is_enough_for_all_shapes(
    gpu: FakeGpu, plan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = open_plan(plan)
    monkeypatch.setattr(gpu, "device_bytes_left", 0)
    for n in (1, 2, 1, 2, 8):
        np.testing.assert_array_equal(
            session.run({"image": images(n)})["logits"], network(images(n), None)["logits"]
        )
    assert gpu.objects.count("context") == 1
    session.close()


def test_a_closed_session_says_so_and_closes_again(gpu: FakeGpu, plan: Path) -> None:
    session = open_plan(plan)
    session.close()
    with pytest.raises(EngineError, match=r"engine.plan: the model is closed; open it again$"):
        session.run({"image": images(1)})
    session.close()
