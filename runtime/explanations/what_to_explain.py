"""What is to be explained, and by which output: the choices of `Classifier.explain`, checked against the model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from runtime.errors import ModelError, OptionError
from runtime.explanations.attribution import METHODS
from runtime.manifest import CAM_METHODS, CamOutput, Manifest


def choose_map(
    manifest: Manifest, outputs: Sequence[str], method: str | None, layer: str | None
) -> CamOutput | None:
    """Return the class activation map that is asked for, None for a method of the input gradient.

    Args:
        manifest: of the model.
        outputs: that the model has.
        method: one of METHODS or CAM_METHODS; None takes the gradient where there is one, else the first map.
        layer: of the map; None takes the first.

    Raises:
        ModelError: the file does not have what the method needs.
        OptionError: no such method or layer.
    """
    cams = manifest.cams
    has_gradient = "gradient" in outputs
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
            f"method {method!r}: the file has no such map (it has {has}); export it again with --explain {method}"
        )
    if layer is None:
        return found[0]
    for cam in found:
        if layer == cam.layer:
            return cam
    raise OptionError(f"layer {layer!r}: expected one of {', '.join(cam.layer for cam in found)}")


def target_classes(target: int | Sequence[int] | np.ndarray | None, n: int, known: int) -> np.ndarray:
    """Return the classes to explain, int64 [n], -1 for the predicted ones.

    Args:
        target: one index, or one for each image; None explains the predicted classes.
        n: how many images.
        known: how many classes the model knows.

    Raises:
        OptionError: `target` is something else.
    """
    if target is None:
        return np.full(n, -1, np.int64)
    try:
        classes = np.asarray(target)
    except ValueError:  # a ragged list
        raise OptionError(f"target {target!r}: expected one class index, or one for each image") from None
    fits = classes.dtype.kind in "iu" and classes.shape in ((), (n,))
    if not fits or classes.min() < 0 or classes.max() >= known:
        raise OptionError(f"target {target!r}: expected one class index below {known}, or one for each image")
    return np.broadcast_to(classes.astype(np.int64), (n,)).copy()
