"""`python -m bench.outliers`: does a file know images that are none of its own?"""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module: python -m bench.outliers")

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bench.accuracy import roc_auc
from bench.measure import data, record
from bench.measure.environment import describe, environment
from bench.networks.network import display_name
from runtime import command
from runtime.classifier import Classifier
from runtime.prediction import softmax
from runtime.reference import in_distribution_scores
from train.data.splits import sources_of
from train.models import factory

EXAMPLES = """
  python -m bench.outliers mnist.onnx --data mnist --against fashion-mnist
  python -m bench.outliers cifar10.onnx --data cifar10 --against folder:photos --images 2000
"""


def separated(inside: np.ndarray, outside: np.ndarray) -> dict[str, float]:
    """Return AUROC in percent, and the false positives in percent where 95 % of what is inside is kept.

    Args:
        inside: scores of images like the training's, larger for what is more like them.
        outside: of others.
    """
    scores = np.concatenate([inside, outside])
    positive = np.arange(len(scores)) < len(inside)
    return {
        "auroc": 100 * roc_auc(scores, positive),
        "fpr95": 100 * float((outside >= np.quantile(inside, 0.05)).mean()),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Print how well energy and softmax tell the two data sets apart, or one JSON line."""
    parser = command.parser(
        "bench.outliers",
        "Measure how well a file's scores tell other images from its own.",
        EXAMPLES,
    )
    parser.add_argument("model", help="exported .onnx file")
    parser.add_argument("--data", required=True, help=data.HELP)
    parser.add_argument("--against", required=True, metavar="NAME", help="images of other things, likewise")
    parser.add_argument("--data-root", default="data", help="folder of the data sets' files (default: data)")
    parser.add_argument("--images", type=int, default=2000, help="of each, at most, evenly spaced (default: 2000)")
    record.add_options(parser)
    factory.add_option(parser)
    options = parser.parse_args(argv)
    factory.allow(*options.arch)
    command.check_counts(options, images=1)
    sources = [path for name in (options.data, options.against) for path in sources_of(name, options.data_root)]
    record.check(options, inputs=[options.model, *sources])
    with Classifier(options.model, threads=1) as classifier:
        manifest, logits = classifier.manifest, []
        for name in (options.data, options.against):
            test = data.stream(name, options.data_root, size=manifest.input.size)
            batches = test.evenly_spaced(min(options.images, len(test.positions))).batches()
            logits.append(np.concatenate([classifier.logits(images) for images, _ in batches]))
    energies = [in_distribution_scores(found) for found in logits]
    result = {
        "bench": "outliers", "model": display_name(Path(options.model)), "precision": manifest.precision,
        "data": options.data, "against": options.against, "n": [len(found) for found in logits],
        "energy": separated(energies[0], energies[1]),
        "softmax": separated(*(softmax(found).max(1) for found in logits)),
        "flagged": None, "environment": environment(),
    }  # fmt: skip
    if manifest.reference is not None:
        result["flagged"] = [100 * float((scores < manifest.reference.threshold).mean()) for scores in energies]
    if record.deliver(options, result):
        return
    print(f"{result['model']}, {manifest.precision}: {options.data} ({len(logits[0]):,} images) from "
          f"{options.against} ({len(logits[1]):,})")  # fmt: skip
    for name, text in (("energy", "energy (Liu et al. 2020)"), ("softmax", "largest softmax probability")):
        print(f"{text:30} AUROC {result[name]['auroc']:6.2f} %   FPR95 {result[name]['fpr95']:6.2f} %")
    if result["flagged"]:
        own, other = result["flagged"]
        print(f"the file's threshold flags {own:.1f} % of its own and {other:.1f} % of the others")
    print(describe(result["environment"]))


if __name__ == "__main__":
    command.run(main)
