"""The final file on its engine, opened as the runtime opens it: what the optimizer makes of the graph."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from export.reference import images_at_once
from export.verification.exact import on_codes
from export.verification.ties import nearly_tied
from runtime.errors import EngineError, ModelError
from runtime.session import ENGINES, open_session
from train.input_spec import InputSpec

# Rounding in other orders moves codes at ties, and a changed code moves logits: by so much of their norm at most,
# in half of the images. (Seen: 2e-7 at most where every code is equal; 0.04 in DeiT-tiny, whose codes come from
# floats; 0.26 to 0.5 in 2-bit networks whose average pooling OpenVINO rounded.)
LARGEST_DIFFERENCE = 0.1
# Images that may change class. Not counted are those whose two best logits are closer than logits move, on the
# engine in half of the images, or, as in forward.py, in the trained network itself between float32 and float64.
MAX_CHANGED_SHARE = 0.02
_IMAGES, _SINGLE_IMAGES = 64, 4


@dataclass(frozen=True)
class EngineRun:
    """What the engine computed, beside the trained network.

    Args:
        engine: name and version.
        batches: sizes of the batches it ran.
        samples: number of images.
        changed_classes: images in another class than in the trained network, in any of the batches.
        undecided_classes: those of them whose two best logits are closer than logits move.
        differing: images whose logits differ by more than float32 rounds, 1e-4 of their norm.
        median_difference: of logits, relative to their norm about their mean.
    """

    engine: str
    batches: tuple[int, ...]
    samples: int
    changed_classes: int
    undecided_classes: int
    differing: int
    median_difference: float

    def __str__(self) -> str:
        tied = f"{self.changed_classes} ({self.undecided_classes} of them nearly tied)"
        changed = f"all but {tied}" if self.changed_classes else "all"
        batches = " and ".join(map(str, self.batches))
        return (
            f"{self.engine}, batches of {batches}: {changed} of {self.samples} classes equal, logits by "
            f"{self.median_difference:.1g} of their size (median), a differing code in {self.differing} images"
        )


def run_on_engine(
    data: bytes, engine: str, network: nn.Module, input_spec: InputSpec, images: Tensor, *, tied: bool = False
) -> EngineRun | None:
    """Run the file on its engine and compare classes and logits with the trained network's.

    Args:
        data: contents of the file.
        engine: one of runtime.session.ENGINES, or another target.
        network: that was exported, in evaluation mode.
        input_spec: of the network.
        images: real images, uint8 [n, C, H, W]; the first of them are run.
        tied: many of its values lie at the border between two codes, where each engine may round otherwise: what
            it computes is told, and not judged.

    Returns:
        None where the engine is not installed here, or runs no ONNX file.

    Raises:
        ModelError: the engine cannot load the file, or computes something else.
    """
    if engine not in ENGINES:
        return None
    images = images[:_IMAGES]
    batches = (1, len(images))
    with torch.no_grad():
        trained = torch.cat([network(input_spec.normalize(part)) for part in images.split(32)])
    try:
        session = open_session(data, engine=engine)
    except EngineError:
        return None
    pixels = images.permute(0, 2, 3, 1).contiguous().numpy()
    parts = [pixels[i : i + 1] for i in range(min(_SINGLE_IMAGES, len(pixels)))] + [pixels]
    try:
        found = [torch.from_numpy(session.run({"image": np.ascontiguousarray(part)})["logits"]) for part in parts]
    finally:
        session.close()
    single, together = torch.cat(found[:-1]), found[-1]
    pairs = ((single, trained[: len(single)]), (together, trained))
    differences = [_difference(*pair) for pair in pairs]
    median = max(float(difference.median()) for difference in differences)
    changed, decided = (torch.zeros(len(images), dtype=torch.bool) for _ in range(2))
    for ours, theirs in pairs:
        other = ours.argmax(1) != theirs.argmax(1)
        best = theirs.topk(2, dim=1).values
        apart = best[:, 0] - best[:, 1] > 2 * (ours - theirs).abs().amax(1).median()
        changed[: len(ours)] |= other
        decided[: len(ours)] |= other & apart
    result = EngineRun(
        engine=f"{session.engine} {session.version}",
        batches=batches,
        samples=len(images),
        changed_classes=int(changed.sum()),
        undecided_classes=int((changed & ~decided).sum()),
        differing=int((differences[-1] > 1e-4).sum()),
        median_difference=median,
    )
    most = math.ceil(MAX_CHANGED_SHARE * len(images))
    if not tied and decided.sum() > most:  # few margins are so small, and float64 takes its time
        exact = on_codes(network, (input_spec.channels, *input_spec.size))
        parts = images.split(images_at_once(math.prod(input_spec.size)))
        with torch.no_grad():
            doubled = torch.cat([exact(input_spec.normalize(part).double()) for part in parts])
        decided &= ~nearly_tied(trained, doubled)
        result = replace(result, undecided_classes=int((changed & ~decided).sum()))
    many = decided.sum() > most
    if not tied and (not median <= LARGEST_DIFFERENCE or many):
        raise ModelError(
            f"{result}; expected the trained network's. The engine computes another network than the file says; "
            "export for another --target, or report the network"
        )
    return result


def _difference(found: Tensor, expected: Tensor) -> Tensor:
    """Return how far logits [n, K] are from what is expected, relative to the norm about its mean, [n]."""
    size = (expected - expected.mean(1, keepdim=True)).norm(dim=1)
    return (found - expected).norm(dim=1) / size.clamp_min(torch.finfo(torch.float32).tiny)
