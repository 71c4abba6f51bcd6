"""`Classifier`: from a frame to a class, with whatever engine the device has."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, overload

import numpy as np

from runtime import command
from runtime.attribution import METHODS, attribute
from runtime.batching import Batching, MicroBatcher
from runtime.errors import EngineError, ImageError, ModelError, OptionError
from runtime.explanation import Explanation, explanation
from runtime.images import to_array, to_batch
from runtime.manifest import CAM_METHODS, INPUT_NAME, TARGET_NAME, CamOutput, Manifest
from runtime.session import Session, open_session

# Images in one run of the engine: large inputs are cut, so that memory stays bounded.
MAX_BATCH = 64


@dataclass(frozen=True)
class Prediction:
    """The class of one image.

    Args:
        label: name of the most probable class.
        index: its position in the manifest's classes.
        probability: its softmax probability, 0 to 1, at the manifest's temperature.
        top: the k most probable classes as (label, probability), best first.
        logits: float32 [K].
        margin: best minus second logit, in steps of the last grid: below 1, another rounding of a single code may
            change the class. None where the file is in float or has one class.
    """

    label: str
    index: int
    probability: float
    top: tuple[tuple[str, float], ...]
    logits: np.ndarray
    margin: float | None = None

    @property
    def raw_probability(self) -> float:
        """The softmax probability of the label at temperature 1."""
        return float(softmax(self.logits)[self.index])


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
                Or the path of an image file. They are converted and resized to what the model takes.
            top_k: how many classes `Prediction.top` lists.

        Returns:
            One prediction for one image, otherwise a list.

        Raises:
            ImageError: an image has a dtype, shape or size the model cannot take.
            FileError: a file is missing or no image.
            ModelError: the model gives logits that are not finite.
        """
        _check_top_k(top_k)
        if not isinstance(images, (list, tuple)):
            images = to_array(images)
        predictions = [_prediction(row, self.manifest, top_k) for row in self.logits(images)]
        return predictions[0] if _is_single(images) else predictions

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
            method: one of runtime.attribution.METHODS, or of runtime.manifest.CAM_METHODS, whose maps the file
                must have; None takes the gradient where the file has it, else the first map that it has.
            layer: of a class activation map, where the file has maps of several; None takes the first.
            samples: noisy copies of each image (smoothgrad).
            noise: standard deviation of the noise, as a share of the image's range of levels (smoothgrad).
            steps: intervals of the path (integrated_gradients).
            baseline: pixel level that the path starts from, 0 is black (integrated_gradients).
            seed: of the noise.
            progress: show a bar on standard error over the images of the methods that run many.

        Raises:
            ModelError: the file was exported without what the method needs, or gives logits that are not finite.
            ImageError: an image has a dtype, shape or size the model cannot take.
            OptionError: no such method or class, or a number out of range.
        """
        cam = self._cam(method, layer)
        method = cam.method if cam else method or "gradient"
        images = _stacked(images) if isinstance(images, (list, tuple)) else to_array(images)
        batch = to_batch(images, self.manifest.input)
        found = attribute(
            functools.partial(self._map, cam.output) if cam else self._gradient,
            batch,
            self._targets(target, len(batch)),
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
            single=_is_single(images), cropped=self.manifest.input.resize == "crop", size=self.manifest.input.size,
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
        _check_top_k(top_k)
        (pixels,) = _singles([image])
        batch = to_batch(pixels, self.manifest.input)
        with self._lock:
            if self._closed:
                raise EngineError("the model is closed; open it again")
            if self._batcher is None:
                # Of the session, not of this object, which may then go although the thread still runs.
                self._batcher = MicroBatcher(functools.partial(_logits, self.session), self._batching)
            batcher = self._batcher
        manifest = self.manifest
        return batcher.submit(batch, lambda row: _prediction(finite(row[None])[0], manifest, top_k))

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

    def logits(self, images: np.ndarray | list[np.ndarray]) -> np.ndarray:
        """Return the logits float32 [N, K] of the images that `predict` takes."""
        if isinstance(images, (list, tuple)):
            batch = np.concatenate([to_batch(image, self.manifest.input) for image in _singles(images)])
        else:
            batch = to_batch(images, self.manifest.input)
        size = self._max_batch
        parts = [batch[start : start + size] for start in range(0, len(batch), size)]
        return finite(np.concatenate([_logits(self.session, part) for part in parts]))

    def _gradient(self, images: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        found = self.session.run({INPUT_NAME: images, TARGET_NAME: target}, ("logits", "gradient"))
        return finite(found["logits"]), found["gradient"]

    def _map(self, output: str, images: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        found = self.session.run({INPUT_NAME: images, TARGET_NAME: target}, ("logits", output))
        return finite(found["logits"]), found[output][:, None]

    def _cam(self, method: str | None, layer: str | None) -> CamOutput | None:
        """Return the class activation map that is asked for, None for a method of the input gradient.

        Raises:
            ModelError: the file does not have what the method needs.
            OptionError: no such method or layer.
        """
        cams = self.manifest.cams
        has_gradient = "gradient" in self.session.outputs
        if method is not None and method not in (*METHODS, *CAM_METHODS):
            raise OptionError(f"method {method!r}: expected one of {', '.join((*METHODS, *CAM_METHODS))}")
        if method not in CAM_METHODS and (method is not None or has_gradient or not cams):
            if layer is not None:
                raise OptionError(f"layer {layer!r}: is for {', '.join(CAM_METHODS)}; leave it out")
            if not has_gradient:
                methods = ", ".join(sorted({cam.method for cam in cams}))
                has = f"maps by {methods} alone" if cams else "classes only"
                remedy = "with --explain gradient" if cams else "without --no-saliency"
                raise ModelError(f"this model gives {has}; export it again {remedy} to have them explained")
            return None
        found = [cam for cam in cams if method in (None, cam.method)]
        if not found:
            has = ", ".join(sorted({cam.method for cam in cams})) or "none"
            raise ModelError(
                f"method {method!r}: the file has no such map (it has {has}); "
                f"export it again with --explain {method}"
            )
        if layer is None:
            return found[0]
        for cam in found:
            if layer == cam.layer:
                return cam
        raise OptionError(f"layer {layer!r}: expected one of {', '.join(cam.layer for cam in found)}")

    def _targets(self, target: int | Sequence[int] | np.ndarray | None, n: int) -> np.ndarray:
        """Return the classes to explain, int64 [n], -1 for the predicted ones."""
        if target is None:
            return np.full(n, -1, np.int64)
        try:
            classes = np.asarray(target)
        except ValueError:  # a ragged list
            raise OptionError(f"target {target!r}: expected one class index, or one for each image") from None
        known = len(self.manifest.classes)
        fits = classes.dtype.kind in "iu" and classes.shape in ((), (n,))
        if not fits or classes.min() < 0 or classes.max() >= known:
            raise OptionError(f"target {target!r}: expected one class index below {known}, or one for each image")
        return np.broadcast_to(classes.astype(np.int64), (n,)).copy()

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


def softmax(logits: np.ndarray) -> np.ndarray:
    """Return the probabilities float64 [..., K] of logits [..., K]."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    probabilities: np.ndarray = shifted / shifted.sum(-1, keepdims=True)
    return probabilities


