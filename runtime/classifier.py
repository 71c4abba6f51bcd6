"""`Classifier`: from a frame to a class, with whatever engine the device has."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from runtime import command
from runtime.batching import Batching, MicroBatcher
from runtime.errors import EngineError, OptionError
from runtime.explanations.attribution import attribute
from runtime.explanations.explanation import Explanation, explanation
from runtime.explanations.what_to_explain import choose_map, target_classes
from runtime.images import gpu_interface, to_array, to_batch
from runtime.images.lists import is_single, singles, stacked
from runtime.manifest import INPUT_NAME, TARGET_NAME, Manifest
from runtime.prediction import Prediction, check_top_k, finite, prediction
from runtime.session import PLAN_ENGINE, Session, open_session

if TYPE_CHECKING:
    from runtime.engines.tensorrt.device_array import DeviceView

# Images in one run of the engine: large inputs are cut, so that memory stays bounded.
MAX_BATCH = 64


class Classifier:
    """An exported model, ready to classify frames. Safe to call from several threads; a context manager.

    Args:
        model: path or contents of an ONNX file that `python -m export.onnx` wrote, or path of a plan that
            `python -m export.engine` built.
        engine: "openvino" or "ort"; None takes the one the file was exported for.
        device: another device of the engine than the first; see `runtime.session.open_session`.
        threads: CPU threads of one inference; None leaves the number to the engine.
        parallel_runs: how many threads will call at the same time; see `runtime.session.open_session`.
        cache: folder of your own where compiled models are kept, so that the same model starts faster the next
            time; None keeps nothing. See `runtime.session.open_session`.
        stream: for a plan, the app's CUDA stream, where all work is then enqueued.
        context: for a plan, the app's PyCUDA context, in which all work is then done.
        providers: of ONNX Runtime, in place of `device`; see `runtime.session.open_session`.
        options: of the engine, by its own names; see `runtime.session.open_session`.
        sidecar: of a plan that is given as its contents; see `runtime.session.open_session`.
        version_compatible: run the code for the CPU that a plan carries; see `runtime.session.open_session`.
        key: public key that the file must be signed with; see `runtime.session.open_session`.
        batching: how `submit` puts images together.

    Raises:
        ClearpactError: see `runtime.session.open_session`.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | bytes,
        *,
        engine: str | None = None,
        device: str | None = None,
        threads: int | None = None,
        parallel_runs: int = 1,
        cache: str | os.PathLike[str] | None = None,
        stream: Any = None,
        context: Any = None,
        providers: Sequence[Any] | None = None,
        options: Mapping[str, Any] | None = None,
        sidecar: str | os.PathLike[str] | bytes | None = None,
        version_compatible: bool = False,
        key: str | os.PathLike[str] | bytes | None = None,
        batching: Batching | None = None,
    ) -> None:
        session = open_session(
            model, engine=engine, device=device, threads=threads, parallel_runs=parallel_runs, cache=cache,
            stream=stream, context=context, providers=providers, options=options, sidecar=sidecar,
            version_compatible=version_compatible, key=key,
        )  # fmt: skip
        self._use(session, batching)

    def _use(self, session: Session, batching: Batching | None) -> None:
        self.session = session
        self._max_batch = min(MAX_BATCH, session.max_batch or MAX_BATCH)
        batching = batching or Batching(max_batch=min(Batching().max_batch, self._max_batch))
        if batching.max_batch > self._max_batch:
            raise OptionError(
                f"max_batch {batching.max_batch}: the model takes {self._max_batch} images at a time"
            )
        self._batching = batching
        self._batcher: MicroBatcher | None = None
        self._lock = threading.Lock()
        self._closed = False

    @classmethod
    def on(cls, session: Session, *, batching: Batching | None = None) -> Classifier:
        """Return a classifier on a session that is open; closing it closes the session."""
        made = cls.__new__(cls)
        made._use(session, batching)
        return made

    def __repr__(self) -> str:
        manifest, session = self.manifest, self.session
        shape = "x".join(map(str, (*manifest.input.size, manifest.input.channels)))
        return (
            f"<Classifier: {manifest.arch}, {manifest.precision}, {shape} -> {len(manifest.classes)} classes, "
            f"{session.engine} {session.version} on {session.device}{', closed' if self._closed else ''}>"
        )

    @property
    def manifest(self) -> Manifest:
        """What the model file says about itself."""
        return self.session.manifest

    @overload
    def predict(self, images: str | os.PathLike[str], *, top_k: int = 3) -> Prediction: ...
    @overload
    def predict(self, images: list[Any], *, top_k: int = 3) -> list[Prediction]: ...
    @overload
    def predict(self, images: Any, *, top_k: int = 3) -> Prediction | list[Prediction]: ...
    def predict(self, images: Any, *, top_k: int = 3) -> Prediction | list[Prediction]:
        """Classify one image or several.

        Args:
            images: uint8, one image [H, W] or [H, W, C], a batch [N, H, W, C], or a list of single images of any
                sizes; grey or RGB (OpenCV gives BGR: turn its frames with frame[:, :, ::-1]), or PIL images.
                Or the path of an image file. They are converted and resized to what the model takes. Of a plan,
                also an array in GPU memory (`__cuda_array_interface__`) of just that size and number of channels,
                which never comes to the host.
            top_k: how many classes `Prediction.top` lists.

        Returns:
            One prediction for one image, otherwise a list.

        Raises:
            ImageError: an image has a dtype, shape or size the model cannot take.
            FileError: a file is missing or no image.
            ModelError: the model gives logits that are not finite.
        """
        check_top_k(top_k)
        batch, single = self._batch(images)
        predictions = [prediction(row, self.manifest, top_k) for row in self._logits_of(batch)]
        return predictions[0] if single else predictions

    def explain(
        self,
        images: Any,
        target: int | Sequence[int] | np.ndarray | None = None,
        *,
        method: str | None = None,
        layer: str | None = None,
        samples: int = 32,
        noise: float = 0.15,
        steps: int = 64,
        baseline: int = 0,
        seed: int = 0,
        progress: bool = False,
    ) -> Explanation:
        """Explain why images are, or would be, put into a class.

        Args:
            images: one image, a batch, or a list of images of one size, as for `predict`; paths too.
            target: the class to explain, one for all images or one each; None explains the predicted class.
            method: one of runtime.explanations.attribution.METHODS, or of runtime.manifest.CAM_METHODS, whose
                maps the file must have; None takes the gradient where the file has it, else the first map.
            layer: of a class activation map, where the file has maps of several; None takes the first.
            samples: noisy copies of each image (smoothgrad).
            noise: standard deviation of the noise, as a share of the image's range of levels (smoothgrad).
            steps: intervals of the path (integrated_gradients).
            baseline: pixel level that the path starts from, 0 is black (integrated_gradients).
            seed: of the noise.
            progress: show a bar on standard error over the images of the methods that run many.

        Raises:
            ModelError: the file was exported without what the method needs, or gives logits or maps that are not
                finite.
            ImageError: an image has a dtype, shape or size the model cannot take.
            OptionError: no such method or class, or a number out of range.
        """
        cam = choose_map(self.manifest, self.session.outputs, method, layer)
        method = cam.method if cam else method or "gradient"
        images = stacked(images) if isinstance(images, (list, tuple)) else to_array(images)
        batch = to_batch(images, self.manifest.input)
        found = attribute(
            functools.partial(self._map, cam.output) if cam else self._gradient,
            batch,
            target_classes(target, len(batch), len(self.manifest.classes)),
            self.manifest.input,
            method="gradient" if cam else method,
            samples=samples,
            noise=noise,
            steps=steps,
            baseline=baseline,
            seed=seed,
            max_batch=self._max_batch,
            progress=command.progress if progress else None,
        )
        explained = explanation(
            found, images, self.manifest.classes, method,
            single=is_single(images), cropped=self.manifest.input.resize == "crop", size=self.manifest.input.size,
        )  # fmt: skip
        return replace(explained, temperature=self.manifest.temperature)

    def submit(self, image: Any, *, top_k: int = 3) -> Future[Prediction]:
        """Classify one image in the background, together with others that are submitted at about the same time.

        Safe from any number of threads; a web server awaits `asyncio.wrap_future(classifier.submit(image))`.

        Args:
            image: one image, as for `predict`; it is resized in the calling thread.
            top_k: how many classes `Prediction.top` lists.

        Returns:
            The future prediction; the errors of the run are raised by its `result()`.

        Raises:
            ImageError: it is no image that the model can take, or several.
            EngineError: the classifier is closed.
        """
        check_top_k(top_k)
        (pixels,) = singles([image])
        batch = to_batch(pixels, self.manifest.input)
        with self._lock:
            if self._closed:
                raise EngineError("the model is closed; open it again")
            if self._batcher is None:
                # Of the session, not of this object, which may then go although the thread still runs.
                self._batcher = MicroBatcher(functools.partial(_logits, self.session), self._batching)
            batcher = self._batcher
        manifest = self.manifest
        return batcher.submit(batch, lambda row: prediction(finite(row[None])[0], manifest, top_k))

    def warm_up(self, batch: int | Sequence[int] | None = None, *, explain: bool = False) -> None:
        """Compile and run the model on black images, so that the first frame takes no longer than the others.

        Args:
            batch: numbers of images in one run; None takes one, and the sizes that `submit` uses once it was used.
            explain: also for `explain`.

        Raises:
            ModelError: `explain`, and the model gives classes only.
            OptionError: a number of images that the model does not take at a time.
        """
        if batch is None:
            batch = self._batching.ladder() if self._batcher else 1
        expected = self.manifest.input
        for n in np.atleast_1d(np.asarray(batch)):
            if n.dtype.kind not in "iu" or not 1 <= n <= self._max_batch:
                raise OptionError(f"batch {n}: expected whole numbers from 1 to {self._max_batch}")
            images = np.zeros((int(n), *expected.size, expected.channels), np.uint8)
            _logits(self.session, images)
            if explain:
                self.explain(images)

    def logits(self, images: Any) -> np.ndarray:
        """Return the logits float32 [N, K] of the images that `predict` takes."""
        batch, _ = self._batch(images)
        return self._logits_of(batch)

    def _batch(self, images: Any) -> tuple[np.ndarray | DeviceView, bool]:
        """Return images as the batch that the model takes, and whether it is a single image."""
        if isinstance(images, (list, tuple)):
            return np.concatenate([to_batch(image, self.manifest.input) for image in singles(images)]), False
        if self.session.engine == PLAN_ENGINE and gpu_interface(images) is not None:
            from runtime.engines.tensorrt.device_array import device_batch

            on_device = device_batch(images, self.manifest.input)
            if on_device is not None:
                return on_device
        array = to_array(images)
        return to_batch(array, self.manifest.input), is_single(array)

    def _logits_of(self, batch: np.ndarray | DeviceView) -> np.ndarray:
        parts = (slice(start, start + self._max_batch) for start in range(0, batch.shape[0], self._max_batch))
        return finite(np.concatenate([_logits(self.session, batch[part]) for part in parts]))

    def _gradient(self, images: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        found = self.session.run({INPUT_NAME: images, TARGET_NAME: target}, ("logits", "gradient"))
        return finite(found["logits"]), finite(found["gradient"], "gradients")

    def _map(self, output: str, images: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        found = self.session.run({INPUT_NAME: images, TARGET_NAME: target}, ("logits", output))
        return finite(found["logits"]), finite(found[output][:, None], "maps")

    def close(self) -> None:
        """Finish what was submitted, and free the model."""
        with self._lock:
            self._closed = True
        if self._batcher is not None:
            self._batcher.close()
        self.session.close()

    def __enter__(self) -> Classifier:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _logits(session: Session, images: np.ndarray | DeviceView) -> np.ndarray:
    if isinstance(images, np.ndarray):
        return session.run({INPUT_NAME: images})["logits"]
    plan: Any = session  # no other takes arrays in GPU memory
    found: np.ndarray = plan.run({INPUT_NAME: images}, to_host=True)["logits"]
    return found
