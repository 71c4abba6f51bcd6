"""Frames in GPU memory, given to `Classifier.predict` of a plan: they never come to the host."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from runtime import Classifier
from runtime.engines.tensorrt.device_array import DeviceView, device_batch
from runtime.errors import ImageError
from runtime.manifest import ImageInput
from tests.fake_cuda import FakeGpu, to_device
from tests.fake_tensorrt import CLASSES, images, network, write_plan


class Unreadable:
    """An array of CuPy: numpy may not copy it to the host by itself."""

    def __init__(self, array: Any) -> None:
        self.__cuda_array_interface__ = array.__cuda_array_interface__

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        raise TypeError("Implicit conversion to a NumPy array is not allowed")


@pytest.mark.parametrize("app_stream", [False, True])
def test_frames_on_the_gpu_are_classified_without_coming_to_the_host(
    gpu: FakeGpu, plan: Path, app_stream: bool
) -> None:
    gpu.cudaSetDevice(0)
    stream = gpu.cudaStreamCreateWithFlags(1)[1] if app_stream else None
    with Classifier(plan, stream=stream) as classifier:
        for round_ in range(4):
            batch = images(3, round_)
            held = to_device(gpu, batch)
            expected = classifier.predict(batch)
            before = gpu.bytes_copied
            found = classifier.predict(Unreadable(held))
            # Down come the logits, up goes the target -1 of a plan that explains; no pixel does.
            assert gpu.bytes_copied - before == 3 * CLASSES * 4 + 3 * 8
            assert [one.label for one in found] == [one.label for one in expected]
            for one, row in zip(found, network(batch, None)["logits"], strict=True):
                np.testing.assert_array_equal(one.logits, row)
            one = to_device(gpu, batch[0])
            single = classifier.predict(Unreadable(one))
            np.testing.assert_array_equal(single.logits, found[0].logits)
            np.testing.assert_array_equal(classifier.logits(one), single.logits[None])
            gpu.cudaFree(held.address)
            gpu.cudaFree(one.address)
    if stream is not None:
        gpu.cudaStreamDestroy(stream)


def test_more_frames_than_the_plan_takes_are_cut(gpu: FakeGpu, plan: Path) -> None:
    gpu.cudaSetDevice(0)
    batch = images(19)
    held = to_device(gpu, batch)
    with Classifier(plan) as classifier:
        found = classifier.logits(Unreadable(held))
    np.testing.assert_array_equal(found, network(batch, None)["logits"])
    gpu.cudaFree(held.address)


def test_what_the_plan_does_not_take_is_one_line(gpu: FakeGpu, tmp_path: Path) -> None:
    gpu.cudaSetDevice(0)
    with Classifier(write_plan(tmp_path / "class.plan", saliency=False)) as classifier:
        for array, text in (
            (images(1)[0, 1:], r"^Unreadable in GPU memory of shape \[\d+, \d+, \d\] and type \|u1: only a plan"),
            (images(1).astype(np.float32), r"and type <f4: .*; resize it there, or copy it to the host$"),
        ):
            held = to_device(gpu, array)
            with pytest.raises(ImageError, match=text):
                classifier.predict(Unreadable(held))
            gpu.cudaFree(held.address)
        turned = SimpleNamespace(
            __cuda_array_interface__={
                **to_device(gpu, images(2)).__cuda_array_interface__,
                "strides": (1, 2, 3, 4),
            }
        )
        with pytest.raises(ImageError, match=r"^image: a device array with strides .*; copy it first$"):
            classifier.predict(turned)
        gpu.cudaFree(turned.__cuda_array_interface__["data"][0])


class RequiresGradient(Unreadable):
    """A tensor of PyTorch whose gradient is wanted: it refuses to be an array of others."""

    def __init__(self) -> None:
        pass

    @property
    def __cuda_array_interface__(self) -> Any:
        raise RuntimeError("Use var.detach()")


def test_an_array_that_refuses_to_be_read_is_one_line(gpu: FakeGpu, plan: Path) -> None:
    with Classifier(plan) as classifier:
        with pytest.raises(ImageError, match=r"^RequiresGradient that is no array \(Implicit conversion"):
            classifier.predict(RequiresGradient())
        with pytest.raises(
            ImageError, match=r"^image: a device array that cannot be taken \(Use var\.detach\(\)\)$"
        ):
            classifier.session.run({"image": RequiresGradient()})


@pytest.mark.parametrize(
    ("shape", "channels", "taken"),
    [
        ((4, 6), 1, ((1, 4, 6, 1), True)),
        ((4, 6, 1), 1, ((1, 4, 6, 1), True)),
        ((5, 4, 6), 1, ((5, 4, 6, 1), False)),
        ((5, 4, 6, 1), 1, ((5, 4, 6, 1), False)),
        ((4, 6, 3), 3, ((1, 4, 6, 3), True)),
        ((2, 4, 6, 3), 3, ((2, 4, 6, 3), False)),
        ((4, 6, 3), 1, None),  # to be made grey
        ((4, 6), 3, None),
        ((0, 4, 6, 3), 3, None),
        ((4, 7, 3), 3, None),
        ((1, 1, 4, 6, 3), 3, None),
        ((6,), 1, None),
        ((), 1, None),
    ],
)
def test_shapes_mean_what_they_mean_on_the_host(
    shape: tuple[int, ...], channels: int, taken: tuple[tuple[int, ...], bool] | None
) -> None:
    expected = ImageInput((4, 6), channels, (0.0,) * channels, (1.0,) * channels)
    array = SimpleNamespace(
        __cuda_array_interface__={"version": 3, "shape": shape, "typestr": "|u1", "data": (4096, True)}
    )
    found = device_batch(array, expected)
    assert (None if found is None else (found[0].shape, found[1])) == taken
    assert found is None or (found[0].address, found[0].owner) == (4096, array)
    assert device_batch(np.zeros(shape, np.uint8), expected) is None


def test_rows_of_a_view_are_of_the_same_memory() -> None:
    owner = object()
    view = DeviceView(4096, (7, 2, 3), np.dtype(np.int16), 5, owner)
    assert view[2:4] == DeviceView(4096 + 2 * 12, (2, 2, 3), np.dtype(np.int16), 5, owner)
    assert view[4:99] == DeviceView(4096 + 4 * 12, (3, 2, 3), np.dtype(np.int16), 5, owner)
