"""Device arrays, streams and contexts of the app in the TensorRT session, on strict models of CUDA and it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from runtime import Classifier
from runtime.engines.tensorrt.cuda import Cuda, stream_handle
from runtime.engines.tensorrt.device_array import DeviceArray
from runtime.engines.tensorrt.session import open as open_plan
from runtime.errors import EngineError
from tests.fake_cuda import FakeContext, FakeGpu, on_host, to_device
from tests.fake_tensorrt import (
    images,
    network,
)

ALL = ("logits", "saliency", "gradient")


def test_device_arrays_are_taken_and_given_without_a_copy(gpu: FakeGpu, plan: Path) -> None:
    session = open_plan(plan)
    batch, target = images(3), np.array([1, 2, 3])
    image = to_device(gpu, batch)
    for _ in range(3):
        before = gpu.bytes_copied
        found = session.run({"image": image, "target": target}, ALL)
        assert gpu.bytes_copied - before == target.nbytes
        for name, expected in network(batch, target).items():
            assert isinstance(found[name], DeviceArray)
            np.testing.assert_array_equal(on_host(gpu, found[name]), expected)
            assert "stream" not in found[name].__cuda_array_interface__
        del found
    assert gpu.objects.count("context") == 1
    gpu.cudaFree(image.address)
    session.close()


def test_a_graph_of_one_device_array_is_not_launched_for_another(gpu: FakeGpu, plan: Path) -> None:
    session = open_plan(plan)
    batches = [images(2, seed) for seed in range(12)]
    arrays = [to_device(gpu, batch) for batch in batches]
    for index in [0, 0, 0, 1, 1, 1, 0, 1, *range(12), *range(12), *range(12)]:
        found = session.run({"image": arrays[index]})["logits"]
        np.testing.assert_array_equal(on_host(gpu, found), network(batches[index], None)["logits"])
        del found
    assert gpu.calls.count("cudaGraphLaunch") > 0
    assert len(gpu.executables) <= 8
    for array in arrays:
        gpu.cudaFree(array.address)
    session.close()


def test_device_outputs_keep_their_memory_until_they_are_dropped(gpu: FakeGpu, plan: Path) -> None:
    session = open_plan(plan)
    first = images(2, 1)
    image, other = to_device(gpu, first), to_device(gpu, images(2, 2))
    kept = session.run({"image": image})["logits"]
    session.run({"image": other})
    session.run({"image": images(2, 3)})
    np.testing.assert_array_equal(on_host(gpu, kept), network(first, None)["logits"])
    session.close()  # the kept array's memory goes with the array
    np.testing.assert_array_equal(on_host(gpu, kept), network(first, None)["logits"])
    del kept
    for array in (image, other):
        gpu.cudaFree(array.address)


def test_inputs_of_another_stream_are_waited_for(gpu: FakeGpu, plan: Path) -> None:
    session = open_plan(plan)
    producer = gpu.cudaStreamCreateWithFlags(0)[1]
    batch = images(2)
    image = to_device(gpu, np.zeros_like(batch), producer)
    pinned = Cuda(gpu).pinned(batch.shape, batch.dtype)
    pinned[1][:] = batch
    gpu.cudaMemcpyAsync(image.address, pinned[0], batch.nbytes, 1, producer)
    found = session.run({"image": image})
    np.testing.assert_array_equal(on_host(gpu, found["logits"]), network(batch, None)["logits"])
    del found
    session.close()
    gpu.cudaStreamDestroy(producer)
    gpu.cudaFreeHost(pinned[0])
    gpu.cudaFree(image.address)


def test_all_work_is_done_in_the_apps_context_and_stream(gpu: FakeGpu, plan: Path) -> None:
    context = FakeContext(gpu)
    context.push()
    stream = gpu.cudaStreamCreateWithFlags(0)[1]
    batch = images(2)
    image = to_device(gpu, batch)
    context.pop()
    with Classifier(plan, context=context, stream=SimpleNamespace(handle=stream)) as classifier:
        for _ in range(4):
            assert classifier.predict(batch)[0].index == network(batch, None)["logits"][0].argmax()
        found = classifier.session.run({"image": image})["logits"]
        assert found.__cuda_array_interface__["stream"] == stream
        assert gpu.streams[stream].queue  # returned before it was done
        context.push()
        gpu.cudaStreamSynchronize(stream)
        np.testing.assert_array_equal(on_host(gpu, found), network(batch, None)["logits"])
        context.pop()
        del found
        classifier.session.run({"image": image})
    assert not gpu.contexts()
    assert len(gpu.streams) == 1
    context.push()
    gpu.cudaStreamDestroy(stream)
    gpu.cudaFree(image.address)
    context.pop()


def test_a_run_waits_until_its_page_locked_memory_is_free_again(gpu: FakeGpu, plan: Path) -> None:
    gpu.cudaSetDevice(0)
    stream, batch = gpu.cudaStreamCreateWithFlags(0)[1], images(2)
    image = to_device(gpu, batch)
    session = open_plan(plan, stream=stream)
    copies = []
    for target in (np.array([1, 2]), np.array([5, 6])):
        found = session.run({"image": image, "target": target}, ("saliency",))["saliency"]
        address, copy = Cuda(gpu).pinned(found.shape, found.dtype)
        gpu.cudaMemcpyAsync(address, found.address, copy.nbytes, 2, stream)  # the app's own, on its stream
        copies.append((address, copy, target))
        del found
    gpu.cudaStreamSynchronize(stream)
    for address, copy, target in copies:
        np.testing.assert_array_equal(copy, network(batch, target)["saliency"])
        gpu.cudaFreeHost(address)
    session.close()
    gpu.cudaFree(image.address)
    gpu.cudaStreamDestroy(stream)


@pytest.mark.parametrize(
    "stream",
    [7, SimpleNamespace(handle=7), SimpleNamespace(ptr=7), SimpleNamespace(cuda_stream=7),
     SimpleNamespace(__cuda_stream__=lambda: (0, 7))],
)  # fmt: skip
def test_streams_of_every_library_are_known(stream: Any) -> None:
    assert stream_handle(stream) == 7


def test_what_is_no_stream_is_refused() -> None:
    with pytest.raises(EngineError, match=r"^stream of type str: expected a handle, or one of PyCUDA"):
        stream_handle("zero")
