"""Device arrays, streams and contexts of the app in the TensorRT session, on strict models of CUDA and it."""

from __future__ import annotations

import gc
import threading
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
from tests.fake_tensorrt import images, install, network

ALL = ("logits", "saliency", "gradient")


def test_device_arrays_are_taken_and_given_without_a_copy(gpu: FakeGpu, plan: Path) -> None:
    gpu.cudaSetDevice(0)
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
    assert gpu.calls.count("cudaGraphLaunch") == 2
    gpu.cudaFree(image.address)
    session.close()


def test_arrays_in_turns_are_all_launched_by_one_graph(gpu: FakeGpu, plan: Path) -> None:
    gpu.cudaSetDevice(0)
    session = open_plan(plan)
    batches = [images(2, seed) for seed in range(12)]
    arrays = [to_device(gpu, batch) for batch in batches]
    for index in [0, 0, 0, 1, 1, 1, 0, 1, *range(12), *range(12), *range(12)]:
        found = session.run({"image": arrays[index]})["logits"]
        np.testing.assert_array_equal(on_host(gpu, found), network(batches[index], None)["logits"])
        del found
    assert gpu.calls.count("cudaStreamBeginCapture") == 1
    assert gpu.calls.count("cudaGraphLaunch") == 43
    for array in arrays:
        gpu.cudaFree(array.address)
    session.close()


def test_device_outputs_keep_their_memory_until_they_are_dropped(gpu: FakeGpu, plan: Path) -> None:
    gpu.cudaSetDevice(0)
    session = open_plan(plan)
    first = images(2, 1)
    image, other = to_device(gpu, first), to_device(gpu, images(2, 2))
    kept = session.run({"image": image})["logits"]
    session.run({"image": other})
    session.run({"image": images(2, 3)})
    np.testing.assert_array_equal(on_host(gpu, kept), network(first, None)["logits"])
    assert gpu.objects.count("context") == 1  # what is kept is its own memory, not a context's
    session.close()  # the kept array's memory goes with the array
    assert gpu.objects == []
    np.testing.assert_array_equal(on_host(gpu, kept), network(first, None)["logits"])
    del kept
    for array in (image, other):
        gpu.cudaFree(array.address)


def test_inputs_of_another_stream_are_waited_for(gpu: FakeGpu, plan: Path) -> None:
    gpu.cudaSetDevice(0)
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


def written_late(gpu: FakeGpu, image: Any, batch: np.ndarray, stream: int) -> tuple[int, np.ndarray]:
    """Let a stream write a batch into a device array: late, as everything that is enqueued."""
    pinned = Cuda(gpu).pinned(batch.shape, batch.dtype)
    pinned[1][:] = batch
    address = image.__cuda_array_interface__["data"][0]
    gpu.cudaMemcpyAsync(address, pinned[0], batch.nbytes, 1, stream)
    return pinned


@pytest.mark.parametrize("producer", ["legacy", "blocking", "0 in version 3"])
def test_inputs_that_name_no_stream_are_waited_for_on_the_legacy_one(
    gpu: FakeGpu, plan: Path, producer: str
) -> None:
    gpu.cudaSetDevice(0)
    batch = images(2)
    stream = gpu.cudaStreamCreateWithFlags(0)[1] if producer == "blocking" else 0
    version = 3 if "3" in producer else 2
    image = to_device(gpu, np.zeros_like(batch), 0, version=version)
    session = open_plan(plan)
    pinned = written_late(gpu, image, batch, stream)
    found = session.run({"image": image})["logits"]
    np.testing.assert_array_equal(on_host(gpu, found), network(batch, None)["logits"])
    del found
    session.close()
    gpu.cudaFree(image.address)
    gpu.cudaFreeHost(pinned[0])
    if stream:
        gpu.cudaStreamDestroy(stream)


