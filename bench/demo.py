"""`make demo`: the whole way on handwritten digits, from training to the device, in about a minute.

Trains the two-layer network twice, in float and with 8-bit PACT and saliency guidance, exports both, classifies
the test images through `runtime.Classifier`, and shows them side by side.
"""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module: python -m bench.demo")

import functools
import io
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from bench.accuracy import confusion_matrix, score
from bench.measure import data
from bench.measure.statistics import measure, summarize
from export.onnx import main as export_main
from runtime import command
from runtime.classifier import Classifier, Prediction
from runtime.files import write_atomically
from runtime.manifest import INPUT_NAME
from train.__main__ import main as train_main


def main(argv: Sequence[str] | None = None) -> None:
    """Run the demo into a folder."""
    parser = command.parser(
        "bench.demo", "Train, export, classify and measure on digits.", "  python -m bench.demo"
    )
    parser.add_argument("-o", "--output", default="demo", help="folder for models and pictures (default: demo)")
    parser.add_argument("--epochs", type=int, default=30, help="of each training (default: 30)")
    options = parser.parse_args(argv)
    folder = Path(options.output)

    models = {}
    for name, method, bits, precision in (("float", "plain", "32", "--fp32"), ("int8", "sgt", "8", "--int8")):
        print(f"\n== {name}: train and export")
        train_main(["--data", "digits", "--arch", "cnn2", "--method", method, "--bits", bits, "--name", name,
                    "--epochs", str(options.epochs), "--runs", str(folder), "--overwrite"])  # fmt: skip
        models[name] = folder / f"digits_{name}.onnx"
        export_main([str(folder / name / "ckpt.pt"), precision, "-o", str(models[name])])

    print("\n== classify the test images with runtime.Classifier, one thread")
    test = data.load("digits")
    classifiers = {name: Classifier(path, threads=1) for name, path in models.items()}
    frame = test.images[:1]
    samples = measure(
        {n: functools.partial(c.session.run, {INPUT_NAME: frame}) for n, c in classifiers.items()}, seconds=2.0
    )
    print(f"{'':10}{'accuracy %':>12}{'p50 ms':>10}{'p99 ms':>10}{'file bytes':>12}")
    predicted = {}
    for name, classifier in classifiers.items():
        predicted[name] = classifier.predict(list(test.images))
        classes = np.array([p.index for p in predicted[name]])
        scores = score(confusion_matrix(test.labels, classes, len(classifier.manifest.classes)))
        row = summarize(samples[name], 1)
        print(f"{name:10}{scores.accuracy:12.2f}{row.p50_ms:10.4f}{row.p99_ms:10.4f}"
              f"{models[name].stat().st_size:12,}")  # fmt: skip
        classifier.close()
    differing = sum(a.index != b.index for a, b in zip(predicted["float"], predicted["int8"], strict=True))
    print(f"{differing} of {len(test.labels)} test images classified differently by the two networks")

    draw_samples(test, predicted["int8"], folder / "samples.png")
    for picture in ("alpha.png", "curves.png"):
        shutil.copyfile(folder / "int8" / picture, folder / picture)
    print(f"\npictures: {', '.join(str(folder / p) for p in ('samples.png', 'alpha.png', 'curves.png'))}")
    print(f"next:     python -m runtime.classify {models['int8']} PHOTO.png")


def draw_samples(test: data.LabelledImages, predictions: list[Prediction], path: Path) -> None:
    """Draw test images with their predictions into a PNG file, the wrong ones first."""
    wrong = [i for i, p in enumerate(predictions) if p.index != test.labels[i]]
    right = [i for i in range(len(predictions)) if i not in set(wrong)]
    chosen = (wrong[:8] + right)[:32]
    figure = Figure(figsize=(10, 6), layout="constrained")
    for axes, index in zip(figure.subplots(4, 8).flat, chosen, strict=False):
        prediction = predictions[index]
        correct = prediction.index == test.labels[index]
        axes.imshow(test.images[index, :, :, 0], cmap="gray")
        title = f"{prediction.label}  {prediction.probability:.0%}"
        axes.set_title(title if correct else f"{title}, is {test.labels[index]}", fontsize=9,
                       color="black" if correct else "crimson")  # fmt: skip
        axes.set_axis_off()
    figure.suptitle(
        f"INT8 network on the test images: {len(wrong)} of {len(predictions)} wrong (red, shown first)"
    )
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    write_atomically(path, picture.getvalue())


if __name__ == "__main__":
    command.run(main)
