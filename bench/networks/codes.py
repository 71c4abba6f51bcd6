"""The codes inside a file, as outputs; and how far what one machine computes is from another, codes included."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx

CODES = ".codes"  # what the names of quantizers' codes end with; export/verification/probes.py has the others


def with_codes(data: bytes) -> tuple[bytes, tuple[str, ...]]:
    """Return a file whose quantizers' codes are outputs as well, and their names.

    Where the graph clips codes to their grid after the quantizer, the clipped ones are taken.
    """
    model = onnx.load_from_string(data)
    names = [
        name for node in model.graph.node for name in node.output
        if name.endswith(CODES) and node.op_type in ("QuantizeLinear", "Clip")
    ]  # fmt: skip
    known = {output.name for output in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in known)
    return model.SerializeToString(), tuple(names)


@dataclass(frozen=True)
class Differences:
    """How far one run of the same images is from another.

    Args:
        images: number of images.
        codes: compared; 0 where both runs have none in common, and none are known to be equal then.
        codes_moved: those that differ.
        largest_step: between two codes.
        images_with_moved_codes: at least one.
        classes_differing: images in another class.
        logits: largest difference, as a share of the image's largest logit.
        logits_of_equal_codes: the same over the images without a moved code; None where there is none.
        map: largest difference, as a share of the largest value of the image's map.
        map_of_equal_codes: the same over the images without a moved code; None where there is none.
    """

    images: int
    codes: int
    codes_moved: int
    largest_step: int
    images_with_moved_codes: int
    classes_differing: int
    logits: float
    logits_of_equal_codes: float | None
    map: float
    map_of_equal_codes: float | None


def differences(expected: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray]) -> Differences:
    """Compare `logits`, the map `saliency` and all codes that both runs have in the same shape.

    Args:
        expected: outputs by name, each [N, ...].
        found: likewise, of the same images.
    """
    n = len(expected["logits"])
    names = [
        name for name, codes in expected.items()
        if name.endswith(CODES) and name in found and found[name].shape == codes.shape
    ]  # fmt: skip
    steps = [np.abs(expected[name].astype(np.int32) - found[name]).reshape(n, -1) for name in names]
    moved = np.concatenate(steps, 1) if steps else np.zeros((n, 0), np.int32)
    equal = (moved == 0).all(1) & (moved.size > 0)
    logits = _share(expected["logits"], found["logits"])
    maps = _share(expected["saliency"], found["saliency"])
    return Differences(
        images=n,
        codes=moved.size,
        codes_moved=int(np.count_nonzero(moved)),
        largest_step=int(moved.max(initial=0)),
        images_with_moved_codes=int((moved > 0).any(1).sum()),
        classes_differing=int((expected["logits"].argmax(1) != found["logits"].argmax(1)).sum()),
        logits=float(logits.max()),
        logits_of_equal_codes=float(logits[equal].max()) if equal.any() else None,
        map=float(maps.max()),
        map_of_equal_codes=float(maps[equal].max()) if equal.any() else None,
    )


def _share(expected: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Return the largest difference of each image as a share of its largest expected value, float64 [N]."""
    expected, found = (values.reshape(len(values), -1).astype(np.float64) for values in (expected, found))
    share: np.ndarray = np.abs(expected - found).max(1) / np.abs(expected).max(1)
    return share
