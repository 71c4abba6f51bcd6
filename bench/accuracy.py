"""`python -m bench.accuracy`: accuracy, sensitivity, specificity and confusion of a model, on its engine."""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module: python -m bench.accuracy")

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from bench.measure import data, record
from bench.measure.environment import describe, environment, peak_memory_bytes
from bench.measure.streams import Batch, ImageStream, cores, in_parallel
from export.probabilities import Calibration, of_sums, sums
from runtime import command
from runtime.classifier import Classifier
from runtime.errors import OptionError
from runtime.session import ENGINES
from train.data.splits import sources_of
from train.models import factory

EXAMPLES = """
  python -m bench.accuracy ckpt.onnx --data mnist --data-root data
  python -m bench.accuracy ckpt.onnx --data mnist_test.npz --engine ort
  python -m bench.accuracy ckpt.onnx --data mnist --against ckpt.pt    # image by image
  python -m bench.accuracy ckpt.onnx --data cifar10 --odd-images       # a temperature, on images not fitted
  python -m bench.accuracy ckpt.onnx --data digits --json >> results.jsonl
"""


_NO_MARGINS = np.empty((2, 0), np.float32)


@dataclass(frozen=True)
class Scores:
    """Scores of a classifier in percent, macro-averaged one against the rest, and its confusion matrix.

    Args:
        accuracy: share of images classified right.
        sensitivity: mean over classes of true positives / (true positives + false negatives).
        specificity: mean over classes of true negatives / (true negatives + false positives).
        confusion: int64 [K, K]; row: true class, column: predicted class.
    """

    accuracy: float
    sensitivity: float
    specificity: float
    confusion: np.ndarray