def finite(logits: np.ndarray) -> np.ndarray:
    """Return logits [N, K] as they are; raise ModelError where one is not finite, which no class could tell."""
    if not np.isfinite(logits).all():
        rows = np.flatnonzero(~np.isfinite(logits).all(-1))
        raise ModelError(
            f"image {rows[0]} of {len(logits)}: the model gives logits that are not finite ({len(rows)} such "
            "images); its weights are damaged or it overflows: train or export it again"
        )
    return logits


def _logits(session: Session, images: np.ndarray) -> np.ndarray:
    return session.run({INPUT_NAME: images})["logits"]


def _check_top_k(top_k: object) -> None:
    if not isinstance(top_k, (int, np.integer)) or top_k < 1:
        raise OptionError(f"top_k {top_k!r}: expected a whole number from 1")


def _prediction(logits: np.ndarray, manifest: Manifest, top_k: int) -> Prediction:
    probabilities = softmax(logits if manifest.temperature == 1 else logits / manifest.temperature)
    order = np.argsort(-probabilities, kind="stable")
    top = tuple((manifest.classes[i], float(probabilities[i])) for i in order[:top_k])
    margin = None
    if manifest.logit_step is not None and len(order) > 1:
        margin = float(logits[order[0]] - logits[order[1]]) / manifest.logit_step
    return Prediction(top[0][0], int(order[0]), top[0][1], top, logits, margin)


def _singles(images: Sequence[Any]) -> list[np.ndarray]:
    """Return the images of a list as arrays, having checked that each is one image."""
    if not images:
        raise ImageError("an empty list of images, expected at least one")
    arrays = [to_array(image) for image in images]
    for position, array in enumerate(arrays):
        if array.ndim == 4 and len(array) != 1:
            raise ImageError(
                f"element {position} of the list: a batch of shape {list(array.shape)}, expected one image; "
                "give the batch alone, or join batches with np.concatenate"
            )
        if array.ndim == 3 and not _is_single(array) and len(array) != 1:
            raise ImageError(
                f"element {position} of the list: shape {list(array.shape)}, expected one image [H, W], [H, W, 1] "
                "or [H, W, 3]; put the channels last"
            )
    return arrays


def _stacked(images: Sequence[Any]) -> np.ndarray:
    """Return a list of images of one size as a batch [N, H, W, C]."""
    arrays = [array if _is_single(array) else array[0] for array in _singles(images)]  # of batches of one
    arrays = [array[..., None] if array.ndim == 2 else array for array in arrays]
    shapes = {array.shape for array in arrays}
    if len(shapes) > 1:
        raise ImageError(
            f"images of shapes {sorted(map(list, shapes))}, expected one shape; explain them one by one"
        )
    return np.stack(arrays)


def _is_single(images: np.ndarray | Sequence[Any]) -> bool:
    if isinstance(images, (list, tuple)):
        return False
    images = np.asarray(images)
    return images.ndim == 2 or (images.ndim == 3 and images.shape[2] in (1, 3))
