"""`python -m bench.plan_agreement`: a plan against the ONNX file it was built from, image by image.

The file runs on a CPU engine, whose codes export compared with the checkpoint's: what differs is TensorRT's doing.
"""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module: python -m bench.plan_agreement")

import contextlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from bench.measure import data
from bench.measure.environment import describe, environment
from runtime import command
from runtime.agreement import spearman, top_overlap
from runtime.classifier import MAX_BATCH
from runtime.errors import ModelError, OptionError
from runtime.images import to_batch
from runtime.manifest import INPUT_NAME, TARGET_NAME
from runtime.session import Session, open_session

EXAMPLES = """
  python -m bench.plan_agreement engine.plan ckpt.onnx --data mnist_test.npz
  python -m bench.plan_agreement engine.plan ckpt.onnx --data mnist --images 1000 --json
"""


@dataclass(frozen=True)
class PlanAgreement:
    """How well a plan does what its file says.

    Args:
        images: number of images.
        differing: images that the two put into different classes.
        largest_difference: of two logits, as a share of the largest logit's magnitude.
        spearman: mean rank correlation of the saliency maps; None where the plan has none.
        least_spearman: of the worst image.
        top_overlap: mean share of the 10 % most salient pixels in common.
    """

    images: int
    differing: int
    largest_difference: float
    spearman: float | None
    least_spearman: float | None
    top_overlap: float | None


def compare(plan: Session, reference: Session, images: np.ndarray) -> PlanAgreement:
    """Run both on images uint8 [N, H, W, C]; maps are of the classes that the reference predicts."""
    explains = "saliency" in plan.outputs and "saliency" in reference.outputs
    outputs = ("logits", "saliency") if explains else ("logits",)
    size = min(MAX_BATCH, plan.max_batch or MAX_BATCH)
    pairs = []
    for start in range(0, len(images), size):
        inputs = {INPUT_NAME: np.ascontiguousarray(images[start : start + size])}
        if explains:
            predicted = reference.run(inputs)["logits"].argmax(1).astype(np.int64)
            inputs = {**inputs, TARGET_NAME: predicted}
        pairs.append((plan.run(inputs, outputs), reference.run(inputs, outputs)))
    ours, theirs = ({name: np.concatenate([pair[i][name] for pair in pairs]) for name in outputs} for i in (0, 1))
    difference = np.abs(ours["logits"] - theirs["logits"]).max() / np.abs(theirs["logits"]).max()
    ranks = spearman(ours["saliency"], theirs["saliency"]) if explains else None
    return PlanAgreement(
        images=len(images),
        differing=int(np.count_nonzero(ours["logits"].argmax(1) != theirs["logits"].argmax(1))),
        largest_difference=float(difference),
        spearman=None if ranks is None else float(ranks.mean()),
        least_spearman=None if ranks is None else float(ranks.min()),
        top_overlap=float(top_overlap(ours["saliency"], theirs["saliency"]).mean()) if explains else None,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Print how many images differ, and how much the maps agree."""
    parser = command.parser(
        "bench.plan_agreement", "Compare a plan with the ONNX file it was built from.", EXAMPLES
    )
    parser.add_argument("plan", help="plan of python -m export.engine, or another model of the same classes")
    parser.add_argument("model", help="the ONNX file")
    parser.add_argument("--data", required=True, help=data.HELP)
    parser.add_argument("--data-root", default="data", help="folder of the data sets' files (default: data)")
    parser.add_argument("--images", type=int, help="only the first so many")
    parser.add_argument("--engine", choices=("openvino", "ort"), help="that runs the file (default: its own)")
    parser.add_argument("--json", action="store_true", help="one JSON line, with the environment")
    options = parser.parse_args(argv)
    if options.images is not None and options.images < 1:
        raise OptionError(f"--images {options.images}: expected a whole number from 1")
    with (
        contextlib.closing(open_session(options.plan)) as plan,
        contextlib.closing(open_session(options.model, engine=options.engine)) as reference,
    ):
        ours, theirs = plan.manifest, reference.manifest
        if (ours.classes, ours.input) != (theirs.classes, theirs.input):
            raise ModelError(
                f"{options.plan}: not built from {options.model}: inputs or classes differ; rebuild it"
            )
        loaded = data.load(
            options.data, options.data_root,
            size=ours.input.size, classes=ours.classes, trained_on=ours.data,
        )  # fmt: skip
        found = compare(plan, reference, to_batch(loaded.images[: options.images], ours.input))
    where = environment()
    if options.json:
        print(json.dumps({
            "bench": "plan_agreement", "plan": Path(options.plan).name, "model": Path(options.model).name,
            "engines": [f"{session.engine} {session.version}" for session in (plan, reference)],
            "data": loaded.name, **asdict(found), "environment": where,
        }))  # fmt: skip
        return
    print(f"{found.differing:,} of {found.images:,} images in another class, logits differ by at most "
          f"{found.largest_difference:.2%} of the largest")  # fmt: skip
    if found.spearman is not None:
        print(f"maps: Spearman {found.spearman:.4f} (least {found.least_spearman:.4f}), "
              f"top-10 % overlap {found.top_overlap:.4f}")  # fmt: skip
    print(describe(where))


if __name__ == "__main__":
    command.run(main)