def confusion_matrix(labels: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Return int64 [K, K] of labels and predicted classes int64 [N]; row: true class, column: predicted class."""
    return np.bincount(labels * classes + predicted, minlength=classes**2).reshape(classes, classes)


def score(confusion: np.ndarray) -> Scores:
    """Return the scores of a confusion matrix int64 [K, K]; classes without images are left out of the means."""
    total = confusion.sum()
    true_positive = np.diag(confusion)
    positive, predicted = confusion.sum(1), confusion.sum(0)
    true_negative = total - positive - predicted + true_positive
    present = positive > 0
    sensitivity = true_positive[present] / positive[present]
    specificity = true_negative[present] / np.maximum(total - positive[present], 1)
    return Scores(
        accuracy=100 * float(true_positive.sum() / total),
        sensitivity=100 * float(sensitivity.mean()),
        specificity=100 * float(specificity.mean()),
        confusion=confusion,
    )


Logits = Callable[[np.ndarray], np.ndarray]
"""Images uint8 [n, H, W, C], n at most MAX_BATCH -> logits float32 [n, K]; for several threads at once."""


@dataclass(frozen=True)
class Counts:
    """What is counted of all images.

    Args:
        confusion: int64 [K, K]; row: true class, column: predicted class.
        differing: images that another classifier puts elsewhere.
        auc: area under the ROC curve by the difference of the logits, where there are two classes; else None.
        raw: how far the probabilities are to be believed at temperature 1.
        calibrated: likewise, at the temperature asked for.
    """

    confusion: np.ndarray
    differing: int
    auc: float | None
    raw: Calibration
    calibrated: Calibration


def roc_auc(margins: np.ndarray, positive: np.ndarray) -> float:
    """Return the share of pairs, one positive and one negative image, whose margins are in order; ties count half.

    Args:
        margins: float [N], larger where an image is more probably positive.
        positive: bool [N]; both kinds are there.
    """
    _, place, counts = np.unique(margins, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    mean_rank = (last - (counts - 1) / 2)[place]
    n = int(positive.sum())
    return float((mean_rank[positive].sum() - n * (n + 1) / 2) / (n * (len(positive) - n)))


def count(
    logits: Logits,
    test: ImageStream,
    classes: int,
    *,
    against: Logits | None = None,
    workers: int = 1,
    temperature: float = 1.0,
) -> Counts:
    """Classify all images and count.

    Memory does not grow with the images, but for the 8 bytes of each that the area under a curve needs.

    Args:
        logits: of the classifier to measure.
        test: labelled images.
        classes: K.
        against: of the other classifier; None finds no difference.
        workers: batches that are classified at the same time.
        temperature: that `Counts.calibrated` is measured at.
    """

    def of_batch(batch: Batch) -> tuple[np.ndarray, int, np.ndarray, np.ndarray]:
        images, labels = batch
        found = logits(images)
        predicted = found.argmax(1)
        differing = int((predicted != against(images).argmax(1)).sum()) if against else 0
        margins = np.stack([found[:, 1] - found[:, 0], labels]).astype(np.float32) if classes == 2 else _NO_MARGINS
        believed = np.stack([sums(found, labels), sums(found, labels, temperature)])
        return confusion_matrix(labels, predicted, classes), differing, margins, believed

    total, differing, parts = np.zeros((classes, classes), np.int64), 0, []
    believed = np.zeros((2, 1))
    batches = in_parallel(of_batch, test.batches(), workers)
    for confusion, elsewhere, margins, of_part in command.progress(
        batches, label="images / 64", total=test.batch_count
    ):
        total += confusion
        believed = believed + of_part
        differing += elsewhere
        parts.append(margins)
    auc = None
    if classes == 2 and total.sum(1).all():
        margins, labels = np.concatenate(parts, axis=1)
        auc = roc_auc(margins, labels == 1)
    raw, calibrated = map(of_sums, believed)
    return Counts(total, differing, auc, raw, calibrated)


def checkpoint_logits(path: str) -> Logits:
    """Return the fake-quantized network of a checkpoint as a classifier; its images have the network's size.

    Raises:
        FileError: no checkpoint of this project.
        OptionError: torch is not installed.
    """
    try:
        import torch

        from train import checkpoint as checkpoints
    except ImportError as error:
        raise OptionError(f"--against: needs {error.name}; pip install 'clearpact[train]'") from None
    checkpoint = checkpoints.load(path)
    network = checkpoint.network()
    torch.set_num_threads(1)  # of each of the threads that call

    def logits(images: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            batch = torch.from_numpy(images).permute(0, 3, 1, 2)
            found: np.ndarray = network(checkpoint.input.normalize(batch)).numpy()
        return found

    return logits


def main(argv: Sequence[str] | None = None) -> None:
    """Print the scores of one model on a test split, for a person or as one JSON line."""
    parser = command.parser("bench.accuracy", "Measure the accuracy of an exported model on its engine.", EXAMPLES)
    parser.add_argument("model", help="ONNX file of python -m export.onnx, or plan of export.engine")
    parser.add_argument("--data", required=True, help=data.HELP)
    parser.add_argument("--data-root", default="data", help="folder of the data sets' files (default: data)")
    parser.add_argument("--against", metavar="CKPT", help="count images this checkpoint classifies differently")
    parser.add_argument("--odd-images", action="store_true",
                        help="every second image only: which --validation of the export did not fit")  # fmt: skip
    parser.add_argument("--engine", choices=tuple(ENGINES), help="default: the one the model was exported for")
    parser.add_argument("--device", help="default: cpu; cuda for a plan")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    record.add_options(parser)
    factory.add_option(parser)
    options = parser.parse_args(argv)
    factory.allow(*options.arch)
    command.check_counts(options, threads=1)
    record.check(options, inputs=[options.model, *sources_of(options.data, options.data_root)])
    workers = options.threads or cores()
    with Classifier(
        options.model, engine=options.engine, device=options.device, threads=1, parallel_runs=workers
    ) as classifier:
        manifest = classifier.manifest
        classes = manifest.classes
        test = data.stream(
            options.data, options.data_root,
            size=manifest.input.size, classes=classes, trained_on=manifest.data,
        )  # fmt: skip
        if test.labels.max() >= len(classes):
            raise OptionError(
                f"--data {options.data}: labels up to {test.labels.max()}, expected below {len(classes)}, the "
                f"classes of {options.model}; name the data it was trained on"
            )
        if options.odd_images:
            test = test.odd()
        against = checkpoint_logits(options.against) if options.against else None
        found = count(classifier.logits, test, len(classes), against=against, workers=workers,
                      temperature=manifest.temperature)  # fmt: skip
        scores = score(found.confusion)
        engine = f"{classifier.session.engine} {classifier.session.version}"
        before = classifier.manifest.metrics.get("test_accuracy")
    where, n = environment(), int(found.confusion.sum())
    result = {
        "bench": "accuracy", "model": Path(options.model).name, "arch": classifier.manifest.arch,
        "precision": classifier.manifest.precision, "target": classifier.manifest.target, "engine": engine,
        "bits": min((layer["bits"] for layer in manifest.layers if layer["bits"]), default=None),
        "data": test.name, "part": "odd" if options.odd_images else None, "n": n, "accuracy": scores.accuracy,
        "sensitivity": scores.sensitivity, "specificity": scores.specificity, "auc": found.auc,
        "temperature": manifest.temperature, "raw": asdict(found.raw), "calibrated": asdict(found.calibrated),
        "checkpoint_accuracy": before, "classified_differently": found.differing if options.against else None,
        "classes": classes, "confusion": scores.confusion.tolist(),
        "peak_memory_bytes": peak_memory_bytes(), "environment": where,
    }  # fmt: skip
    if record.deliver(options, result):
        return
    print(f"{options.model}  {classifier.manifest.precision} on {engine}, {n:,} images of {test.name}")
    print(f"accuracy     {scores.accuracy:6.2f} %" + (f"   (checkpoint {before:.2f} %)" if before else ""))
    if options.against:
        print(f"differently  {found.differing:6,}     images of {n:,}, from {options.against}")
    if len(classes) == 2:
        of_class = f"of {command.printable(classes[1])}"
        negative, positive = (100 * row[i] / max(row.sum(), 1) for i, row in enumerate(scores.confusion))
        print(f"sensitivity  {positive:6.2f} %   {of_class}")
        print(f"specificity  {negative:6.2f} %   {of_class}")
    else:
        print(f"sensitivity  {scores.sensitivity:6.2f} %   macro, one against the rest")
        print(f"specificity  {scores.specificity:6.2f} %")
    if found.auc is not None:
        print(f"ROC AUC      {found.auc:8.4f}")
    print(f"confidence   {found.raw}")
    if manifest.temperature != 1:
        print(f"calibrated   {found.calibrated}   at temperature {manifest.temperature:.3f}")
    print(_table(scores.confusion, classes))
    print(describe(where))


def _table(confusion: np.ndarray, classes: tuple[str, ...]) -> str:
    width = max(5, len(str(confusion.max())) + 1)
    classes = tuple(map(command.printable, classes))
    names = max(len(name) for name in classes)
    head = " " * (names + 2) + "".join(f"{name[: width - 1]:>{width}}" for name in classes)
    rows = [
        f"  {name:{names}}" + "".join(f"{count or '.':>{width}}" for count in row)
        for name, row in zip(classes, confusion, strict=True)
    ]
    return "\n".join(["confusion    row: true class, column: predicted", head, *rows])


if __name__ == "__main__":
    command.run(main)