def test_inputs_from_pytorch_are_waited_for_on_its_current_stream(
    gpu: FakeGpu, plan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu.cudaSetDevice(0)
    batch, side = images(2), gpu.cudaStreamCreateWithFlags(1)[1]
    image = to_device(gpu, np.zeros_like(batch), version=2)
    monkeypatch.setattr("torch.cuda.current_stream", lambda device: SimpleNamespace(cuda_stream=side))
    tensor = type("Tensor", (), {"__module__": "torch", "device": "cuda:0", **vars(image)})()
    pinned = written_late(gpu, image, batch, side)
    with Classifier(plan) as classifier:
        found = classifier.session.run({"image": tensor})["logits"]
        np.testing.assert_array_equal(on_host(gpu, found), network(batch, None)["logits"])
        del found
    gpu.cudaFree(image.address)
    gpu.cudaFreeHost(pinned[0])
    gpu.cudaStreamDestroy(side)


@pytest.mark.parametrize("consumer", ["legacy", "blocking", "told", "app"])
def test_what_is_dropped_is_written_again_only_after_it_was_read(gpu: FakeGpu, plan: Path, consumer: str) -> None:
    gpu.cudaSetDevice(0)
    stream = 0 if consumer == "legacy" else gpu.cudaStreamCreateWithFlags(0 if consumer == "blocking" else 1)[1]
    app = gpu.cudaStreamCreateWithFlags(1)[1] if consumer == "app" else None
    session = open_plan(plan, stream=app)
    first, second = images(2, 1), images(2, 2)
    image, other = to_device(gpu, first), to_device(gpu, second)
    for _ in range(3):
        kept = session.run({"image": image})["logits"]
        if consumer == "app":  # as the interface asks of a consumer: its stream waits for the one that is named
            event = gpu.cudaEventCreateWithFlags(2)[1]
            gpu.cudaEventRecord(event, kept.__cuda_array_interface__["stream"])
            gpu.cudaStreamWaitEvent(stream, event, 0)
            gpu.cudaEventDestroy(event)
        read = gpu.app_reads(kept, stream)
        if consumer in ("told", "app"):
            kept.record_stream(SimpleNamespace(cuda_stream=stream))
        del kept
        found = session.run({"image": other})["logits"]
        if app:
            gpu.cudaStreamSynchronize(app)
        gpu.cudaStreamSynchronize(stream)
        np.testing.assert_array_equal(read(), network(first, None)["logits"])
        np.testing.assert_array_equal(on_host(gpu, found), network(second, None)["logits"])
        del found
    session.close()
    for array in (image, other):
        gpu.cudaFree(array.address)
    for handle in (stream, app):
        if handle:
            gpu.cudaStreamDestroy(handle)


def test_what_is_dropped_while_the_app_records_breaks_nothing(gpu: FakeGpu, plan: Path) -> None:
    gpu.cudaSetDevice(0)
    session, image = open_plan(plan), to_device(gpu, images(2))
    recording = gpu.cudaStreamCreateWithFlags(0)[1]
    kept = session.run({"image": image})["logits"]
    gpu.cudaStreamBeginCapture(recording, 1)
    del kept  # the legacy stream must not be touched now
    graph = gpu.cudaStreamEndCapture(recording)[1]
    found = session.run({"image": image})["logits"]
    np.testing.assert_array_equal(on_host(gpu, found), network(images(2), None)["logits"])
    del found
    session.close()
    gpu.cudaGraphDestroy(graph)
    gpu.cudaStreamDestroy(recording)
    gpu.cudaFree(image.address)


def test_outputs_that_come_and_go_take_no_more_memory(gpu: FakeGpu, plan: Path) -> None:
    gpu.cudaSetDevice(0)
    session, image = open_plan(plan), to_device(gpu, images(8))
    kept = [session.run({"image": image}, ALL) for _ in range(20)]
    most = sum(not memory.released for memory in gpu.memory.values())
    kept.clear()
    for _ in range(100):
        kept = [session.run({"image": image}, ALL)]
    assert sum(not memory.released for memory in gpu.memory.values()) < most
    kept.clear()
    session.close()
    gpu.cudaFree(image.address)


def test_a_slice_that_is_not_aligned_is_taken(gpu: FakeGpu, plan: Path) -> None:
    batch = images(2)
    gpu.cudaSetDevice(0)
    image = to_device(gpu, batch, offset=60)
    with Classifier(plan) as classifier:
        for _ in range(3):
            found = classifier.session.run({"image": image})["logits"]
            np.testing.assert_array_equal(on_host(gpu, found), network(batch, None)["logits"])
            del found
    gpu.cudaFree(image.address)


def test_the_default_stream_is_published_as_the_interface_has_it(gpu: FakeGpu, plan: Path) -> None:
    gpu.cudaSetDevice(0)
    image = to_device(gpu, images(2))
    with Classifier(plan, stream=0) as classifier:
        found = classifier.session.run({"image": image})["logits"]
        assert found.__cuda_array_interface__["stream"] == 1
        gpu.cudaStreamSynchronize(0)
        np.testing.assert_array_equal(on_host(gpu, found), network(images(2), None)["logits"])
        del found
    gpu.cudaFree(image.address)


def test_a_producer_does_not_write_over_what_the_apps_stream_has_yet_to_read(gpu: FakeGpu, plan: Path) -> None:
    gpu.cudaSetDevice(0)
    app, producer = (gpu.cudaStreamCreateWithFlags(1)[1] for _ in range(2))
    batch, later = images(2, 1), images(2, 2)
    image = to_device(gpu, batch, producer)
    session = open_plan(plan, stream=app)
    found = session.run({"image": image})["logits"]
    pinned = written_late(gpu, image, later, producer)
    gpu.cudaStreamSynchronize(producer)
    gpu.cudaStreamSynchronize(app)
    np.testing.assert_array_equal(on_host(gpu, found), network(batch, None)["logits"])
    del found
    session.close()
    gpu.cudaFree(image.address)
    gpu.cudaFreeHost(pinned[0])
    for handle in (app, producer):
        gpu.cudaStreamDestroy(handle)


def test_the_callers_device_stays_current_also_when_what_it_drops_is_collected(
    plan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = FakeGpu(devices=2)
    install(monkeypatch, gpu)
    gpu.cudaSetDevice(1)
    image = to_device(gpu, images(2))
    gpu.cudaSetDevice(0)
    session = open_plan(plan, device="cuda:1")
    kept = session.run({"image": image})["logits"]
    assert gpu.current_context() == "primary 0"

    def in_another_thread() -> None:
        nonlocal kept
        del kept
        assert not gpu.contexts()
        assert not hasattr(gpu._thread, "primary")

    thread = threading.Thread(target=in_another_thread)
    thread.start()
    thread.join()
    session.run({"image": images(2)})
    session.close()
    assert gpu.current_context() == "primary 0"
    gpu.cudaSetDevice(1)
    gpu.cudaFree(image.address)
    del session
    gc.collect()
    gpu.assert_clean()


def test_a_session_that_is_dropped_without_being_closed_gives_everything_back(gpu: FakeGpu, plan: Path) -> None:
    gpu.cudaSetDevice(0)
    image = to_device(gpu, images(2))
    session = open_plan(plan)
    kept = session.run({"image": image})["logits"]
    session.run({"image": images(3)})
    del session
    gc.collect()
    assert gpu.objects == []
    np.testing.assert_array_equal(on_host(gpu, kept), network(images(2), None)["logits"])
    del kept
    gpu.cudaFree(image.address)
